"""GRPO for several rewards: each is standardised by itself before they are summed.

    A_i = standardise_batch( sum_f w_f (r_if - mean_f) / std_f ),  mean_f and std_f inside the group

Different combinations of rewards with the same sum stay apart, which the standardised sum would merge.

Source: "GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization", arXiv
2601.05242.
Differs: standard deviations get 1e-4 added, as in TRL.
"""

from mmpost.train.advantages import NormThenSum
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
    parts = Parts(aggregate="seq_mean", denominator=OLD, stabilise=(Clip(epsilon, epsilon_high),))
    return Method(rollout=parts, advantage=NormThenSum())
