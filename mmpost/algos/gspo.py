"""Group sequence policy optimisation: one ratio per completion.

    s_i = (pi(o_i) / pi_old(o_i))^(1/|o_i|)
    J   = 1/G sum_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i),  A_i as in GRPO

Its gradient is s_i A_i times the mean of grad log pi over the completion, hence ``seq_mean``.

Source: "Group Sequence Policy Optimization", arXiv 2507.18071, equations 5 to 7. There: eps_low 3e-4, eps_high 4e-4, 4
mini-batches per rollout batch, no KL.
Differs: nothing in the loss; set ``grpo.mini_batches: 4`` for the paper's updates.
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
    parts = Parts(aggregate="seq_mean", denominator=SEQUENCE, stabilise=(Clip(epsilon, epsilon_high),))
    return Method(rollout=parts, advantage=Group())
