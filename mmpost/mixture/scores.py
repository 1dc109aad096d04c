"""One number per run from the scores of several tests: mean, weighted by size, in- and out-score.

Scores are kept per test and joined here, as late as possible: which mixture wins depends on how tests are weighted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmpost.core.errors import MmpostError
from mmpost.mixture.records import MixtureRecord

KINDS = ("eval.mean", "eval.weighted", "eval.in", "eval.out", "eval.in_out")
Scores = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Target:
    """What a mixture is judged by.

    Attributes:
        name: ``eval.mean`` (tests count alike), ``eval.weighted`` (rows count alike), ``eval.in``, ``eval.out``
            (rows of those tests count alike), ``eval.in_out``, or ``eval.TASK`` or ``eval.TASK.GROUP``.
        in_tasks: Tests of the sources' own kind.
        out_tasks: Tests of other kinds.
        in_weight: Share of the in-score in ``eval.in_out``, 0 to 1.
        tasks: Tests that ``mean`` and ``weighted`` are over; empty means all.
    """

    name: str = "eval.mean"
    in_tasks: tuple[str, ...] = ()
    out_tasks: tuple[str, ...] = ()
    in_weight: float = 0.5
    tasks: tuple[str, ...] = ()

    def __call__(self, scores: Scores) -> tuple[float, float]:
        """Value and its standard error from the number of test rows.

        Raises:
            MmpostError: MMP-V027 for a test that was not run, or a target without its tests.
        """
        if self.name == "eval.in_out":
            parts = [Target("eval.in", self.in_tasks)(scores), Target("eval.out", (), self.out_tasks)(scores)]
            shares = (self.in_weight, 1 - self.in_weight)
            value = sum(share * part[0] for share, part in zip(shares, parts, strict=True))
            return value, math.hypot(*(share * part[1] for share, part in zip(shares, parts, strict=True)))
        weights = self._weights(scores)
        total = math.fsum(weights.values())
        value = math.fsum(weight * scores[name]["value"] for name, weight in weights.items()) / total
        errors = [weight * standard_error(scores[name]) for name, weight in weights.items()]
        return value, math.hypot(*errors) / total

    def _weights(self, scores: Scores) -> dict[str, float]:
        """What each test counts for."""
        if self.name in ("eval.in", "eval.out"):
            chosen = self.in_tasks if self.name == "eval.in" else self.out_tasks
            if not chosen:
                option = "--in-tasks" if self.name == "eval.in" else "--out-tasks"
                raise MmpostError("MMP-V027", f"target '{self.name}' has no tests.", f"Name them with {option} a,b.")
        elif self.name in ("eval.mean", "eval.weighted"):
            chosen = self.tasks or tuple(name for name, score in scores.items() if not score.get("group"))
        else:
            chosen = (self.name.removeprefix("eval."),)
        for name in chosen:
            if name not in scores:
                known = ", ".join([*KINDS, *(f"eval.{task}" for task in scores)])
                raise MmpostError("MMP-V027", f"no score '{name}' in the runs.", f"Known targets: {known}.")
        alike = self.name == "eval.mean"
        return {name: 1.0 if alike else float(scores[name]["n"]) for name in chosen}

    def to_json(self) -> dict[str, Any]:
        """For predictor.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Target:
        """Inverse of ``to_json``."""
        in_tasks, out_tasks, chosen = (tuple(values[key]) for key in ("in_tasks", "out_tasks", "tasks"))
        return cls(str(values["name"]), in_tasks, out_tasks, float(values["in_weight"]), chosen)


def standard_error(score: Mapping[str, float]) -> float:
    """Of an exact-match rate over n rows, with two right and two wrong ones added, so that 0 and 1 are not certain.

    Source: Agresti and Coull (1998), The American Statistician 52.
    """
    n = float(score["n"])
    share = (score["value"] * n + 2) / (n + 4)
    return math.sqrt(share * (1 - share) / (n + 4))


def weighted(values: Mapping[str, float], sizes: Mapping[str, float], tasks: Sequence[str]) -> float:
    """Mean over tests, each counted by its rows: the paper's in- and out-score.

    Args:
        values: Score by test.
        sizes: Rows by test.
        tasks: Which tests.
    """
    return math.fsum(values[t] * sizes[t] for t in tasks) / math.fsum(sizes[t] for t in tasks)


def measured(records: Sequence[MixtureRecord], target: Target) -> tuple[list[float], list[float]]:
    """Target values and standard errors of all runs."""
    pairs = [target(record.scores) for record in records]
    return [value for value, _ in pairs], [error for _, error in pairs]
