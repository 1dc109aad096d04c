"""Does the text contain something: given words, or a pattern. 1.0 or 0.0 per completion."""

from __future__ import annotations

import re
from typing import Any, Literal

from mmpost.rewards.answers import right_answers
from mmpost.rewards.extract import extract, normalise, text_of
from mmpost.rewards.workers import run


def contains(
    prompts: list[Any],
    completions: list[Any],
    *,
    solution: list[Any],
    how: Literal["any", "all"] = "any",
    where: Literal["completion", "answer"] = "completion",
    whole_words: bool = True,
    **columns: list[Any],
) -> list[float | None]:
    """1 if the solution's texts stand in the completion, without regard to case and spaces.

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings.
        solution: A text or a list of texts; None gives None.
        how: Whether one of the texts is enough.
        where: The whole completion, which rewards naming everything, or the extracted answer.
        whole_words: ``cat`` does not stand in ``category``.
        columns: Other columns; not read.
    """
    scores: list[float | None] = []
    for completion, gold in zip(completions, solution, strict=True):
        text = text_of(completion)
        said = (extract(text) or "") if where == "answer" else normalise(text)
        # Nothing stands in every text.
        needles = [one for one in right_answers(gold) if one]
        found = [_stands_in(one.casefold(), said.casefold(), whole_words) for one in needles]
        scores.append(float(any(found) if how == "any" else all(found)) if found else None)
    return scores


def _stands_in(needle: str, text: str, whole_words: bool) -> bool:
    if not whole_words:
        return needle in text
    return re.search(rf"(?<!\w){re.escape(needle)}(?!\w)", text) is not None


def regex(
    prompts: list[Any],
    completions: list[Any],
    *,
    pattern: str | list[str | None],
    full: bool = False,
    item_timeout: float = 2.0,
    **columns: list[Any],
) -> list[float | None]:
    """1 if the pattern is found in the completion.

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings.
        pattern: One for all as an option, or a column; None gives None. Python's syntax; ``(?s)`` and the like inside.
        full: The pattern has to match the whole text.
        item_timeout: Seconds for one completion. Patterns such as ``(a+)+b`` can take for ever; the search is then
            killed, gives None and is counted.
        columns: Other columns; not read.
    """
    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    known = [
        (one, text_of(completion), full)
        for one, completion in zip(patterns, completions, strict=True)
        if one is not None
    ]
    found = iter(run("mmpost.rewards.text:matches", known, limit_s=item_timeout))
    results = [None if one is None else next(found) for one in patterns]
    return [None if result is None else float(result) for result in results]


def matches(pattern: str, text: str, full: bool) -> bool:
    """Whether the pattern is found; the part that runs in a worker process."""
    return (re.fullmatch if full else re.search)(pattern, text) is not None
