"""Charts as inline SVG text: no script, no library, no outside resource.

Colours are the CSS variables ``--s0`` ... ``--s7``, ``--grid``, ``--ink`` and ``--soft`` of the page, so that
one drawing serves light and dark pages. Values show on hover through ``<title>`` elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 220  # viewBox units; the page scales the drawing
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 26
COLOURS = 8
MAX_POINTS = 240  # per line; more cannot be seen at this width
MAX_HOVER = 60  # points per line that answer the mouse; each costs 100 bytes
_SMOOTH_FROM = 24  # points; shorter lines are drawn as they are


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart.

    Attributes:
        name: Name in the legend.
        x: Horizontal positions, ascending.
        y: Values; None leaves a gap.
        low: Lower ends of intervals, or empty.
        high: Upper ends of intervals, or empty.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar.

    Attributes:
        label: What it stands for.
        value: Its length.
        low: Lower end of the confidence interval, or None.
        high: Upper end, or None.
        note: Text behind the value on hover, for example ``n=200``.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2, 2.5, 5 times a power of ten) that enclose ``low`` and ``high``."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """Short text of a number: 4 significant digits, no trailing zeros, exponents without padding."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def line_chart(series: Sequence[Series], *, title: str, x_label: str = "step", smooth: bool = True) -> str:
    """Lines over a common axis; empty text when there is nothing to draw.

    Args:
        series: The lines, at most eight colours.
        title: Accessible name; the caller prints the visible heading.
        x_label: Name of the horizontal axis.
        smooth: Draw long lines light, with their running mean on top.
    """
    series = [line for line in series if any(value is not None for value in line.y)]
    if not series:
        return ""
    values = [v for line in series for v in (*line.y, *line.low, *line.high) if v is not None]
    xs = [x for line in series for x in line.x]
    ticks = nice_ticks(min(values), max(values))
    frame = _Frame(min(xs), max(xs), ticks[0], ticks[-1])
    parts = [frame.grid(ticks, x_label)]
    for index, line in enumerate(series):
        parts.append(_line(line, index % COLOURS, frame, smooth=smooth))
    legend = _legend([line.name for line in series]) if len(series) > 1 else ""
    return _svg("".join(parts), HEIGHT, f"{title}: {_summary(series)}") + legend


def histogram(values: Sequence[float], *, title: str, bins: int = 20) -> str:
    """Counts of values in equal bins; empty text for no values."""
    if not values:
        return ""
    low, high = min(values), max(values)
    ticks = nice_ticks(low, high)
    low, high = ticks[0], ticks[-1]
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    y_ticks = nice_ticks(0, max(counts), 4)
    frame = _Frame(low, high, 0, y_ticks[-1])
    bars = []
    for index, count in enumerate(counts):
        left, right = low + (high - low) * index / bins, low + (high - low) * (index + 1) / bins
        x0, x1, y0 = frame.x(left), frame.x(right), frame.y(count)
        bars.append(
            f'<rect class="f0" x="{x0 + 0.5:.1f}" y="{y0:.1f}" width="{max(0.5, x1 - x0 - 1):.1f}" '
            f'height="{frame.y(0) - y0:.1f}"><title>{number(left)} to {number(right)}: {count}</title></rect>'
        )
    mean = sum(values) / len(values)
    label = f"{title}: {len(values)} values, mean {number(mean)}"
    return _svg(frame.grid(y_ticks, "value", x_ticks=ticks) + "".join(bars), HEIGHT, label)


def bar_chart(
    bars: Sequence[Bar], *, title: str, low: float = 0.0, high: float | None = None, one_colour: bool = False
) -> str:
    """Horizontal bars with confidence whiskers; empty text for no bars.

    Args:
        bars: Top to bottom.
        title: Accessible name.
        low: Start of the axis.
        high: End of the axis; by default the next round number.
        one_colour: Paint all bars alike instead of by position.
    """
    if not bars:
        return ""
    label_width = min(150.0, 14 + 6.6 * max(len(bar.label) for bar in bars))
    tops = [value for bar in bars for value in (bar.value, bar.high) if value is not None]
    bottoms = [value for bar in bars for value in (bar.value, bar.low) if value is not None]
    ticks = nice_ticks(min(low, *bottoms), high if high is not None else max(low, *tops))
    row, height = 30, 30 * len(bars) + 26
    frame = _Frame(ticks[0], ticks[-1], 0, 1, left=label_width, right=52, top=4, height=height)
    parts = [_vertical_grid(frame, ticks, height)]
    for index, bar in enumerate(bars):
        parts.append(_bar(bar, 0 if one_colour else index, 4 + row * index, frame, label_width))
    said = ", ".join(f"{bar.label} {number(bar.value)}" for bar in bars)
    return _svg("".join(parts), height, f"{title}: {said}")


@dataclass(frozen=True, slots=True)
class _Frame:
    """Maps data to viewBox units."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    left: float = LEFT
    right: float = RIGHT
    top: float = TOP
    height: float = HEIGHT

    def x(self, value: float) -> float:
        span = (self.x_high - self.x_low) or 1.0
        return self.left + (value - self.x_low) / span * (WIDTH - self.left - self.right)

    def y(self, value: float) -> float:
        span = (self.y_high - self.y_low) or 1.0
        return self.height - BOTTOM - (value - self.y_low) / span * (self.height - BOTTOM - self.top)

    def grid(self, y_ticks: Sequence[float], x_label: str, x_ticks: Sequence[float] = ()) -> str:
        """Horizontal lines with numbers, and numbers below."""
        parts = []
        for tick in y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="g" x1="{self.left}" x2="{WIDTH - self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="t e" x="{self.left - 6}" y="{y + 3.5:.1f}">{number(tick)}</text>')
        inside = [t for t in x_ticks or nice_ticks(self.x_low, self.x_high) if self.x_low <= t <= self.x_high]
        for tick in inside:
            x = self.x(tick)
            if x < WIDTH - self.right - 34:  # the axis name stands at the right end
                parts.append(f'<text class="t m" x="{x:.1f}" y="{self.height - 9}">{number(tick)}</text>')
        parts.append(f'<text class="t e" x="{WIDTH - self.right}" y="{self.height - 9}">{escape(x_label)}</text>')
        return "".join(parts)


def _line(line: Series, colour: int, frame: _Frame, *, smooth: bool) -> str:
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True)]
    parts = []
    for x, low, high in zip(line.x, line.low, line.high, strict=False):
        if low is not None and high is not None:
            at = f'x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}"'
            parts.append(f'<line class="w s{colour}" {at} y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}"/>')
    if smooth and sum(y is not None for _, y in points) >= _SMOOTH_FROM:
        parts.append(_path(_thin(points), frame, f"r s{colour}"))
        points = _running_mean(points, max(3, len(points) // 15))
    points = _thin(points)
    parts.append(_path(points, frame, f"l s{colour}"))
    known = [(x, y) for x, y in points if y is not None]
    for x, y in known[:: max(1, math.ceil(len(known) / MAX_HOVER))]:
        text = escape(f"{line.name} {number(y)} at {number(x)}")
        circle = f'<circle class="p f{colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="5">'
        parts.append(f"{circle}<title>{text}</title></circle>")
    if len(known) == 1:  # a line of one point would be invisible
        at = f'cx="{frame.x(known[0][0]):.1f}" cy="{frame.y(known[0][1]):.1f}"'
        parts.append(f'<circle class="f{colour}" {at} r="3"/>')
    return "".join(parts)


def _path(points: Sequence[tuple[float, float | None]], frame: _Frame, css: str) -> str:
    steps, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        steps.append(f"{pen}{frame.x(x):.1f} {frame.y(y):.1f}")
        pen = "L"
    return f'<path class="{css}" d="{"".join(steps)}"/>'


def _thin(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most ``MAX_POINTS`` points; each bucket keeps its lowest and highest, so that spikes survive."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        bucket = [(x, y) for x, y in points[start : start + size] if y is not None]
        if bucket:
            ends = {min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])}
            kept += sorted(ends)
    return kept


def _running_mean(points: Sequence[tuple[float, float | None]], window: int) -> list[tuple[float, float | None]]:
    """Centred mean over ``window`` neighbours, fewer at both ends; gaps stay gaps."""
    half = window // 2
    means: list[tuple[float, float | None]] = []
    for index, (x, y) in enumerate(points):
        around = [value for _, value in points[max(0, index - half) : index + half + 1] if value is not None]
        means.append((x, None if y is None else sum(around) / len(around)))
    return means


def _bar(bar: Bar, colour: int, top: float, frame: _Frame, label_width: float) -> str:
    zero, end = frame.x(max(0.0, frame.x_low)), frame.x(bar.value)
    interval = f" [{number(bar.low)}, {number(bar.high)}]" if bar.low is not None and bar.high is not None else ""
    said = escape(f"{bar.label}: {number(bar.value)}{interval} {bar.note}".strip())
    shown = bar.label if len(bar.label) <= 22 else bar.label[:21] + "…"
    css, x, width = f"f{colour % COLOURS}", min(zero, end), abs(end - zero)
    parts = [
        f"<g><title>{said}</title>",
        f'<text class="t e k" x="{label_width - 8:.1f}" y="{top + 18}">{escape(shown)}</text>',
        f'<rect class="{css}" x="{x:.1f}" y="{top + 5}" width="{width:.1f}" height="18" rx="2"/>',
    ]
    if bar.low is not None and bar.high is not None:
        low, high, y = frame.x(bar.low), frame.x(bar.high), top + 14
        parts.append(f'<path class="wh" d="M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 4}v8M{high:.1f} {y - 4}v8"/>')
    text_x = max(end, frame.x(bar.high) if bar.high is not None else end, zero) + 6
    parts.append(f'<text class="t k" x="{text_x:.1f}" y="{top + 18}">{number(bar.value)}</text></g>')
    return "".join(parts)


def _vertical_grid(frame: _Frame, ticks: Sequence[float], height: float) -> str:
    parts = []
    for tick in ticks:
        x = frame.x(tick)
        parts.append(f'<line class="g" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 22}"/>')
        parts.append(f'<text class="t m" x="{x:.1f}" y="{height - 7}">{number(tick)}</text>')
    return "".join(parts)


def _legend(names: Sequence[str]) -> str:
    items = "".join(f'<li><i class="b{i % COLOURS}"></i>{escape(name)}</li>' for i, name in enumerate(names))
    return f'<ul class="legend">{items}</ul>'


def _summary(series: Sequence[Series]) -> str:
    said = []
    for line in series:
        known = [value for value in line.y if value is not None]
        said.append(f"{line.name} from {number(known[0])} to {number(known[-1])}")
    return "; ".join(said)


def _svg(body: str, height: float, label: str) -> str:
    head = f'<svg role="img" viewBox="0 0 {WIDTH} {height}" aria-label="{escape(label, quote=True)}">'
    return f"{head}{body}</svg>"
