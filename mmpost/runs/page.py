"""A report page of free form: sections of paragraphs, tiles, tables, drawings and pictures in one file.

``mmpost.runs.report`` shows training runs; commands whose results are not a training run (a tokenizer's
reconstructions, a mixture's predictor, a filter's scores) compose their own page from these blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmpost.runs.report import MAX_BYTES
from mmpost.runs.thumbs import data_uri


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Plain words; ``note`` draws attention to them."""

    text: str
    note: bool = False
    kind: str = "paragraph"


@dataclass(frozen=True, slots=True)
class Tiles:
    """Headline figures as (label, value)."""

    items: Sequence[tuple[str, str]]
    kind: str = "tiles"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings; columns whose every cell reads as a number are set flush right."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    kind: str = "table"

    def numeric(self, column: int) -> bool:
        """True for a column of figures."""
        cells = [row[column].strip("+-% ").replace(",", "") for row in self.rows if row[column]]
        return bool(cells) and all(cell[:1].isdigit() for cell in cells)


@dataclass(frozen=True, slots=True)
class Drawing:
    """An SVG drawing made by ``mmpost.runs.svg`` (its text is already escaped there)."""

    svg: str
    title: str = ""
    note: str = ""
    kind: str = "drawing"


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures side by side as (caption, PNG, JPEG or WebP bytes); small ones are shown enlarged, pixels kept."""

    items: Sequence[tuple[str, bytes]]
    title: str = ""
    kind: str = "pictures"

    def sources(self) -> list[tuple[str, str]]:
        """Captions and data URIs."""
        return [(caption, data_uri(content)) for caption, content in self.items]


Block = Paragraph | Tiles | Table | Drawing | Pictures


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it. Drawings that follow each other share a row where they fit."""

    title: str
    blocks: Sequence[Block]


def write_page(out: Path, *, title: str, sections: Sequence[Section], subtitle: str = "mmpost report") -> Path:
    """Write one HTML file that loads nothing.

    Args:
        out: The file; its folder is created.
        title: Heading of the page.
        sections: In order; empty ones are left out.
        subtitle: The line under the heading.

    Returns:
        ``out``. Beyond 5 MB pictures are left out from the last section on, and the page says so.
    """
    shown = [section for section in sections if section.blocks]
    html = _render(title, subtitle, shown)
    for index in reversed(range(len(shown))):
        if len(html.encode()) <= MAX_BYTES:
            break
        kept = [block for block in shown[index].blocks if not isinstance(block, Pictures)]
        if len(kept) < len(shown[index].blocks):
            kept.append(Paragraph("Pictures are left out here, to keep this file under 5 MB.", note=True))
            shown[index] = Section(shown[index].title, kept)
            html = _render(title, subtitle, shown)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(html, "utf-8")
    partial.replace(out)
    return out


def _render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    # jinja2 costs 60 ms; pages are written at the end of commands only.
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415
    from markupsafe import Markup  # noqa: PLC0415

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # Drawings and the style sheet are ours, and escaped where they were made; everything else is escaped here.
    environment.filters |= {"drawing": Markup}
    folder = Path(__file__).parent
    page = environment.from_string((folder / "page.html.j2").read_text("utf-8"))
    style = Markup((folder / "report.css").read_text("utf-8"))
    return page.render(title=title, subtitle=subtitle, sections=sections, style=style)
