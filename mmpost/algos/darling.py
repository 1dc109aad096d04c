"""Diversity-aware reinforcement learning: a good completion earns more the fewer others say the same.

    d_i = (G - |cluster of i|) / (G - 1), at least 0.1        r_i = quality_i d_i        A_i = r_i - mean(r)

Clusters are what is connected by pairs of completions that mean the same (a ~ b, b ~ c: one cluster).

Source: "Jointly Reinforcing Diversity and Quality in Language Model Generations", arXiv 2509.02534, and its release.
There: pairs by a trained classifier, texts of up to 5 words by their words; G 8; math: 256 prompts, learning rate 1e-6,
no penalty; chat: 64 prompts, KL 0.001.
Differs: no classifier comes with mmpost. ``partition`` says when two texts mean the same: ``exact`` (the same words),
``ngram`` (half of their word pairs in common; up to 5 words: half of their words), ``answer`` (the same extracted
answer) or ``file.py:function`` of your own, from two texts to a bool. Factors below 1 would reward repetition where
quality is negative, so quality is first shifted by the lowest one of the group when that is below 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mmpost.core.catalog import Catalog
from mmpost.core.rollout import Group as Completed
from mmpost.rewards.answers import same
from mmpost.rewards.cluster import clusters
from mmpost.rewards.extract import extract
from mmpost.train.advantages import Group
from mmpost.train.denominators import OLD
from mmpost.train.method import Method
from mmpost.train.parts import Parts
from mmpost.train.stabilisers import Clip

# Texts of up to so many words are compared by single words.
SHORT = 5

Partition = Callable[[str, str], bool]
PARTITIONS = {name: f"mmpost.algos.darling:same_{name}" for name in ("exact", "ngram", "answer")}


def same_exact(first: str, second: str) -> bool:
    """The same words, apart from case."""
    return first.casefold().split() == second.casefold().split()


def same_ngram(first: str, second: str) -> bool:
    """At least half of all different word pairs in common (of words, when one text has at most 5)."""
    one, two = first.casefold().split(), second.casefold().split()
    size = 1 if min(len(one), len(two)) <= SHORT else 2
    grams = [{tuple(words[i : i + size]) for i in range(len(words) - size + 1)} for words in (one, two)]
    union = grams[0] | grams[1]
    return not union or len(grams[0] & grams[1]) >= 0.5 * len(union)


def same_answer(first: str, second: str) -> bool:
    """The same extracted answer; texts without one are different."""
    return same(extract(first), extract(second))


@dataclass(frozen=True)
class Diverse:
    """Quality times diversity.

    Attributes:
        partition: Whether two texts mean the same.
        floor: Lowest factor.
        correct_only: Whether only completions with a quality above 0 are compared; the others keep their quality.
    """

    partition: Partition
    floor: float = 0.1
    correct_only: bool = False

    def __call__(self, group: Completed) -> list[float | None]:
        """Quality, shifted to at least 0, times diversity."""
        scores = [rollout.score for rollout in group.rollouts]
        lowest = min(0.0, *(score for score in scores if score is not None), 0.0)
        out = [None if score is None else score - lowest for score in scores]
        counted = [i for i, s in enumerate(out) if s is not None and (s > 0 or not self.correct_only)]
        names = clusters([group.rollouts[i].text for i in counted], self.partition)
        for i, name in zip(counted, names, strict=True):
            quality = out[i]
            assert quality is not None
            diversity = (len(names) - names.count(name)) / (len(names) - 1) if len(names) > 1 else 1.0
            out[i] = quality * max(self.floor, diversity)
        return out


def preset(
    partition: str = "ngram",
    floor: float = 0.1,
    correct_only: bool = False,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Method:
    """Parts of completions.

    Args:
        partition: ``exact``, ``ngram``, ``answer``, or ``file.py:function``.
        floor: Lowest factor.
        correct_only: Compare completions with a quality above 0 only.
        epsilon: Clip below 1 - epsilon.
        epsilon_high: Clip above 1 + epsilon_high; None for ``epsilon``.
    """
    return Method(
        rollout=Parts(aggregate="token", denominator=OLD, stabilise=(Clip(epsilon, epsilon_high),)),
        advantage=Group(std=False),
        shape=(Diverse(Catalog("partitions", PARTITIONS).get(partition), floor, correct_only),),
    )
