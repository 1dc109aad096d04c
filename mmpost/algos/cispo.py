"""Clipped importance sampling: the ratio is cut, the gradient is not.

    J = 1/N sum_i sum_t sg(min(rho, cap)) A_i log pi,  A_i as in GRPO

A token whose ratio is large keeps a gradient of cap * A, where PPO's clip would leave it none.

Source: "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", arXiv 2506.13585, equations 4 and
5; the cap of 5 is ScaleRL's, arXiv 2510.13786.
Differs: there is no lower limit unless ``low`` is given.
"""

from mmpost.train.advantages import Group
from mmpost.train.denominators import capped
from mmpost.train.method import Method
from mmpost.train.parts import Parts


def preset(cap: float = 5.0, low: float | None = None) -> Method:
    """Parts of completions.

    Args:
        cap: Largest ratio.
        low: Smallest ratio; None for no limit.
    """
    return Method(rollout=Parts(aggregate="token", denominator=capped(cap, low)), advantage=Group())
