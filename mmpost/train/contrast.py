"""The contrast of a film with itself: what the policy answers when the frames come in another order.

Beside the completions that train, each prompt with frames gets some on a scrambled copy of itself. They are scored by
the same rewards, belong to no group and never train; only their accuracy is kept, as a note of the group.

Source: the temporal reward of T-GRPO, "Video-R1", arXiv 2503.21776.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmpost.core.rollout import Rollout
from mmpost.train.draw import Candidate, Collected, Desk, Draw

# Under this name the notes of a group hold what the contrast found.
NOTE = "contrast"


@dataclass(frozen=True)
class Contrast(Draw):
    """K prompts, n completions each, and ``share * n`` on frames in a random order.

    Attributes:
        share: Completions on the scrambled copy as a share of n, in (0, 1]; at least one.
        margin: The gate is open where the accuracy is at least this times the accuracy on the scrambled copy.
        graded: Accuracy is the mean score; else the share of right completions.
        right_above: A score above it is right.
        accuracy: Name of the reward that is the accuracy; None for the first one.
    """

    share: float = 0.5
    margin: float = 1.0
    graded: bool = False
    right_above: float = 0.5
    accuracy: str | None = None

    def score(self, rollout: Rollout) -> float | None:
        """The accuracy reward of a completion; None where it does not apply."""
        parts = rollout.score_parts
        return parts.get(self.accuracy) if self.accuracy is not None else next(iter(parts.values()), None)

    def is_right(self, rollout: Rollout) -> bool:
        """Whether the completion counts as right."""
        score = self.score(rollout)
        return score is not None and score > self.right_above

    def level(self, rollouts: Sequence[Rollout]) -> float | None:
        """Accuracy of completions; None when none has a score."""
        scores = [(self.score(rollout), self.is_right(rollout)) for rollout in rollouts]
        known = [float(score if self.graded else right) for score, right in scores if score is not None]
        return float(np.mean(known)) if known else None

    def note(self, rollouts: Sequence[Rollout], scrambled: Sequence[Rollout]) -> dict[str, Any] | None:
        """What the comparison says about a group.

        Returns:
            ``ordered`` and ``scrambled`` accuracy and whether the gate ``opens``; None when one of them is not known,
            for example for a prompt without frames.
        """
        ordered, other = self.level(rollouts), self.level(scrambled)
        if ordered is None or other is None:
            return None
        return {"ordered": ordered, "scrambled": other, "opens": ordered >= self.margin * other}

    def collect(self, desk: Desk, carried: Sequence[Candidate] = ()) -> Collected:
        """Sample and score the groups of a step and their scrambled copies.

        Returns:
            The groups; the metrics are means over prompts with frames: ``ordered``, ``scrambled``, ``gate`` (share of
            open gates) and ``gate_at_zero`` (share of gates that are open because nothing was right either way).
        """
        collected = super().collect(desk, carried)
        found = desk.scrambled(collected.candidates, max(1, round(self.share * desk.num_generations)))
        mine = []
        for candidate, rollouts in zip(collected.candidates, found, strict=True):
            note = self.note(candidate.group.rollouts, rollouts)
            if note is not None:
                candidate.group.notes = {**candidate.group.notes, NOTE: note}
                empty = note["opens"] and note["ordered"] == note["scrambled"] == 0.0
                mine.append((candidate.uid, note["ordered"], note["scrambled"], float(note["opens"]), float(empty)))
        # In the order of the prompts, so that sums do not depend on how many processes there are.
        table = sorted(desk.gather(mine))
        if table:
            names = ("ordered", "scrambled", "gate", "gate_at_zero")
            collected.metrics = dict(zip(names, np.mean(np.array(table)[:, 1:], axis=0).tolist(), strict=True))
        return collected
