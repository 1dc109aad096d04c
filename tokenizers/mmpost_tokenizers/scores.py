"""Scores of pairs of images, and of how codes are used.

Image scores compare what would be written to a file: uint8, see ``images.to_uint8``. Each gives one number per image.
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.features import FeatureExtractor, LayeredExtractor
from mmpost_tokenizers.health import count, entropies, health_of, merged
from mmpost_tokenizers.losses import LPIPSLoss

# Equal images have no finite PSNR; they count as this many dB.
LOSSLESS_DB = 100.0
# SSIM's window of 11 pixels must fit.
SSIM_MIN_SIDE = 11
# Published counts of usage: LlamaGen's queue; XQ-GAN's moving mean, its early steps, and its share of a fair hit count.
LLAMAGEN_QUEUE = 65_536
XQGAN_EARLY_STEPS, XQGAN_EARLY, XQGAN_LATE, XQGAN_SHARE = 100, 0.9, 0.99, 0.08


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB ``[B]`` of uint8 ``[B, 3, H, W]``; at most 100."""
    error = (images.double() - target.double()).square().mean((1, 2, 3))
    return (10 * torch.log10(255**2 / error)).clamp(max=LOSSLESS_DB)


def psnr_of_mean_colour(target: Tensor) -> Tensor:
    """PSNR ``[B]`` of an image of one colour, the target's mean: what a tokenizer has to beat."""
    flat = target.double().mean((2, 3), keepdim=True).round().expand_as(target)
    return psnr(flat, target)


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Structural similarity ``[B]`` of uint8 ``[B, 3, H, W]`` with sides of at least 11; Gaussian window."""
    made: Any = structural_similarity_index_measure(images.float(), target.float(), data_range=255.0, reduction="none")
    return made.reshape(len(images))


def deep_feature_distance(extractor: LayeredExtractor, images: Tensor, target: Tensor) -> Tensor:
    """Squared distance ``[B]`` of feature maps, channels of unit length, mean over positions, summed over layers.

    It has LPIPS' form without its learned weights, and is reported as ``dfd[<extractor>]``.
    """
    total = torch.zeros(len(images), dtype=torch.float64)
    for here, there in zip(extractor.layers(images), extractor.layers(target), strict=True):
        difference = F.normalize(here, dim=1, eps=1e-6) - F.normalize(there, dim=1, eps=1e-6)
        total += difference.square().sum(1).mean((1, 2)).double().cpu()
    return total


class Perceptual:
    """A perceptual distance with the name that it deserves.

    Attributes:
        key: ``lpips`` only with the published VGG16 trunk, recognised by its hash; else ``dfd[<name>]``.
        sha256: Of the weights.
    """

    def __init__(self, source: LayeredExtractor | str | Path) -> None:
        """Open a distance.

        Args:
            source: An extractor with layers, or the file of a VGG16 trunk for LPIPS.

        Raises:
            MmpostError: MMP-C112 without that file.
        """
        self._lpips: LPIPSLoss | None = None
        self._layers: LayeredExtractor | None = None
        if isinstance(source, str | Path):
            self._lpips = LPIPSLoss(source)
            self.sha256 = self._lpips.sha256
            self.key = "lpips" if self._lpips.name == "lpips" else f"dfd[vgg16-layout-{self.sha256[:8]}]"
        else:
            self._layers = source
            self.sha256 = str(getattr(source, "sha256", ""))
            self.key = f"dfd[{source.name}]"

    @torch.no_grad()
    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        """Distance ``[B]`` of uint8 ``[B, 3, H, W]``."""
        if self._lpips is not None:
            net = self._lpips.net.to(images.device)
            return net(images.float() / 127.5 - 1, target.float() / 127.5 - 1).reshape(-1).double().cpu()
        assert self._layers is not None
        return deep_feature_distance(self._layers, images, target)


def perceptual_distance(which: str, extractor: FeatureExtractor) -> Perceptual | None:
    """The perceptual distance of an evaluation; its key in the results says what it is.

    Args:
        which: ``none``; ``features``: layers of the network that scores, ``dfd[NAME]``; ``auto``: those where it has
            layers, else none; or the file of a VGG16 trunk: ``lpips`` with the published one, recognised by its hash,
            and with any other ``dfd[vgg16-layout-...]``.
        extractor: What scores.

    Raises:
        MmpostError: MMP-C112 for a file that is not there, MMP-C117 for ``features`` of a network without layers.
    """
    if which == "none" or (which == "auto" and not isinstance(extractor, LayeredExtractor)):
        return None
    if which not in ("auto", "features"):
        if not Path(which).is_file():
            what = f"--perceptual {which}: there is no such file."
            raise MmpostError("MMP-C112", what, "Give the file vgg16-397923af.pth, features or none.")
        return Perceptual(which)
    if not isinstance(extractor, LayeredExtractor):
        what = f"--perceptual features: {extractor.name} shows no layers to compare."
        raise MmpostError("MMP-C117", what, "Give --perceptual none, or the file vgg16-397923af.pth for LPIPS.")
    return Perceptual(extractor)


class UsageMeter:
    """Counts codes over an evaluation set and reports the three published definitions of usage by name.

    They are not comparable with each other: a small codebook fills LlamaGen's queue, and XQ-GAN asks for 8 % of a fair
    share of the hits instead of one hit.
    """

    def __init__(self, codebook_size: int, groups: int = 1) -> None:
        self.codebook_size, self.groups = codebook_size, groups
        self.counts = count(torch.zeros(0, groups, dtype=torch.int64), codebook_size, groups)
        self._queue: deque[Tensor] = deque()
        self._queued = 0
        self._mean = self.counts.double()
        self._steps = 0

    def update(self, indices: Tensor) -> None:
        """Count the indices of one batch, ``[B, *grid]`` or ``[B, *grid, groups]``."""
        rows = indices.detach().cpu().reshape(-1, self.groups)
        hits = count(rows, self.codebook_size, self.groups)
        self.counts = merged([self.counts, hits])
        self._queue.append(rows)
        self._queued += len(rows)
        while self._queued - len(self._queue[0]) >= LLAMAGEN_QUEUE:
            self._queued -= len(self._queue.popleft())
        share = hits.double() / len(rows)
        keep = 0.0 if self._steps == 0 else XQGAN_EARLY if self._steps < XQGAN_EARLY_STEPS else XQGAN_LATE
        self._mean = merged([keep * self._mean, (1 - keep) * share])
        self._steps += 1

    def result(self) -> dict[str, float]:
        """Usage and entropy, mean over groups.

        Returns:
            ``usage``: share of codes that occur in the whole set. ``usage_llamagen``: among the last 65,536 indices
            (without the zeros that the released queue starts with). ``usage_xqgan``: codes whose moving mean of hits is
            at least 8 % of the uniform expectation. ``perplexity``: exp of the entropy. ``entropy_bits``: the entropy.
            ``tokens``: indices counted per group.
        """
        health = health_of(self.counts)
        often = self._mean.coalesce().values() if self._mean.is_sparse else self._mean
        recent = torch.cat(list(self._queue))[-LLAMAGEN_QUEUE:] if self._queue else torch.zeros(0, self.groups)
        distinct = [len(recent[:, group].unique()) / self.codebook_size for group in range(self.groups)]
        fair = XQGAN_SHARE / self.codebook_size
        return {
            "usage": health.usage,
            "usage_llamagen": sum(distinct) / self.groups,
            "usage_xqgan": int((often >= fair).sum()) / (self.groups * self.codebook_size),
            "perplexity": health.perplexity,
            "entropy_bits": float(entropies(self.counts).mean() / math.log(2)),
            "tokens": float(health.tokens),
        }
