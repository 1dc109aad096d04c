"""Drawings of mixtures: predicted against measured, a triangle for three sources, parallel axes for more.

They use the frame, the colours and the classes of ``mmpost.runs.svg``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mmpost.runs.svg import COLOURS, HEIGHT, WIDTH, _Frame, _svg, nice_ticks, number

# The triangle: corners of the three sources in viewBox units, clockwise from the top.
_TOP, _SIDE = 26.0, 330.0
_TRIANGLE_HEIGHT = _SIDE * math.sqrt(3) / 2


@dataclass(frozen=True, slots=True)
class Point:
    """A run.

    Attributes:
        label: Which mixture.
        predicted: Prediction from all other runs.
        measured: Score.
        predicted_sd: Standard deviation of the prediction.
        measured_sd: Standard error of the score.
        group: Colour, 0 to 7.
    """

    label: str
    predicted: float
    measured: float
    predicted_sd: float = 0.0
    measured_sd: float = 0.0
    group: int = 0


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture and its score.

    Attributes:
        weights: On the simplex.
        value: Score.
        label: What it is.
        marked: Draw it as a star.
    """

    weights: Sequence[float]
    value: float
    label: str = ""
    marked: bool = False


def scatter(points: Sequence[Point], *, title: str) -> str:
    """Predicted against measured with 95 % intervals and the line where both agree; empty for no points."""
    points = [point for point in points if math.isfinite(point.predicted) and math.isfinite(point.measured)]
    if not points:
        return ""
    ends = [v for p in points for v in (p.predicted, p.measured, *_ends(p.measured, p.measured_sd))]
    ticks = nice_ticks(min(ends), max(ends))
    low, high = ticks[0], ticks[-1]
    frame = _Frame(low, high, low, high)
    line = f"M{frame.x(low):.1f} {frame.y(low):.1f}L{frame.x(high):.1f} {frame.y(high):.1f}"
    parts = [frame.grid(ticks, "measured", x_ticks=ticks), f'<path class="r s7" style="opacity:.8" d="{line}"/>']
    for point in points:
        parts.append(_scatter_point(point, frame, low, high))
    gaps = [abs(point.predicted - point.measured) for point in points]
    said = f"{title}: {len(points)} runs, mean absolute error {number(sum(gaps) / len(gaps))}"
    return _svg("".join(parts), HEIGHT, said)


def _scatter_point(point: Point, frame: _Frame, low: float, high: float) -> str:
    css = point.group % COLOURS
    x, y = frame.x(point.measured), frame.y(point.predicted)
    bottom, top = (frame.y(min(high, max(low, v))) for v in _ends(point.predicted, point.predicted_sd))
    left, right = (frame.x(v) for v in _ends(point.measured, point.measured_sd))
    said = f"{point.label}: predicted {number(point.predicted)}, measured {number(point.measured)}"
    return (
        f'<g><title>{escape(said)}</title><line class="w s{css}" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" '
        f'y2="{top:.1f}"/><line class="w s{css}" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<circle class="f{css}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/></g>'
    )


def _ends(value: float, sd: float) -> tuple[float, float]:
    return value - 1.96 * sd, value + 1.96 * sd


def ternary(
    names: Sequence[str], points: Sequence[Mixture], *, title: str, surface: Sequence[Mixture] = (), step: float = 0.0
) -> str:
    """Mixtures of three sources in a triangle, stronger where scores are higher; empty for no points.

    Args:
        names: Sources at the top, at the lower right and at the lower left.
        points: Runs, and marked ones.
        title: Accessible name.
        surface: Predictions on a lattice, drawn as the background.
        step: Distance of its points in weight.
    """
    if not points or len(names) != 3:
        return ""
    values = [one.value for one in (*points, *surface)]
    low, high = min(values), max(values)
    parts = [_cell(one, low, high, step) for one in surface]
    corners = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    edge = "L".join("{:.1f} {:.1f}".format(*_place(corner)) for corner in corners)
    parts.append(f'<path class="l s7" d="M{edge}Z"/>')
    anchors = (("m", 0, -8), ("m", 0, 18), ("m", 0, 18))
    for name, corner, (anchor, dx, dy) in zip(names, corners, anchors, strict=True):
        x, y = _place(corner)
        parts.append(f'<text class="t {anchor} k" x="{x + dx:.1f}" y="{y + dy:.1f}">{escape(_short(name))}</text>')
    parts += [_dot(one, low, high, names) for one in sorted(points, key=lambda one: one.marked)]
    best = max(points, key=lambda one: one.value)
    said = f"{title}: scores from {number(low)} to {number(high)}, best run {best.label or best.weights}"
    return _svg("".join(parts), _TOP + _TRIANGLE_HEIGHT + 30, said)


def _place(weights: Sequence[float]) -> tuple[float, float]:
    left = (WIDTH - _SIDE) / 2
    x = left + _SIDE * (0.5 * weights[0] + weights[1])
    return x, _TOP + _TRIANGLE_HEIGHT * (1 - weights[0])


def _cell(one: Mixture, low: float, high: float, step: float) -> str:
    """A hexagon of the lattice."""
    x, y = _place(one.weights)
    radius = _SIDE * step / math.sqrt(3) * 1.02
    corners = [(x + radius * math.sin(k * math.pi / 3), y + radius * math.cos(k * math.pi / 3)) for k in range(6)]
    path = "L".join(f"{a:.1f} {b:.1f}" for a, b in corners)
    return f'<path class="f0" style="opacity:{0.05 + 0.6 * _height(one.value, low, high):.2f}" d="M{path}Z"/>'


def _height(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _dot(one: Mixture, low: float, high: float, names: Sequence[str]) -> str:
    x, y = _place(one.weights)
    shares = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(names, one.weights, strict=True))
    said = escape(f"{one.label or 'run'}: {number(one.value)} at {shares}")
    if one.marked:
        angles = [math.pi / 2 + k * math.pi / 5 for k in range(10)]
        spikes = [(x + r * math.cos(a), y - r * math.sin(a)) for k, a in enumerate(angles) for r in ((9, 4)[k % 2],)]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in spikes)
        return f'<path class="f1" style="stroke:var(--card)" d="M{path}Z"><title>{said}</title></path>'
    radius = 3 + 3 * _height(one.value, low, high)
    return (
        f'<circle class="f2" style="stroke:var(--card)" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">'
        f"<title>{said}</title></circle>"
    )


def parallel(names: Sequence[str], points: Sequence[Mixture], *, title: str) -> str:
    """One vertical axis per source and one for the score, one line per mixture; empty for no points."""
    if not points:
        return ""
    low, high = min(one.value for one in points), max(one.value for one in points)
    ticks = nice_ticks(low, high)
    axes, width = [*names, "score"], (WIDTH - 70) / max(1, len(names))
    frame = _Frame(0, 1, 0, 1, top=24)
    parts = []
    for index, name in enumerate(axes):
        x = 30 + width * index
        top, bottom = frame.y(1), frame.y(0)
        ends = ("0", "1") if index < len(names) else (number(ticks[0]), number(ticks[-1]))
        parts.append(f'<line class="g" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
        parts.append(f'<text class="t m k" x="{x:.1f}" y="12">{escape(_short(name, 14))}</text>')
        parts.append(f'<text class="t e" x="{x - 4:.1f}" y="{bottom:.1f}">{ends[0]}</text>')
        parts.append(f'<text class="t e" x="{x - 4:.1f}" y="{top + 6:.1f}">{ends[1]}</text>')
    for one in sorted(points, key=lambda one: (one.marked, one.value)):
        heights = [*one.weights, (one.value - ticks[0]) / (ticks[-1] - ticks[0])]
        path = "L".join(f"{30 + width * k:.1f} {frame.y(value):.1f}" for k, value in enumerate(heights))
        strength = 1.0 if one.marked else 0.15 + 0.6 * _height(one.value, low, high)
        said = escape(f"{one.label}: {number(one.value)}")
        css = f'class="l s{1 if one.marked else 0}" style="opacity:{strength:.2f}"'
        parts.append(f'<path {css} d="M{path}"><title>{said}</title></path>')
    said = f"{title}: {len(points)} mixtures of {len(names)} sources, scores from {number(low)} to {number(high)}"
    return _svg("".join(parts), HEIGHT, said)


def _short(text: str, limit: int = 24) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
