"""Training and pFD evaluation of a tokenizer here and in the most direct plain loop, alternating in one run.

    python -m benchmarks.tokenizer_throughput --rounds 5 --out benchmarks/out/tokenizer.jsonl

Both sides have the same weights, batches and losses. The plain training loop has no running means, no health, no log
and no checkpoints; the plain evaluation encodes and decodes every image anew for each of the fifteen settings.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mmpost.config.load import load
from mmpost.train.distributed import Processes
from mmpost_tokenizers import opening
from mmpost_tokenizers.batches import ImageBatches
from mmpost_tokenizers.features import FeatureExtractor
from mmpost_tokenizers.frechet import Moments, frechet_distance
from mmpost_tokenizers.images import Cutting, ImageSet, from_uint8, images_from_arrays, to_uint8
from mmpost_tokenizers.options import TokenizerConfig
from mmpost_tokenizers.perturbation import LatentPerturbation, scaled_delta
from mmpost_tokenizers.pfid import ALPHAS, deltas_for, pfid
from mmpost_tokenizers.toy_features import RandomConvFeatures
from mmpost_tokenizers.training import TokenizerTrainer


def pictures(count: int, size: int) -> ImageSet:
    """Smooth random pictures: what they show does not matter for time."""
    small = np.random.default_rng(0).integers(0, 256, (count, size // 4, size // 4), dtype=np.uint8)
    large = small.repeat(4, 1).repeat(4, 2)
    return images_from_arrays(large, [n % 10 for n in range(count)], cutting=Cutting(size))


def ours(config: TokenizerConfig, images: ImageSet) -> tuple[Callable[[int], None], TokenizerTrainer]:
    """Function that trains so many steps, and its trainer."""
    fed = images if config.data.workers else opening.resident(images)
    batches = ImageBatches(fed, batch_size=config.train.batch_size, seed=0, workers=config.data.workers)
    tokenizer = opening.new_tokenizer(config.tokenizer, seed=0)
    trainer = TokenizerTrainer(
        tokenizer, batches, config, processes=Processes(strategy="ddp"), output=Path(tempfile.mkdtemp())
    )

    def train(steps: int) -> None:
        trainer.total = trainer.state.step + steps
        trainer.run()

    return train, trainer


def plain(config: TokenizerConfig, images: ImageSet) -> Callable[[int], None]:
    """The same training, written in the most direct way."""
    tokenizer = opening.new_tokenizer(config.tokenizer, seed=0).to(opening.device()).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=config.train.learning_rate, weight_decay=0.0)
    pixels, _ = images.stacked()
    draw = torch.Generator().manual_seed(0)
    section = config.tokenizer.perturb
    perturb = LatentPerturbation(section.alpha, section.beta, scaled_delta(tokenizer.codebook_size))

    def train(steps: int) -> None:
        for _ in range(steps):
            rows = torch.randint(len(pixels), (config.train.batch_size,), generator=draw)
            batch = from_uint8(pixels[rows]).to(opening.device())
            z = tokenizer.encode(batch)
            clean = tokenizer.quantize(z)
            moved = perturb(tokenizer, clean.indices, z=z, generator=draw)
            output = tokenizer.decode(tokenizer.quantizer.straight_through(clean, moved.indices))
            loss = functional.mse_loss(output, batch) + sum(clean.losses.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train


@torch.no_grad()
def plain_pfd(tokenizer: Any, images: ImageSet, extractor: FeatureExtractor) -> float:
    """Fifteen independent evaluations, each of which encodes all images again."""
    pixels, _ = images.stacked()
    real = Moments.empty(extractor.dim)
    for part in pixels.split(64):
        real.update(extractor(part))
    values = []
    for delta in deltas_for(tokenizer.codebook_size):
        for alpha in ALPHAS:
            made, draw = Moments.empty(extractor.dim), torch.Generator().manual_seed(0)
            for part in pixels.split(64):
                output = tokenizer.reconstruct(from_uint8(part), LatentPerturbation(alpha, 1.0, delta), draw)
                made.update(extractor(to_uint8(output)))
            values.append(frechet_distance(made, real))
    return float(np.mean(values))


def timed(work: Callable[[], Any]) -> float:
    """Seconds: wall time on a GPU, time of this process on a CPU, which others may share."""
    now = time.perf_counter if torch.cuda.is_available() else time.process_time
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    clock = now()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return now() - clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tokenizers/demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/tokenizer_throughput.jsonl"))
    parser.add_argument("overrides", nargs="*", help="key=value")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    config = load(TokenizerConfig, [words.config], words.overrides).config
    images = pictures(words.images, config.tokenizer.image_size)
    train, trainer = ours(config, images)
    direct = plain(config, images)
    extractor = RandomConvFeatures()
    train(2)
    direct(2)
    words.out.parent.mkdir(parents=True, exist_ok=True)
    with words.out.open("a", encoding="utf-8") as file:
        for number in range(words.rounds):
            before = copy.copy(trainer.state)
            seconds = {
                "ours": timed(functools.partial(train, words.steps)),
                "plain": timed(functools.partial(direct, words.steps)),
            }
            waited, spent = trainer.state.waited - before.waited, trainer.state.seconds - before.seconds
            seen = words.steps * config.train.batch_size
            tokenizer = trainer.mean.model
            scores = {
                "ours": timed(functools.partial(pfid, tokenizer, images, extractor)),
                "plain": timed(functools.partial(plain_pfd, tokenizer, images, extractor)),
            }
            record = {
                "round": number,
                "config": words.config,
                "overrides": words.overrides,
                "device": str(opening.device()),
                "threads": words.threads,
                "train_images_per_s": {name: seen / value for name, value in seconds.items()},
                "train_ratio": seconds["plain"] / seconds["ours"],
                "wait_share": waited / max(spent, 1e-9),
                "pfd_s": scores,
                "pfd_ratio": scores["plain"] / scores["ours"],
                "images": len(images),
            }
            file.write(json.dumps(record) + "\n")
            print(json.dumps(record))


if __name__ == "__main__":
    main()
