"""Is the answer right: numbers, counts, option letters, text. Each scores 0 to 1 per completion.

A completion without an answer scores 0: it was asked for one. A row without a ``solution`` scores None. A ``solution``
that is a list holds several right answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmpost.rewards.extract import extract, normalise, quantity, text_of, to_letter, to_number


def answer(
    prompts: list[Any],
    completions: list[Any],
    *,
    solution: list[Any],
    aliases: list[Any] | None = None,
    tolerance: float = 1e-6,
    percent: bool = False,
    **columns: list[Any],
) -> list[float | None]:
    """1 if the extracted answer equals the solution, compared as what the solution is.

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings.
        solution: Right answers: a number, a single option letter, or text. None gives None.
        aliases: Further right answers, a list per row or None.
        tolerance: Largest relative difference of numbers.
        percent: ``50%`` means 0.5; else ``%`` is a unit.
        columns: Other columns; not read.
    """
    return _score(
        completions, solution, lambda found, gold: same(found, gold, tolerance=tolerance, percent=percent), aliases
    )


def number(
    prompts: list[Any],
    completions: list[Any],
    *,
    solution: list[Any],
    tolerance: float = 1e-6,
    absolute: float = 0.0,
    percent: bool = False,
    **columns: list[Any],
) -> list[float | None]:
    """1 if the extracted answer is the number of the solution.

    The difference may be ``tolerance`` times the solution (at least ``tolerance``) or ``absolute``, whichever is more.
    A unit may be left out; two different units are different answers.
    """
    return _score(
        completions,
        solution,
        lambda found, gold: same_number(found, gold, tolerance=tolerance, absolute=absolute, percent=percent),
    )


def counting(
    prompts: list[Any], completions: list[Any], *, solution: list[Any], partial: bool = False, **columns: list[Any]
) -> list[float | None]:
    """1 if the extracted answer is the whole number of the solution; with ``partial`` less by the relative error.

    Partial credit is ``1 - |answer - solution| / max(solution, 1)``, not below 0.
    """

    def credit(found: str | None, gold: str) -> float:
        value, target = to_number(found), to_number(gold)
        if value is None or target is None or value != int(value):
            return 0.0
        return max(0.0, 1.0 - abs(value - target) / max(target, 1.0)) if partial else float(value == target)

    return _score(completions, solution, credit)


def choice(
    prompts: list[Any],
    completions: list[Any],
    *,
    solution: list[Any],
    options: list[Any] | None = None,
    **columns: list[Any],
) -> list[float | None]:
    """1 if the extracted answer is the option letter of the solution: ``B``, ``(B)``, ``B. bag``.

    With a column ``options`` (a list of texts, or letter to text) an answer that is an option's text counts as its
    letter.
    """
    scores: list[float | None] = []
    for index, (completion, gold) in enumerate(zip(completions, solution, strict=True)):
        letters = _letters(options[index] if options is not None else None)
        found = extract(text_of(completion))
        said = letters.get((found or "").casefold()) or to_letter(found)
        right = normalise(str(gold))
        wanted = letters.get(right.casefold()) or to_letter(right)
        scores.append(None if gold is None else float(said is not None and said == wanted))
    return scores


def exact(
    prompts: list[Any],
    completions: list[Any],
    *,
    solution: list[Any],
    aliases: list[Any] | None = None,
    **columns: list[Any],
) -> list[float | None]:
    """1 if the extracted answer is the solution's text, apart from case, spaces and final punctuation."""
    return _score(
        completions,
        solution,
        lambda found, gold: found is not None and found.casefold() == gold.casefold(),
        aliases,
    )


def same(first: str | None, second: str | None, *, tolerance: float = 1e-6, percent: bool = False) -> bool:
    """Do two extracted answers mean the same: as numbers, as option letters, else as text without case.

    None equals nothing, not even None. Numbers are compared by ``same_number``, relative to ``second``.
    """
    if first is None or second is None:
        return False
    if to_number(first) is not None and to_number(second) is not None:
        return same_number(first, second, tolerance=tolerance, percent=percent)
    letters = to_letter(first), to_letter(second)
    # "C. elegans" and "C. albicans" are no options; one of the two must be the letter alone.
    if None not in letters and min(len(first.strip("()")), len(second.strip("()"))) == 1:
        return letters[0] == letters[1]
    return first.casefold() == second.casefold()


def same_number(
    found: str | None, gold: str | None, *, tolerance: float = 1e-6, absolute: float = 0.0, percent: bool = False
) -> bool:
    """Are both numbers, of one unit where both have one, and close."""
    value, target = quantity(found, percent=percent), quantity(gold, percent=percent)
    if value is None or target is None or (value[1] and target[1] and value[1] != target[1]):
        return False
    return abs(value[0] - target[0]) <= max(absolute, tolerance * max(1.0, abs(target[0])))


def _letters(options: Any) -> dict[str, str]:
    """Option text without case to letter; texts that stand for two letters are left out."""
    if isinstance(options, Mapping):
        pairs = [(str(letter).strip("()").upper(), text) for letter, text in options.items() if text is not None]
    elif isinstance(options, str) or not hasattr(options, "__iter__"):
        return {}
    else:
        pairs = [(chr(ord("A") + place), text) for place, text in enumerate(options)]
    texts = [normalise(str(text)).casefold() for _, text in pairs]
    return {text: letter for text, (letter, _) in zip(texts, pairs, strict=True) if text and texts.count(text) == 1}


def _score(
    completions: list[Any],
    solution: list[Any],
    credit: Callable[[str | None, str], float],
    aliases: list[Any] | None = None,
) -> list[float | None]:
    """Best credit of each completion's answer over the right answers of its row."""
    scores: list[float | None] = []
    for index, (completion, gold) in enumerate(zip(completions, solution, strict=True)):
        right = right_answers(gold, aliases[index] if aliases is not None else None)
        found = extract(text_of(completion)) if right else None
        scores.append(max(float(credit(found, one)) for one in right) if right else None)
    return scores


def right_answers(gold: Any, aliases: Any = None) -> list[str]:
    """Right answers of a row, normalised; empty when there is none."""
    found = []
    for given in (gold, aliases):
        several = given if isinstance(given, list | tuple) else [given]
        found += [normalise(str(one)) for one in several if one is not None]
    return found
