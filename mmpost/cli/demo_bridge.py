"""The TokenBridge stage of ``mmpost tokenizer demo``: a small KL-VAE, its levels, and two heads on its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

    from mmpost_tokenizers.bridge.head import Head

LEVELS = (4, 8, 16, 32, 64)
VAE_STEPS, VAE_BATCH, KL_WEIGHT = 400, 32, 2e-3
HEAD_STEPS, HEAD_BATCH, HEAD_LEVELS = 300, 64, 16


def bridge_stage(
    base: Path, train: Tensor, held_out: Tensor, labels: tuple[Tensor, Tensor], seed: int, share: float = 1.0
) -> dict[str, Any]:
    """Train the VAE, quantize it at every number of levels, and compare the heads; found done where it is.

    Args:
        base: Folder; ``vae``, ``bridge`` and ``bridge.json`` in it are written.
        train: Images ``[N, 3, S, S]`` in [-1, 1].
        held_out: Others.
        labels: Their classes.
        seed: Of everything random.
        share: Of the usual number of steps, for a trial.

    Returns:
        ``levels`` and ``error`` at 64 levels on held-out images, ``by_levels`` and ``heads`` (held-out nats per
        dimension).
    """
    done = base / "bridge.json"
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    from mmpost_tokenizers.bridge.vae import QuantizedVAETokenizer
    from mmpost_tokenizers.bridging import quantizing_error

    if not (base / "vae" / "config.json").is_file():
        train_vae(train, seed, max(2, round(share * VAE_STEPS))).save_pretrained(base / "vae")
    by_levels = {}
    for levels in LEVELS:
        # Few levels saturate more than a careful user would accept; here that is part of what is shown.
        tokenizer = QuantizedVAETokenizer.from_vae(
            base / "vae", image_size=train.shape[-1], levels=levels, max_saturation=None
        )
        tokenizer.fit(train.split(VAE_BATCH))
        by_levels[levels] = quantizing_error(tokenizer, list(held_out.split(VAE_BATCH)))
    tokenizer.save_pretrained(base / "bridge")
    result = {
        "levels": LEVELS[-1],
        "error": by_levels[LEVELS[-1]]["error"],
        "by_levels": by_levels,
        "heads": compare_heads(base / "vae", train, held_out, labels, seed, max(2, round(share * HEAD_STEPS))),
    }
    done.write_text(json.dumps(result, indent=1) + "\n")
    stored: dict[str, Any] = json.loads(done.read_text())
    return stored


def train_vae(images: Tensor, seed: int, steps: int = VAE_STEPS) -> AutoencoderKL:
    """A KL-VAE of 4 x 4 latents with 8 channels for images of 16 pixels."""
    import torch
    from diffusers import AutoencoderKL

    from mmpost.core import seeding

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 32),
            layers_per_block=1,
            latent_channels=8,
            norm_num_groups=4,
            sample_size=images.shape[-1],
            mid_block_add_attention=False,
        )
        optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for step in range(steps):
            rows = seeding.generator(seed, "demo vae", step).integers(len(images), size=VAE_BATCH)
            batch = images[torch.from_numpy(rows)]
            posterior = vae.encode(batch).latent_dist
            output = vae.decode(posterior.sample()).sample
            divergence = posterior.kl().mean() / posterior.mean[0].numel()
            loss = torch.nn.functional.mse_loss(output, batch) + KL_WEIGHT * divergence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        sample = vae.eval().encode(images[:512]).latent_dist.mode()
    # What published VAEs have: the factor that gives latents a standard deviation of one.
    vae.register_to_config(scaling_factor=float(1 / sample.std()))
    return vae


def compare_heads(
    vae: Path, train: Tensor, held_out: Tensor, labels: tuple[Tensor, Tensor], seed: int, steps: int = HEAD_STEPS
) -> dict[str, float]:
    """Held-out nats per dimension of the autoregressive and the independent head, same size, same conditioning.

    The conditioning is the class, the place and the de-quantized tokens to the left, above and above left.
    """
    import torch

    from mmpost_tokenizers.bridge.head import DimensionHead, HeadConfig, ParallelHead
    from mmpost_tokenizers.bridge.vae import QuantizedVAETokenizer

    tokenizer = QuantizedVAETokenizer.from_vae(vae, image_size=train.shape[-1], levels=HEAD_LEVELS, max_saturation=None)
    tokenizer.fit(train.split(VAE_BATCH))
    sides = [_rows(tokenizer, images, label) for images, label in zip((train, held_out), labels, strict=True)]
    config = HeadConfig(
        channels=tokenizer.groups,
        levels=HEAD_LEVELS,
        z_dim=sides[0][0].shape[1],
        width=64,
        depth=2,
        heads=4,
        dropout=0.0,
    )
    nats = {}
    for name, kind in (("autoregressive", DimensionHead), ("independent", ParallelHead)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = kind(config)
        _train_head(head, *sides[0], seed, steps)
        with torch.no_grad():
            z, indices = sides[1]
            parts = zip(z.split(1024), indices.split(1024), strict=True)
            total = sum(float(head.eval().log_probs(*part).double().sum()) for part in parts)
        nats[name] = -total / indices.numel()
    return nats


def _rows(tokenizer: Any, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Conditioning ``[N * H * W, z]`` and indices ``[N * H * W, C]``."""
    import torch
    from torch.nn import functional

    indices = torch.cat([tokenizer.tokenize(part) for part in images.split(VAE_BATCH)])
    latents = functional.pad(tokenizer.lookup(indices), (0, 0, 1, 0, 1, 0))
    count, height, width, _ = indices.shape
    near = torch.cat([latents[:, 1:, :-1], latents[:, :-1, 1:], latents[:, :-1, :-1]], -1)
    place = torch.eye(height * width).view(1, height, width, -1).expand(count, -1, -1, -1)
    known = functional.one_hot(labels, 10).float().view(count, 1, 1, -1).expand(-1, height, width, -1)
    return torch.cat([near, place, known], -1).flatten(0, 2), indices.flatten(0, 2)


def _train_head(head: Head, z: Tensor, indices: Tensor, seed: int, steps: int) -> None:
    import torch

    from mmpost.core import seeding

    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.from_numpy(seeding.generator(seed, "demo head", step).integers(len(z), size=HEAD_BATCH * 4))
        loss = -head.log_probs(z[rows], indices[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
