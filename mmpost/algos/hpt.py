"""Hybrid post-training: a prompt that the policy fails is trained on its demonstration, any other one by RL.

    P = number of right answers among the n completions of a prompt
    (alpha, beta) = (0, 1) if P <= gamma else (1, 0),      L = alpha L_RL + beta L_SFT

L_RL is that of Dr. GRPO without a clip: A = r - mean, sums over tokens divided by the length limit. L_SFT is the mean
over the tokens of the step's demonstrations. A failed prompt without a demonstration is left out and counted as
``demo/missing``; it is never trained by RL.

Source: "Towards a Unified View of Large Language Model Post-Training", arXiv 2509.04419, section 4. There: n 8, 128
prompts, gamma 0 (Qwen2.5-Math) or 2 (Llama-3.1-8B), learning rate 5e-6, entropy bonus 0.001, demonstrations weighted
1.0 (1.5B: 0.3), gradient norm clipped at 80.
Differs: the release divides the RL loss by the length limit alone; here it is divided by the number of completions,
too. A right answer is one with a reward above ``threshold``.
"""

from mmpost.train.advantages import Group
from mmpost.train.denominators import OLD
from mmpost.train.draw import THRESHOLD, Draw
from mmpost.train.method import Method
from mmpost.train.parts import Parts
from mmpost.train.soft import Soft


def preset(gamma: int = 0, demo_weight: float = 1.0, entropy: float = 0.001, threshold: float = THRESHOLD) -> Method:
    """Parts of completions and of demonstrations.

    Args:
        gamma: Right answers up to which a prompt is trained on its demonstration; -1 is RL alone, n is SFT alone.
        demo_weight: Factor on the demonstrations' share of the loss.
        entropy: Weight of the entropy bonus on completions.
        threshold: A reward above it is a right answer.
    """
    return Method(
        rollout=Parts(aggregate="const", denominator=OLD),
        demo=Parts(aggregate="token"),
        advantage=Group(std=False),
        draw=Draw(threshold=threshold),
        gate=lambda scored: scored.positive <= gamma,
        demo_weight=demo_weight,
        soft=(Soft("entropy", entropy, rows="rollout"),) if entropy else (),
    )
