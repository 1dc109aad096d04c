"""Finite scalar quantization, by ``vector_quantize_pytorch``: every channel bounded and rounded, no loss."""

from __future__ import annotations

import torch
from torch import Tensor
from vector_quantize_pytorch import FSQ

from mmpost_tokenizers.base import Quantized, Quantizer
from mmpost_tokenizers.quantizers.binary import MAX_LISTED, too_many
from mmpost_tokenizers.quantizers.configs import FSQConfig


class FSQuantizer(Quantizer):
    """Channel d takes one of ``levels[d]`` values in [-1, 1], ``levels[d] // 2`` steps from 0 to 1.

    The index is the digits in mixed radix, first channel fastest. The gradient goes straight through the rounding and
    through the bounding tanh.

    Source: arXiv 2309.15505.
    """

    config: FSQConfig

    def __init__(self, config: FSQConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = len(config.levels)
        # The library lists the codes when it is to return indices; digits are turned into indices here instead.
        self.bounded = FSQ(levels=list(config.levels), return_indices=False)
        self.codebook_size = 1
        for levels in config.levels:
            self.codebook_size *= levels
        levels_d = torch.tensor(config.levels)
        self.register_buffer("_levels", levels_d, persistent=False)
        self.register_buffer("_radix", torch.cumprod(levels_d, 0) // levels_d, persistent=False)
        self._levels: Tensor
        self._radix: Tensor

    def forward(self, z: Tensor, *, generator: torch.Generator | None = None) -> Quantized:
        """Quantize ``z`` ``[B, *grid, len(levels)]``."""
        latents = self.bounded.quantize(z)
        half = self._levels // 2
        digits = (latents.detach() * half).round().long() + half
        return Quantized(latents, (digits * self._radix).sum(-1), {})

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of ``indices``."""
        half = self._levels // 2
        digits = indices[..., None] // self._radix % self._levels
        return (digits - half) / half

    def project(self, z: Tensor, group: int = 0) -> Tensor:
        """Bounded latents before rounding; the library has this only together with the rounding."""
        levels = self._levels
        half_span = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half_span)
        return (torch.tanh(z + shift) * half_span - offset) / (levels // 2)

    def code_vectors(self, group: int = 0) -> Tensor:
        """All codes; at most ``MAX_LISTED`` of them."""
        if self.codebook_size > MAX_LISTED:
            raise too_many(self.codebook_size)
        return self.lookup(torch.arange(self.codebook_size, device=self._levels.device))

    def lattice(self) -> tuple[int, ...]:
        """The levels."""
        return self.config.levels
