"""Residual quantization at one resolution: each level quantizes what the levels before it left over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from mmpost_tokenizers.base import Quantized, Quantizer, build_quantizer
from mmpost_tokenizers.quantizers.configs import ResidualConfig


class ResidualQuantizer(Quantizer):
    """``latents = e_1 + ... + e_depth``; level l quantizes ``r_l = z - sg(e_1 + ... + e_(l-1))``.

    Losses are means over levels of the losses at ``r_l``. The last axis of the indices is the level.

    Source: arXiv 2107.03312, with the losses of the chosen part.
    """

    config: ResidualConfig

    def __init__(self, config: ResidualConfig) -> None:
        super().__init__()
        self.config = config
        self.groups = config.depth
        self.levels = nn.ModuleList(build_quantizer(config.part) for _ in range(config.depth))
        self.codebook_size, self.dim = self._level(0).codebook_size, self._level(0).dim

    def _level(self, level: int) -> Quantizer:
        return cast(Quantizer, self.levels[level])

    def _passes(self, z: Tensor) -> Iterator[tuple[Tensor, Quantized]]:
        """Residual and outcome of each level."""
        residual = z
        for level in range(self.groups):
            done: Quantized = self._level(level)(residual)
            yield residual, done
            residual = residual - done.latents.detach()

    def forward(self, z: Tensor, *, generator: torch.Generator | None = None) -> Quantized:
        """Quantize ``z`` level by level; indices ``[B, *grid, depth]``."""
        done = [outcome for _, outcome in self._passes(z)]
        losses = {name: torch.stack([one.losses[name] for one in done]).mean() for name in done[0].losses}
        codes = torch.stack([one.latents.detach() for one in done]).sum(0)
        return Quantized(z + (codes - z).detach(), torch.stack([one.indices for one in done], dim=-1), losses)

    def lookup(self, indices: Tensor) -> Tensor:
        """Sum of the codes of all levels."""
        return torch.stack([self._level(level).lookup(indices[..., level]) for level in range(self.groups)]).sum(0)

    def project(self, z: Tensor, group: int = 0) -> Tensor:
        """The residual that level ``group`` sees in the clean pass."""
        residual = z
        for level in range(group):
            part = self._level(level)
            was_training = part.training
            # A look must not move the codes of VQ-EMA.
            residual = residual - part.eval()(residual).latents.detach()
            part.train(was_training)
        return residual

    def code_vectors(self, group: int = 0) -> Tensor:
        """Codes of one level."""
        return self._level(group).code_vectors()

    def revive(self, dead: Tensor, z: Tensor, *, generator: torch.Generator) -> int:
        """Revive at each level, from the residuals that it sees."""
        residuals = [self.project(z, level) for level in range(self.groups)]
        return sum(
            self._level(level).revive(dead[level], residual, generator=generator)
            for level, residual in enumerate(residuals)
        )
