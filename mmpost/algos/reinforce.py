"""REINFORCE over whole completions.

    grad J = E[ (r - b) sum_t grad log pi(y_t) ],  so  kappa = (r - b) / R

b is the running mean of earlier steps' scores, so that it does not depend on the completions that it is taken off.

Source: Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", 1992.
Differs: nothing. With several optimiser steps per rollout batch it is off-policy after the first; use a method with
``old`` then.
"""

from mmpost.train.advantages import Reward
from mmpost.train.method import Method
from mmpost.train.parts import Parts


def preset(baseline: float = 0.0, memory: float | None = 0.9) -> Method:
    """Parts of completions.

    Args:
        baseline: b at the start.
        memory: Share of b that a step keeps; None for a constant b.
    """
    return Method(rollout=Parts(aggregate="seq_sum"), advantage=Reward(baseline, memory))
