"""Are the times right: intervals, moments, orders, and boxes over time, each 0 to 1 per completion.

Times are seconds from the start of the film or sound, as ``12.5``, ``12.5 s``, ``1:05.5`` or ``1:02:05``. An interval
is two times with ``to``, ``until``, ``and``, a dash or a comma between them, with or without brackets.

Sources: temporal IoU and its use as a reward, survey "Video-LMM Post-Training" (arXiv 2510.05034); vIoU of tubes,
"Where Does It Exist: Spatio-Temporal Video Grounding" (arXiv 2001.06891).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmpost.rewards.extract import raw_answer, text_of
from mmpost.rewards.geometry import overlaps, read_boxes

# Not behind a digit, a point, a colon or a minus: "-1.0" must not be read as 1.0, nor the end of "1.05" as 05.
_CLOCK = r"(?<![\d.:\-])\d{1,9}(?::\d{1,2}){0,2}(?:\.\d{1,9})?(?![\d:]*\d)"
_UNIT = r"(?:\s*(?:seconds|second|secs|sec|s)\b)?"
_BETWEEN = r"\s*(?:to|until|till|through|and|-{1,2}>|[-\u2013\u2014,;])\s*"
# Behind the separator a minus is the separator's own.
_SPAN = re.compile(rf"({_CLOCK}){_UNIT}{_BETWEEN}((?<![\d.:])\d{{1,9}}(?::\d{{1,2}}){{0,2}}(?:\.\d{{1,9}})?)(?![:\d])")
_TIME = re.compile(rf"({_CLOCK}){_UNIT}")
_STAMPED = re.compile(rf"({_CLOCK}){_UNIT}[\"']?\s*[:=]\s*(\[[^\[\]]*\]|\([^()]*\))")
_ITEMS = re.compile(r"->|\u2192|[><,;\n]|\bthen\b")


def temporal_iou(
    prompts: list[Any],
    completions: list[Any],
    *,
    solution: list[Any],
    threshold: float | None = None,
    **columns: list[Any],
) -> list[float | None]:
    """Intersection over union of the interval in the answer with that of the solution.

    With several intervals on either side: ``2 sum(IoU of matched pairs) / (intervals said + intervals asked for)``
    over the best one-to-one matching, which is the IoU again for one and one. An interval that ends before it starts
    matches nothing and still counts as said.

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings; intervals are read from the extracted answer, else from the whole text.
        solution: ``[start, end]`` in seconds, a list of such, or text with them. None gives None.
        threshold: Instead of the value: whether it is at least this, in (0, 1] (R@1 at IoU ``threshold``).
        columns: Other columns; not read.

    Raises:
        ValueError: A solution without intervals or with one that has no length, or a threshold out of range.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold!r}; expected a value in (0, 1]")

    def credit(text: str, gold: Any) -> float:
        said, asked = read_intervals(text), _gold_intervals(gold)
        shared = interval_overlaps(said, asked)
        rows, at = linear_sum_assignment(shared, maximize=True)
        value = float(2 * shared[rows, at].sum() / (len(said) + len(asked)))
        return value if threshold is None else float(value >= threshold)

    return _scores(completions, solution, credit)


def time_point(
    prompts: list[Any],
    completions: list[Any],
    *,
    solution: list[Any],
    tolerance: float = 0.0,
    **columns: list[Any],
) -> list[float | None]:
    """1 if the answer is one time that lies in the solution's interval (or within ``tolerance`` of its moment).

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings. An answer with several times, such as an interval, scores 0.
        solution: ``[start, end]``, a list of such, a number of seconds, or text with one of these. None gives None.
        tolerance: Seconds by which intervals are widened at both ends, at least 0.
        columns: Other columns; not read.

    Raises:
        ValueError: A solution without a time, or a tolerance below 0.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance is {tolerance!r}; expected at least 0")

    def credit(text: str, gold: Any) -> float:
        times = [seconds(found) for found in _TIME.findall(text)]
        asked = _gold_points(gold)
        if len(times) != 1:
            return 0.0
        return float(bool(((asked[:, 0] - tolerance <= times[0]) & (times[0] <= asked[:, 1] + tolerance)).any()))

    return _scores(completions, solution, credit)


def ordering(
    prompts: list[Any],
    completions: list[Any],
    *,
    solution: list[Any],
    measure: Literal["kendall", "exact", "subsequence"] = "kendall",
    **columns: list[Any],
) -> list[float | None]:
    """How well the order of the items in the answer agrees with the solution.

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings; items stand between commas, ``>``, arrows, lines or "then". Items of one
            letter may also stand together (``BAC``). An answer that does not name every item exactly once scores 0.
        solution: Items in order as a list, or as text in the same form. None gives None.
        measure: ``kendall`` is the share of pairs in the right order (Kendall's tau mapped to [0, 1]), ``exact`` is 1
            for the right order alone, ``subsequence`` the longest common subsequence over the number of items.
        columns: Other columns; not read.

    Raises:
        ValueError: A solution with fewer than two items or with one twice, or an unknown measure.
    """
    if measure not in ("kendall", "exact", "subsequence"):
        raise ValueError(f"measure is {measure!r}; expected kendall, exact or subsequence")

    def credit(text: str, gold: Any) -> float:
        asked = _items(gold) if isinstance(gold, str) else [_name(str(item)) for item in gold]
        if len(set(asked)) < 2 or len(set(asked)) != len(asked):
            raise ValueError(f"solution is {gold!r}; expected at least two different items")
        said = _items(text)
        if len(said) != len(asked) and all(len(item) == 1 for item in asked):
            said = [letter.casefold() for letter in text if letter.isalnum()]
        if sorted(said) != sorted(asked):
            return 0.0
        places = [asked.index(item) for item in said]
        if measure == "exact":
            return float(places == sorted(places))
        if measure == "subsequence":
            return _longest_rise(places) / len(places)
        pairs = list(combinations(places, 2))
        return sum(first < second for first, second in pairs) / len(pairs)

    return _scores(completions, solution, credit)


def tubes(
    prompts: list[Any],
    completions: list[Any],
    *,
    solution: list[Any],
    tolerance: float = 1e-3,
    **columns: list[Any],
) -> list[float | None]:
    """vIoU of a box that moves: the sum of its IoU at the times that both name, over the times that either names.

    This is the temporal IoU times the mean box IoU over the shared times. A time that the answer names again has no
    partner left, so that it costs and never pays.

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings with entries such as ``"1.5": [x1, y1, x2, y2]``, as JSON or one a line.
        solution: Seconds to box as a mapping, a list of ``[seconds, x1, y1, x2, y2]``, or text as above. None gives
            None.
        tolerance: Seconds by which times that are the same may differ, at least 0.
        columns: Other columns; not read.

    Raises:
        ValueError: A solution without boxes, or a tolerance below 0.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance is {tolerance!r}; expected at least 0")

    def credit(text: str, gold: Any) -> float:
        said, asked = _read_tube(text), _gold_tube(gold)
        near = np.abs(said[:, None, 0] - asked[None, :, 0]) <= tolerance
        shared = np.where(near, overlaps(said[:, 1:], asked[:, 1:]), -1.0)
        total, partners, left = 0.0, 0, set(range(len(asked)))
        for row in shared:
            free = [at for at in sorted(left) if row[at] >= 0]
            if free:
                best = max(free, key=lambda at: row[at])
                left.discard(best)
                partners += 1
                total += float(row[best])
        return total / (len(said) + len(asked) - partners)

    return _scores(completions, solution, credit)


def seconds(clock: str) -> float:
    """``12.5``, ``1:05.5`` or ``1:02:05`` in seconds.

    >>> seconds("1:05.5")
    65.5
    """
    total = 0.0
    for piece in clock.split(":"):
        total = 60 * total + float(piece)
    return total


def read_intervals(text: str) -> np.ndarray:
    """All intervals in the text, float64 ``[n, 2]`` seconds, as they are written: an end may lie before its start."""
    found = [(seconds(start), seconds(end)) for start, end in _SPAN.findall(text)]
    return np.array(found, dtype=np.float64).reshape(-1, 2)


def interval_overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair; 0 for intervals without length.

    Args:
        first: Intervals ``[n, 2]`` in seconds.
        second: Intervals ``[m, 2]``.

    Returns:
        float64 ``[n, m]`` in [0, 1].
    """
    low = np.maximum(first[:, None, 0], second[None, :, 0])
    high = np.minimum(first[:, None, 1], second[None, :, 1])
    lengths = [np.maximum(some[:, 1] - some[:, 0], 0.0) for some in (first, second)]
    shared = np.maximum(high - low, 0.0) * ((lengths[0][:, None] > 0) & (lengths[1][None, :] > 0))
    union = lengths[0][:, None] + lengths[1][None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _scores(completions: list[Any], solution: list[Any], credit: Callable[[str, Any], float]) -> list[float | None]:
    """Credit of the extracted answers, else of the whole texts; None where there is no solution."""
    scores: list[float | None] = []
    for completion, gold in zip(completions, solution, strict=True):
        text = text_of(completion)
        found = raw_answer(text)
        scores.append(None if gold is None else credit(text if found is None else found, gold))
    return scores


def _gold_intervals(gold: Any) -> np.ndarray:
    """Intervals of a solution, ``[n, 2]`` with n at least 1."""
    array = read_intervals(gold) if isinstance(gold, str) else _numbers(gold, 2)
    if not len(array) or not (array[:, 0] < array[:, 1]).all():
        raise ValueError(f"solution is {gold!r}; expected [start, end] in seconds with start < end, or a list of such")
    return array


def _gold_points(gold: Any) -> np.ndarray:
    """Intervals of a solution that may have no length, ``[n, 2]``; a moment is one that starts where it ends."""
    if isinstance(gold, str):
        array = read_intervals(gold)
        moments = [seconds(found) for found in _TIME.findall(gold)]
        if not len(array) and len(moments) == 1:
            array = np.array([moments * 2])
    elif isinstance(gold, int | float):
        array = np.array([[gold, gold]], dtype=np.float64)
    else:
        array = _numbers(gold, 2)
    if not len(array) or not (array[:, 0] <= array[:, 1]).all():
        raise ValueError(f"solution is {gold!r}; expected seconds, [start, end], or a list of such")
    return array


def _numbers(value: Any, size: int) -> np.ndarray:
    """A list of numbers or of lists of ``size`` numbers as float64 ``[n, size]``; empty if it is neither."""
    try:
        array = np.atleast_2d(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError):
        return np.zeros((0, size))
    return array if array.ndim == 2 and array.shape[1] == size and np.isfinite(array).all() else np.zeros((0, size))


def _read_tube(text: str) -> np.ndarray:
    """Entries ``time: box`` of a text, float64 ``[n, 5]``."""
    found = [(seconds(clock), read_boxes(box)) for clock, box in _STAMPED.findall(text)]
    return np.array([[time, *box[0]] for time, box in found if len(box) == 1], dtype=np.float64).reshape(-1, 5)


def _gold_tube(gold: Any) -> np.ndarray:
    if isinstance(gold, str):
        array = _read_tube(gold)
    elif isinstance(gold, dict):
        array = _numbers([[seconds(str(time)), *box] for time, box in gold.items()], 5)
    else:
        array = _numbers(gold, 5)
    if not len(array) or not ((array[:, 1] <= array[:, 3]) & (array[:, 2] <= array[:, 4])).all():
        raise ValueError(f"solution is {gold!r}; expected seconds to [x1, y1, x2, y2]")
    return array


def _items(text: str) -> list[str]:
    return [name for name in map(_name, _ITEMS.split(text.strip().strip("[]()"))) if name]


def _name(text: str) -> str:
    return " ".join(text.split()).strip(" .\"'()[]").casefold()


def _longest_rise(places: Sequence[int]) -> int:
    """Length of the longest rising subsequence, which is the longest one in common with the sorted order."""
    best: list[int] = []
    for at, place in enumerate(places):
        best.append(1 + max((best[before] for before in range(at) if places[before] < place), default=0))
    return max(best)
