"""Anchored supervised fine-tuning: DFT held near the starting weights.

    L = -(1/N) sum_m sg(pi_m) log pi_m + weight * (1/N) sum_m KL(p_start || p_policy)(m)

The divergence is over the whole vocabulary at each target position.

Source: "Anchored Supervised Fine-Tuning", arXiv 2509.23753; the direction of the divergence and its weight are those of
the release (scripts: 0.1, README: 0.05), learning rate 2e-5, 3 epochs.
Differs: the paper's text has KL(p_policy || p_start), which is ``direction: reverse``.
"""

from typing import Literal

from mmpost.train.denominators import ONE
from mmpost.train.method import Method
from mmpost.train.parts import Parts
from mmpost.train.soft import Soft


def preset(weight: float = 0.1, direction: Literal["forward", "reverse"] = "forward") -> Method:
    """Parts of demonstrations.

    Args:
        weight: Of the divergence; 0 is DFT.
        direction: ``forward`` KL(start || policy), ``reverse`` KL(policy || start).
    """
    kind: Literal["forward_kl", "reverse_kl"] = "forward_kl" if direction == "forward" else "reverse_kl"
    return Method(demo=Parts(aggregate="token", denominator=ONE), soft=(Soft(kind, weight, rows="demo"),))
