"""The vote of one group: which class of answers wins, by which rule, and how clearly. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from mmpost.core.seeding import uniform

Ties = Literal["likelier", "first", "skip"]


def winner(
    classes: Sequence[int | None],
    mean_logp: Sequence[float | None],
    *,
    ties: Ties = "likelier",
    min_support: int = 2,
) -> int | None:
    """Class with the most members, or None.

    Args:
        classes: Per completion the index of the first member of its class; None for one without an answer, which
            neither votes nor wins.
        mean_logp: Per completion the mean log-probability of its tokens, nats; None and NaN are the least likely.
        ties: Of classes of equal size, ``likelier`` takes the one whose members have the higher mean log-probability,
            and of those the one seen first; ``first`` the one seen first; ``skip`` none.
        min_support: A class with fewer members does not win.
    """
    counts = Counter(name for name in classes if name is not None)
    most = max(counts.values(), default=0)
    if most < min_support or not most:
        return None
    tied = sorted(name for name, count in counts.items() if count == most)
    if len(tied) == 1 or ties == "first":
        return tied[0]
    if ties == "skip":
        return None

    def likelihood(name: int) -> float:
        values = [logp for one, logp in zip(classes, mean_logp, strict=True) if one == name]
        return math.fsum(-math.inf if v is None or math.isnan(v) else v for v in values) / len(values)

    # max keeps the first of equals, and ``tied`` is in the order of the first members.
    return max(tied, key=likelihood)


def released(answers: Sequence[str | None]) -> str:
    """Most frequent string, the first seen of equally frequent ones; no answer is the string ``None``.

    This is the vote of the release of arXiv 2505.22453, in which completions without an answer can win.
    """
    return Counter("None" if answer is None else answer for answer in answers).most_common(1)[0][0]


def random_class(classes: Sequence[int | None], *, seed: int, uid: int) -> int | None:
    """A class drawn evenly from those that the group has: the control experiment of a vote."""
    names = sorted({name for name in classes if name is not None})
    return names[int(uniform(seed, "random_vote", uid) * len(names))] if names else None


def shares(classes: Sequence[int | None]) -> list[float]:
    """Sizes of the classes over the number of answers, largest first; empty without answers."""
    counts = Counter(name for name in classes if name is not None)
    return [count / counts.total() for _, count in counts.most_common()]


def agreement(classes: Sequence[int | None]) -> float:
    """Size of the largest class over all completions, those without an answer included, in [0, 1]."""
    counts = Counter(name for name in classes if name is not None)
    return max(counts.values(), default=0) / len(classes)


def entropy(classes: Sequence[int | None]) -> float:
    """Entropy of the answers over their classes, nats; 0 without answers."""
    return -math.fsum(share * math.log(share) for share in shares(classes)) + 0.0
