"""REINFORCE with the mean of the other completions of a prompt as baseline.

    A_i = r_i - 1/(G - 1) sum_{j != i} r_j = G/(G - 1) (r_i - mean),  kappa = A_i / R

Source: "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs", arXiv
2402.14740, equation 8.
Differs: no KL in the reward unless asked for (``loss.kl.kl=k1_reward``, ``loss.kl.beta``), which then has no baseline.
"""

from mmpost.train.advantages import LeaveOneOut
from mmpost.train.method import Method
from mmpost.train.parts import Parts


def preset() -> Method:
    """Parts of completions."""
    return Method(rollout=Parts(aggregate="seq_sum"), advantage=LeaveOneOut())
