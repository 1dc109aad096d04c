"""Length-unbiased sequence policy optimisation: GSPO with each completion's loss times its length.

    J = 1/G sum_i |o_i| min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i)

Source: "Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length Variation in RLVR",
arXiv 2602.05261.
Differs: the clip distances are GSPO's; the paper's own were not checked.
"""

from mmpost.train.advantages import Group
from mmpost.train.denominators import SEQUENCE
from mmpost.train.method import Method
from mmpost.train.parts import Parts
from mmpost.train.stabilisers import Clip


def preset(epsilon: float = 3e-4, epsilon_high: float | None = 4e-4) -> Method:
    """Parts of completions.

    Args:
        epsilon: Clip below 1 - epsilon.
        epsilon_high: Clip above 1 + epsilon_high; None for ``epsilon``.
    """
    parts = Parts(aggregate="seq_sum", denominator=SEQUENCE, stabilise=(Clip(epsilon, epsilon_high),))
    return Method(rollout=parts, advantage=Group())
