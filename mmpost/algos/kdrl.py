"""Reinforcement learning and distillation in one step: GRPO with a reverse KL to a teacher.

    J = 1/N sum_i sum_t min(rho A_i, clip(rho, 1 - eps, 1 + eps_high) A_i) - beta KL(pi || pi_teacher)

on the policy's own completions. The divergence is estimated by k2, whose gradient is exact on-policy; beta falls from
5e-3 to 1e-3 on a straight line over the run; completions that are right already are not pulled towards the teacher.

Source: "KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning", arXiv
2506.02208. Unverified: its numbers were read in summaries.
Differs: "right" is a score above ``threshold``. The teacher reads the student's token ids and images, so it must be of
the same family with the same tokenizer (``loss.teacher``).
"""

from dataclasses import dataclass

from mmpost.train.advantages import Group
from mmpost.train.denominators import OLD
from mmpost.train.method import Method
from mmpost.train.parts import Kl, Parts
from mmpost.train.stabilisers import Clip


@dataclass(frozen=True, slots=True)
class NotRight:
    """Whether a completion is pulled towards the teacher: its score is not above ``threshold``."""

    threshold: float

    def __call__(self, score: float | None) -> bool:
        """True for a score up to the threshold, and for none."""
        return score is None or score <= self.threshold


def preset(
    beta: float = 5e-3,
    final_beta: float | None = 1e-3,
    threshold: float | None = 0.5,
    epsilon: float = 0.2,
    epsilon_high: float | None = 0.28,
) -> Method:
    """Parts of completions.

    Args:
        beta: Weight of the divergence at the start.
        final_beta: Weight at the end; None for ``beta``.
        threshold: Completions with a higher score are left alone; None to pull at all of them.
        epsilon: Clip below 1 - epsilon.
        epsilon_high: Clip above 1 + epsilon_high; None for ``epsilon``.
    """
    kl = Kl("k2", beta, final_beta, to="teacher", rows=None if threshold is None else NotRight(threshold))
    parts = Parts(aggregate="token", denominator=OLD, stabilise=(Clip(epsilon, epsilon_high),), kl=kl)
    return Method(rollout=parts, advantage=Group())
