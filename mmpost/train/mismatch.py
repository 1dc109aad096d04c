"""Weights for the distance between the policy that trains and the engine that sampled.

An engine with its own kernels, precision or truncation samples from a slightly different distribution. With
omega = pi_old / pi_engine the surrogate of the step, an expectation over the engine's samples, is multiplied by a
bounded omega.

Sources: truncated importance sampling as in IMPALA, arXiv 1802.01561, and the modes that RL libraries use
(``token_mask`` is IcePop); the constants are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mmpost.train.estimator import log_ratio
from mmpost.train.positions import Positions

Mode = Literal["off", "token_tis", "seq_tis", "token_mask", "seq_mask", "geo_reject", "bypass"]
# Upper limit, lower limit by mode, where the user says nothing.
LIMITS: dict[str, tuple[float, float]] = {
    "token_tis": (2.0, 0.0),
    "seq_tis": (2.0, 0.0),
    "token_mask": (5.0, 0.5),
    "seq_mask": (3.0, 0.0),
    "geo_reject": (1.001, 0.999),
}
# Distances are counted in bins, whose counts add up over micro-batches and processes as the values themselves do not:
# 40 per decade from 1e-9 to 100 nats, so that a quantile is at most 6 % too large.
GAP_LOWEST, GAP_DECADES, GAP_PER_DECADE = 1e-9, 11, 40
GAP_BINS = GAP_DECADES * GAP_PER_DECADE + 1


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How positions are weighted by omega.

    Attributes:
        mode: ``off`` 1; ``token_tis`` min(omega, cap); ``seq_tis`` the same for the product over the row;
            ``token_mask`` omega, 0 outside [low, cap]; ``seq_mask`` the product, 0 above cap; ``geo_reject`` 1 on rows
            whose geometric mean lies in [low, cap], else 0; ``bypass`` 1, and the engine's log-probabilities stand in
            for the old policy's.
        cap: Upper limit; None for the mode's usual one.
        low: Lower limit, likewise.
    """

    mode: Mode = "off"
    cap: float | None = None
    low: float | None = None

    def limits(self) -> tuple[float, float]:
        """Upper and lower limit."""
        cap, low = LIMITS.get(self.mode, (1.0, 0.0))
        return (cap if self.cap is None else self.cap), (low if self.low is None else self.low)

    def applied(self, p: Positions) -> Positions:
        """Positions with the engine in place of the old policy under ``bypass``, else as they are."""
        if self.mode != "bypass" or p.engine is None:
            return p
        return replace(p, old=torch.where(p.engine.isfinite(), p.engine, p.old))

    def weight(self, p: Positions) -> Tensor | None:
        """Factor of each position, ``[M]``, detached; None where it is 1 everywhere.

        A position for which the engine reported nothing finite has omega = 1.
        """
        if self.mode in ("off", "bypass") or p.engine is None:
            return None
        log_omega = log_ratio(p.old, torch.where(p.engine.isfinite(), p.engine, p.old))
        cap, low = self.limits()
        if self.mode in ("token_tis", "token_mask"):
            omega = log_omega.exp()
        elif self.mode == "geo_reject":
            omega = p.row_mean(log_omega).exp()
        else:
            omega = p.row_sum(log_omega).exp()
        if self.mode.endswith("_tis"):
            return omega.clamp(max=cap)
        inside = (omega >= low) & (omega <= cap)
        kept = torch.ones_like(omega) if self.mode == "geo_reject" else omega
        return torch.where(inside, kept, torch.zeros_like(kept))


def gap_counts(p: Positions, sampled: Tensor) -> Tensor:
    """How many positions of a micro-batch are how far from the engine.

    Args:
        p: Positions; without ``engine`` nothing is counted, nor is a position where it is not finite.
        sampled: bool ``[M]``, False on demonstrations.

    Returns:
        float64 ``[GAP_BINS]``: counts by |log-probability here - the engine's|; the last bin is open.
    """
    if p.engine is None:
        return torch.zeros(GAP_BINS, dtype=torch.float64, device=p.logp.device)
    gap = (p.logp - p.engine).abs()[p.engine.isfinite() & sampled].double()
    # A policy that is not finite is as far away as can be.
    gap = gap.nan_to_num(nan=1e9, posinf=1e9)
    steps = ((gap / GAP_LOWEST).clamp(min=1).log10() * GAP_PER_DECADE).ceil().long()
    return torch.bincount(steps.clamp(max=GAP_BINS - 1), minlength=GAP_BINS).double()


def gap_quantile(counts: Sequence[float], share: float) -> float:
    """The distance, in nats, that so large a share of the positions does not exceed; NaN without any.

    Args:
        counts: Sum of ``gap_counts`` over micro-batches and processes.
        share: In (0, 1]; 1 is the largest distance.

    Returns:
        The upper edge of the bin of that position: at most 6 % too large, never too small below 100 nats; 0 where it
        is at most 1e-9.
    """
    left = share * sum(counts)
    if not left:
        return float("nan")
    for step, count in enumerate(counts):
        left -= count
        if left <= 1e-9:
            return GAP_LOWEST * 10 ** (step / GAP_PER_DECADE) if step else 0.0
    return GAP_LOWEST * 10.0**GAP_DECADES
