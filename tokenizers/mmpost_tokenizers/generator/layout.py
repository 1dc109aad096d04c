"""What the codes of one image look like, and whether codes do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmpost.core.errors import MmpostError


@dataclass(frozen=True, slots=True)
class CodeLayout:
    """What the codes of one image look like.

    Attributes:
        codebook_size: Codes per group, K.
        groups: Indices per position, G.
        grid: ``(H, W)`` or ``(N,)``.
        tokenizer_sha256: Hash of everything that decides about the codes: encoder and quantizer, not the decoder.
    """

    codebook_size: int
    groups: int
    grid: tuple[int, ...]
    tokenizer_sha256: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the indices of one image: the grid, then G where it is more than one."""
        return (*self.grid, self.groups) if self.groups > 1 else self.grid

    @property
    def positions(self) -> int:
        """Places of the grid, N."""
        return math.prod(self.grid)

    @property
    def length(self) -> int:
        """Codes per image, N * G."""
        return self.positions * self.groups

    def difference(self, other: CodeLayout) -> str:
        """What differs, in words; empty when the layouts are equal."""
        names = {"codebook_size": "codebook size", "groups": "groups", "grid": "grid"}
        for name, words in names.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{words} {_words(mine)} against {_words(theirs)}"
        if self.tokenizer_sha256 != other.tokenizer_sha256:
            return f"tokenizer hash {self.tokenizer_sha256[:12]} against {other.tokenizer_sha256[:12]}"
        return ""


def check_codes(codes: Tensor, layout: CodeLayout) -> None:
    """Refuse codes of another shape or outside the codebook.

    Raises:
        MmpostError: MMP-C101, MMP-C106.
    """
    if codes.dtype.is_floating_point or tuple(codes.shape[1:]) != layout.shape:
        raise MmpostError(
            "MMP-C101",
            f"codes have shape {list(codes.shape[1:])} and type {codes.dtype} where the generator needs integers "
            f"{list(layout.shape)}.",
            "Use a tokenizer with one grid of codes, or of groups of codes, per image",
        )
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= layout.codebook_size):
        raise MmpostError(
            "MMP-C106",
            f"codes reach from {int(codes.min())} to {int(codes.max())}, the codebook has {layout.codebook_size}.",
            "Use codes of the generator's tokenizer",
        )


def _words(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
