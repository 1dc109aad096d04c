"""The pixel head of TiTok of two stages: a mixture of the codes of MaskGIT's VQGAN, through its decoder."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

CODES, CODE_DIM, CHANNELS = 1024, 256, 128
LEVELS, BLOCKS, GROUPS = (1, 1, 2, 2, 4), 2, 32


class MaskGITHead(nn.Module):
    """Tokens ``[B, side^2, width]`` to images ``[B, 3, 16 side, 16 side]`` in [0, 1], not clamped.

    Two 1x1 layers give a distribution over 1024 codes at each place; the mean code goes through the decoder.

    Source: arXiv 2406.07550, section 3.3; released ``titok.py`` and ``maskgit_vqgan.py`` of bytedance/1d-tokenizer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, CODES)
        self.codes = nn.Embedding(CODES, CODE_DIM)
        self.decoder = MaskGITDecoder()

    @property
    def last(self) -> nn.Conv2d:
        """The layer that makes the pixels."""
        return self.decoder.conv_out

    def forward(self, tokens: Tensor) -> Tensor:
        """Images from the outputs at the mask tokens."""
        chances = self.outer(self.inner(tokens).tanh()).softmax(-1)
        side = round(tokens.shape[1] ** 0.5)
        maps = (chances @ self.codes.weight).transpose(1, 2).unflatten(2, (side, side))
        return cast(Tensor, self.decoder(maps))


class _Block(nn.Module):
    """Residual block without biases. Its shortcut reads the block's own output, which is how it was trained."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.conv1(functional.silu(self.norm1(maps)))
        inner = self.conv2(functional.silu(self.norm2(inner)))
        skipped = maps if self.nin_shortcut is None else self.nin_shortcut(inner)
        return cast(Tensor, inner + skipped)


class _Level(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, enlarges: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Block(inputs if first else outputs, outputs) for first in (True, False))
        self.upsample_conv = nn.Conv2d(outputs, outputs, 3, padding=1) if enlarges else None

    def forward(self, maps: Tensor) -> Tensor:
        for block in self.block:
            maps = block(maps)
        if self.upsample_conv is None:
            return maps
        return cast(Tensor, self.upsample_conv(functional.interpolate(maps, scale_factor=2.0, mode="nearest")))


class MaskGITDecoder(nn.Module):
    """Code maps ``[B, 256, h, w]`` to images ``[B, 3, 16 h, 16 w]``; names of parameters are the published ones."""

    def __init__(self) -> None:
        super().__init__()
        widths = [CHANNELS * level for level in LEVELS]
        self.conv_in = nn.Conv2d(CODE_DIM, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(_Block(widths[-1], widths[-1]) for _ in range(BLOCKS))
        above = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            _Level(inputs, outputs, enlarges=level > 0)
            for level, (inputs, outputs) in enumerate(zip(above, widths, strict=True))
        )
        self.norm_out = nn.GroupNorm(GROUPS, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Images, from coarse to fine."""
        maps = self.conv_in(maps)
        for block in self.mid:
            maps = block(maps)
        for level in reversed(self.up):
            maps = level(maps)
        return cast(Tensor, self.conv_out(functional.silu(self.norm_out(maps))))
