import re
from xml.etree import ElementTree

import pytest

from mmpost.runs.svg import (
    HEIGHT,
    MAX_POINTS,
    WIDTH,
    Bar,
    Series,
    bar_chart,
    histogram,
    line_chart,
    nice_ticks,
    number,
)


def drawings():
    x = list(range(500))
    noisy = [((7 * i) % 13) / 13 for i in x]
    yield line_chart([Series("a<b", x, noisy), Series("b", x[:3], [1.0, None, 2.0])], title='t"&<')
    yield line_chart([Series("one", [5], [2.0])], title="single point")
    yield line_chart([Series("flat", [1, 2], [0.0, 0.0])], title="flat")
    yield line_chart([Series("ci", [1, 2], [0.5, 0.6], [0.4, 0.5], [0.6, 0.7])], title="ci")
    yield histogram([1.0, 1.0, 1.0], title="same")
    yield histogram([-1.0, 0.5, 3.0], title="h")
    yield bar_chart([Bar("sft & co", 0.7, 0.6, 0.8, "n=5"), Bar("x" * 50, 0.0)], title="b", high=1.0)
    yield bar_chart([Bar("loss", -0.5, -0.7, -0.3)], title="negative")


@pytest.mark.parametrize("index", range(8))
def test_drawings_are_well_formed_accessible_and_inside_their_box(index):
    drawing = list(drawings())[index]
    tree = ElementTree.fromstring(f"<div>{drawing}</div>")
    svg = tree.find("svg")
    assert svg.get("role") == "img"
    assert svg.get("aria-label")
    assert "xmlns" not in drawing
    height = float(svg.get("viewBox").split()[3])
    for element in svg.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert -0.1 <= float(element.get(name, 0)) <= WIDTH + 0.1
        for name in ("y", "y1", "y2", "cy"):
            assert -0.1 <= float(element.get(name, 0)) <= height + 0.1
    assert svg.find(".//title") is not None


def test_nothing_to_draw_is_empty_text():
    assert line_chart([], title="t") == histogram([], title="t") == bar_chart([], title="t") == ""
    assert line_chart([Series("a", [1, 2], [None, None])], title="t") == ""


def test_thinning_keeps_a_spike():
    y = [0.0] * 100_000
    y[77_777] = 50.0
    drawing = line_chart([Series("a", list(range(100_000)), y)], title="t", smooth=False)
    path = re.search(r'class="l s0" d="([^"]+)"', drawing).group(1)
    points = re.findall(r"[ML]([\d.]+) ([\d.]+)", path)
    assert len(points) <= MAX_POINTS + 2
    heights = {float(y) for _, y in points}
    assert min(heights) < HEIGHT / 4 < max(heights)
    assert len(drawing) < 20_000


def test_a_gap_breaks_the_line():
    drawing = line_chart([Series("a", [1, 2, 3, 4], [1.0, 1.5, None, 2.0])], title="t")
    path = re.search(r'class="l s0" d="([^"]+)"', drawing).group(1)
    assert path.count("M") == 2


def test_smoothing_a_constant_changes_nothing():
    drawing = line_chart([Series("a", list(range(60)), [3.0] * 60)], title="t")
    raw = re.search(r'class="r s0" d="([^"]+)"', drawing).group(1)
    mean = re.search(r'class="l s0" d="([^"]+)"', drawing).group(1)
    assert raw == mean


def test_histogram_counts_every_value_once():
    drawing = histogram([0.0, 0.1, 0.5, 0.999, 1.0], title="t")
    assert sum(int(count) for count in re.findall(r": (\d+)</title>", drawing)) == 5


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.31, 0.32), (-5, 1e6), (3, 3), (0, 0), (-1e-9, 1e-9), (1e5, 1e5 + 1)]
)
def test_ticks_enclose_the_range_in_round_steps(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9 * abs(low)
    assert ticks[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(ticks) <= 8
    mantissa = float(f"{ticks[1] - ticks[0]:.3e}".split("e")[0])
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 0.01


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (0.12345, "0.1235"),
        (1234.4, "1234"),
        (3e-4, "3e-4"),
        (1.25e6, "1.25e6"),
        (-2.0, "-2"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
