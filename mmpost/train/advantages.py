"""Rewards of a group to one advantage per completion.

Sources: GRPO, arXiv 2402.03300 equation 3 (``group``); Dr. GRPO, arXiv 2503.20783 (``group_nostd``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# Added to the standard deviation, outside the root, as TRL does; the paper has no epsilon.
STD_EPSILON = 1e-4


def group(scores: np.ndarray) -> np.ndarray:
    """(r - mean) / (std + 1e-4) with the sample standard deviation (ddof 1)."""
    return (scores - scores.mean()) / (scores.std(ddof=1) + STD_EPSILON) if len(scores) > 1 else np.zeros_like(scores)


def group_nostd(scores: np.ndarray) -> np.ndarray:
    """r - mean."""
    return scores - scores.mean()


def ones(scores: np.ndarray) -> np.ndarray:
    """1 for every row: demonstrations."""
    return np.ones_like(scores)


ADVANTAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"group": group, "group_nostd": group_nostd, "ones": ones}


def of_group(name: str, scores: Sequence[float | None]) -> np.ndarray:
    """Advantages of one group, float64 ``[G]``; a completion without a score gets NaN and does not train."""
    values = np.array([np.nan if score is None else score for score in scores], dtype=np.float64)
    known = ~np.isnan(values)
    out = np.full(len(values), np.nan)
    if known.any():
        out[known] = ADVANTAGES[name](values[known])
    return out
