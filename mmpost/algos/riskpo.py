"""Risk-based policy optimisation: credit follows the lower part of the distribution of bundle scores.

B different questions make a bundle; its j-th paper is the j-th completion of each, with the score s = sum of its B
rewards. With the running quantiles q_a, q_b of paper scores at the levels alpha and beta,

    RVaR = ((s - q_a)+ - (s - q_b)+ + natural (q_a - q_b)) / (beta - alpha),    CVaR = -(q_a - s)+ / alpha
    A    = (w CVaR + RVaR) / (w + 1)

A paper's A goes back to its completions by ``credit``:

    uniform        A
    std            A / (std of the question's rewards + 1e-6)
    score          A times 0.5 if the completion is right, else 1.5
    sum_mean       A d / sum(d), d = r - mean of the question's rewards; A / B when |sum(d)| < 1e-6
    sum_mean_safe  the same, but A / B when sum(d) < 0.5 sum|d|

Source: "RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training", arXiv 2510.00911, and its
release. There: B 5, n 10, alpha 0.2, beta 0.8, w 1.5, quantiles tracked at a rate of 0.1 (DAPO-math: sum_mean; MATH:
beta 0.9, n 5, std, natural), clip 0.2, learning rate 1e-6, no penalty.
Differs: ``sum_mean_safe`` is the default, because the signed sum of the release can turn credit round: deviations (0.1,
-0.2) of a right and a wrong answer give shares (-1, 2). Questions that are left over make a smaller bundle whose scores
are scaled by B over its size. A completion without a reward is left out of its paper, likewise scaled.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mmpost.train.advantages import known
from mmpost.train.denominators import OLD
from mmpost.train.method import Method, Scored
from mmpost.train.parts import Parts
from mmpost.train.stabilisers import Clip

Credit = Literal["uniform", "std", "score", "sum_mean", "sum_mean_safe"]


@dataclass(frozen=True)
class Risk:
    """Advantages of papers, shared out to completions. Its state is the two quantiles.

    Attributes:
        bundle: Questions of a bundle.
        alpha: Lower level.
        beta: Upper level.
        weight: w.
        credit: How a paper's advantage reaches its completions.
        natural: Whether RVaR is measured from the upper quantile, so that every advantage is at most 0.
        normalise: Whether advantages are divided by their standard deviation over the papers of a bundle.
        rate: Step size of the quantiles.
    """

    bundle: int = 5
    alpha: float = 0.2
    beta: float = 0.8
    weight: float = 1.5
    credit: Credit = "sum_mean_safe"
    natural: bool = False
    normalise: bool = False
    rate: float = 0.1

    def of_papers(self, scores: np.ndarray, low: float, high: float) -> np.ndarray:
        """A of each paper score, given the quantiles."""

        def above(level: float) -> np.ndarray:
            return np.maximum(scores - level, 0.0)

        shift = low - high if self.natural else 0.0
        middle = (above(low) - above(high) + shift) / (self.beta - self.alpha)
        tail = -np.maximum(low - scores, 0.0) / self.alpha
        return (self.weight * tail + middle) / (self.weight + 1)

    def track(self, scores: np.ndarray, state: dict[str, Any]) -> None:
        """Move the quantiles towards those of the scores."""
        for name, level in (("low", self.alpha), ("high", self.beta)):
            state[name] += self.rate * (level - float((scores < state[name]).mean()))

    def __call__(self, groups: Sequence[Scored], state: dict[str, Any]) -> list[np.ndarray]:
        """Credit per group; moves the quantiles and logs them."""
        bundles = [_table(groups[i : i + self.bundle]) for i in range(0, len(groups), self.bundle)]
        papers = [self._paper_scores(rewards) for rewards in bundles]
        together = np.concatenate(papers) if papers else np.empty(0)
        together = together[~np.isnan(together)]
        if not together.size:
            return [np.full(len(group.scores), np.nan) for group in groups]
        if "low" not in state:
            state["low"], state["high"] = (float(np.quantile(together, q)) for q in (self.alpha, self.beta))
        out: list[np.ndarray] = []
        uniform = 0
        for rewards, scores in zip(bundles, papers, strict=True):
            advantages = self.of_papers(scores, state["low"], state["high"])
            if self.normalise:
                advantages = advantages / (np.nanstd(advantages) + 1e-6)
            shares, evenly = self._shares(rewards)
            uniform += evenly
            out.extend(np.where(np.isnan(rewards), np.nan, shares * advantages))
        log = {"quantile_low": state["low"], "quantile_high": state["high"]}
        log |= {"even_share": uniform / together.size, "left_over": float(len(groups) % self.bundle)}
        self.track(together, state)
        state["log"] = log
        return [values[: len(group.scores)] for values, group in zip(out, groups, strict=True)]

    def _paper_scores(self, rewards: np.ndarray) -> np.ndarray:
        """Sum of the rewards of each paper ``[G]``, scaled to ``bundle`` questions; NaN for a paper without any."""
        count = (~np.isnan(rewards)).sum(axis=0)
        total = np.nansum(rewards, axis=0) * self.bundle
        return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)

    def _shares(self, rewards: np.ndarray) -> tuple[np.ndarray, int]:
        """Factor of the paper's advantage at each completion ``[questions, G]``, and papers that fell back to 1 / B."""
        questions = len(rewards)
        if self.credit == "uniform":
            return np.ones_like(rewards), 0
        if self.credit == "score":
            return np.where(rewards > 0, 0.5, 1.5), 0
        with warnings.catch_warnings():
            # A question without any reward has no mean; it does not train either.
            warnings.simplefilter("ignore", RuntimeWarning)
            if self.credit == "std":
                return np.broadcast_to(1 / (np.nanstd(rewards, axis=1, keepdims=True) + 1e-6), rewards.shape), 0
            off = rewards - np.nanmean(rewards, axis=1, keepdims=True)
        total = np.nansum(off, axis=0)
        even = np.abs(total) < 1e-6
        if self.credit == "sum_mean_safe":
            even |= total < 0.5 * np.nansum(np.abs(off), axis=0)
        return np.where(even, 1 / questions, off / np.where(even, 1.0, total)), int(even.sum())


def _table(groups: Sequence[Scored]) -> np.ndarray:
    """Rewards ``[questions, G]``; NaN where there is none."""
    width = max(len(group.scores) for group in groups)
    return np.stack([np.pad(known(g.scores), (0, width - len(g.scores)), constant_values=np.nan) for g in groups])


def preset(
    bundle: int = 5,
    alpha: float = 0.2,
    beta: float = 0.8,
    weight: float = 1.5,
    credit: Credit = "sum_mean_safe",
    natural: bool = False,
    normalise: bool = False,
    rate: float = 0.1,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Method:
    """Parts of completions.

    Args:
        bundle: Questions of a bundle.
        alpha: Lower level.
        beta: Upper level.
        weight: w.
        credit: How a paper's advantage reaches its completions.
        natural: Measure RVaR from the upper quantile; every advantage is then at most 0.
        normalise: Divide by the standard deviation over the papers of a bundle.
        rate: Step size of the quantiles.
        epsilon: Clip below 1 - epsilon.
        epsilon_high: Clip above 1 + epsilon_high; None for ``epsilon``.
    """
    if natural:
        warnings.warn("riskpo with natural: every advantage is at most 0, so that nothing is reinforced", stacklevel=2)
    return Method(
        rollout=Parts(aggregate="token", denominator=OLD, stabilise=(Clip(epsilon, epsilon_high),)),
        advantage=Risk(bundle, alpha, beta, weight, credit, natural, normalise, rate),
    )
