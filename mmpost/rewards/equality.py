r"""Do two answers to one question mean the same, when neither of them is the label.

Unlike ``answers.same``, the relation is symmetric: a pair is put into a fixed order before it is compared, because
tolerances and math-verify depend on the order. It need not be transitive; ``classes`` joins what is connected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmpost.core.errors import MmpostError
from mmpost.rewards.answers import same_number
from mmpost.rewards.cluster import clusters
from mmpost.rewards.extract import to_letter, to_number
from mmpost.rewards.geometry import overlaps, read_boxes
from mmpost.rewards.workers import run

Kind = Literal["auto", "math", "number", "choice", "text", "boxes"]
Pair = tuple[str, str]

_WORDS = re.compile(r"\w+|[^\w\s]")
_OPTIONS = "ABCDEFGHIJ"
_ARTICLES = ("a", "an", "the")
# What marks an answer as mathematics that text comparison would get wrong.
_MATHS = re.compile(
    r"\\[a-zA-Z]|[=^{}√π∞<>≤≥≠±|\u2225⊥¬~&∧\u2228\[\]]|\d\s*[a-zA-Z(]|[+*/]|\w\s*-\s*\w|(?:^|[\s(])[-\u2212]\s*[\w$]|\d!|\w'(?!\w)"
    r"|\d\s*,\s*\d"
)


@dataclass(frozen=True)
class Equality:
    """When two answers mean the same.

    Attributes:
        kind: ``math`` (math-verify), ``number``, ``choice`` (option letters), ``text`` (words without case, articles
            and punctuation), ``boxes``, or ``auto``: boxes if both are, else numbers, else letters, else mathematics
            if one looks like it and math-verify is installed, else text.
        tolerance: Largest relative difference of numbers.
        percent: ``50%`` means 0.5; else ``%`` is a unit.
        iou: Least intersection over union of boxes.
        item_timeout: Seconds for one comparison by math-verify; one that takes longer counts as different.
    """

    kind: Kind = "auto"
    tolerance: float = 1e-6
    percent: bool = False
    iou: float = 0.5
    item_timeout: float = 5.0

    def pairs(self, asked: Sequence[Pair]) -> list[bool]:
        """Whether the two of each pair mean the same.

        Raises:
            MmpostError: MMP-E010 for ``math`` without math-verify.
            CallTimeout: The call of the reward as a whole is late.
        """
        ordered = [(min(pair), max(pair)) for pair in asked]
        found = {pair: self._decided(*pair) for pair in dict.fromkeys(ordered)}
        unsure = [pair for pair, value in found.items() if value is None]
        results = run("mmpost.rewards.math_equal:equal", unsure, limit_s=self.item_timeout)
        found |= {pair: bool(result) for pair, result in zip(unsure, results, strict=True)}
        return [bool(found[pair]) for pair in ordered]

    def classes(self, groups: Sequence[Sequence[str | None]]) -> list[list[int | None]]:
        """Classes of equal answers inside each group.

        Args:
            groups: Answers; None is no answer and belongs to no class.

        Returns:
            Per group and answer the index of the first answer of its class, or None.
        """
        distinct = [list(dict.fromkeys(answer for answer in group if answer is not None)) for group in groups]
        asked = [(one, two) for names in distinct for j, two in enumerate(names) for one in names[:j]]
        equal = dict(zip(asked, self.pairs(asked), strict=True))
        out: list[list[int | None]] = []
        for group, names in zip(groups, distinct, strict=True):
            cluster = dict(zip(names, clusters(names, lambda one, two: equal[one, two]), strict=True))
            first: dict[int, int] = {}
            for index, answer in enumerate(group):
                if answer is not None:
                    first.setdefault(cluster[answer], index)
            out.append([None if answer is None else first[cluster[answer]] for answer in group])
        return out

    def _decided(self, one: str, two: str) -> bool | None:
        """What needs no algebra; None for the rest."""
        if one == two:
            return True
        if self.kind == "boxes":
            return similarity(read_boxes(one), read_boxes(two)) >= self.iou
        if self.kind == "number":
            return same_number(one, two, tolerance=self.tolerance, percent=self.percent)
        if self.kind == "choice":
            letters = to_letter(one), to_letter(two)
            return None not in letters and letters[0] == letters[1]
        if self.kind == "text":
            return plain(one) == plain(two)
        return self._guessed(one, two)

    def _guessed(self, one: str, two: str) -> bool | None:
        boxes = read_boxes(one), read_boxes(two)
        if self.kind == "auto" and len(boxes[0]) and len(boxes[1]):
            return similarity(*boxes) >= self.iou
        if to_number(one) is not None and to_number(two) is not None:
            return same_number(one, two, tolerance=self.tolerance, percent=self.percent)
        if same_letter(one, two):
            return True
        if self.kind == "math":
            _require_math_verify()
            return None
        if one.casefold() == two.casefold():
            return True
        if _MATHS.search(one) is None and _MATHS.search(two) is None:
            return plain(one) == plain(two)
        # A sign is no punctuation here: x+1 and x-1 have the same words.
        return None if find_spec("math_verify") is not None else False


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Mean intersection over union of the best one-to-one matching of two sets of boxes; missing partners count 0.

    Args:
        first: Boxes ``[n, 4]``.
        second: Boxes ``[m, 4]``.

    Returns:
        In [0, 1]; 0 when either set is empty, because a set without boxes is no answer.
    """
    if not len(first) or not len(second):
        return 0.0
    overlap = overlaps(first, second)
    return float(overlap[linear_sum_assignment(overlap, maximize=True)].sum() / max(overlap.shape))


def same_letter(one: str, two: str) -> bool:
    """Whether both are the same option and one of them is the letter alone."""
    letters = to_letter(one), to_letter(two)
    alone = min(len(one.strip("()")), len(two.strip("()"))) == 1
    # Beyond these a letter is rather a variable, of which x and X are two.
    return alone and letters[0] is not None and letters[0] in _OPTIONS and letters[0] == letters[1]


def plain(text: str) -> tuple[str, ...]:
    """Words without case, articles and punctuation; a text that has nothing else keeps its characters."""
    words = _WORDS.findall(text.casefold())
    kept = tuple(word for word in words if word.isalnum() and word not in _ARTICLES)
    return kept or tuple(words)


def _require_math_verify() -> None:
    if find_spec("math_verify") is None:
        raise MmpostError(
            "MMP-E010",
            "'kind: math' needs math_verify, which is not installed.",
            'Run: pip install "mmpost-toolkit[math]"',
        )
