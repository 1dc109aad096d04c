"""The paper's hand-made mixtures: weights straight from the scores of singles, leave-one-out and uniform runs.

Source: MoDoMoDo, arXiv 2505.24871, section on heuristic strategies. The "No1" variants are not implemented, because
the paper does not define them, and it does not report ``alpha_single``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmpost.core.errors import MmpostError
from mmpost.mixture.records import MixtureRecord, matrix, rounded


def alpha(
    member: np.ndarray, in_score: np.ndarray, out_score: np.ndarray, weight: float, *, alpha_single: float = 0.5
) -> np.ndarray:
    """Sources by the summed scores of the runs that they were in.

    Args:
        member: 1 where a run used a source, ``[runs, m]``.
        in_score: Score on the sources' own tests, ``[runs]``.
        out_score: Score on unseen tests, ``[runs]``.
        weight: Share of the in-score, 0 to 1: the paper's A_in is 1, A_bal 0.5, A_out 0.
        alpha_single: Factor on runs with one source; 0.5 is our choice.

    Returns:
        Weights ``[m]``.
    """
    factor = np.where(member.sum(1) == 1, alpha_single, 1.0)
    sums = [_min_max(member.T @ (factor * score)) for score in (in_score, out_score)]
    total = weight * sums[0] + (1 - weight) * sums[1]
    return _shares(total)


def coli(member: np.ndarray, out_score: np.ndarray, *, ridge: float = 1e-3) -> tuple[np.ndarray, np.ndarray]:
    """Sources by their ridge coefficient over its variance factor.

    Args:
        member: 1 where a run used a source, ``[runs, m]``.
        out_score: Score, ``[runs]``.
        ridge: Added to the diagonal.

    Returns:
        Weights ``[m]``, and the variance factors ``[m]``, which are all equal on a symmetric design.
    """
    inverse = np.linalg.inv(member.T @ member + ridge * np.eye(member.shape[1]))
    beta, factors = inverse @ member.T @ out_score, np.diag(inverse)
    return _shares(np.maximum(0.0, beta / factors)), factors


def norm(score_without: np.ndarray) -> np.ndarray:
    """Less of a source the better the run without it was, but never less than half of another.

    Args:
        score_without: Score of the run without source i, ``[m]``.

    Returns:
        Weights ``[m]``. For five sources this is the paper's ``0.2 - 0.1 u``.
    """
    m = len(score_without)
    return _shares((1 - _min_max(score_without) / 2) / m)


def heuristics(records: Sequence[MixtureRecord], target: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Mixtures from earlier runs: ``norm``, ``coli`` and ``alpha`` (the score counts as in- and out-score).

    Args:
        records: Runs of a ``seeds`` design among others.
        target: Score by the record's label.

    Raises:
        MmpostError: MMP-V026 when a leave-one-out run is missing.
    """
    names = list(records[0].weights) if records else []
    lacking = [name for name in names if f"without {name}" not in target] if len(names) > 2 else []
    if not names or lacking or len(names) == 2:
        words = f"without {', '.join(lacking)}" if lacking else "of three or more sources"
        raise MmpostError(
            "MMP-V026",
            f"heuristic mixtures need the scores of all leave-one-out runs; there are none {words}.",
            "Run mmpost mixture design --scheme seeds and its runs first, then --results FOLDER.",
        )
    known = [record for record in records if record.label in target]
    scores = np.array([target[record.label] for record in known])
    member = (matrix(known) > 1e-6).astype(np.float64)
    # Only even mixtures are records of the paper's kind.
    even = np.array([record.label.startswith(("single ", "without ", "uniform")) for record in known])
    without = np.array([target[f"without {name}"] for name in names])
    found = {
        "norm": norm(without),
        "coli": coli(member[even], scores[even])[0],
        "alpha": alpha(member[even], scores[even], scores[even], 0.5),
    }
    return {key: dict(zip(names, rounded(weights), strict=True)) for key, weights in found.items()}


def _min_max(values: np.ndarray) -> np.ndarray:
    span = float(np.ptp(values))
    return (values - values.min()) / span if span > 0 else np.zeros_like(values)


def _shares(values: np.ndarray) -> np.ndarray:
    total = float(values.sum())
    return values / total if total > 0 else np.full(len(values), 1 / len(values))
