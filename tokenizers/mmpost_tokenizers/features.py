"""What a feature extractor is, and which names its scores may carry.

The honesty rule lives here and nowhere else: a distance is called FID only when its features come from the standard
Inception-v3 weights; with any other extractor it is a Fréchet distance, ``fd``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mmpost.core.errors import MmpostError

WEIGHTS_VARIABLE = "MMPOST_FEATURE_WEIGHTS"


@runtime_checkable
class FeatureExtractor(Protocol):
    """Anything that turns pictures into vectors.

    Attributes:
        name: Stands in ``fd[<name>]`` and next to every score.
        dim: Numbers per picture.
        is_inception: The standard Inception-v3 weights of FID, recognised by their hash.
        sha256: Of the weights, 64 hexadecimal digits.
    """

    name: str
    dim: int
    is_inception: bool
    sha256: str

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``[B, dim]`` of uint8 ``[B, 3, H, W]``."""
        ...


@runtime_checkable
class LayeredExtractor(Protocol):
    """An extractor whose feature maps can be compared position by position."""

    name: str

    def layers(self, images: Tensor) -> list[Tensor]:
        """Feature maps ``[B, C, h, w]`` of uint8 ``[B, 3, H, W]``, early layers first."""
        ...


def key_for(prefix: str, extractor: FeatureExtractor) -> str:
    """Key of a Fréchet distance: ``"r"`` gives ``rfid`` or ``rfd``, ``"p"`` ``pfid`` or ``pfd``, and so on."""
    return f"{prefix}fid" if extractor.is_inception else f"{prefix}fd"


def title_for(prefix: str, extractor: FeatureExtractor) -> str:
    """The same for people: ``rFID``, or ``rFD[digits-cnn32-seed0]``."""
    return f"{prefix}FID" if extractor.is_inception else f"{prefix}FD[{extractor.name}]"


def describe(extractor: FeatureExtractor) -> dict[str, Any]:
    """Name, hash, size and, where the extractor knows them, accuracy and training data; ready for JSON."""
    known = {"name": extractor.name, "sha256": extractor.sha256, "dim": extractor.dim}
    more = getattr(extractor, "facts", None)
    return {**known, "is_inception": extractor.is_inception, **(more if isinstance(more, Mapping) else {})}


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes, whatever file they come from."""
    total = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def on_device(extractor: FeatureExtractor, device: torch.device) -> FeatureExtractor:
    """The extractor with its weights on ``device``, in evaluation mode."""
    if isinstance(extractor, nn.Module):
        extractor.to(device).eval()
    return extractor


@torch.no_grad()
def extract(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> Tensor:
    """Features float32 ``[N, dim]`` on the CPU of batches of uint8 ``[B, 3, H, W]``.

    Raises:
        MmpostError: MMP-V072 without any image.
    """
    rows = [extractor(batch).float().cpu() for batch in batches]
    if not rows:
        raise MmpostError("MMP-V072", "there are no images to evaluate on.", "Give at least two images")
    return torch.cat(rows)


def open_extractor(which: str = "auto") -> FeatureExtractor:
    """The extractor that a name or file stands for.

    Args:
        which: ``auto`` for the file that the environment variable ``MMPOST_FEATURE_WEIGHTS`` names; a ``.pth`` or
            ``.pt`` file of Inception-v3 or MobileNetV2 weights; a ``.safetensors`` file written by
            ``ClassifierFeatures.save``; or ``random-conv``, which is good for smoke tests only.

    Raises:
        MmpostError: MMP-V073 when ``auto`` finds no file, MMP-V074 for a file that is none of these.
    """
    from mmpost_tokenizers import inception, mobilenet, toy_features  # noqa: PLC0415  torchvision takes seconds

    if which == "random-conv":
        return toy_features.RandomConvFeatures()
    if which == "auto":
        which = os.environ.get(WEIGHTS_VARIABLE, "")
        if not which:
            raise MmpostError(
                "MMP-V073",
                f"no feature extractor: {WEIGHTS_VARIABLE} is not set.",
                "Set it to a file of the Inception weights pt_inception-2015-12-05-6726825d.pth, or name another "
                "extractor; its score is then called FD, not FID",
            )
    path = Path(which)
    if not path.is_file():
        raise unusable(path, "there is no such file")
    if path.suffix == ".safetensors":
        return toy_features.ClassifierFeatures.load(path)
    weights = read_weights(path)
    if inception.MARK in weights:
        return inception.InceptionFeatures(weights, sha256=file_digest(path))
    if mobilenet.MARK in weights:
        return mobilenet.MobileNetFeatures(weights, sha256=file_digest(path))
    raise unusable(path, "its tensors are those of neither Inception-v3 nor MobileNetV2")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a file that ``torch.save`` wrote; nothing but tensors is ever unpickled.

    Raises:
        MmpostError: MMP-V074.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever pickle, zipfile or struct raised
        raise unusable(path, f"it cannot be read: {type(error).__name__}") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise unusable(path, "it holds something else than named tensors")
    return dict(content)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unusable(path: Path, why: str) -> MmpostError:
    """The MMP-V074 of a weights file."""
    return MmpostError("MMP-V074", f"feature weights '{path}': {why}.", "Give another file")


def load_strictly(net: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Fill ``net``; counters of batch normalisation, which old files lack, may be missing.

    Raises:
        MmpostError: MMP-V074 that names missing, unknown and wrongly shaped tensors.
    """
    own = net.state_dict()
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    missing, unknown = sorted(needed - weights.keys()), sorted(weights.keys() - own.keys())
    misshaped = sorted(name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape)
    faults = {"missing": missing, "unknown": unknown, "of another shape": misshaped}
    listed = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in faults.items() if names]
    if listed:
        raise MmpostError("MMP-V074", f"{what}: tensors do not fit: {'; '.join(listed)}.", "Give another file")
    net.load_state_dict(dict(weights), strict=False)
