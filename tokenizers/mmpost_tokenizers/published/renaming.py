"""Published tensor names to ours: what is renamed, reshaped or left out, and what is wrong with a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.published.files import differences

T = TypeVar("T", bound=DiscreteTokenizer)


@dataclass(frozen=True, slots=True)
class Rename:
    """One published tensor.

    Attributes:
        ours: Name in our model.
        shape: Shape in the published file; the values are the same in the same order.
    """

    ours: str
    shape: tuple[int, ...]


def renames(
    tokenizer: DiscreteTokenizer, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Rename]:
    """Published name to ``Rename`` for all of ``names`` (published to ours); ``shapes`` where they differ."""
    own = {name: tuple(tensor.shape) for name, tensor in tokenizer.state_dict().items()}
    return {theirs: Rename(ours, shapes.get(theirs, own[ours])) for theirs, ours in names.items()}


def load_renamed(
    tokenizer: T, tensors: Mapping[str, Tensor], table: Mapping[str, Rename], *, left_out: Iterable[str], place: str
) -> T:
    """Copy published tensors into ``tokenizer`` by ``table``.

    Args:
        tokenizer: Takes the values.
        tensors: By published name.
        table: By published name; must cover the tokenizer.
        left_out: Beginnings of published names that a tokenizer does not need; they may be there or not.
        place: Names the file in errors.

    Raises:
        MmpostError: MMP-E071, naming published tensors that are missing, unexpected or of another shape.
    """
    needed = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(left_out))}
    problems = differences({name: rename.shape for name, rename in table.items()}, needed)
    if problems:
        raise MmpostError("MMP-E071", f"{place} does not fit the model: {problems}.", "Check model and checkpoint.")
    own = tokenizer.state_dict()
    tokenizer.load_state_dict(
        {rename.ours: needed[name].reshape(own[rename.ours].shape) for name, rename in table.items()}
    )
    tokenizer.eval()
    return tokenizer
