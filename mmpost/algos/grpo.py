"""Group relative policy optimisation.

    A_i = (r_i - mean(r)) / std(r) inside the group of a prompt
    J   = 1/G sum_i 1/|o_i| sum_t min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta KL(pi || pi_ref)

with rho = pi / pi_old and eps = 0.2. The gradient of the minimum is rho A where the unclipped branch decides and 0
elsewhere, which is what the ``Clip`` stabiliser says.

Source: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", arXiv 2402.03300,
equations 3 and 4.
Differs: beta is 0 unless asked for (paper: 0.04; TRL: 0), and the penalty's default estimator is ``k2``, whose gradient
is that of KL(pi || pi_ref); ``loss.kl.kl=k3`` is the paper's. The standard deviation gets 1e-4 added, as in TRL.
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
    parts = Parts(aggregate="seq_mean", denominator=OLD, stabilise=(Clip(epsilon, epsilon_high),))
    return Method(rollout=parts, advantage=Group())
