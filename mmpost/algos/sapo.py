"""Soft adaptive policy optimisation: a gate without edges in place of the clip.

    J = 1/G sum_i 1/|o_i| sum_t 4/tau sigmoid(tau (rho - 1)) A_i,  tau = 1.0 for A > 0, else 1.05

Its gradient is 4 s (1 - s) rho A grad log pi with s = sigmoid(tau (rho - 1)), which is 1 at rho = 1.

Source: "Soft Adaptive Policy Optimization", arXiv 2511.20347.
Differs: nothing in the loss.
"""

from mmpost.train.advantages import Group
from mmpost.train.denominators import OLD
from mmpost.train.method import Method
from mmpost.train.parts import Parts
from mmpost.train.stabilisers import Sapo


def preset(positive: float = 1.0, negative: float = 1.05) -> Method:
    """Parts of completions.

    Args:
        positive: tau of positive advantages.
        negative: tau of the others.
    """
    parts = Parts(aggregate="seq_mean", denominator=OLD, stabilise=(Sapo(positive, negative),))
    return Method(rollout=parts, advantage=Group())
