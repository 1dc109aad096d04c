"""Scores to one advantage per completion.

Every class here is called with all groups of the step, over all processes and in the order of their uids, so that the
number of processes changes nothing. A completion without a score gets NaN and does not train.

Sources: GRPO, arXiv 2402.03300 equation 3 (``Group``); Dr. GRPO, arXiv 2503.20783 (``Group(std=False)``); RLOO,
arXiv 2402.14740 (``LeaveOneOut``); arXiv 2508.08221 (``BatchStd``); Reinforce-Ada, arXiv 2510.04996 (``AllDrawn``);
GDPO, arXiv 2601.05242 (``NormThenSum``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mmpost.train.method import Advantage, Scored

# Added to the standard deviation, outside the root, as TRL does; the papers have no epsilon.
STD_EPSILON = 1e-4


def known(scores: Sequence[float | None]) -> np.ndarray:
    """Scores as float64 ``[G]``, NaN where there is none."""
    return np.array([np.nan if score is None else score for score in scores], dtype=np.float64)


def centred(scores: np.ndarray) -> np.ndarray:
    """Minus the mean of what is known; NaN stays. Equal scores give exactly 0, which rounding would not."""
    found = scores[~np.isnan(scores)]
    if not len(found) or found.min() == found.max():
        return scores * 0.0
    return scores - found.mean()


def standardised(scores: np.ndarray) -> np.ndarray:
    """(r - mean) / (std + 1e-4) with the sample standard deviation (ddof 1); a lone score becomes 0."""
    if (~np.isnan(scores)).sum() < 2:
        return centred(scores)
    return centred(scores) / (np.nanstd(scores, ddof=1) + STD_EPSILON)


@dataclass(frozen=True, slots=True)
class Ones:
    """1 for every completion that has a score."""

    def __call__(self, groups: Sequence[Scored], state: dict[str, Any]) -> list[np.ndarray]:
        """Advantages per group, float64 ``[G]``."""
        return [np.where(np.isnan(known(group.scores)), np.nan, 1.0) for group in groups]


@dataclass(frozen=True, slots=True)
class Reward:
    """r - b.

    Attributes:
        baseline: b; with ``memory`` its value at the start.
        memory: Share of b that is kept when the mean score of a step enters it; None for a constant b. A step's own
            scores enter after its advantages are made, so that the gradient stays unbiased.
    """

    baseline: float = 0.0
    memory: float | None = None

    def __call__(self, groups: Sequence[Scored], state: dict[str, Any]) -> list[np.ndarray]:
        """Advantages per group, float64 ``[G]``."""
        baseline = float(state.get("baseline", self.baseline))
        scores = [known(group.scores) for group in groups]
        together = np.concatenate(scores) if scores else np.empty(0)
        if self.memory is not None and (~np.isnan(together)).any():
            state["baseline"] = self.memory * baseline + (1 - self.memory) * float(np.nanmean(together))
        return [values - baseline for values in scores]


@dataclass(frozen=True, slots=True)
class Group:
    """r - mean of the group, over its standard deviation unless ``std`` is False."""

    std: bool = True

    def __call__(self, groups: Sequence[Scored], state: dict[str, Any]) -> list[np.ndarray]:
        """Advantages per group, float64 ``[G]``."""
        make = standardised if self.std else centred
        return [make(known(group.scores)) for group in groups]


@dataclass(frozen=True, slots=True)
class BatchStd:
    """r - mean of the group, over the standard deviation of all scores of the step."""

    def __call__(self, groups: Sequence[Scored], state: dict[str, Any]) -> list[np.ndarray]:
        """Advantages per group, float64 ``[G]``."""
        scores = [known(group.scores) for group in groups]
        together = np.concatenate(scores) if scores else np.empty(0)
        several = (~np.isnan(together)).sum() > 1
        spread = float(np.nanstd(together, ddof=1)) if several else 0.0
        return [centred(values) / (spread + STD_EPSILON) for values in scores]


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """r minus the mean of the other completions, which is G / (G - 1) times r minus the mean of all."""

    def __call__(self, groups: Sequence[Scored], state: dict[str, Any]) -> list[np.ndarray]:
        """Advantages per group, float64 ``[G]``."""
        out = []
        for group in groups:
            scores = known(group.scores)
            count = int((~np.isnan(scores)).sum())
            out.append(centred(scores) * (count / (count - 1) if count > 1 else 1.0))
        return out


@dataclass(frozen=True, slots=True)
class AllDrawn:
    """r minus the share of positive ones among all that were drawn of the prompt, those not kept included."""

    def __call__(self, groups: Sequence[Scored], state: dict[str, Any]) -> list[np.ndarray]:
        """Advantages per group, float64 ``[G]``."""
        return [
            known(group.scores) - group.positive / group.drawn if group.drawn else centred(known(group.scores))
            for group in groups
        ]


@dataclass(frozen=True, slots=True)
class NormThenSum:
    """Each reward function standardised inside the group, then their weighted sum standardised over the step."""

    def __call__(self, groups: Sequence[Scored], state: dict[str, Any]) -> list[np.ndarray]:
        """Advantages per group, float64 ``[G]``."""
        sums = [_weighted(group) for group in groups]
        together = np.concatenate(sums) if sums else np.empty(0)
        if (~np.isnan(together)).sum() < 2:
            return sums
        mean, spread = float(np.nanmean(together)), float(np.nanstd(together, ddof=1))
        return [(values - mean) / (spread + STD_EPSILON) for values in sums]


def _weighted(group: Scored) -> np.ndarray:
    """Weighted sum of standardised rewards; one that does not apply adds nothing to a completion that has another."""
    if not group.components:
        return standardised(known(group.scores))
    parts = np.stack([standardised(known(part)) for part in group.components])
    total = np.nansum(parts * np.array(group.weights)[:, None], axis=0)
    return np.where(np.isnan(parts).all(axis=0), np.nan, total)


# By the name in ``loss.advantage``.
ADVANTAGES: dict[str, Callable[[], Advantage]] = {
    "ones": Ones,
    "reward": Reward,
    "group": Group,
    "group_nostd": lambda: Group(std=False),
    "batch_std": BatchStd,
    "rloo": LeaveOneOut,
    "global_stat": AllDrawn,
    "norm_then_sum": NormThenSum,
}
