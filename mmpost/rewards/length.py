"""Scores of how long and how repetitive a completion is; they never look at whether it is right."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from mmpost.rewards.extract import text_of


def soft_overlong(
    prompts: list[Any],
    completions: list[Any],
    *,
    completion_ids: list[list[int]],
    max_length: int = 20480,
    buffer: int = 4096,
    **columns: list[Any],
) -> list[float | None]:
    """0 for short completions, falling to -1 over the last ``buffer`` tokens before ``max_length``.

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings; not read.
        completion_ids: Token ids; n is their number.
        max_length: From here on -1. Set it to ``grpo.max_completion_length``.
        buffer: Tokens over which the score falls, in [1, max_length].
        columns: Other columns; not read.

    Returns:
        0 for ``n <= max_length - buffer``, then ``(max_length - buffer - n) / buffer``, -1 beyond ``max_length``.

    Raises:
        ValueError: ``buffer`` is out of range.

    Source: DAPO, arXiv 2503.14476, equation 13, with its defaults.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer is {buffer}; expected 1 to max_length, which is {max_length}")
    free = max_length - buffer
    return [min(0.0, max(-1.0, (free - len(ids)) / buffer)) for ids in completion_ids]


def length(
    prompts: list[Any],
    completions: list[Any],
    *,
    completion_ids: list[list[int]],
    minimum: int = 1,
    maximum: int = 1024,
    **columns: list[Any],
) -> list[float | None]:
    """1 if the completion has ``minimum`` to ``maximum`` tokens, both included, else 0."""
    return [float(minimum <= len(ids) <= maximum) for ids in completion_ids]


def repetition(
    prompts: list[Any],
    completions: list[Any],
    *,
    completion_ids: list[list[int]] | None = None,
    ngram: int = 8,
    **columns: list[Any],
) -> list[float | None]:
    """Minus the share of n-grams that stood in the same completion before, in (-1, 0].

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings; read only without ``completion_ids``, word by word.
        completion_ids: Token ids, which know no spaces and so work for every language.
        ngram: Tokens per n-gram, at least 1. Shorter completions score 0.
        columns: Other columns; not read.
    """
    units: list[Any] = completion_ids if completion_ids is not None else [text_of(c).split() for c in completions]
    return [-repeated_share(unit, ngram) for unit in units]


def repeated_share(units: Sequence[Hashable], ngram: int) -> float:
    """Share of n-grams that stood before, in [0, 1); 0 when there is none.

    Raises:
        ValueError: ``ngram`` is below 1.
    """
    if ngram < 1:
        raise ValueError(f"ngram is {ngram}; expected at least 1")
    grams = [tuple(units[start : start + ngram]) for start in range(len(units) - ngram + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
