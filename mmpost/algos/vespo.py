"""Variational sequence-level soft policy optimisation: completions weighted by a smooth function of their ratio.

    J = 1/N sum_i sum_t sg(phi(W_i)) A_i log pi,  W_i = pi(o_i) / pi_old(o_i),  phi(W) = e^lambda W^k e^(-lambda W)

(k, lambda) is (2, 3) for A >= 0, else (3, 2); phi(1) = 1.

Source: "VESPO: Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM Training", arXiv
2602.10693.
Differs: the weight for the mismatch of another engine (``loss.mismatch``) multiplies phi instead of entering W.
"""

from mmpost.train.advantages import Group
from mmpost.train.method import Method
from mmpost.train.parts import Parts
from mmpost.train.stabilisers import Vespo


def preset(
    k_positive: float = 2.0, lambda_positive: float = 3.0, k_negative: float = 3.0, lambda_negative: float = 2.0
) -> Method:
    """Parts of completions.

    Args:
        k_positive: Exponent for advantages of at least 0.
        lambda_positive: Decay for advantages of at least 0.
        k_negative: Exponent for negative advantages.
        lambda_negative: Decay for negative advantages.
    """
    weights = Vespo(k_positive, lambda_positive, k_negative, lambda_negative)
    return Method(rollout=Parts(aggregate="token", stabilise=(weights,)), advantage=Group())
