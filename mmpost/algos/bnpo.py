"""GRPO with the mean over the tokens of each forward pass, then over forward passes.

    J = 1/P sum_p 1/N_p sum_(i, t in p) min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i)

It depends on ``train.per_device_train_batch_size`` and on which rows go together, unlike every other method here, and
is kept to compare with.

Source: the loss that TRL calls ``bnpo`` (no paper; the one of that name, arXiv 2506.02864, is about something else).
Differs: completions with an advantage of 0 are not run, so they are not in N_p.
"""

from mmpost.train.advantages import Group
from mmpost.train.denominators import OLD
from mmpost.train.method import Method
from mmpost.train.parts import Parts
from mmpost.train.stabilisers import Clip


def preset(epsilon: float = 0.2, epsilon_high: float | None = None) -> Method:
    """Parts of completions.

    Args:
        epsilon: Clip below 1 - epsilon.
        epsilon_high: Clip above 1 + epsilon_high; None for ``epsilon``.
    """
    parts = Parts(aggregate="micro_token", denominator=OLD, stabilise=(Clip(epsilon, epsilon_high),))
    return Method(rollout=parts, advantage=Group())
