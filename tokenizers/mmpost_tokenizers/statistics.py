"""Features of reference images: computed once and kept on disk under a hash of everything they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.batches import evaluation_batches
from mmpost_tokenizers.features import FeatureExtractor, extract, on_device
from mmpost_tokenizers.frechet import Moments, noise_floor
from mmpost_tokenizers.images import ImageSet, to_uint8

logger = logging.getLogger(__name__)

# Part of every key: results of an older layout are not read.
_LAYOUT = "mmpost-reference-1"
_FLOOR_SEED = 0


@dataclass(frozen=True, slots=True)
class Reference:
    """What a set of real images gives an evaluation.

    Attributes:
        features: float32 ``[N, D]``, in the order of the set.
        moments: Of all features, float64.
        noise_floor: Distance between random halves; see ``frechet.noise_floor``. NaN below four images.
        data: Fingerprint of the images.
        cached: Read from disk instead of computed.
    """

    features: Tensor
    moments: Moments
    noise_floor: float
    data: str
    cached: bool


def reference_of(
    images: ImageSet,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 64,
    workers: int = 0,
    cache: Path | None = None,
    device: torch.device | None = None,
) -> Reference:
    """Features of all images.

    Args:
        images: Without random crops or flips.
        extractor: What makes features.
        batch_size: Images per pass.
        workers: See ``ImageBatches``.
        cache: Folder of kept features; None computes every time. The key is the hash of contents and cutting of the
            images, and of the extractor's weights.
        device: Where the extractor runs; the CPU by default.

    Raises:
        MmpostError: MMP-V076 for images that are cut at random, MMP-V070 for fewer than two.
    """
    refuse_random(images)
    data = images.fingerprint
    words = {"layout": _LAYOUT, "data": data, "extractor": extractor.name, "sha256": extractor.sha256}
    digest = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
    path = None if cache is None else cache / f"{digest}.safetensors"
    if path is not None and path.is_file():
        kept = _read(path, data)
        if kept is not None:
            return kept
    place = device or torch.device("cpu")
    extractor = on_device(extractor, place)
    batches = evaluation_batches(images, batch_size=batch_size, workers=workers)
    features = extract(extractor, (to_uint8(pictures).to(place) for pictures, _, _ in batches))
    moments = Moments.empty(features.shape[1])
    moments.update(features)
    floor = noise_floor(features, seed=_FLOOR_SEED) if len(features) >= 4 else float("nan")
    if path is not None:
        _write(path, features, moments, floor)
    return Reference(features, moments, floor, data, cached=False)


def refuse_random(images: ImageSet) -> None:
    """Refuse images that a second look would show otherwise.

    Raises:
        MmpostError: MMP-V076.
    """
    if images.is_random:
        raise MmpostError(
            "MMP-V076",
            "images with random crops or flips cannot be evaluated: every look would show other pixels.",
            "Open them with crop=center and flip=False",
        )


def _read(path: Path, data: str) -> Reference | None:
    """What a file holds; None, with a remark in the log, when it is damaged and is to be computed again."""
    try:
        with safe_open(path, "pt") as file:
            values = {name: file.get_tensor(name) for name in ("features", "mean", "scatter", "noise_floor")}
    except (SafetensorError, OSError) as error:
        logger.warning("kept reference features %s are damaged (%s) and are computed again", path, error)
        return None
    moments = Moments(len(values["features"]), values["mean"], values["scatter"])
    return Reference(values["features"], moments, float(values["noise_floor"]), data, cached=True)


def _write(path: Path, features: Tensor, moments: Moments, floor: float) -> None:
    """Written beside its place and then moved there: another process sees all of the file or nothing."""
    tensors = {
        "features": features.contiguous(),
        "mean": moments.mean,
        "scatter": moments.scatter.contiguous(),
        "noise_floor": torch.tensor(floor, dtype=torch.float64),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, scratch)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
