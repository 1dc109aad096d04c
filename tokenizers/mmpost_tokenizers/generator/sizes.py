"""Named sizes of generators.

Source: B to 3B are those of LlamaGen, arXiv 2406.06525, Table 1; with 16,384 codes and 1,000 classes the counts are the
published 111M, 343M, 775M, 1.4B and 3.1B. "test" is the size of the project's tests, "400M" lies between L and XL.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from mmpost.core.errors import MmpostError


@dataclass(frozen=True, slots=True)
class Size:
    """Shape of the transformer.

    Attributes:
        width: Length of a hidden state.
        depth: Layers.
        heads: Attention heads; must divide the width.
        mlp_width: Length of a hidden state inside the SwiGLU block.
        dropout: Share dropped of embeddings and of the output of each block while training.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    dropout: float = 0.1


def swiglu_width(width: int) -> int:
    """Two thirds of 4 * width, rounded up to a multiple of 256, as in LLaMA."""
    return 256 * -(-(8 * width // 3) // 256)


def _size(width: int, depth: int, heads: int, dropout: float = 0.1) -> Size:
    return Size(width, depth, heads, swiglu_width(width), dropout)


SIZES = {
    "test": _size(96, 3, 4, dropout=0.0),
    "small": _size(384, 8, 6),
    "B": _size(768, 12, 12),
    "L": _size(1024, 24, 16),
    "400M": _size(1024, 28, 16),
    "XL": _size(1280, 36, 20),
    "XXL": _size(1536, 48, 24),
    "3B": _size(3200, 24, 32),
}


def size(name: str) -> Size:
    """The size called ``name``.

    Raises:
        MmpostError: MMP-C100 for an unknown name.
    """
    if name in SIZES:
        return SIZES[name]
    near = difflib.get_close_matches(name, SIZES, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    raise MmpostError("MMP-C100", f"unknown generator size '{name}'.", f"{hint}Known: {', '.join(SIZES)}")
