"""What ``mmpost tokenizer bridge-sample`` does: images from a trained model of bridge tokens, and their scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mmpost.core import seeding
from mmpost.core.errors import MmpostError
from mmpost_tokenizers import opening
from mmpost_tokenizers.bridge.masked import MaskedGenerator
from mmpost_tokenizers.bridge.raster import RasterGenerator
from mmpost_tokenizers.bridge.running import open_bridge
from mmpost_tokenizers.bridge.spatial import SpatialGenerator, kind_of
from mmpost_tokenizers.bridge.vae import QuantizedVAETokenizer
from mmpost_tokenizers.features import FeatureExtractor, extract, on_device
from mmpost_tokenizers.generator.identity import layout_of
from mmpost_tokenizers.generator.pretokenize import CODES_FILE, Codes
from mmpost_tokenizers.images import to_uint8
from mmpost_tokenizers.set_scores import generation_scores
from mmpost_tokenizers.statistics import Reference

GENERATORS: dict[str, type[SpatialGenerator]] = {"masked": MaskedGenerator, "raster": RasterGenerator}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BridgeSampling:
    """How index maps are drawn; see ``SpatialGenerator.generate``.

    Attributes:
        steps: Passes of the spatial model; None for the most that make sense.
        guidance: Weight of classifier-free guidance; 1 is none.
        schedule: ``linear`` or ``constant``.
        temperature: Of each channel.
        seed: Of the draws.
        batch_size: Images per pass.
    """

    steps: int | None = None
    guidance: float = 1.0
    schedule: str = "linear"
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 64


def open_model(run: str | Path) -> SpatialGenerator:
    """The model of a run folder or checkpoint, on the device.

    Raises:
        MmpostError: MMP-E082 for a folder that holds none, and as ``from_pretrained``.
    """
    folder = Path(run) / "final" if (Path(run) / "final").is_dir() else Path(run)
    kind = kind_of(folder)
    if kind not in GENERATORS:
        what = f"'{folder}' is not a TokenBridge generator: its kind is {kind}."
        raise MmpostError("MMP-E082", what, "Name a folder that its trainer wrote.")
    return GENERATORS[kind].from_pretrained(folder).to(opening.device())


def sampled(
    model: SpatialGenerator,
    tokenizer: QuantizedVAETokenizer,
    labels: Tensor,
    sampling: BridgeSampling,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Index maps int64 ``[B, H, W, C]`` on the CPU, batch by batch; a batch's draws depend on seed and its place.

    Raises:
        MmpostError: MMP-C102 when the model was trained on the indices of another tokenizer, MMP-C096 for ``steps``.
    """
    own = layout_of(tokenizer).tokenizer_sha256
    if model.tokenizer_sha256 and model.tokenizer_sha256 != own:
        what = (
            f"the model was trained on codes of another bridge: tokenizer hash {model.tokenizer_sha256[:12]} against "
            f"{own[:12]}."
        )
        raise MmpostError("MMP-C102", what, "Give the bridge folder that bridge-train was given.")
    device, done = next(model.parameters()).device, 0
    for number, part in enumerate(labels.split(sampling.batch_size)):
        word = int(seeding.generator(sampling.seed, "bridge-sample", number).integers(2**62))
        yield (
            model.eval()
            .generate(
                part.to(device),
                steps=sampling.steps,
                guidance=sampling.guidance,
                schedule=sampling.schedule,
                temperature=sampling.temperature,
                generator=torch.Generator(device).manual_seed(word),
            )
            .cpu()
        )
        done += len(part)
        if progress is not None:
            progress(done, len(labels))


def sample_images(
    run: str | Path,
    bridge: str | Path,
    out: Path,
    *,
    classes: list[int] | None,
    per_class: int,
    sampling: BridgeSampling,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the codes of samples, ``codes.safetensors``, which ``mmpost tokenizer decode`` opens; returns the file.

    Raises:
        MmpostError: MMP-C117 for a class that the model does not have, and as ``sampled``.
    """
    model, tokenizer = open_model(run), open_bridge(bridge)
    known = model.backbone.config.classes
    chosen = list(range(known)) if classes is None else classes
    if strange := [label for label in chosen if not 0 <= label < known]:
        raise MmpostError(
            "MMP-C117", f"--classes {','.join(map(str, strange))}: the model has 0..{known - 1}.", "Correct --classes."
        )
    labels = torch.tensor(chosen).repeat_interleave(per_class)
    indices = torch.cat(list(sampled(model, tokenizer, labels, sampling, progress)))
    layout = layout_of(tokenizer)
    keys = [f"{label}-{number % per_class}" for number, label in enumerate(labels.tolist())]
    out.mkdir(parents=True, exist_ok=True)
    codes = indices.reshape(len(indices), 1, *layout.shape).to(torch.int32)
    Codes(layout, codes, labels, keys).save(out / CODES_FILE)
    return out / CODES_FILE


def score_samples(
    run: str | Path,
    bridge: str | Path,
    reference: Reference,
    extractor: FeatureExtractor,
    *,
    samples: int,
    sampling: BridgeSampling,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores of freshly drawn images, every class equally often, as ``set_scores.generation_scores``.

    Raises:
        MmpostError: As ``sampled``; MMP-V070 for too few images.
    """
    model, tokenizer = open_model(run), open_bridge(bridge)
    device = next(tokenizer.parameters()).device
    scored = on_device(extractor, device)
    labels = torch.arange(samples) % model.backbone.config.classes
    drawn = sampled(model, tokenizer, labels, sampling, progress)
    features = extract(scored, (to_uint8(tokenizer.detokenize(part.to(device))) for part in drawn))
    logits = cast(Any, extractor).logits(features) if extractor.is_inception else None
    results: dict[str, Any] = generation_scores(
        reference.features, features, extractor, fake_logits=logits, seed=sampling.seed
    )
    return {**results, "noise_floor": reference.noise_floor, "sampling": dataclasses.asdict(sampling)}
