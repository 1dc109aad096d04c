"""What is known about a mixture: its weights and the scores of the run that trained on it, as lines of a file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmpost.core.errors import MmpostError
from mmpost.core.files import write_whole

SCHEMA = 1
RESULTS = "results.jsonl"
# Weights are whole multiples of this, so that files, folder names and samplers agree to the last digit.
UNIT = 1_000_000
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class MixtureRecord:
    """One finished proxy run.

    Attributes:
        weights: Share of the draws by source, on the simplex.
        scores: By task ``{"value": 0..1, "n": rows}``, and ``TASK.GROUP`` for the groups of a task.
        seed: Seed of the run.
        steps: Optimiser steps.
        rows_seen: Rows drawn in all.
        passes: How often each source was gone through; above 1 rows were repeated.
        model: Weights that the run started from.
        command: ``sft`` or ``grpo``.
    """

    weights: Mapping[str, float]
    scores: Mapping[str, Mapping[str, float]]
    seed: int = 0
    steps: int = 0
    rows_seen: int = 0
    passes: Mapping[str, float] = field(default_factory=dict)
    model: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        check_simplex(list(self.weights.values()), list(self.weights))

    @property
    def label(self) -> str:
        """Short words for people: ``single a``, ``without a``, ``uniform`` or the shares."""
        return label(self.weights)


def label(weights: Mapping[str, float]) -> str:
    """Short words for a mixture.

    >>> label({"a": 1.0, "b": 0.0}), label({"a": 0.5, "b": 0.5}), label({"a": 0.7, "b": 0.3})
    ('single a', 'uniform', 'a 0.70, b 0.30')
    """
    names, values = list(weights), np.array(list(weights.values()))
    used = values > TOLERANCE
    even = bool(np.ptp(values[used]) <= 2 / UNIT)
    if used.sum() == 1:
        return f"single {names[int(np.argmax(values))]}"
    if even and used.all():
        return "uniform"
    if even and used.sum() == len(names) - 1:
        return f"without {names[int(np.argmin(values))]}"
    return ", ".join(f"{name} {value:.2f}" for name, value in weights.items() if value > TOLERANCE)


def check_simplex(weights: Sequence[float], names: Sequence[str]) -> None:
    """Refuse what is no mixture.

    Raises:
        MmpostError: MMP-V021 for weights that are negative, not finite or do not add up to 1.
    """
    values = [float(weight) for weight in weights]
    fine = bool(values) and all(math.isfinite(v) and v >= 0 for v in values)
    if not fine or abs(math.fsum(values) - 1) > len(values) * TOLERANCE:
        shown = ", ".join(f"{name} {value:g}" for name, value in zip(names, values, strict=True))
        raise MmpostError(
            "MMP-V021",
            f"no mixture: {shown or 'no weights'}; weights must be ≥ 0 and add up to 1.",
            "Divide them by their sum.",
        )


def rounded(weights: Sequence[float] | np.ndarray) -> list[float]:
    """Weights as whole multiples of 1e-6 that add up to 1, by largest remainder.

    Args:
        weights: Non-negative, not all 0; only ratios count.
    """
    shares = np.asarray(weights, dtype=np.float64)
    exact = shares / shares.sum() * UNIT
    # 1/3 and its computed neighbours must not round to different sides.
    whole = np.floor(exact + 1e-6).astype(np.int64)
    missing = UNIT - int(whole.sum())
    order = np.argsort(whole - exact, kind="stable")
    whole[order[:missing]] += 1
    return [int(units) / UNIT for units in whole]


def run_name(weights: Mapping[str, float], seed: int) -> str:
    """Folder of a run: a function of mixture and seed, so that no design trains the same thing twice."""
    units = {name: round(value * UNIT) for name, value in weights.items()}
    digest = hashlib.sha256(json.dumps(units, sort_keys=True).encode()).hexdigest()
    return f"m-{digest[:10]}-s{seed}"


def write_records(path: Path, records: Iterable[MixtureRecord]) -> None:
    """Write all records at once, in an order that does not depend on which run ended first."""
    lines = [json.dumps({"schema": SCHEMA, **asdict(r)}, ensure_ascii=False) for r in sorted(records, key=_order)]
    write_whole(path, "".join(line + "\n" for line in lines))


def _order(record: MixtureRecord) -> tuple[int, list[float]]:
    return record.seed, [-value for value in record.weights.values()]


def read_records(folder: Path) -> list[MixtureRecord]:
    """Records of a folder of ``mmpost mixture run``, or of a results file.

    Raises:
        MmpostError: MMP-V022 when there are none or the file is damaged.
    """
    path = folder / RESULTS if folder.is_dir() else folder
    if not path.is_file():
        raise MmpostError(
            "MMP-V022", f"'{folder}' holds no {RESULTS}.", "Run mmpost mixture run design.yaml --config proxy.yaml."
        )
    records: list[MixtureRecord] = []
    # Bytes, since a damaged file need not be text; the file ends with a line break unless it was cut.
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), 1):
        try:
            row: dict[str, Any] = json.loads(line)
            if row.pop("schema") != SCHEMA:
                raise ValueError(f"schema is not {SCHEMA}")
            records.append(MixtureRecord(**row))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise MmpostError(
                "MMP-V022", f"{path}:{number}: no record of a mixture ({error}).", "Run mmpost mixture run again."
            ) from error
    names = {tuple(record.weights) for record in records}
    if len(names) != 1:
        what = "no records" if not records else "records of different sources"
        raise MmpostError("MMP-V022", f"{path}: {what}.", "Run mmpost mixture run again.")
    return records


def matrix(records: Sequence[MixtureRecord]) -> np.ndarray:
    """Weights, float64 ``[runs, sources]``."""
    return np.array([list(record.weights.values()) for record in records], dtype=np.float64)
