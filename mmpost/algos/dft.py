"""Dynamic fine-tuning: demonstrations weighted by their own probability.

    L = -(1/N) sum_m sg(pi_m) log pi_m,  so  kappa = pi / N

pi_ref = 1 makes the ratio pi itself: the gradient is that of -(1/N) sum pi, which does not blow up on tokens that the
model finds unlikely, as that of -log pi does.

Source: "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification", arXiv
2508.05629, equation 9. There: Qwen2.5-Math on NuminaMath, learning rate 5e-5, batch 256, one epoch.
Differs: nothing in the loss. The authors warn that it does not help everywhere.
"""

from mmpost.train.denominators import ONE
from mmpost.train.method import Method
from mmpost.train.parts import Parts


def preset() -> Method:
    """Parts of demonstrations."""
    return Method(demo=Parts(aggregate="token", denominator=ONE))
