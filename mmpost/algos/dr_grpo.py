"""GRPO without its two biases.

    A_i = r_i - mean(r)
    J   = 1/(G L) sum_i sum_t min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i)

L is a constant, the longest completion allowed, so that long wrong answers are not punished less per token; without
the standard deviation, questions that are too easy or too hard do not weigh more.

Source: "Understanding R1-Zero-Like Training: A Critical Perspective", arXiv 2503.20783, section 3. There: G 8, eps 0.2,
L 3000, learning rate 1e-6, no KL.
Differs: L is ``grpo.max_completion_length``.
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
    parts = Parts(aggregate="const", denominator=OLD, stabilise=(Clip(epsilon, epsilon_high),))
    return Method(rollout=parts, advantage=Group(std=False))
