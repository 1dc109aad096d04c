"""Unsupervised post-training: GRPO whose reward is the majority vote of the group, so that no label is read.

    r_i = 1 if answer_i equals the majority's answer, else 0        A, J as in ``grpo``, with beta 0.01 and k3

The vote is the reward ``majority_vote``, which ``mmpost upt`` puts in front of the list of rewards; with
``mmpost grpo rewards=[majority_vote]`` it goes together with any other method.

With a vote accuracy above one half the expected pseudo-label is at least as good as a single answer; below one half a
vote amplifies errors, and rows should be filtered first (``mmpost data filter``).

Source: "Unsupervised Post-Training for Multi-Modal LLM Reasoning via GRPO", arXiv 2505.22453, and its release. There:
10 completions at temperature 0.7 and top_p 0.99, batch 512 in mini-batches of 128, learning rate 1e-6, weight decay
0.01, KL 0.01 in the k3 form, 15 epochs, prompts and completions of 2048 tokens, vision tower trained.
Differs: the vote; see ``mmpost.rewards.majority_vote``.
"""

from mmpost.train.advantages import Group
from mmpost.train.denominators import OLD
from mmpost.train.method import Method
from mmpost.train.parts import Kl, Parts
from mmpost.train.stabilisers import Clip


def preset(epsilon: float = 0.2, epsilon_high: float | None = None, beta: float = 0.01) -> Method:
    """Parts of completions.

    Args:
        epsilon: Clip below 1 - epsilon.
        epsilon_high: Clip above 1 + epsilon_high; None for ``epsilon``.
        beta: Weight of the penalty for leaving the starting weights.
    """
    stabilise = (Clip(epsilon, epsilon_high),)
    parts = Parts(aggregate="seq_mean", denominator=OLD, stabilise=stabilise, kl=Kl(beta=beta, estimator="k3"))
    return Method(rollout=parts, advantage=Group())
