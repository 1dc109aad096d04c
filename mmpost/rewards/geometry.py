"""Are the boxes and points right: F1 over a one-to-one matching, 0 to 1 per completion.

Coordinates are compared as they are; the data have to use those that the model is asked for. Every object of the
solution is found once at most: naming a box twice costs precision instead of scoring twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmpost.rewards.extract import raw_answer, text_of

_N = r"\s*([-+]?\d{1,15}(?:\.\d{1,15})?)\s*"
# [x1, y1, x2, y2] or (x1,y1),(x2,y2)
_BOX = re.compile(rf"[\[(]{_N},{_N}(?:,|\),?\s?\(){_N},{_N}[\])]")
# [x, y] or (x, y) or x="1.5" y="2.5"
_POINT = re.compile(rf"""[\[(]{_N},{_N}[\])]|\bx\s?=\s?["']{_N}["']\s?y\s?=\s?["']{_N}["']""")


def boxes(
    prompts: list[Any],
    completions: list[Any],
    *,
    solution: list[Any],
    iou: float | list[float] = 0.5,
    **columns: list[Any],
) -> list[float | None]:
    """F1 of the boxes in the answer: a box is right if it overlaps with its partner by at least ``iou``.

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings; boxes are read from the extracted answer, else from the whole text, as
            ``[x1, y1, x2, y2]`` or ``(x1,y1),(x2,y2)``.
        solution: List of boxes, or text with boxes. None gives None; no boxes ask for an answer without boxes.
        iou: Least intersection over union in (0, 1], or several, over which the F1 is averaged.
        columns: Other columns; not read.

    Raises:
        ValueError: A solution that holds no boxes, or a threshold out of range.
    """
    thresholds = iou if isinstance(iou, list) else [iou]
    if not thresholds or not all(0 < threshold <= 1 for threshold in thresholds):
        raise ValueError(f"iou is {iou!r}; expected values in (0, 1]")

    def credit(said: np.ndarray, gold: np.ndarray) -> float:
        overlap = overlaps(said, gold)
        return float(np.mean([f1(overlap >= threshold) for threshold in thresholds]))

    return _score(completions, solution, credit, read_boxes, sizes=(4,))


def points(
    prompts: list[Any],
    completions: list[Any],
    *,
    solution: list[Any],
    distance: float = 0.0,
    **columns: list[Any],
) -> list[float | None]:
    """F1 of the points in the answer: a point is right inside its box, or within ``distance`` of its point.

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings; points are read from the extracted answer, else from the whole text, as
            ``[x, y]``, ``(x, y)`` or ``x="1" y="2"``.
        solution: List of boxes (4 numbers) or of points (2 numbers), or text with them. None gives None.
        distance: Largest Euclidean distance from a point, in the unit of the coordinates; the border of a box is wider
            by it.
        columns: Other columns; not read.

    Raises:
        ValueError: A solution that holds neither boxes nor points.
    """

    def credit(said: np.ndarray, gold: np.ndarray) -> float:
        low, high = gold[None, :, :2], gold[None, :, -2:]
        away = np.maximum(np.maximum(low - said[:, None], said[:, None] - high), 0.0)
        return f1(np.hypot(away[..., 0], away[..., 1]) <= distance)

    return _score(completions, solution, credit, lambda text: _numbers(_POINT, text, 2), sizes=(4, 2))


def f1(right: np.ndarray) -> float:
    """F1 of the largest one-to-one matching.

    Args:
        right: Whether prediction i may be object j, bool ``[predictions, objects]``.

    Returns:
        ``2 matches / (predictions + objects)``; 1.0 when there is neither.
    """
    if sum(right.shape) == 0:
        return 1.0
    rows, at = linear_sum_assignment(right, maximize=True)
    return float(2 * right[rows, at].sum() / sum(right.shape))


def read_boxes(text: str) -> np.ndarray:
    """All boxes in the text, float64 ``[n, 4]`` with the smaller corner first."""
    return _numbers(_BOX, text, 4)


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair; 0 where both boxes are empty.

    Args:
        first: Boxes ``[n, 4]`` with x1 <= x2 and y1 <= y2.
        second: Boxes ``[m, 4]``.

    Returns:
        float64 ``[n, m]`` in [0, 1].
    """
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0.0), axis=2)
    area = [np.prod(some[:, 2:] - some[:, :2], axis=1) for some in (first, second)]
    union = area[0][:, None] + area[1][None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _score(
    completions: list[Any],
    solution: list[Any],
    credit: Callable[[np.ndarray, np.ndarray], float],
    read: Callable[[str], np.ndarray],
    *,
    sizes: tuple[int, ...],
) -> list[float | None]:
    scores: list[float | None] = []
    for completion, gold in zip(completions, solution, strict=True):
        if gold is None:
            scores.append(None)
            continue
        text = text_of(completion)
        found = raw_answer(text)
        scores.append(credit(read(text if found is None else found), _gold(gold, sizes)))
    return scores


def _gold(gold: Any, sizes: tuple[int, ...]) -> np.ndarray:
    """Boxes or points of a solution, ``[n, 4]`` or ``[n, 2]``."""
    if isinstance(gold, str):
        found = [_numbers(_BOX if size == 4 else _POINT, gold, size) for size in sizes]
        filled = [array for array in found if len(array)]
        if filled or gold.strip() in ("", "[]"):
            return filled[0] if filled else np.zeros((0, sizes[0]))
    else:
        try:
            array = np.asarray(gold, dtype=np.float64)
        except (TypeError, ValueError):
            array = np.full((1,), np.nan)
        if array.size == 0:
            return np.zeros((0, sizes[0]))
        array = np.atleast_2d(array)
        if array.ndim == 2 and array.shape[1] in sizes and np.isfinite(array).all():
            return _ordered(array)
    expected = " or ".join({4: "[x1, y1, x2, y2]", 2: "[x, y]"}[size] for size in sizes)
    raise ValueError(f"solution is {gold!r}; expected a list of {expected}")


def _numbers(pattern: re.Pattern[str], text: str, size: int) -> np.ndarray:
    """Everything in the text that the pattern finds, float64 ``[n, size]``."""
    found = [[float(group) for group in match.groups() if group is not None] for match in pattern.finditer(text)]
    return _ordered(np.array(found, dtype=np.float64).reshape(-1, size))


def _ordered(array: np.ndarray) -> np.ndarray:
    """Boxes with their smaller corner first; points as they are."""
    if array.shape[1] != 4:
        return array
    return np.concatenate([np.minimum(array[:, :2], array[:, 2:]), np.maximum(array[:, :2], array[:, 2:])], axis=1)
