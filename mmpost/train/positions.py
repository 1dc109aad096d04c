"""What is known of each trained position when its coefficient is made, and sums over the positions of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Positions:
    """Trained positions of a micro-batch, detached; ``[M]`` where nothing else is said.

    Rows are whole: all trained positions of a row are in one micro-batch, so that sums over rows mean something.

    Attributes:
        logp: Log-probability under the policy, nats.
        old: Under the policy that is held fixed while a rollout batch is used; equal to ``logp`` on-policy.
        advantage: Of the position's row.
        row: Row of the position, int64, sorted.
        lengths: Trained positions of each row, int64 ``[rows]``.
        reference: Under the starting weights, or None when nothing asks for it.
        teacher: Under the teacher, or None.
        engine: As the rollout engine reported it, or None. Not finite where the engine gave nothing.
        entropy: Of the policy's distribution, nats, or None.
        penalised: False on rows that the KL penalty leaves alone; None for all rows.
        progress: Share of the run that is done, in [0, 1].
        facts: Numbers of the whole step that stabilisers asked for, by the name of the stabiliser's class.
    """

    logp: Tensor
    old: Tensor
    advantage: Tensor
    row: Tensor
    lengths: Tensor
    reference: Tensor | None = None
    teacher: Tensor | None = None
    engine: Tensor | None = None
    entropy: Tensor | None = None
    penalised: Tensor | None = None
    progress: float = 0.0
    facts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def select(self, mask: Tensor) -> Positions:
        """The positions of whole rows that ``mask`` (bool ``[M]``) picks; row numbers stay."""
        skipped = {"lengths", "progress", "facts"}
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in skipped}
        picked = {name: value[mask] for name, value in values.items() if value is not None}
        return replace(self, **picked)

    def row_sum(self, values: Tensor) -> Tensor:
        """Sum over the position's row, at each position; summed in float64."""
        sums = torch.zeros(len(self.lengths), dtype=torch.float64, device=values.device)
        return sums.index_add(0, self.row, values.double())[self.row].to(values.dtype)

    def row_mean(self, values: Tensor) -> Tensor:
        """Mean over the position's row, at each position; summed in float64."""
        sums = torch.zeros(len(self.lengths), dtype=torch.float64, device=values.device)
        sums = sums.index_add(0, self.row, values.double()) / self.lengths.clamp(min=1)
        return sums[self.row].to(values.dtype)
