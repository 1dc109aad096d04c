"""Decoupled clip and dynamic sampling policy optimisation.

    J = E[ 1/sum|o_i| sum_i sum_t min(rho A_i, clip(rho, 1 - 0.2, 1 + 0.28) A_i) ],  A_i = (r_i - mean) / std
        subject to 0 < number of right answers of the group < G

Four switches on top of GRPO without a penalty: the upper clip distance is wider (rare tokens may grow), the mean is
over tokens, groups without spread are replaced by further prompts (``train.draw.Dynamic``), and completions that get
near the length limit L are punished by

    0 for n <= L - L_c,   ((L - L_c) - n) / L_c in between,   -1 for n > L.

Source: "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv 2503.14476, equations 8 to 13. There: G
16, 512 prompts, 16 updates per rollout batch, learning rate 1e-6, L = 20480, L_c = 4096, rewards -1 and 1.
Differs: L is ``grpo.max_completion_length`` and L_c a share of it. With rewards 0 and 1 the full punishment weighs
twice what it does in the paper; ``penalty: 0.5`` is its ratio. Groups beyond K are dropped unless ``carry`` is set, and
with ``grpo.mini_batches`` above 1 each mini-batch is filled by itself. Set ``grpo.mask_truncated_completions`` for the
paper's overlong filtering instead of the punishment (``penalty: 0``); the scores of such completions stay in their
group's mean.
"""

from dataclasses import dataclass, replace

from mmpost.config.schema import GrpoSection
from mmpost.core.rollout import Group as Completed
from mmpost.train.advantages import Group
from mmpost.train.denominators import OLD
from mmpost.train.draw import Draw, Dynamic
from mmpost.train.method import Method
from mmpost.train.parts import Parts
from mmpost.train.stabilisers import Clip


@dataclass(frozen=True)
class Overlong:
    """Takes up to ``penalty`` off the scores of completions near the length limit.

    Attributes:
        share: L_c as a share of the limit, in (0, 1].
        penalty: Largest punishment.
        max_length: L in tokens; None until ``bind`` sets it.
    """

    share: float = 0.2
    penalty: float = 1.0
    max_length: int | None = None

    def bind(self, section: GrpoSection) -> "Overlong":
        """With the limit of the run."""
        return replace(self, max_length=self.max_length or section.max_completion_length)

    def punishment(self, length: int) -> float:
        """Between -1 and 0."""
        assert self.max_length is not None
        window = self.share * self.max_length
        return min(0.0, max(-1.0, (self.max_length - window - length) / window))

    def __call__(self, group: Completed) -> list[float | None]:
        """Scores with the punishment of each completion's length."""
        return [
            None if rollout.score is None else rollout.score + self.penalty * self.punishment(len(rollout.tokens))
            for rollout in group.rollouts
        ]


def preset(
    epsilon: float = 0.2,
    epsilon_high: float | None = 0.28,
    dynamic: bool = True,
    max_rounds: int = 10,
    carry: bool = False,
    overlong: float = 0.2,
    penalty: float = 1.0,
) -> Method:
    """Parts of completions.

    Args:
        epsilon: Clip below 1 - epsilon.
        epsilon_high: Clip above 1 + epsilon_high; None for ``epsilon``.
        dynamic: Replace groups without spread.
        max_rounds: Rounds of prompts per step at most.
        carry: Train surplus groups in the next step.
        overlong: L_c as a share of ``grpo.max_completion_length``.
        penalty: Largest punishment of length; 0 for none.
    """
    return Method(
        rollout=Parts(aggregate="token", denominator=OLD, stabilise=(Clip(epsilon, epsilon_high),)),
        advantage=Group(),
        shape=(Overlong(overlong, penalty),) if penalty else (),
        draw=Dynamic(max_rounds=max_rounds, carry=carry) if dynamic else Draw(),
    )
