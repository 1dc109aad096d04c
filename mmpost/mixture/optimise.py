"""The best mixture of a predictor, and the mixtures that are worth the next runs, within limits on every weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from mmpost.core.errors import MmpostError
from mmpost.core.seeding import generator
from mmpost.mixture.designs import CONCENTRATIONS
from mmpost.mixture.predict import GaussianProcess, Predictor, expected_improvement

POOL = 20_000
_STARTS = 8
# Believed runs closer than this would be the same run again.
MIN_DISTANCE = 0.02


@dataclass(frozen=True, slots=True)
class Limits:
    """Smallest and largest weight of every source, float64 ``[m]`` each.

    Raises:
        MmpostError: MMP-V025 when no mixture is within them.
    """

    low: np.ndarray
    high: np.ndarray

    def __post_init__(self) -> None:
        fine = (self.low >= 0).all() and (self.high <= 1).all() and (self.low <= self.high).all()
        if not fine or self.low.sum() > 1 + 1e-9 or self.high.sum() < 1 - 1e-9:
            raise MmpostError(
                "MMP-V025",
                f"no mixture has weights between {_shown(self.low)} and {_shown(self.high)}.",
                "Lower --floor; floors add up to 1 at most.",
            )

    @classmethod
    def floor(cls, m: int, least: float = 0.0) -> Limits:
        """At least ``least`` of every source."""
        return cls(np.full(m, least), np.ones(m))

    def contains(self, weights: np.ndarray) -> np.ndarray:
        """Which mixtures ``[k, m]`` are within, bool ``[k]``."""
        return np.all((weights >= self.low - 1e-9) & (weights <= self.high + 1e-9), axis=1)


def _shown(values: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


def pool(limits: Limits, *, seed: int, count: int = POOL) -> np.ndarray:
    """Candidates within the limits, about ``[count, m]``: inside, on every kind of face, and the corners.

    A Dirichlet draw is never on a face of the simplex, where the best mixture often is, so a third of the
    candidates uses a random part of the sources only.
    """
    m = len(limits.low)
    rng = generator(seed, "mixture/pool", m)
    inside = [rng.dirichlet(np.full(m, a), size=count * 2 // 9) for a in CONCENTRATIONS]
    size = count // 3
    keys = rng.random((size, m))
    kept = keys <= np.sort(keys, axis=1)[np.arange(size), rng.integers(0, m, size=size), None]
    parts = np.where(kept, rng.exponential(size=(size, m)), 0.0)
    faces = parts / parts.sum(1, keepdims=True)
    shares = np.concatenate([np.eye(m), np.full((1, m), 1 / m), *inside, faces])
    spare = 1 - limits.low.sum()
    candidates = limits.low + spare * shares
    over = candidates > limits.high
    if over.any():
        candidates = np.array([_within(row, limits) for row in candidates])
    return candidates


def _within(row: np.ndarray, limits: Limits) -> np.ndarray:
    """A mixture whose too large weights are cut and given to the others in proportion to their room."""
    cut = np.clip(row, limits.low, limits.high)
    room = limits.high - cut
    missing = 1 - cut.sum()
    return cut + room * (missing / room.sum()) if missing > 1e-12 else cut


def maximise(
    value: Callable[[np.ndarray], np.ndarray], limits: Limits, *, seed: int, candidates: np.ndarray | None = None
) -> np.ndarray:
    """Mixture ``[m]`` with the largest value: the best of a pool, improved from several starts.

    Args:
        value: From mixtures ``[k, m]`` to numbers ``[k]``.
        limits: Smallest and largest weights.
        seed: Of the pool.
        candidates: Another pool, within the limits.
    """
    points = pool(limits, seed=seed) if candidates is None else candidates
    scores = value(points)
    order = np.argsort(-scores, kind="stable")
    best, best_score = points[order[0]], float(scores[order[0]])
    bounds = list(zip(limits.low, limits.high, strict=True))
    total = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like}
    scale = float(np.ptp(scores)) or 1.0  # SLSQP's tolerance is absolute
    for start in points[order[:_STARTS]]:
        found = minimize(
            lambda w: -float(value(w[None])[0]) / scale, start, bounds=bounds, constraints=total, method="SLSQP"
        ).x
        row = np.clip(found, limits.low, limits.high)
        row = _within(row / row.sum(), limits)
        if limits.contains(row[None])[0] and float(value(row[None])[0]) > best_score:
            best, best_score = row, float(value(row[None])[0])
    return best


def optimum(predictor: Predictor, limits: Limits, *, seed: int = 0) -> np.ndarray:
    """Mixture ``[m]`` with the highest expected score."""
    return maximise(lambda w: predictor.predict(w)[0], limits, seed=seed)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A mixture that is worth a run.

    Attributes:
        weights: ``[m]``.
        mean: Expected score before any of the proposals is run.
        sd: Its standard deviation.
        gain: Expected improvement at the time of choice; 0 for other strategies.
    """

    weights: np.ndarray
    mean: float
    sd: float
    gain: float


def propose(
    predictor: Predictor,
    tried: np.ndarray,
    limits: Limits,
    n: int,
    *,
    strategy: str = "ei",
    seed: int = 0,
) -> list[Proposal]:
    """The next mixtures, best first.

    Args:
        predictor: Fitted; ``ei`` with more than one proposal needs the Gaussian process.
        tried: Mixtures that were run ``[n, m]``.
        limits: Smallest and largest weights.
        n: How many, at least 1.
        strategy: ``ei`` expected improvement over the best expected score so far, each proposal believed before the
            next is chosen; ``mean`` the highest expected scores, apart from each other.
        seed: Of the candidates.

    Raises:
        MmpostError: MMP-C006 for an unknown strategy.
    """
    if strategy not in ("ei", "mean"):
        raise MmpostError("MMP-C006", f"unknown name '{strategy}' among strategies.", "Known: ei, mean")
    candidates = pool(limits, seed=seed)
    chosen: list[Proposal] = []
    model, seen = predictor, tried
    for _ in range(n):
        free = candidates
        if chosen:
            far = [np.abs(candidates - p.weights).max(1) >= MIN_DISTANCE for p in chosen]
            free = candidates[np.all(far, axis=0)]
        if not len(free):
            break
        best = float(model.predict(seen)[0].max())
        if strategy == "ei":
            weights = _best_by_improvement(model, best, free, limits, seed, first=not chosen)
            gain = float(expected_improvement(*model.predict(weights[None]), best)[0])
        elif chosen:
            weights, gain = free[int(np.argmax(predictor.predict(free)[0]))], 0.0
        else:
            weights, gain = optimum(predictor, limits, seed=seed), 0.0
        mean, sd = predictor.predict(weights[None])
        chosen.append(Proposal(weights, float(mean[0]), float(sd[0]), gain))
        if strategy == "ei" and isinstance(model, GaussianProcess):
            model, seen = model.believe(weights), np.vstack([seen, weights])
    return chosen


def _best_by_improvement(
    model: Predictor, best: float, free: np.ndarray, limits: Limits, seed: int, *, first: bool
) -> np.ndarray:
    def gain(w: np.ndarray) -> np.ndarray:
        return expected_improvement(*model.predict(w), best)

    if first:
        return maximise(gain, limits, seed=seed, candidates=free)
    return free[int(np.argmax(gain(free)))]


def paper_candidates(predictor: Predictor, tried: np.ndarray, k: int, *, seed: int, count: int = POOL) -> np.ndarray:
    """The paper's proposals ``[k, m]``: normal draws around the tried mixtures, the best k by prediction.

    Draws with a negative weight are dropped and the rest divided by their sum. For comparison; ``propose`` is better.
    Source: MoDoMoDo, arXiv 2505.24871, algorithm of the model-based strategy.
    """
    rng = generator(seed, "mixture/paper")
    draws = rng.multivariate_normal(tried.mean(0), np.cov(tried.T), size=count, check_valid="ignore")
    inside = draws[(draws >= 0).all(1)]
    shares = inside / inside.sum(1, keepdims=True)
    return shares[np.argsort(-predictor.predict(shares)[0], kind="stable")[:k]]
