r"""Is a mathematical answer equal to the solution: ``\frac{\sqrt{2}}{2}`` and ``1/\sqrt2``. 1.0 or 0.0 per completion.

Numbers, option letters and equal texts are decided here; the rest goes to worker processes, because sympy can hang.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from mmpost.core.errors import MmpostError
from mmpost.rewards.answers import right_answers, same_number
from mmpost.rewards.extract import extract, text_of, to_letter, to_number
from mmpost.rewards.workers import run

# The library itself is imported by the workers only; it takes seconds and holds on to memory.
if find_spec("math_verify") is None:
    raise MmpostError(
        "MMP-E010", "'math' needs math_verify, which is not installed.", 'Run: pip install "mmpost-toolkit[math]"'
    )


def math(
    prompts: list[Any],
    completions: list[Any],
    *,
    solution: list[Any],
    tolerance: float = 1e-6,
    percent: bool = False,
    item_timeout: float = 5.0,
    **columns: list[Any],
) -> list[float | None]:
    """1 if the extracted answer equals the solution as mathematics.

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings. Only what the completion says is read, so a solution in the prompt is
            not found.
        solution: Right answer as text or LaTeX, or a list of them. None, and what math-verify cannot read, give None.
        tolerance: Largest relative difference of plain numbers.
        percent: ``50%`` means 0.5; else ``%`` is a unit.
        item_timeout: Seconds for one comparison; a longer one is killed, gives None and is counted.
        columns: Other columns; not read.

    Source: math-verify 0.9, with its own time limits off: they are alarms, which work in the main thread only.
    """
    scores: list[float | None] = [None] * len(completions)
    open_items: list[tuple[int, tuple[str, str]]] = []
    for index, (completion, gold) in enumerate(zip(completions, solution, strict=True)):
        right = right_answers(gold)
        found = extract(text_of(completion)) if right else None
        if not right:
            continue
        cheap = [_decided(found, one, tolerance, percent) for one in right]
        if found is None or None not in cheap or 1.0 in cheap:
            scores[index] = max(value for value in cheap if value is not None)
        else:
            scores[index] = 0.0
            open_items += [(index, (one, found)) for one, value in zip(right, cheap, strict=True) if value is None]
    results = run("mmpost.rewards.math_equal:equal", [item for _, item in open_items], limit_s=item_timeout)
    _join(scores, [index for index, _ in open_items], results)
    return scores


def _decided(found: str | None, gold: str, tolerance: float, percent: bool) -> float | None:
    """1.0 or 0.0 where no algebra is needed, else None."""
    if found is None:
        return 0.0
    if found == gold:
        return 1.0
    if to_number(found) is not None and to_number(gold) is not None:
        return float(same_number(found, gold, tolerance=tolerance, percent=percent))
    # One capital letter is an option; x and X are two variables.
    if len(gold) == 1 and gold.isupper() and to_letter(found) is not None:
        return float(to_letter(found) == gold)
    return None


def _join(scores: list[float | None], indices: list[int], results: list[bool | None]) -> None:
    """The best result of a row wins; one that is unknown makes the row unknown unless another is right."""
    for index in set(indices):
        mine = [result for at, result in zip(indices, results, strict=True) if at == index]
        scores[index] = 1.0 if True in mine else None if None in mine else 0.0
