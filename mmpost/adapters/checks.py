"""Pieces of a rendered row with their media, and what is refused about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmpost.core.errors import MmpostError
from mmpost.core.sample import Kind, Part, Sample, Turn

# Decoded media of one stretch, by kind: Pillow images, ``Audio`` and ``Video``, each in reading order.
Shown = Mapping[Kind, Sequence[Any]]
# Numbers that transformers gives to kinds of tokens; text is 0.
TOKEN_TYPES: Mapping[Kind, int] = {"image": 1, "video": 2, "audio": 3}


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the rendered conversation that trains as a whole or not at all."""

    text: str
    media: tuple[Part, ...]
    train: bool


def media_of(turns: Sequence[Turn]) -> tuple[Part, ...]:
    """Media parts of turns in reading order."""
    return tuple(part for turn in turns for part in turn.parts if part.kind != "text")


def runs_of(mask: Tensor) -> list[int]:
    """Lengths of the stretches of True in a bool ``[T]``, in order."""
    values, counts = torch.unique_consecutive(mask, return_counts=True)
    return [int(count) for count in counts[values]]


def refuse_other_kinds(sample: Sample, kinds: Sequence[Kind], model: str) -> None:
    """Chat templates leave out what they do not know, and the row would train without it.

    Raises:
        MmpostError: MMP-D042.
    """
    other = [part.kind for part in sample.media() if part.kind not in kinds]
    if other:
        raise MmpostError(
            "MMP-D042",
            f"{sample.origin}: the row has a part of kind {other[0]}, but the model ({model}) "
            f"takes text and {', '.join(kinds)}.",
            "Choose a model that takes it, or remove the part.",
        )


def mismatch(sample: Sample, model: str, kind: Kind, placeholders: int, features: int) -> MmpostError:
    """The MMP-D015 of a row whose placeholders and features differ in number."""
    return MmpostError(
        "MMP-D015",
        f"{sample.origin}: processor produced {placeholders} {kind} placeholders but the encoder {features} "
        f"features (model {model}); this row would fail in forward.",
        f"Remove literal {kind} tokens from the text, or check that processor and weights belong together.",
    )


def too_long(sample: Sample, total: int, counts: Mapping[Kind, int], limit: int) -> MmpostError:
    """The MMP-D014 of a row of ``total`` tokens, of which ``counts`` are media."""
    parts = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    return MmpostError(
        "MMP-D014",
        f"{sample.origin}: {total} tokens (text {total - sum(counts.values())}, {parts}) exceed "
        f"data.max_length {limit}. Media spans are never cut.",
        f"Options: data.max_length={-(-total // 64) * 64}, data.media.max_pixels, or data.on_long=drop",
    )
