"""Proximal policy optimisation, clipped, without a critic.

    J = E[ min(rho A, clip(rho, 1 - eps, 1 + eps) A) ],  rho = pi / pi_old, eps = 0.2

Source: "Proximal Policy Optimization Algorithms", arXiv 1707.06347, equation 7.
Differs: there is no value function, hence no generalised advantage estimation. All tokens of a completion have the
advantage r - b, which is what lambda = 1, gamma = 1 and a constant value give; b is the mean of the prompt's
completions (``baseline: group``) or the running mean of earlier steps (``baseline: running``). Set
``loss.kl.kl=k1_reward`` and ``loss.kl.beta`` for the penalty that RLHF takes off the reward.
"""

from typing import Literal

from mmpost.train.advantages import Group, Reward
from mmpost.train.denominators import OLD
from mmpost.train.method import Method
from mmpost.train.parts import Parts
from mmpost.train.stabilisers import Clip


def preset(
    epsilon: float = 0.2, epsilon_high: float | None = None, baseline: Literal["group", "running"] = "group"
) -> Method:
    """Parts of completions.

    Args:
        epsilon: Clip below 1 - epsilon.
        epsilon_high: Clip above 1 + epsilon_high; None for ``epsilon``.
        baseline: What is taken off the score.
    """
    parts = Parts(aggregate="token", denominator=OLD, stabilise=(Clip(epsilon, epsilon_high),))
    return Method(rollout=parts, advantage=Group(std=False) if baseline == "group" else Reward(memory=0.9))
