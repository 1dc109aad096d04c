"""Held-out pairs in two halves: one chooses, the other reports.

The first half decides when to stop and which weights are kept; the second says how good they are. The loss of the half
that chose is too low, because the luckiest of many measurements was taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from mmpost.core import seeding
from mmpost.core.errors import MmpostError
from mmpost_tokenizers.pairs import Pairs


class Losses(NamedTuple):
    """Mean pair loss of both halves."""

    select: float
    report: float


UNKNOWN = Losses(math.inf, math.inf)


@dataclass
class HeldOut:
    """Measurements of one run.

    Attributes:
        select: The half that chooses.
        report: The half that reports; nothing of the training follows it.
        before: Losses of the main-trained decoder.
        best: Losses of the weights with the lowest loss on ``select``.
        best_step: Their step; 0 are the main-trained ones.
        best_weights: These weights.
        last: Losses of the latest measurement.
    """

    select: Pairs
    report: Pairs
    before: Losses | None = None
    best: Losses = UNKNOWN
    best_step: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    last: Losses = UNKNOWN

    @classmethod
    def of(cls, pairs: Pairs, seed: int) -> HeldOut:
        """Divide pairs; the halves follow from their number and the seed alone.

        Raises:
            MmpostError: MMP-T078 for fewer than two pairs.
        """
        if len(pairs) < 2:
            what = (
                f"post-training needs two held-out images or more, one to choose and one to report; got {len(pairs)}."
            )
            raise MmpostError("MMP-T078", what, "Give more in data.eval.")
        first, second = halves(len(pairs), seed)
        return cls(pairs.subset(first), pairs.subset(second))

    def measure(
        self, step: int, loss: Callable[[Pairs], float], weights: Callable[[], dict[str, Tensor]]
    ) -> dict[str, float]:
        """Measure both halves at a step; remembers the weights when they are the best on ``select``.

        Args:
            step: Steps done.
            loss: Mean loss of pairs.
            weights: A copy of the weights that are measured.

        Returns:
            ``pair_loss`` of the reporting half and ``pair_loss_select`` of the other, for metrics.jsonl.
        """
        self.last = Losses(loss(self.select), loss(self.report))
        if self.before is None:
            self.before = self.last
        if self.last.select < self.best.select:
            self.best, self.best_step, self.best_weights = self.last, step, weights()
        return {"pair_loss": self.last.report, "pair_loss_select": self.last.select}

    def summary(self) -> dict[str, Any]:
        """What a run reports; all but the ``select`` figures are of the half that chose nothing."""
        assert self.before is not None
        return {
            "pair_loss_before": self.before.report,
            "pair_loss_after": self.best.report,
            "pair_loss_last": self.last.report,
            "pair_loss_select_before": self.before.select,
            "pair_loss_select_after": self.best.select,
            "held_out_select": len(self.select),
            "held_out_report": len(self.report),
            "best_step": self.best_step,
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON; the weights are saved with the others."""
        return {"before": self.before, "best": self.best, "best_step": self.best_step, "last": self.last}

    def restore(self, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """From a checkpoint."""
        self.before, self.best, self.last = (Losses(*state[name]) for name in ("before", "best", "last"))
        self.best_step, self.best_weights = state["best_step"], weights


def halves(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Rows 0 to ``count`` - 1 in two halves drawn by the seed, each in order; an odd one falls to the second."""
    order: Sequence[int] = np.asarray(seeding.generator(seed, "posttrain.halves").permutation(count)).tolist()
    return sorted(order[: count // 2]), sorted(order[count // 2 :])
