"""Intervals: Wilson for a share, paired bootstrap for a difference on the same rows, Student t over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mmpost.core import seeding

Z95 = 1.959963984540054
# 97.5 % quantiles of Student's t for 1 to 10 degrees of freedom.
T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
RESAMPLES = 2000


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % score interval of a share.

    Source: Wilson (1927), J. Am. Stat. Assoc. 22, 209-212.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # Rounding must not move an end past a share that is exactly 0 or 1.
    return max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p))


def paired_bootstrap(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], *, seed: int
) -> tuple[float, tuple[float, float]]:
    """Mean of b - a over the same rows and its 95 % percentile interval.

    Two levels: runs are drawn with replacement, then rows inside each drawn run. With one run this is the ordinary
    paired bootstrap over rows. With very few runs the interval is too narrow; ``over_seeds`` is the careful one.

    Source: stratified bootstrap over runs, "Deep RL at the Edge of the Statistical Precipice", arXiv 2108.13264.

    Args:
        a: Scores of the first model per run and row.
        b: Scores of the second model on the same runs and rows.
        seed: Of the resampling.
    """
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    runs, rows = difference.shape
    rng = seeding.generator(seed, "paired_bootstrap")
    run = rng.integers(0, runs, size=(RESAMPLES, runs, 1))
    means = difference[run, rng.integers(0, rows, size=(RESAMPLES, runs, rows))].mean((1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), (float(low), float(high))


def gain_ratio(
    start: Sequence[Sequence[float]], a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], *, seed: int
) -> tuple[float | None, tuple[float, float] | None]:
    """Share of the gain of b over the start that a has, and its 95 % percentile interval.

    Runs and rows are drawn as in ``paired_bootstrap``, the same ones for both gains. Draws in which b gains nothing
    count as an infinite share where a gains something, else as 0; an end of the interval may therefore be infinite.

    Args:
        start: Scores of the starting model per run and row.
        a: Scores after one training, same runs and rows.
        b: Scores after the training that is compared with.
        seed: Of the resampling.

    Returns:
        None for both when b gains nothing.
    """
    first = np.asarray(a, dtype=np.float64) - np.asarray(start, dtype=np.float64)
    second = np.asarray(b, dtype=np.float64) - np.asarray(start, dtype=np.float64)
    if second.mean() <= 0:
        return None, None
    runs, rows = first.shape
    rng = seeding.generator(seed, "paired_bootstrap")
    run = rng.integers(0, runs, size=(RESAMPLES, runs, 1))
    row = rng.integers(0, rows, size=(RESAMPLES, runs, rows))
    gained, reference = first[run, row].mean((1, 2)), second[run, row].mean((1, 2))
    without = np.where(gained > 0, math.inf, 0.0)
    shares = np.where(reference > 0, gained / np.where(reference > 0, reference, 1.0), without)
    # Not interpolated: between a number and infinity there is nothing.
    low, high = np.quantile(shares, [0.025, 0.975], method="nearest")
    return float(first.mean() / second.mean()), (float(low), float(high))


def over_seeds(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Mean of independent runs and its 95 % Student interval.

    Args:
        values: One number per seed, at least two.
    """
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    half = _t975(n - 1) * array.std(ddof=1) / math.sqrt(n)
    return float(array.mean()), (float(array.mean() - half), float(array.mean() + half))


def _t975(df: int) -> float:
    """97.5 % quantile of Student's t; beyond the table by its expansion around the normal one (error below 1e-4).

    Source: Abramowitz and Stegun (1964), 26.7.5.
    """
    if df <= len(T975):
        return T975[df - 1]
    z = Z95
    return (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    )
