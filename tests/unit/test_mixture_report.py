"""The page of a folder of mixtures and its drawings."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from mmpost.mixture.designs import design
from mmpost.mixture.fit import fit
from mmpost.mixture.records import MixtureRecord
from mmpost.mixture.report import write_mixture_report
from mmpost.mixture.scores import Target
from mmpost.mixture.suggest import suggest
from mmpost.runs.svg_mixture import Mixture, Point, parallel, scatter, ternary


def drawing(svg):
    return ElementTree.fromstring(svg)


def test_points_lie_on_the_line_where_prediction_and_measurement_agree():
    svg = drawing(scatter([Point("a <b>", 0.2, 0.2, 0.05, 0.01), Point("c", 0.8, 0.8)], title="t"))
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")]
    line = next(path.get("d") for path in svg.iter("path"))
    x0, y0, x1, y1 = map(float, re.findall(r"[\d.]+", line))
    for x, y in circles:
        assert (y - y0) / (y1 - y0) == pytest.approx((x - x0) / (x1 - x0), abs=0.01)
    assert next(title.text for title in svg.iter("title")) == "a <b>: predicted 0.2, measured 0.2"
    assert svg.get("aria-label") == "t: 2 runs, mean absolute error 0"


def test_bars_of_a_point_are_its_intervals():
    svg = drawing(scatter([Point("a", 0.5, 0.4, 0.1, 0.05), Point("b", 0.0, 0.0), Point("c", 1.0, 1.0)], title="t"))
    circles = {round(float(c.get("cx"))): float(c.get("cy")) for c in svg.iter("circle")}
    (low_x, low_y), (high_x, high_y) = min(circles.items()), max(circles.items())
    bars = [line for line in svg.iter("line") if line.get("class") == "w s0"][:2]
    unit_x, unit_y = high_x - low_x, low_y - high_y
    assert (float(bars[0].get("y1")) - float(bars[0].get("y2"))) / unit_y == pytest.approx(2 * 1.96 * 0.1, abs=0.01)
    assert (float(bars[1].get("x2")) - float(bars[1].get("x1"))) / unit_x == pytest.approx(2 * 1.96 * 0.05, abs=0.01)


def test_corners_of_the_triangle_are_single_sources():
    rows = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1 / 3, 1 / 3, 1 / 3)]
    svg = drawing(ternary(["top", "right", "left"], [Mixture(row, 0.5) for row in rows], title="t"))
    places = np.array([(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")])
    top, right, left, middle = places
    assert top[1] < left[1] == right[1]
    assert left[0] < top[0] < right[0]
    np.testing.assert_allclose(middle, places[:3].mean(0), atol=0.1)
    assert [text.text for text in svg.iter("text")] == ["top", "right", "left"]


def test_a_marked_mixture_is_a_star_and_parallel_axes_have_a_line_each():
    points = [Mixture((0.1, 0.2, 0.3, 0.4), 0.5, "one"), Mixture((0, 0, 0, 1), 0.9, "two", marked=True)]
    svg = drawing(parallel(list("abcd"), points, title="t"))
    assert len(list(svg.iter("path"))) == 2
    assert [text.text for text in svg.iter("text") if "k" in text.get("class")] == ["a", "b", "c", "d", "score"]
    triangle = drawing(ternary(list("abc"), [Mixture((0.2, 0.3, 0.5), 1, "s", marked=True)], title="t"))
    assert [title.text for title in triangle.iter("title")] == ["s: 1 at a 0.20, b 0.30, c 0.50"]


def test_nothing_is_drawn_of_nothing():
    assert scatter([], title="t") == ternary(list("abc"), [], title="t") == parallel(list("ab"), [], title="t") == ""


@pytest.mark.parametrize("m", [3, 4])
def test_the_page_shows_runs_predictor_and_suggestions(tmp_path, m):
    names = ["a&b", "c", "d", "e"][:m]
    records = [
        MixtureRecord(
            row, {"t": {"value": 0.3 + 0.2 * row["c"], "n": 100}, "t.x": {"value": 1, "n": 5, "group": 1}}, steps=5
        )
        for row in design(names, "seeds,dirichlet", 11).named()
    ]
    fitted = fit(records, Target(), "auto")
    text = write_mixture_report(tmp_path / "r.html", fitted, records, suggest(fitted, 2)).read_text()
    assert text.count("<svg") == 2 + len({"gp", "mean", fitted.model}) - 1
    assert "mixtures of a&amp;b, c" in text
    assert "Every run predicted from all the others" in text
    assert text.count("single c") >= 2
    assert "<script" not in text
