"""Product quantization: groups of channels, each with a quantizer of its own."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mmpost_tokenizers.base import Quantized, Quantizer, build_quantizer
from mmpost_tokenizers.quantizers.configs import ProductConfig


class ProductQuantizer(Quantizer):
    """Channels are cut into ``groups`` equal pieces, quantized apart and put together again.

    Losses are means over the groups, as in XQ-GAN. XQ-GAN cuts the tokens of a ViT instead and joins along channels;
    with a tokenizer that lays such tokens side by side in channels both are the same.
    """

    config: ProductConfig

    def __init__(self, config: ProductConfig) -> None:
        super().__init__()
        self.config = config
        self.groups = config.groups
        self.parts = nn.ModuleList(build_quantizer(config.part) for _ in range(config.groups))
        self.codebook_size = self._part(0).codebook_size
        self.dim = config.groups * self._part(0).dim

    def _part(self, group: int) -> Quantizer:
        return cast(Quantizer, self.parts[group])

    def _pieces(self, z: Tensor) -> tuple[Tensor, ...]:
        return z.split(self.dim // self.groups, dim=-1)

    def forward(self, z: Tensor, *, generator: torch.Generator | None = None) -> Quantized:
        """Quantize each group; indices ``[B, *grid, groups]``."""
        done: list[Quantized] = [
            part(piece, generator=generator) for part, piece in zip(self.parts, self._pieces(z), strict=True)
        ]
        losses = {name: torch.stack([one.losses[name] for one in done]).mean() for name in done[0].losses}
        latents = torch.cat([one.latents for one in done], dim=-1)
        return Quantized(latents, torch.stack([one.indices for one in done], dim=-1), losses)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of all groups side by side."""
        return torch.cat([self._part(group).lookup(indices[..., group]) for group in range(self.groups)], dim=-1)

    def normalise(self, z: Tensor) -> Tensor:
        """Each group as its quantizer wants it."""
        pieces = self._pieces(z)
        return torch.cat([self._part(group).normalise(piece) for group, piece in enumerate(pieces)], dim=-1)

    def project(self, z: Tensor, group: int = 0) -> Tensor:
        """The channels of one group, as its quantizer compares them."""
        return self._part(group).project(self._pieces(z)[group])

    def code_vectors(self, group: int = 0) -> Tensor:
        """Codes of one group."""
        return self._part(group).code_vectors()

    def lattice(self) -> tuple[int, ...] | None:
        """That of a group; all are the same."""
        return self._part(0).lattice()

    def revive(self, dead: Tensor, z: Tensor, *, generator: torch.Generator) -> int:
        """Revive in each group."""
        return sum(
            self._part(group).revive(dead[group], piece, generator=generator)
            for group, piece in enumerate(self._pieces(z))
        )
