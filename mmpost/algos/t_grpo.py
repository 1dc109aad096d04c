"""GRPO that pays for the order of frames: a right answer earns more where the order helps.

    p   = accuracy of the G completions of the film        p~ = of G/2 completions of the film with shuffled frames
    r_t = alpha if p >= margin p~, else 0                  R_i = r_i + r_t where completion i is right, else r_i

and omega more for right completions of a length in [shortest, longest]. Advantages, clip and penalty are those of
``grpo``; completions of the shuffled film are never trained on, and prompts without a film have no r_t. Frames are
shuffled before they are joined into pairs, once per prompt; their times stay sorted.

Source: "Video-R1: Reinforcing Video Reasoning in MLLMs", arXiv 2503.21776, section 3 (``variant=paper``: margin 1, p is
the share of right completions), and its release (``released``: margin 0.8, p is the mean accuracy reward, right is one
above 0.1, and omega is paid only where more than one completion is right). There: alpha 0.3, omega 0.2 for 320 to 512
tokens, 8 completions at temperature 1 and top_p 0.95, learning rate 1e-6, KL 0.04 in the k3 form.
Differs: the release computes log-probabilities under other positions than it samples with, retries failed passes
without pixels and replaces broken media; here nothing of that happens. Its log-ratio in the penalty is clamped to 10.
In the paper right is 1 and wrong is 0; above ``right_above`` counts as right here, so that graded rewards work, too.

Where a group's total reward takes two values the bonus changes nothing: r_t maps them to two others, and dividing by
the standard deviation undoes that (tests/unit/test_t_grpo.py). ``std: false`` keeps its effect.
"""

from dataclasses import dataclass
from typing import Literal

from mmpost.core.rollout import Group as Completed
from mmpost.train.advantages import Group
from mmpost.train.contrast import NOTE, Contrast
from mmpost.train.denominators import OLD
from mmpost.train.method import Method
from mmpost.train.parts import Kl, Parts
from mmpost.train.stabilisers import Clip


@dataclass(frozen=True)
class Bonus:
    """Adds r_t and omega to the scores of right completions.

    Attributes:
        contrast: Says what is right; it also left the note about the gate.
        alpha: r_t where the gate is open.
        omega: Bonus for a length in [shortest, longest].
        shortest: Tokens.
        longest: Tokens.
        right_needed: Right completions of a group from which on omega is paid.
    """

    contrast: Contrast
    alpha: float = 0.3
    omega: float = 0.2
    shortest: int = 320
    longest: int = 512
    right_needed: int = 1

    def __call__(self, group: Completed) -> list[float | None]:
        """Scores with the bonuses."""
        right = [self.contrast.is_right(rollout) for rollout in group.rollouts]
        note = group.notes.get(NOTE)
        temporal = self.alpha if note is not None and note["opens"] else 0.0
        omega = self.omega if sum(right) >= self.right_needed else 0.0
        out: list[float | None] = []
        for rollout, is_right in zip(group.rollouts, right, strict=True):
            if rollout.score is None or not is_right:
                out.append(rollout.score)
            else:
                fits = self.shortest <= len(rollout.tokens) <= self.longest
                out.append(rollout.score + temporal + (omega if fits else 0.0))
        return out


def preset(
    variant: Literal["paper", "released"] = "paper",
    alpha: float = 0.3,
    omega: float = 0.2,
    shortest: int = 320,
    longest: int = 512,
    share: float = 0.5,
    margin: float | None = None,
    right_above: float | None = None,
    accuracy: str | None = None,
    std: bool = True,
    beta: float = 0.04,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Method:
    """Parts of completions.

    Args:
        variant: ``paper`` or ``released``; see above.
        alpha: Bonus of right completions where the order of frames helps.
        omega: Bonus of right completions of a length in [shortest, longest]; 0 for none.
        shortest: Tokens.
        longest: Tokens.
        share: Completions on shuffled frames as a share of ``grpo.num_generations``.
        margin: Of the gate; None for the variant's.
        right_above: A completion whose accuracy reward is above it is right; None for 0.5 (paper) or 0.1 (released).
        accuracy: Name of the reward that is the accuracy; None for the first one of the run.
        std: Divide by the standard deviation of the group.
        beta: Weight of the penalty for leaving the starting weights.
        epsilon: Clip below 1 - epsilon.
        epsilon_high: Clip above 1 + epsilon_high; None for ``epsilon``.

    Raises:
        ValueError: A share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; expected a value in (0, 1]")
    released = variant == "released"
    contrast = Contrast(
        share=share,
        margin=margin if margin is not None else 0.8 if released else 1.0,
        graded=released,
        right_above=right_above if right_above is not None else 0.1 if released else 0.5,
        accuracy=accuracy,
    )
    parts = Parts(
        aggregate="seq_mean",
        denominator=OLD,
        stabilise=(Clip(epsilon, epsilon_high),),
        kl=Kl(beta=beta, estimator="k3"),
    )
    bonus = Bonus(contrast, alpha, omega, shortest, longest, right_needed=2 if released else 1)
    return Method(rollout=parts, advantage=Group(std=std), shape=(bonus,), draw=contrast)
