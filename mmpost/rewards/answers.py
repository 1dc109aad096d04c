"""Is the answer right: numbers, option letters, exact text. Each scores 1.0 or 0.0 per completion.

A completion without an answer scores 0: it was asked for one. A row without a ``solution`` scores None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmpost.rewards.extract import extract, normalise, text_of, to_letter, to_number


def answer(
    prompts: list[Any], completions: list[Any], *, solution: list[Any], tolerance: float = 1e-6, **columns: list[Any]
) -> list[float | None]:
    """1 if the extracted answer equals the solution, compared as what the solution is.

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings.
        solution: Right answers: a number, a single option letter, or text. None gives None.
        tolerance: Largest relative difference of numbers.
        columns: Other columns; not read.
    """

    def equal(found: str | None, gold: str) -> bool:
        if to_number(gold) is not None:
            return _same_number(found, gold, tolerance)
        if len(gold) == 1 and gold.isalpha():
            return to_letter(found) == gold.upper()
        return found is not None and found.casefold() == gold.casefold()

    return _score(completions, solution, equal)


def number(
    prompts: list[Any], completions: list[Any], *, solution: list[Any], tolerance: float = 1e-6, **columns: list[Any]
) -> list[float | None]:
    """1 if the extracted answer is the number of the solution within a relative ``tolerance``."""
    return _score(completions, solution, lambda found, gold: _same_number(found, gold, tolerance))


def choice(
    prompts: list[Any], completions: list[Any], *, solution: list[Any], **columns: list[Any]
) -> list[float | None]:
    """1 if the extracted answer is the option letter of the solution: ``B``, ``(B)``, ``B. bag``."""
    return _score(
        completions, solution, lambda found, gold: to_letter(found) is not None and to_letter(found) == to_letter(gold)
    )


def exact(
    prompts: list[Any], completions: list[Any], *, solution: list[Any], **columns: list[Any]
) -> list[float | None]:
    """1 if the extracted answer is the solution's text, apart from case, spaces and final punctuation."""
    return _score(
        completions,
        solution,
        lambda found, gold: found is not None and found.casefold() == gold.casefold(),
    )


def _same_number(found: str | None, gold: str, tolerance: float) -> bool:
    value, target = to_number(found), to_number(gold)
    return value is not None and target is not None and abs(value - target) <= tolerance * max(1.0, abs(target))


def _score(completions: list[Any], solution: list[Any], equal: Callable[[str | None, str], bool]) -> list[float | None]:
    return [
        None if gold is None else float(equal(extract(text_of(completion)), normalise(str(gold))))
        for completion, gold in zip(completions, solution, strict=True)
    ]
