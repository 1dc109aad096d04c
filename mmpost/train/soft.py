"""Terms over the whole vocabulary at each trained position: distance to another model, entropy bonus.

They are computed where the logits are, chunk by chunk of the language-model head, so that logits of all positions
never exist together.

Sources: ASFT, arXiv 2509.23753 (forward KL to the starting weights); entropy bonus as in PPO, arXiv 1707.06347.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Soft:
    """One term. It is averaged over positions as the policy part of its rows is.

    Attributes:
        kind: ``forward_kl`` KL(other || policy), ``reverse_kl`` KL(policy || other), ``entropy`` of the policy.
        weight: At least 0. Times a KL it is added to the loss; times the entropy it is taken off.
        to: The other model: the starting weights or the teacher. An entropy has none.
        rows: Which rows it acts on.
    """

    kind: Literal["forward_kl", "reverse_kl", "entropy"]
    weight: float
    to: Literal["reference", "teacher"] = "reference"
    rows: Literal["all", "rollout", "demo"] = "all"

    @property
    def sign(self) -> float:
        """Of the term in the loss."""
        return -1.0 if self.kind == "entropy" else 1.0
