r"""From votes to labels: the rule of AudioMCQ, and one that tells knowing from guessing.

Paper: a row is weak when at least two of three models answer it on silence, else strong; one vote each.
Source: "Measuring Audio's Impact on Correctness: Audio-Contribution-Aware Post-Training of Large Audio Language
Models", arXiv 2509.21060. For another number of models: more than half of them.

Three models that guess among K options call a strong row weak with probability 3 (1/K)^2 (1 - 1/K) + (1/K)^3, which is
15.6 % for K = 4. The robust rule (our own) asks each model several times, and a row is weak when

* the votes of all models under all nulls are right more often than chance, by a one-sided test at 5 %, or
* more than half of the models are right in at least three quarters of theirs.

Chance of a vote is 1/K for a question with K options, and never less than

* the share of the row's answer among all rows: what a constant answer reaches;
* the share of the row's answer among all that the model answers under the same null: a model that has the same word for
  every silence is right about all rows with that answer, and knows nothing.

Votes with different chances are added up exactly (their sum has a Poisson binomial distribution). Rows that are not
weak are ``harmful`` when they are answered better without the medium (Fisher's exact test, 5 %), ``hard`` when not even
chance is reached with it, and ``strong`` otherwise: reinforcement learning gets no signal from the hard ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mmpost.contribution.score import WITH
from mmpost.core.sample import Sample
from mmpost.eval.stats import wilson

Label = Literal["weak", "strong", "hard", "harmful", "unscored"]
LABELS: tuple[Label, ...] = ("weak", "strong", "hard", "harmful", "unscored")
RULES = ("robust", "paper")
ALPHA = 0.05
SURE = 0.75
# Columns that hold the options of a multiple-choice question.
_OPTION_COLUMNS = ("options", "choices")


@dataclass(frozen=True, slots=True)
class Votes:
    """Right and asked votes of one model under one condition."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Share of right votes; 0 without votes."""
        return self.right / max(self.asked, 1)


def tally(record: Mapping[str, Any]) -> dict[str, Votes]:
    """Votes by condition of one model's record; votes without a score do not count."""
    counts = {}
    for name, entry in record.items():
        known = [vote for vote in entry["right"] if vote is not None]
        counts[name] = Votes(sum(known), len(known))
    return counts


def paper(votes: Sequence[Votes]) -> Literal["weak", "strong"]:
    """Label by the votes of each model without the medium; several votes of a model count as their majority."""
    right = sum(2 * one.right > one.asked for one in votes)
    return "weak" if 2 * right > len(votes) else "strong"


def answered(models: Sequence[Sequence[tuple[Votes, float]]]) -> bool:
    """Whether models know the answer without the medium rather than guess it.

    Args:
        models: Of each model and null the votes, and the probability that one of them is right by chance.
    """
    sums = [_pooled([votes for votes, _ in one]) for one in models]
    sure = sum(one.asked > 0 and one.right >= SURE * one.asked for one in sums)
    if 2 * sure > len(models):
        return True
    total = _pooled(sums)
    return total.asked > 0 and tail(total.right, [(v.asked, p) for one in models for v, p in one]) <= ALPHA


def robust(
    with_medium: Sequence[Votes],
    without: Mapping[str, Sequence[Votes]],
    chance: float,
    chances: Mapping[str, Sequence[float]] | None = None,
) -> Label:
    """Label by the votes of each model with the medium, and by null without it.

    Args:
        with_medium: Of each model.
        without: By null, of each model.
        chance: Probability of a right guess with the medium.
        chances: The same by null and model; default ``chance`` for all.
    """
    if not sum(one.asked for one in with_medium):
        return "unscored"
    level = chances or {null: [chance] * len(votes) for null, votes in without.items()}
    cells = [[(votes[m], level[null][m]) for null, votes in without.items()] for m in range(len(with_medium))]
    if answered(cells):
        return "weak"
    full = _pooled(with_medium)
    bare = _pooled([one for votes in without.values() for one in votes])
    if bare.share > full.share and fisher_tail(bare, full) <= ALPHA:
        return "harmful"
    return "hard" if full.share <= chance else "strong"


def _pooled(votes: Sequence[Votes]) -> Votes:
    return Votes(sum(one.right for one in votes), sum(one.asked for one in votes))


def tail(right: int, guesses: Sequence[tuple[int, float]]) -> float:
    """Probability of at least ``right`` right guesses.

    Args:
        right: How many.
        guesses: (number of guesses, probability of each being right).
    """
    counts = np.ones(1)
    for asked, p in guesses:
        for _ in range(asked):
            counts = np.convolve(counts, [1.0 - p, p])
    return float(math.fsum(counts[right:]))


def fisher_tail(one: Votes, other: Votes) -> float:
    """Probability that ``one`` has at least so many of the right votes of both, if both are equally good.

    Source: Fisher (1935), J. R. Stat. Soc. 98, 39-54.
    """
    total, right = one.asked + other.asked, one.right + other.right
    ways = math.comb(total, one.asked)
    most = min(right, one.asked)
    return math.fsum(
        math.comb(right, x) * math.comb(total - right, one.asked - x) / ways for x in range(one.right, most + 1)
    )


def difference(full: Votes, bare: Votes) -> tuple[float, float]:
    """95 % interval of the share of right votes with minus without.

    Source: Newcombe (1998), Statistics in Medicine 17, 873-890, method 10.
    """
    (low1, high1), (low2, high2) = wilson(full.right, full.asked), wilson(bare.right, bare.asked)
    gap = full.share - bare.share
    below = math.hypot(full.share - low1, high2 - bare.share)
    above = math.hypot(high1 - full.share, bare.share - low2)
    return max(-1.0, gap - below), min(1.0, gap + above)


def chances(rows: Sequence[Sample]) -> list[tuple[int | None, float]]:
    """Number of options of each row, None for an open question, and the probability of a right guess."""
    golds = [_key(row.columns.get("solution")) for row in rows]
    counts = Counter(golds)
    found = []
    for row, gold in zip(rows, golds, strict=True):
        options = next((row.columns[name] for name in _OPTION_COLUMNS if row.columns.get(name)), None)
        number = len(options) if isinstance(options, Sequence | Mapping) and not isinstance(options, str) else None
        found.append((number, max(1 / number if number else 0.0, counts[gold] / len(rows))))
    return found


def _key(gold: Any) -> str:
    return str(gold).strip().casefold()


def habits(rows: Sequence[Sample], answers: Sequence[str]) -> list[float]:
    """Of each row, the share of all rows to which a model says this row's answer.

    Args:
        rows: All rows.
        answers: What one model says to each of them under one null.
    """
    counts = Counter(map(_key, answers))
    return [counts[_key(row.columns.get("solution"))] / len(rows) for row in rows]


def record(
    row: Sample,
    models: Mapping[str, Mapping[str, Any]],
    nulls: Sequence[str],
    options: int | None,
    chance: float,
    habit: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """The line of ``scores.jsonl`` of a row.

    Args:
        row: The row.
        models: Record of ``score_rows`` by name of the model.
        nulls: Names, the first one for the paper's rule unless silence is among them.
        options: Number of options, None for an open question.
        chance: Probability of a right guess.
        habit: By null, of each model what ``habits`` says about the row.
    """
    votes = {name: tally(one) for name, one in models.items()}
    with_medium = [one[WITH] for one in votes.values()]
    without = {null: [one[null] for one in votes.values()] for null in nulls}
    full, bare = _pooled(with_medium), _pooled([one for each in without.values() for one in each])
    level = {null: [max(chance, one) for one in (habit or {}).get(null, [0.0] * len(models))] for null in nulls}
    label = robust(with_medium, without, chance, level)
    chosen = next((null for null in nulls if null.startswith("silence")), nulls[0])
    gap = full.share - bare.share
    return {
        "id": row.id,
        "origin": row.origin,
        "source": row.source,
        "solution": row.columns.get("solution"),
        "options": options,
        "chance": chance,
        "with": full.share,
        "without": bare.share,
        "by_null": {null: _pooled(each).share for null, each in without.items()},
        "contribution": gap,
        # As of a model that guesses wherever it does not know.
        "corrected": gap / (1 - chance) if chance < 1 else gap,
        "interval": list(difference(full, bare)),
        "paper": "unscored" if label == "unscored" else paper(without[chosen]),
        "robust": label,
        "models": {name: dict(one) for name, one in models.items()},
    }
