"""Adaptive sampling: prompts stay active in rounds until their completions tell right from wrong.

    A_i = r_i - p,   p = right answers / completions over all that were drawn of the prompt, those not kept included

Of the completions of a prompt n are kept, half of them right as far as there are enough of either kind. Advantages do
not add up to 0 over the kept ones, which is meant: the baseline is a better estimate of the policy's success than n
completions that were chosen to be balanced.

Source: "Reinforce-Ada: An Adaptive Sampling Framework for Reinforce-Style LLM Training", arXiv 2510.04996, and its
release. There: at most 4 rounds of 8 completions, n 4, right is a reward above 0.7, clip 0.2 and 0.28 with a dual clip
of 10, batch 512 in mini-batches of 128, learning rate 1e-6, no penalty.
Differs: the first completions of either kind in generation order are kept. Set ``grpo.num_generations: 4`` for n.
"""

from typing import Literal

from mmpost.train.advantages import AllDrawn
from mmpost.train.denominators import OLD
from mmpost.train.draw import Adaptive
from mmpost.train.method import Method
from mmpost.train.parts import Parts
from mmpost.train.stabilisers import Clip, Dual


def preset(
    epsilon: float = 0.2,
    epsilon_high: float | None = 0.28,
    dual: float = 10.0,
    rounds: int = 4,
    per_round: int = 8,
    rule: Literal["balanced", "positive_focused"] = "balanced",
    threshold: float = 0.7,
) -> Method:
    """Parts of completions.

    Args:
        epsilon: Clip below 1 - epsilon.
        epsilon_high: Clip above 1 + epsilon_high; None for ``epsilon``.
        dual: Largest ratio of a completion with a negative advantage.
        rounds: Rounds at most.
        per_round: Completions per active prompt and round.
        rule: When a prompt needs no further round; see ``train.draw.Adaptive``.
        threshold: A reward above it is a right answer.
    """
    return Method(
        rollout=Parts(aggregate="token", denominator=OLD, stabilise=(Clip(epsilon, epsilon_high), Dual(dual))),
        advantage=AllDrawn(),
        draw=Adaptive(threshold=threshold, rounds=rounds, per_round=per_round, rule=rule),
    )
