"""What each plug point promises. Types only; nothing heavy is imported when this module runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mmpost.core.sample import Sample

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mmpost.core.batch import Batch, Encoded


class RewardFunction(Protocol):
    """TRL's signature: lists over all completions, and every column of the data by name.

    ``prompts`` and ``completions`` are message lists. Returns one score per completion; None means that the
    reward does not apply to it, which is left out of means and never read as 0.
    """

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float | None]:
        """One score per completion."""
        ...


class Adapter(Protocol):
    """Turns samples into model inputs. Only adapters know about pixels and chat templates."""

    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    media_token_ids: tuple[int, ...]
    position_axes: int

    def encode(self, sample: Sample, *, loss_on: str) -> Encoded:
        """Token ids, loss mask and media of a whole conversation."""
        ...

    def encode_prompt(self, sample: Sample) -> Encoded:
        """The same for a conversation that the policy continues."""
        ...

    def encode_scrambled(self, sample: Sample, random: np.random.Generator) -> Encoded | None:
        """``encode_prompt`` of a copy whose parts come in a random order in time; None where there is no time."""
        ...

    def encode_answer(self, sample: Sample) -> Tensor:
        """Ids of the final assistant turn as ``encode`` trains them, int64 ``[n]``."""
        ...

    def collate(self, rows: Sequence[Encoded], *, left: bool = False) -> Batch:
        """Pad rows into a batch, on the left for generation."""
        ...

    def join_media(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Media tensors of several rows as the model's arguments, in row order."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion without special tokens."""
        ...
