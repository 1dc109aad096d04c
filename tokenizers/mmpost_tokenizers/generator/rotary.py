"""Rotary positions by row and column of the grid instead of by place in the sequence.

The first half of the pairs of a head turns with the row, the second half with the column, so that attention scores of
two codes depend on the difference of their rows and that of their columns alone.

Source: LlamaGen, arXiv 2406.06525, section 2.2 (2-D RoPE "in each layer"), after RoFormer, arXiv 2104.09864, equation
34. Differs: the released code multiplies query and key of the class token by zero, here they are not turned; pairs are
channel i and i + d/2, as in transformers, which only renames channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmpost.core.errors import MmpostError

BASE = 10_000.0


class GridRotary(nn.Module):
    """Takes the place of ``rotary_emb`` of a transformers model; has no weights.

    Place 0 of a sequence is the class token, which is not turned; the codes follow row by row, ``groups`` for each
    place of the grid.

    Args:
        grid: Rows and columns.
        groups: Codes per place; they share its row and column.
        head_dim: Channels of a head, a multiple of 4.

    Raises:
        MmpostError: MMP-C120 for codes that have no rows and columns, or heads that cannot be divided.
    """

    angles: Tensor

    def __init__(self, grid: tuple[int, ...], groups: int, head_dim: int) -> None:
        super().__init__()
        if len(grid) != 2:
            raise MmpostError(
                "MMP-C120", f"rope=2d needs a grid of rows and columns, but the codes are a row of {grid[0]}.",
                "Set model.rope=1d",
            )  # fmt: skip
        if head_dim % 4:
            raise MmpostError("MMP-C120", f"rope=2d cannot divide heads of {head_dim} channels.", "Set model.rope=1d")
        quarter = head_dim // 4
        rates = BASE ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
        place = torch.arange(grid[0] * grid[1]).repeat_interleave(groups)
        turned = torch.cat([(place // grid[1])[:, None] * rates, (place % grid[1])[:, None] * rates], 1)
        whole = torch.cat([torch.zeros(1, 2 * quarter, dtype=torch.float64), turned])
        self.register_buffer("angles", torch.cat([whole, whole], 1).float(), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[B, T, head_dim]`` in the type of ``x`` for places ``[B, T]`` of the sequence."""
        angles = self.angles[position_ids]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)
