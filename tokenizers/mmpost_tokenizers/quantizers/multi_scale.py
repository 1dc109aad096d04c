"""Multi-scale residual quantization from coarse to fine maps, as in VAR and XQ-GAN (there ``MSVR``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.base import Quantized, Quantizer
from mmpost_tokenizers.quantizers.configs import MultiScaleConfig, VQConfig
from mmpost_tokenizers.quantizers.vq import VectorQuantizer, nearest


class Phi(nn.Conv2d):
    """``(1 - ratio) h + ratio conv3x3(h)``, which sharpens a map that was enlarged."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, input: Tensor) -> Tensor:
        """Quantize ``z`` ``[B, H, W, C]``; ``generator`` draws which images drop scales, in training mode only."""
        return (1 - self.ratio) * input + self.ratio * super().forward(input)


class MultiScaleQuantizer(Quantizer):
    """At each scale: shrink the residual by area, quantize, enlarge bicubically, pass phi, add, subtract.

    All scales share one codebook. Indices are one flat sequence ``[B, sum of side^2]``, coarse to fine, row by row.
    With ``part.l2_norm`` codes are chosen by the angle, but added with their own length, as in VAR.
    ``vq`` and ``commit`` compare the sum so far with the whole ``z``, as means over scales.

    In training mode each image drops its later scales with probability ``dropout`` and keeps a random number of them
    that is at least ``dropout_min_depth``. Indices are of all scales; ``latents`` are then not ``lookup(indices)``.

    Source: arXiv 2404.02905, algorithms 1 and 2; released ``quant.py`` of VAR and XQ-GAN.
    Differs: XQ-GAN drops in the first int(share B) images of a batch, which are none in a small batch; and it divides
    ``vq`` by the number of scales, but not ``commit``.
    """

    config: MultiScaleConfig

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__()
        self.config = config
        part = cast(VQConfig, config.part)
        self.codebook = VectorQuantizer(part)
        self.codebook_size, self.dim = part.codebook_size, part.dim
        self.phis = nn.ModuleList(Phi(part.dim, config.phi_ratio) for _ in range(config.num_phi))

    def index_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """One flat sequence; the grid must be as large as the last scale."""
        side = self.config.scales[-1]
        if grid != (side, side):
            raise MmpostError(
                "MMP-C071",
                f"quantizer 'multi_scale' ends at a {side}x{side} map, but the token grid is {list(grid)}.",
                "Let the last of quantizer.scales be the side of the grid.",
            )
        return (sum(side * side for side in self.config.scales),)

    def _phi(self, scale: int) -> Phi:
        """The convolution of scale number ``scale``: that whose tick is nearest, with the published ticks."""
        count, last = len(self.phis), max(len(self.config.scales) - 1, 1)
        margin = 1 / (3 * count) if count == 4 else 1 / (2 * count)
        ticks = np.linspace(margin, 1 - margin, count)  # numpy, for the published choice between equally near ticks
        return cast(Phi, self.phis[int(np.abs(ticks - scale / last).argmin())])

    def _enlarge(self, indices: Tensor, scale: int) -> Tensor:
        """What ``indices`` ``[B, side, side]`` of a scale add: ``[B, C, H, W]``."""
        side = self.config.scales[-1]
        maps = functional.embedding(indices, self.codebook.weight).permute(0, 3, 1, 2)
        if scale < len(self.config.scales) - 1:
            maps = functional.interpolate(maps, size=(side, side), mode="bicubic")
        added: Tensor = self._phi(scale)(maps)
        return added

    def _choose(self, residual: Tensor, side: int) -> Tensor:
        """Indices ``[B, side, side]`` of the residual ``[B, C, H, W]`` at one scale."""
        small = functional.interpolate(residual, size=(side, side), mode="area").permute(0, 2, 3, 1)
        flat = self.codebook.normalise(small.reshape(-1, self.dim))
        return nearest(flat, self.codebook.code_vectors()).view(len(residual), side, side)

    def _passes(self, maps: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices ``[B, side^2]`` and what they add, scale by scale."""
        residual = maps.detach()
        for scale, side in enumerate(self.config.scales):
            indices = self._choose(residual, side)
            added = self._enlarge(indices, scale)
            residual = residual - added.detach()
            yield indices.flatten(1), added

    def forward(self, z: Tensor, *, generator: torch.Generator | None = None) -> Quantized:
        """Quantize ``z`` ``[B, H, W, C]``; ``generator`` draws which images drop scales, in training mode only."""
        self.index_shape(tuple(z.shape[1:-1]))
        maps = z.permute(0, 3, 1, 2)
        depth = self._depth(len(z), generator, z.device)
        total = torch.zeros_like(maps)
        indices: list[Tensor] = []
        vq, commit = z.new_zeros((), dtype=torch.float32), z.new_zeros((), dtype=torch.float32)
        for scale, (chosen, added) in enumerate(self._passes(maps)):
            kept = (scale < depth).to(maps.dtype)
            total = total + added * kept[:, None, None, None]
            # Means over the images that still have this scale, and over all scales.
            share = kept / (kept.sum().clamp(min=1) * len(self.config.scales))
            vq = vq + ((total - maps.detach()).square().mean((1, 2, 3)) * share).sum()
            commit = commit + ((total.detach() - maps).square().mean((1, 2, 3)) * share).sum()
            indices.append(chosen)
        latents = maps + (total - maps).detach()
        part = self.codebook.config
        losses = {"vq": part.vq_weight * vq, "commit": part.commit_weight * commit}
        return Quantized(latents.permute(0, 2, 3, 1).contiguous(), torch.cat(indices, dim=1), losses)

    def _depth(self, batch: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Number of scales that each image keeps, ``[B]``."""
        scales = len(self.config.scales)
        if not self.training or not self.config.dropout:
            return torch.full((batch,), scales, device=device)
        if generator is None:
            raise ValueError("quantizer dropout draws numbers: pass generator to quantize, or set dropout=0")
        drops, depths = torch.rand(2, batch, generator=generator, device=generator.device).to(device)
        least = min(self.config.dropout_min_depth, scales)
        depths = least + (depths * (scales - least + 1)).long().clamp(max=scales - least)
        return torch.where(drops < self.config.dropout, depths, scales)

    def lookup(self, indices: Tensor) -> Tensor:
        """What the maps of all scales add up to."""
        sides = self.config.scales
        parts = indices.split([side * side for side in sides], dim=1)
        maps = torch.stack(
            [
                self._enlarge(part.unflatten(1, (side, side)), scale)
                for scale, (part, side) in enumerate(zip(parts, sides, strict=True))
            ]
        )
        return maps.sum(0).permute(0, 2, 3, 1)

    def project(self, z: Tensor, group: int = 0) -> Tensor:
        """Not defined here: an index stands for an area of the residual."""
        raise MmpostError(
            "MMP-C073",
            "a multi-scale quantizer has no latent per index, so neighbours of latents are not defined.",
            "Set perturbation.neighbour_of=code and perturbation.variant=paper.",
        )

    def code_vectors(self, group: int = 0) -> Tensor:
        """The shared codes, with their own lengths."""
        return self.codebook.weight.detach()

    @torch.no_grad()
    def revive(self, dead: Tensor, z: Tensor, *, generator: torch.Generator) -> int:
        """Dead codes become latents of ``z`` itself, which is what the first scale sees, pooled."""
        return self.codebook.revive(dead, z, generator=generator)
