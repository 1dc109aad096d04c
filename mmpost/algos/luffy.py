"""Learning from off-policy demonstrations: each demonstration takes part in its group, its tokens are reshaped.

    A_i = (r_i - mean) / std over the n completions and the demonstration of a prompt
    completions    rho A with rho = pi / pi_old, no clip
    demonstrations f(pi) A with f(x) = x / (x + gamma): kappa = gamma pi / (pi + gamma)^2 A

f takes weight from tokens that are likely already and gives it to unlikely ones; the behaviour policy of a
demonstration is not known and counts as 1.

Source: "Learning to Reason under Off-Policy Guidance", arXiv 2504.14945, equations 4 to 8. There: 7 completions and 1
demonstration per prompt, gamma 0.1, sums over tokens divided by a constant (as Dr. GRPO).
Differs: completions and demonstrations are averaged by themselves, so that ``demo_weight`` 1/7 gives a demonstration
the weight of one of 7 completions; the whole is then 8/7 of the paper's mean. Set ``grpo.num_generations: 7``, and
``demo_weight`` to one over it. A prompt without a demonstration goes on with its completions and is counted as
``demo/missing``. The reward of a demonstration is what the reward functions give to its text.
"""

from mmpost.train.advantages import Group
from mmpost.train.denominators import OLD, ONE
from mmpost.train.method import Method
from mmpost.train.parts import Parts
from mmpost.train.stabilisers import Luffy


def preset(gamma: float = 0.1, demo_weight: float = 1 / 7, std: bool = True) -> Method:
    """Parts of completions and of demonstrations.

    Args:
        gamma: Constant of the reshaping.
        demo_weight: Factor on the demonstrations' share of the loss.
        std: Divide advantages by the standard deviation.
    """
    return Method(
        rollout=Parts(aggregate="const", denominator=OLD),
        demo=Parts(aggregate="const", denominator=ONE, stabilise=(Luffy(gamma),)),
        advantage=Group(std=std),
        joins=True,
        demo_weight=demo_weight,
    )
