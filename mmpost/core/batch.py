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
        start = self.positions.max() + 1 if len(self) else 0
        after = (start + torch.arange(count)).expand(self.positions.shape[0], count)
        return replace(
            self,
            ids=torch.cat([self.ids, tokens]),
            train=torch.cat([torch.zeros_like(self.train), torch.ones(count, dtype=torch.bool)]),
            positions=torch.cat([self.positions, after], dim=1),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows side by side.

    Attributes:
        inputs: Arguments of the model's forward: ``input_ids [B, T]``, ``attention_mask [B, T]``,
            ``position_ids [B, T]`` or ``[3, B, T]``, and the media tensors.
        row: Row of each trained position, int64 ``[M]``, sorted.
        at: Index in the row whose hidden state predicts the position, int64 ``[M]``.
        target: Token id of the position, int64 ``[M]``.
        num_rows: B.
    """

    inputs: dict[str, Tensor]
    row: Tensor
    at: Tensor
    target: Tensor
    num_rows: int

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(
            {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            self.row.to(device),
            self.at.to(device),
            self.target.to(device),
            self.num_rows,
        )
