"""Q-Tuning: prune rows and tokens of each batch by how wrong and how unsure the model is about them.

Per row: perplexity ppl (error) and mean entropy H (uncertainty), from one forward pass. With Q the quantiles over the
batch

    misconceptions  ppl > Q_{1-a}(ppl) and H <= Q_a(H)          calibration  ppl <= Q_a(ppl) and H > Q_{1-a}(H)

a in [0, 0.49] is found by bisection so that both together are ``data_ratio`` of the rows; rows with the largest |ppl -
H| fill up the number, each as what it is nearer to. Calibration rows are kept whole. Misconceptions lose the tokens
with the largest

    s_t = (1 - l) ppl_t + l (ppl_{t-1} + ppl_{t+1}),   ppl_t = 1 / pi(y_t)

until ``data_ratio * token_ratio`` of the batch's tokens are left. What is left is trained as in supervised fine-tuning.

Source: "Winning the Pruning Gamble: A Unified Approach to Joint Sample and Token Pruning for Efficient Supervised
Fine-Tuning", arXiv 2509.23873. There: l 0.5, learning rate 5e-5, 3 epochs; 12.5 to 25 % of the rows, 70 % of the
tokens.
Differs: decisions are made over the batch of all processes. A token at the end of a row stands in for its missing
neighbour. Each misconception loses the same share of its tokens and keeps at least one.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmpost.train.method import Method
from mmpost.train.parts import Parts

# Quantiles of fewer rows mean little.
FEW = 8
_LARGEST = 0.49
_ROUNDS = 10


def quadrants(error: np.ndarray, doubt: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Masks of misconceptions and of calibration rows.

    Args:
        error: Perplexity per row.
        doubt: Mean entropy per row, nats.
        level: a.
    """
    error_low, error_high = np.quantile(error, [level, 1 - level])
    doubt_low, doubt_high = np.quantile(doubt, [level, 1 - level])
    return (error > error_high) & (doubt <= doubt_low), (error <= error_low) & (doubt > doubt_high)


def choose(error: np.ndarray, doubt: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Misconceptions and calibration rows that train: the share ``ratio`` of all, at least one."""
    wanted = max(1, round(ratio * len(error)))
    low, high = 0.0, _LARGEST
    wrong = right = np.zeros(len(error), dtype=bool)
    for _ in range(_ROUNDS):
        level = (low + high) / 2
        found = quadrants(error, doubt, level)
        count = int((found[0] | found[1]).sum())
        if count > wanted:
            high = level
            continue
        low, (wrong, right) = level, found
        if count == wanted:
            break
    gap = np.where(wrong | right, -np.inf, np.abs(error - doubt))
    extra = np.argsort(-gap, kind="stable")[: wanted - int((wrong | right).sum())]
    more = np.zeros(len(error), dtype=bool)
    more[extra] = True
    return wrong | (more & (error > doubt)), right | (more & (error <= doubt))


def token_scores(logp: np.ndarray, weight: float) -> np.ndarray:
    """s of each token of a row, ``[n]``."""
    each = np.exp(-np.asarray(logp, dtype=np.float64).clip(-50))
    padded = np.concatenate([each[:1], each, each[-1:]])
    return (1 - weight) * each + weight * (padded[:-2] + padded[2:])


@dataclass(frozen=True)
class Prune:
    """Masks of the positions that train.

    Attributes:
        data_ratio: Share of rows that train, in (0, 1].
        token_ratio: Share of their tokens that train, in (0, 1].
        weight: l, of the neighbours.
    """

    data_ratio: float = 0.25
    token_ratio: float = 0.7
    weight: float = 0.5

    def __call__(self, table: Mapping[str, Any]) -> Sequence[np.ndarray]:
        """Per row a bool ``[n]``, from ``logp`` and ``entropy`` of all rows of the step, nats."""
        logps: list[np.ndarray] = table["logp"]
        if not logps:
            return []
        if len(logps) < FEW:
            warnings.warn(f"q_tuning: quantiles of {len(logps)} rows mean little; use 8 rows or more", stacklevel=2)
        error = np.array([np.exp(-np.mean(logp, dtype=np.float64).clip(-50)) for logp in logps])
        doubt = np.array([np.mean(entropy, dtype=np.float64) for entropy in table["entropy"]])
        wrong, right = choose(error, doubt, self.data_ratio)
        sizes = np.array([len(logp) for logp in logps])
        budget = sizes.sum() * self.data_ratio * self.token_ratio - sizes[right].sum()
        share = min(1.0, max(0.0, budget / max(sizes[wrong].sum(), 1)))
        return [
            self._row(logp, share) if wrong[i] else np.full(len(logp), bool(right[i])) for i, logp in enumerate(logps)
        ]

    def _row(self, logp: np.ndarray, share: float) -> np.ndarray:
        """The tokens of a misconception that stay: those with the smallest scores."""
        kept = np.zeros(len(logp), dtype=bool)
        kept[np.argsort(token_scores(logp, self.weight), kind="stable")[: max(1, round(share * len(logp)))]] = True
        return kept


def preset(data_ratio: float = 0.25, token_ratio: float = 0.7, weight: float = 0.5) -> Method:
    """Parts of demonstrations.

    Args:
        data_ratio: Share of rows that train.
        token_ratio: Share of their tokens that train.
        weight: Of the neighbours in a token's score.
    """
    return Method(demo=Parts(aggregate="token"), keep=Prune(data_ratio, token_ratio, weight))
