"""The free-form report page: one file that loads nothing, whatever stands in it."""

import io
import re

import numpy as np
from PIL import Image

from mmpost.runs.page import Drawing, Paragraph, Pictures, Section, Table, Tiles, write_page
from mmpost.runs.svg import Series, line_chart


def png(size=16, seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def page(tmp_path, sections):
    return write_page(tmp_path / "new" / "report.html", title="T <b>", sections=sections).read_text("utf-8")


def test_every_block_is_shown_and_escaped(tmp_path):
    svg = line_chart([Series("a", [0, 1], [1.0, 2.0])], title="curve")
    blocks = [
        Paragraph("x < y"),
        Paragraph("mind", note=True),
        Tiles([("rfd", "0.25")]),
        Table(["name", "value"], [["<i>", "1.5"], ["b", "-20 %"]], title="Scores"),
        Drawing(svg, title="c1"),
        Drawing(svg, title="c2"),
        Pictures([("one", png())], title="Grid"),
    ]
    html = page(tmp_path, [Section("First", blocks), Section("Empty", [])])
    assert "T &lt;b&gt;" in html
    assert "x &lt; y" in html
    assert "<td>&lt;i&gt;</td>" in html
    assert '<p class="note">mind</p>' in html
    assert '<th class="n">value</th>' in html
    assert "<th>name</th>" in html
    assert html.count("<svg") == 2
    assert html.count('<div class="grid">') == 1
    assert "data:image/png;base64," in html
    assert "Empty" not in html
    assert not re.search(r"(src|href)=\"(?!data:|#)", html)
    assert "<script" not in html
    assert html.count("<div") == html.count("</div>")


def test_a_page_over_the_limit_leaves_pictures_out_from_the_end_and_says_so(tmp_path):
    heavy = [Section(f"S{i}", [Paragraph("kept"), Pictures([("p", png(800, i))])]) for i in range(3)]
    html = page(tmp_path, heavy)
    assert len(html.encode()) <= 5_000_000
    assert html.count("kept") == 3
    assert html.count("Pictures are left out here") == 2
    assert html.index("data:image") < html.index("left out here")
