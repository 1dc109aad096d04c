"""What a model eats: one encoded row, and a batch of them with its trained positions laid out flat.

Nothing downstream of a model call is padded: log-probabilities, coefficients and advantages are vectors over the
``M`` trained positions of the batch, each of which knows its row. A position that does not train is simply absent.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as token ids and media tensors, on the CPU and without padding.

    Attributes:
        ids: Token ids with media placeholders expanded, int64 ``[T]``.
        train: True where the id is a target of the loss, bool ``[T]``; never on media or prompt.
        positions: Position ids, int64 ``[A, T]``; A is 3 for models with multimodal rotary positions, else 1.
        media: Model argument to tensor, for example ``pixel_values``; empty for a text-only row.
        origin: ``file:row`` for messages.
    """

    ids: Tensor
    train: Tensor
    positions: Tensor
    media: dict[str, Tensor] = field(default_factory=dict)
    origin: str = ""

    def __len__(self) -> int:
        return int(self.ids.numel())

    @property
    def num_trained(self) -> int:
        """Number of trained positions."""
        return int(self.train.sum())

    def with_completion(self, tokens: Tensor) -> Encoded:
        """The prompt followed by sampled ids, which are then the trained positions.

        Args:
            tokens: int64 ``[n]``; no placeholders of media among them.
        """
        count = tokens.numel()
        start = self.positions[:, -1].max() + 1 if len(self) else 0
        after = (start + torch.arange(count)).expand(self.positions.shape[0], count)
        return replace(
            self,
            ids=torch.cat([self.ids, tokens]),
            train=torch.cat([torch.zeros_like(self.train), torch.ones(count, dtype=torch.bool)]),
            positions=torch.cat([self.positions, after], dim=1),
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a packed sequence: its tokens see each other causally, and all of ``prefix`` before them.

    Attributes:
        start: First index in the packed sequence.
        length: Number of tokens.
        prefix: Number of the segment that comes before this one, or None; a prefix has no prefix itself.
    """

    start: int
    length: int
    prefix: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows side by side (padded), or behind each other in one sequence (packed).

    Attributes:
        inputs: Arguments of the model's forward: ``input_ids [B, T]``, ``position_ids [B, T]`` or ``[3, B, T]``, the
            media tensors, and ``attention_mask [B, T]`` when padded. Packed: B is 1.
        row: Row of each trained position, int64 ``[M]``, sorted.
        at: Which hidden state predicts the position, int64 ``[M]``; an index into the flattened ``[B * T]``.
        target: Token id of the position, int64 ``[M]``.
        num_rows: Number of rows.
        segments: How a packed sequence is cut; None when padded.
    """

    inputs: dict[str, Tensor]
    row: Tensor
    at: Tensor
    target: Tensor
    num_rows: int
    segments: tuple[Segment, ...] | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(
            {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            self.row.to(device),
            self.at.to(device),
            self.target.to(device),
            self.num_rows,
            self.segments,
        )
