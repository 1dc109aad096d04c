"""Rewards with a controlled share of wrong ones: a score r becomes 1 - r with probability p.

With advantages relative to a group, flipping all scores of a group negates its advantages exactly, so that the expected
update is (1 - 2p) times the clean one: 40 % noise learns five times slower, 50 % not at all. Flips of single
completions shrink the mean signal by the same factor (before the division by the standard deviation) and add spread
inside groups.

Source: "The Climb Carves Wisdom Deeper Than the Summit: On the Noisy Rewards in Learning to Reason", arXiv 2505.22653.
There: flips per prompt, p 0 to 0.5, PPO with a critic, 4 completions.
Differs: GRPO's parts take the place of PPO's, so that there is no critic. The default of 10 % is the most that was seen
to learn on the embedded task (docs/performance.md). A flip is a function of ``seed`` and of the
number of the prompt in the run (and of the completion), so that it does not depend on the number of processes.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmpost.core.rollout import Group as Completed
from mmpost.core.seeding import uniform
from mmpost.train.advantages import Group
from mmpost.train.denominators import OLD
from mmpost.train.method import Method
from mmpost.train.parts import Parts
from mmpost.train.stabilisers import Clip


@dataclass(frozen=True)
class Flip:
    """Scores r as 1 - r.

    Attributes:
        rate: Probability of a flip, in [0, 1].
        level: Whether all scores of a group flip together, or each by itself.
        seed: Of the flips.
    """

    rate: float
    level: Literal["group", "row"] = "group"
    seed: int = 0

    def __call__(self, group: Completed) -> list[float | None]:
        """Scores, some of them turned round."""
        scores = [rollout.score for rollout in group.rollouts]
        if self.level == "group":
            flips = np.full(len(scores), uniform(self.seed, "noisy", group.uid) < self.rate)
        else:
            flips = uniform(self.seed, "noisy", group.uid, np.arange(len(scores))) < self.rate
        return [None if s is None else 1.0 - s if flip else s for s, flip in zip(scores, flips, strict=True)]


def preset(
    rate: float = 0.1,
    level: Literal["group", "row"] = "group",
    seed: int = 0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Method:
    """Parts of completions.

    Args:
        rate: Probability that a reward is flipped.
        level: ``group`` flips all completions of a prompt together, ``row`` each by itself.
        seed: Of the flips.
        epsilon: Clip below 1 - epsilon.
        epsilon_high: Clip above 1 + epsilon_high; None for ``epsilon``.
    """
    return Method(
        rollout=Parts(aggregate="seq_mean", denominator=OLD, stabilise=(Clip(epsilon, epsilon_high),)),
        advantage=Group(),
        shape=(Flip(rate, level, seed),),
    )
