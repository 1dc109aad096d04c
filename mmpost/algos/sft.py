"""Supervised fine-tuning: maximise the likelihood of demonstrations.

    kappa = 1/N,  so  L = -(1/N) sum_m log pi(y_m | x)

pi_ref = pi (ratio 1), advantage 1, nothing masked. N counts the target tokens of the whole optimiser step, over all
processes and accumulation steps, which is the mean that transformers uses since 4.46.

Source: "Towards a Unified View of Large Language Model Post-Training", arXiv 2509.04419, Table 1, row SFT.
"""

from mmpost.train.method import Method
from mmpost.train.parts import Parts


def preset() -> Method:
    """Parts of demonstrations."""
    return Method(demo=Parts(aggregate="token"))
