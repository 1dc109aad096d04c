"""Post-training quantizer: every scalar of a latent goes to one of B levels on its own.

Latents x are shifted and scaled to y, of about unit variance. y = +-``value_range`` is laid on +-3 of the level axis,
and the index is that of the nearest level there.

The constants do not make levels that are equally used: with range 5, unit variance becomes 0.6 on the level axis, so
64 levels carry 5.72 bits instead of 6. They are close to the least squared error all the same, whose density of levels
follows p^(1/3), a Gaussian scaled by 1/sqrt(3) = 0.577. The range is a scale, not what can be represented: 64 levels
with range 5 end at 4.06. Latents beyond the last level are counted, see ``saturation_rate``; those that lose more there
than any latent between two levels can are cut off, and more than 1 % of them is refused, see ``cut_off_rate``.

Source: arXiv 2503.16430, equations 1 to 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.base import Quantized, Quantizer
from mmpost_tokenizers.bridge import checkpoint
from mmpost_tokenizers.published.files import load_strictly
from mmpost_tokenizers.quantizers.configs import QuantizerConfig, from_fields

Scheme = Literal["gaussian", "uniform", "lloyd"]
Mode = Literal["paper", "channel"]
SCHEMES = ("gaussian", "uniform", "lloyd")
MODES = ("paper", "channel")

R = 3.0  # ends of the level axis, in standard deviations
MAX_CUT_OFF = 0.01  # share of cut off latents that is accepted unless the user says otherwise
SURE = 4.0  # standard errors above the allowed share, so that few values are judged with care
_FILES = ("quantizer.json", "quantizer.safetensors")
_ROUNDING = 1e-5
_ROUNDS = 500  # of Lloyd's iteration


@dataclass(frozen=True, kw_only=True)
class PostTrainingConfig(QuantizerConfig):
    """What ``PostTrainingQuantizer`` is made of, besides the tables that ``fit`` measures.

    Attributes:
        dim: Channels C; each is a group with an index of its own.
        levels: B, at least 2.
        value_range: Scaled latents of +-this lie at +-3 on the level axis.
        scheme: ``gaussian``: the paper's; ``uniform``: equal steps over the range; ``lloyd``: least squared error.
        mode: ``paper``: one scale for all channels, no shift; ``channel``: shift and scale of each channel.
        max_saturation: Largest share of values that are cut off; more is refused. A value is cut off when it lies
            beyond the last level by more than half the step to the level before, hence loses more than any value
            between levels. Of normal latents at range 5: 0.8 % with 2 levels, 0.001 % with 64; with 64 levels at range
            3: 0.8 %, at range 2: 7.6 %. None accepts any share.
    """

    kind: ClassVar[str] = "post_training"
    dim: int
    levels: int = 64
    value_range: float = 5.0
    scheme: Scheme = "gaussian"
    mode: Mode = "paper"
    max_saturation: float | None = MAX_CUT_OFF

    def __post_init__(self) -> None:
        checks = [
            ("dim", self.dim, self.dim >= 1, "1 or more"),
            ("levels", self.levels, 2 <= self.levels <= 65536, "between 2 and 65536"),
            ("value_range", self.value_range, 0 < self.value_range < math.inf, "a positive number"),
            ("scheme", self.scheme, self.scheme in SCHEMES, f"one of {', '.join(SCHEMES)}"),
            ("mode", self.mode, self.mode in MODES, f"one of {', '.join(MODES)}"),
            (
                "max_saturation",
                self.max_saturation,
                self.max_saturation is None or 0 <= self.max_saturation <= 1,
                "in [0, 1] or null",
            ),
        ]
        for field, value, good, expected in checks:
            if not good:
                raise MmpostError("MMP-C090", f"bridge: {field}={value!r} is not {expected}.", f"Correct {field}.")


class PostTrainingQuantizer(Quantizer):
    """Nearest level for every scalar; C groups of B levels each.

    Attributes:
        table: Buffer ``[B]``: levels on the level axis, rising.
        shift: Buffer ``[C]``: subtracted from the latents.
        scale: Buffer ``[C]``: multiplies them afterwards.
    """

    table: Tensor
    shift: Tensor
    scale: Tensor
    config: PostTrainingConfig

    def __init__(self, config: PostTrainingConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size, self.groups, self.dim = config.levels, config.dim, config.dim
        table = level_table(config.levels, config.scheme, config.value_range)
        self.register_buffer("table", table.float())
        self.register_buffer("shift", torch.zeros(config.dim))
        self.register_buffer("scale", torch.ones(config.dim))
        self.reset_saturation()

    @classmethod
    def fit(
        cls,
        latents: Tensor,
        *,
        levels: int = 64,
        value_range: float = 5.0,
        scheme: Scheme = "gaussian",
        mode: Mode = "paper",
        quantile: float | None = None,
        max_saturation: float | None = MAX_CUT_OFF,
    ) -> Self:
        """Measure shift and scale on latents.

        Args:
            latents: ``[..., C]``, a few thousand positions or more.
            levels: B.
            value_range: See ``PostTrainingConfig``.
            scheme: See ``PostTrainingConfig``; ``lloyd`` iterates on these latents.
            mode: ``paper``: one scale, which makes the standard deviation of all values together 1. ``channel``: mean
                and standard deviation of every channel.
            quantile: Choose the range instead, so that this share of the values lies beyond the last level.
            max_saturation: See ``PostTrainingConfig``.

        Raises:
            MmpostError: MMP-C091 too few or constant latents, MMP-E081 more cut off than is allowed,
                MMP-E084 latents that are not finite.
        """
        flat = latents.detach().reshape(-1, latents.shape[-1]).double().cpu()
        _check_finite(flat)
        shift = flat.mean(0) if mode == "channel" else torch.zeros(flat.shape[1], dtype=torch.float64)
        spread = flat.std(0, correction=0) if mode == "channel" else flat.std(correction=0).expand(flat.shape[1])
        if len(flat) < 2 or not bool((spread > 0).all()):
            raise MmpostError(
                "MMP-C091",
                f"bridge: the {len(flat)} latent positions do not vary in every channel, so there is no scale.",
                "Fit on more images.",
            )
        scaled = (flat - shift) / spread
        if quantile is not None:
            farthest = float(np.quantile(scaled.abs().numpy(), 1 - quantile))
            value_range = farthest * R / float(level_table(levels, "gaussian", value_range)[-1])
        config = PostTrainingConfig(
            dim=flat.shape[1],
            levels=levels,
            value_range=value_range,
            scheme=scheme,
            mode=mode,
            max_saturation=max_saturation,
        )
        quantizer = cls(config).to(latents.device)
        quantizer.shift.copy_(shift)
        quantizer.scale.copy_(1 / spread)
        if scheme == "lloyd":
            points = np.sort((scaled * (R / value_range)).clamp(-R, R).numpy(), axis=None)
            quantizer.table.copy_(torch.from_numpy(_lloyd(points, np.ones_like(points), levels)))
        quantizer.quantize(latents)
        quantizer.reset_saturation()
        return quantizer

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest scaled latent that can be represented."""
        unit = self.config.value_range / R
        return float(self.table[0]) * unit, float(self.table[-1]) * unit

    @property
    def reach(self) -> float:
        """Largest scaled latent, either sign, that is not cut off: half a step beyond the last level."""
        half = float(self.table[-1] - self.table[-2]) / 2
        return (float(self.table[-1]) + half) * self.config.value_range / R

    @property
    def saturation_rate(self) -> float:
        """Share of the values quantized so far that lay beyond the first or last level; 0 before any."""
        return self._beyond / max(self._seen, 1)

    @property
    def cut_off_rate(self) -> float:
        """Share of them that lay beyond ``reach``; see ``PostTrainingConfig.max_saturation``."""
        return self._cut_off / max(self._seen, 1)

    @property
    def measured(self) -> tuple[float, float]:
        """Smallest and largest scaled latent quantized so far; (0, 0) before any."""
        return self._lowest, self._highest

    def reset_saturation(self) -> None:
        """Start counting anew."""
        self._seen, self._beyond, self._cut_off = 0, 0, 0
        self._lowest, self._highest = 0.0, 0.0

    def forward(self, z: Tensor, *, generator: torch.Generator | None = None) -> Quantized:
        """Quantize ``z`` ``[..., C]``; indices are ``[..., C]``, there is no loss and nothing is drawn.

        Raises:
            MmpostError: As ``quantize``.
        """
        indices = self.quantize(z)
        return Quantized(z + (self.lookup(indices).to(z.dtype) - z).detach(), indices, {})

    @torch.no_grad()
    def quantize(self, latents: Tensor) -> Tensor:
        """Indices, int64, of the nearest levels; of two that are equally near, the lower.

        Raises:
            MmpostError: MMP-C092 another number of channels, MMP-E081 more cut off than is allowed,
                MMP-E084 latents that are not finite.
        """
        if latents.shape[-1] != self.dim:
            what = f"bridge: latents with {latents.shape[-1]} channels, but the quantizer was made for {self.dim}."
            raise MmpostError("MMP-C092", what, "Fit a quantizer for this VAE.")
        axis = self._on_axis(latents)
        _check_finite(axis)
        self._count(axis)
        # Midpoints give the same index as a search over all levels, without a tensor that is B times as large.
        # Values beyond +-3 need no clipping: the outermost levels are nearest either way.
        return torch.bucketize(axis.contiguous(), (self.table[1:] + self.table[:-1]) / 2)

    def dequantize(self, indices: Tensor) -> Tensor:
        """Latents, float32, of indices ``[..., C]``."""
        scaled = self.table[indices] * (self.config.value_range / R)
        return scaled / self.scale + self.shift

    def lookup(self, indices: Tensor) -> Tensor:
        """Same as ``dequantize``."""
        return self.dequantize(indices)

    def index_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """``(*grid, C)``, for one channel too."""
        return (*grid, self.groups)

    def project(self, z: Tensor, group: int = 0) -> Tensor:
        """The channel ``group`` of ``z``, ``[..., 1]``."""
        return z[..., group : group + 1]

    def code_vectors(self, group: int = 0) -> Tensor:
        """Latents ``[B, 1]`` of the levels in channel ``group``: neighbours are adjacent levels."""
        unit = self.config.value_range / R
        return (self.table * unit / self.scale[group] + self.shift[group])[:, None]

    def save(self, folder: str | Path) -> None:
        """Write ``quantizer.json`` and ``quantizer.safetensors``."""
        checkpoint.write(Path(folder), self.config.to_json(), self.state_dict(), files=_FILES)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Open what ``save`` wrote.

        Raises:
            MmpostError: MMP-E082 no usable configuration, MMP-E070 no tensors, MMP-E071 keys or shapes that differ,
                MMP-E073 a damaged file.
        """
        config, tensors = checkpoint.read(Path(folder), files=_FILES)
        quantizer = cls(config_from_json(config))
        load_strictly(quantizer, tensors, str(folder))
        return quantizer

    def _on_axis(self, latents: Tensor) -> Tensor:
        return (latents.float() - self.shift) * self.scale * (R / self.config.value_range)

    def _count(self, axis: Tensor) -> None:
        unit = self.config.value_range / R
        self._seen += axis.numel()
        # A value that was made from the last level is not beyond it, whatever rounding did to it.
        self._beyond += int(((axis < self.table[0] - _ROUNDING) | (axis > self.table[-1] + _ROUNDING)).sum())
        self._cut_off += int((axis.abs() > self.reach / unit + _ROUNDING).sum())
        if axis.numel():
            self._lowest = min(self._lowest, float(axis.min()) * unit)
            self._highest = max(self._highest, float(axis.max()) * unit)
        allowed = self.config.max_saturation
        if allowed is not None and self.cut_off_rate > allowed + SURE * math.sqrt(
            allowed * (1 - allowed) / max(self._seen, 1)
        ):
            raise self._too_wide(axis, allowed)

    def _too_wide(self, axis: Tensor, allowed: float) -> MmpostError:
        """The MMP-E081; it names flags of ``mmpost tokenizer bridge``, the arguments here have the same names."""
        farthest = float(np.quantile(axis.abs().cpu().numpy(), 1 - allowed)) * self.config.value_range / R
        enough = math.ceil(10 * farthest / self.reach * self.config.value_range) / 10
        reach, (low, high) = self.reach, self.measured
        ways = [f"raise --range to {enough:g}", "accept it with --max-saturation 1"]
        if self.config.mode == "paper":
            ways.insert(1, "measure shift and scale of each channel with --mode channel")
        fix = ", or ".join(ways)
        return MmpostError(
            "MMP-E081",
            f"the range cuts off {self.cut_off_rate:.1%} of the latents: measured from {low:.2f} to {high:.2f} in "
            f"units of the scale, {1 - allowed:.1%} within {farthest:.2f}, but {self.codebook_size} levels with range "
            f"{self.config.value_range:g} reach {reach:.2f}; {allowed:.1%} may be cut off.",
            f"{fix[0].upper()}{fix[1:]}.",
        )


def config_from_json(table: Mapping[str, Any]) -> PostTrainingConfig:
    """The configuration that ``PostTrainingConfig.to_json`` wrote."""
    fields = {name: value for name, value in table.items() if name != "kind"}
    config: PostTrainingConfig = from_fields(PostTrainingConfig, fields, "quantizer 'post_training'")
    return config


def level_table(levels: int, scheme: Scheme = "gaussian", value_range: float = 5.0) -> Tensor:
    """Levels on the level axis, float64 ``[B]``, rising, symmetric about 0.

    Args:
        levels: B.
        scheme: ``gaussian``: means of N(0, 1) in B cells of equal mass, whose outer boundaries are clamped to +-3 and
            not at infinity. ``uniform``: middles of B equal cells of [-3, 3]. ``lloyd``: least squared error for
            N(0, 1).
        value_range: Only ``lloyd`` depends on it: unit variance is 3 / value_range on the level axis.
    """
    if scheme == "uniform":
        return (torch.arange(levels, dtype=torch.float64) + 0.5) * (2 * R / levels) - R
    if scheme == "lloyd":
        unit = R / value_range
        points = np.linspace(-6, 6, 40001)
        weights = np.exp(-(points**2) / 2)
        table = _lloyd(np.clip(points * unit, -R, R), weights, levels)
        return torch.from_numpy((table - table[::-1]) / 2)  # the iteration stops a little off the symmetric solution
    share = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    edges = torch.special.ndtri(share).clamp(-R, R)
    density = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    mass = torch.special.ndtr(edges)
    return (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])


def _lloyd(points: np.ndarray, weights: np.ndarray, levels: int) -> np.ndarray:
    """Weighted one-dimensional k-means on sorted points: ``[levels]``, rising."""
    mass = np.concatenate([[0.0], np.cumsum(weights)])
    moment = np.concatenate([[0.0], np.cumsum(weights * points)])
    # The best density of levels is wider than that of the points; quantiles of points / 0.577 are a good start.
    start = np.interp((np.arange(levels) + 0.5) / levels * mass[-1], mass[1:], points)
    centres = np.unique(start * math.sqrt(3))
    if len(centres) < levels:
        what = f"bridge: the latents take fewer distinct values than {levels} levels."
        raise MmpostError("MMP-C091", what, "Fit on more images, or take fewer levels.")
    for _ in range(_ROUNDS):
        cuts = np.searchsorted(points, (centres[1:] + centres[:-1]) / 2)
        ends = np.concatenate([[0], cuts, [len(points)]])
        inside = mass[ends[1:]] - mass[ends[:-1]]
        means = (moment[ends[1:]] - moment[ends[:-1]]) / np.where(inside > 0, inside, 1)
        moved = np.where(inside > 0, means, centres)  # an empty cell stays where it is
        if np.abs(moved - centres).max() < 1e-9:
            break
        centres = moved
    return centres


def _check_finite(latents: Tensor) -> None:
    if not bool(torch.isfinite(latents).all()):
        raise MmpostError(
            "MMP-E084",
            "bridge: the VAE gave latents that are not finite.",
            "Run it in float32 or bfloat16; some VAEs overflow in float16.",
        )
