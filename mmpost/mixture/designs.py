"""Which mixtures to try: fixed, random or from earlier scores, and the file that lists them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmpost.core.errors import MmpostError
from mmpost.core.files import write_whole
from mmpost.core.seeding import generator
from mmpost.mixture import SCHEMES
from mmpost.mixture.heuristics import heuristics
from mmpost.mixture.records import MixtureRecord, check_simplex, label, rounded

# Concentrations that Dirichlet draws take in turn: near the corners, even, near the middle.
CONCENTRATIONS = (0.3, 1.0, 3.0)
MAX_LATTICE = 20_000


@dataclass(frozen=True, slots=True)
class Design:
    """Mixtures to try.

    Attributes:
        sources: Names of the sources in ``data.train``.
        mixtures: One weight per source each, on the simplex.
        scheme: How they were made.
        seed: Of random schemes.
    """

    sources: tuple[str, ...]
    mixtures: tuple[tuple[float, ...], ...]
    scheme: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for weights in self.mixtures:
            check_simplex(weights, self.sources)

    def named(self) -> list[dict[str, float]]:
        """Mixtures as weight by source."""
        return [dict(zip(self.sources, weights, strict=True)) for weights in self.mixtures]


def design(
    sources: Sequence[str],
    scheme: str,
    n: int | None = None,
    *,
    seed: int = 0,
    denominator: int | None = None,
    records: Sequence[MixtureRecord] = (),
    target: Mapping[str, float] | None = None,
) -> Design:
    """Mixtures by one or several schemes, without repetition.

    Args:
        sources: Two names or more, all different.
        scheme: Names of ``SCHEMES``, joined by commas; ``seeds`` is singles, leave-one-out and uniform.
        n: Number of mixtures in all. Fixed schemes come whole first, ``simplex`` and ``dirichlet`` fill up.
        seed: Of ``dirichlet``.
        denominator: Lattice step 1 / denominator; by default the coarsest lattice with ``n`` points.
        records: Earlier runs, for ``heuristics``.
        target: Score of each record by its label, for ``heuristics``.

    Raises:
        MmpostError: MMP-V023 for sources or schemes that do not go together.
    """
    names = tuple(sources)
    if len(names) < 2 or len(set(names)) != len(names) or not all(names):
        raise MmpostError(
            "MMP-V023", f"a mixture needs two or more different sources; got {', '.join(names) or 'none'}."
        )
    words = [word.strip() for word in scheme.split(",")]
    for word in words:
        if word not in SCHEMES:
            raise MmpostError("MMP-C006", f"unknown name '{word}' among schemes.", f"Known: {', '.join(SCHEMES)}")
    rows: list[list[float]] = []
    for word in words:
        left = None if n is None else n - len(_unique(rows))
        if word == "heuristics":
            rows += [list(weights.values()) for weights in heuristics(records, target or {}).values()]
        else:
            rows += _scheme(word, len(names), left, seed, denominator, rows)
        rows = _unique(rows)
    if n is not None and len(rows) < n:
        raise MmpostError(
            "MMP-V023",
            f"scheme '{scheme}' has {len(rows)} mixtures of {len(names)} sources, but --n is {n}.",
            "Add dirichlet to the scheme, or ask for fewer.",
        )
    return Design(names, tuple(tuple(row) for row in rows), scheme, seed)


def singles(m: int) -> np.ndarray:
    """Each source alone, ``[m, m]``."""
    return np.eye(m)


def leave_one_out(m: int) -> np.ndarray:
    """All sources but one in equal parts, ``[m, m]``."""
    return (1 - np.eye(m)) / (m - 1)


def uniform(m: int) -> np.ndarray:
    """All sources in equal parts, ``[1, m]``."""
    return np.full((1, m), 1 / m)


def lattice(m: int, denominator: int) -> np.ndarray:
    """All mixtures whose weights are multiples of 1 / denominator, ``[C(denominator + m - 1, m - 1), m]``."""
    bars = itertools.combinations(range(denominator + m - 1), m - 1)
    edges = np.array([(-1, *cut, denominator + m - 1) for cut in bars])
    return (np.diff(edges, axis=1) - 1)[::-1] / denominator


def lattice_size(m: int, denominator: int) -> int:
    """Number of points of ``lattice``.

    >>> lattice_size(3, 6)
    28
    """
    size = 1
    for k in range(1, m):
        size = size * (denominator + k) // k
    return size


def dirichlet(m: int, count: int, *, seed: int) -> np.ndarray:
    """Random mixtures, ``[count, m]``; concentrations take turns and a prefix does not depend on ``count``."""
    draws = [
        generator(seed, "mixture/dirichlet", m, index).dirichlet([CONCENTRATIONS[index % len(CONCENTRATIONS)]] * m)
        for index in range(count)
    ]
    return np.array(draws).reshape(count, m)


def _scheme(
    word: str, m: int, left: int | None, seed: int, denominator: int | None, before: Sequence[Sequence[float]]
) -> list[list[float]]:
    if word == "dirichlet":
        if left is None:
            raise MmpostError("MMP-V023", "scheme dirichlet needs a number of mixtures.", "Add --n 12.")
        return [rounded(row) for row in dirichlet(m, max(left, 0), seed=seed)]
    if word == "simplex":
        return _lattice_rows(m, left, denominator, before)
    parts = {"singles": (singles,), "leave-one-out": (leave_one_out,), "uniform": (uniform,)}
    found = [make(m) for make in parts.get(word, (singles, leave_one_out, uniform))]
    return [rounded(row) for row in np.concatenate(found)]


def _lattice_rows(
    m: int, left: int | None, denominator: int | None, before: Sequence[Sequence[float]]
) -> list[list[float]]:
    """All points of the lattice, or those that are spread best beside the mixtures that are there already."""
    if denominator is None:
        if left is None:
            raise MmpostError("MMP-V023", "scheme simplex needs a size.", "Add --n 12 or --denominator 4.")
        denominator = 1
        while lattice_size(m, denominator) < left + len(before):
            denominator += 1
    if lattice_size(m, denominator) > MAX_LATTICE:
        size = lattice_size(m, denominator)
        raise MmpostError("MMP-V023", f"a lattice of {size} mixtures is too large.", "Choose a smaller denominator.")
    points = np.array([rounded(row) for row in lattice(m, denominator)])
    if left is None or left >= len(points):
        return [list(map(float, row)) for row in points]
    return [list(map(float, points[index])) for index in _spread(points, left, np.array(before).reshape(-1, m))]


def _spread(points: np.ndarray, count: int, before: np.ndarray) -> list[int]:
    """Indices of ``count`` points, each the farthest from all before it; ties go to the first in order."""
    distance = np.full(len(points), np.inf)
    for row in before:
        distance = np.minimum(distance, np.linalg.norm(points - row, axis=1).round(9))
    chosen: list[int] = []
    for _ in range(max(count, 0)):
        best = int(np.argmax(distance))
        chosen.append(best)
        distance = np.minimum(distance, np.linalg.norm(points - points[best], axis=1).round(9))
    return chosen


def _unique(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    return [list(row) for row in dict.fromkeys(tuple(row) for row in rows)]


def write_design(path: Path, made: Design) -> None:
    """Write a design as YAML, one mixture a line."""
    lines = [
        "# mmpost mixture run THIS_FILE --config PROXY.yaml",
        "schema: 1",
        f"sources: {yaml.safe_dump(list(made.sources), default_flow_style=True, width=10_000).strip()}",
        f"scheme: {yaml.safe_dump(made.scheme).splitlines()[0]}",
        f"seed: {made.seed}",
        "mixtures:",
    ]
    lines += [f"  - [{', '.join(f'{w:.6f}' for w in row.values())}]  # {label(row)}" for row in made.named()]
    write_whole(path, "\n".join(lines) + "\n")


def read_design(path: Path) -> Design:
    """Read a design.

    Raises:
        MmpostError: MMP-V023 for a file that is none, MMP-V021 for weights that are no mixture.
    """
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        sources = tuple(str(name) for name in content["sources"])
        mixtures = tuple(tuple(float(w) for w in row) for row in content["mixtures"])
        if content["schema"] != 1 or not mixtures or any(len(row) != len(sources) for row in mixtures):
            raise ValueError("sources and mixtures do not fit together")
    except OSError as error:
        raise MmpostError("MMP-V023", f"no design '{path}'.", "Write one with mmpost mixture design.") from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise MmpostError("MMP-V023", f"'{path}' is no design: {reason}.", "See mmpost mixture design.") from error
    return Design(sources, mixtures, str(content.get("scheme", "")), int(content.get("seed", 0)))
