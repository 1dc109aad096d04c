"""report.html of a folder of mixtures: what was run, how far predictions can be trusted, what is suggested."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmpost.mixture.designs import lattice
from mmpost.mixture.fit import Fit, Quality
from mmpost.mixture.predict import Predictor
from mmpost.mixture.records import MixtureRecord, label
from mmpost.mixture.suggest import Suggestion, Suggestions
from mmpost.runs.page import Block, Drawing, Paragraph, Section, Table, Tiles, write_page
from mmpost.runs.svg_mixture import Mixture, Point, parallel, scatter, ternary

_SURFACE = 24  # lattice of the background of the triangle
_CAUTION = (
    "Differences between single runs of about a point are noise: repeat the suggested mixture and uniform weights with "
    "other seeds before ranking them. Tests that a mixture was chosen by are no unseen tests any more."
)


def write_mixture_report(
    out: Path,
    fitted: Fit,
    records: Sequence[MixtureRecord],
    found: Suggestions,
    *,
    title: str = "mmpost: data mixture",
    head: Sequence[Block] = (),
) -> Path:
    """Write the page.

    Args:
        out: The file.
        fitted: Runs and predictor.
        records: The same runs with all their scores.
        found: What is suggested.
        title: Heading.
        head: Blocks before everything else.
    """
    sections = [
        Section("Summary", [*head, *_summary(fitted, found)]),
        Section("Predictor", _predictor(fitted)),
        Section("Mixtures", [_mixtures(fitted, found), _runs(fitted, records)]),
    ]
    return write_page(out, title=title, sections=sections, subtitle=f"mixtures of {', '.join(fitted.sources)}")


def _summary(fitted: Fit, found: Suggestions) -> list[Block]:
    first = found.chosen[0]
    best = int(np.argmax(fitted.values))
    tiles = [
        ("suggested", label(first.weights)),
        (f"predicted {fitted.target.name}", f"{first.mean:.3f} [{first.low:.3f}, {first.high:.3f}]"),
        ("uniform, predicted", f"{found.uniform.mean:.3f} [{found.uniform.low:.3f}, {found.uniform.high:.3f}]"),
        ("best run", f"{fitted.values[best]:.3f}"),
        ("runs", str(len(fitted.values))),
    ]
    rows = [(f"suggestion {k + 1}", one) for k, one in enumerate(found.chosen)]
    rows += [("best run so far", found.best_tried), ("uniform", found.uniform)]
    gains = any(one.gain for one in found.chosen)
    table = Table(
        ["", *fitted.sources, "predicted", "95 % interval", *(["expected improvement"] if gains else [])],
        [_suggested(name, one, gains) for name, one in rows],
        f"Suggestions, predicted by model {found.model}",
    )
    blocks: list[Block] = [Tiles(tiles), table]
    if not fitted.signal:
        words = f"No model predicts {fitted.target.name} better than its mean: these runs do not tell mixtures apart."
        blocks.append(Paragraph(words, note=True))
    if found.is_settled:
        blocks.append(Paragraph("Further proxy runs promise less than half the noise of one run.", note=True))
    return [*blocks, Paragraph(_CAUTION)]


def _suggested(name: str, one: Suggestion, gains: bool) -> list[str]:
    shares = [f"{weight:.3f}" for weight in one.weights.values()]
    gain = [f"{one.gain:.4f}" if one.gain else ""] if gains else []
    return [name, *shares, f"{one.mean:.3f}", f"{one.low:.3f} to {one.high:.3f}", *gain]


def _predictor(fitted: Fit) -> list[Block]:
    rows = [
        [name, f"{q.mae:.4f}", f"{q.r2:.2f}", f"{q.spearman:.2f}", f"{100 * q.coverage:.0f} %"]
        for name, q in fitted.quality.items()
    ]
    table = Table(
        ["model", "mean absolute error", "R²", "rank correlation", "inside 95 % interval"],
        rows,
        "Every run predicted from all the others",
    )
    drawings: list[Block] = [
        Drawing(
            scatter(_points(fitted, quality), title=f"{name}: predicted against measured"),
            f"{name}: predicted against measured",
            "each run predicted from the others; bars are 95 % intervals",
        )
        for name, quality in fitted.quality.items()
        if name in ("gp", fitted.model, "mean")
    ]
    return [table, *drawings]


def _points(fitted: Fit, quality: Quality) -> list[Point]:
    return [
        Point(label(fitted.named(row)), predicted, float(value), sd, float(error))
        for row, predicted, value, sd, error in zip(
            fitted.weights, quality.predicted, fitted.values, quality.sd, fitted.errors, strict=True
        )
    ]


def _mixtures(fitted: Fit, found: Suggestions) -> Drawing:
    runs = [
        Mixture(row.tolist(), float(value), label(fitted.named(row)))
        for row, value in zip(fitted.weights, fitted.values, strict=True)
    ]
    first = found.chosen[0]
    runs.append(Mixture(list(first.weights.values()), first.mean, "suggested", marked=True))
    title = f"{fitted.target.name} by mixture"
    if len(fitted.sources) != 3:
        return Drawing(parallel(fitted.sources, runs, title=title), title, "one line per run; orange: suggested")
    model = fitted.as_model(found.model)
    drawing = ternary(fitted.sources, runs, title=title, surface=_surface(model), step=1 / _SURFACE)
    return Drawing(drawing, title, "background: predicted; green: runs, larger is better; star: suggested")


def _surface(model: Predictor) -> list[Mixture]:
    points = lattice(3, _SURFACE)
    return [Mixture(row.tolist(), float(v)) for row, v in zip(points, model.predict(points)[0], strict=True)]


def _runs(fitted: Fit, records: Sequence[MixtureRecord]) -> Table:
    tasks = [name for name, score in records[0].scores.items() if not score.get("group")]
    order = np.argsort(-fitted.values, kind="stable")
    rows = []
    for index in order:
        record = records[index]
        cells = [f"{weight:.3f}" for weight in record.weights.values()]
        cells += [f"{fitted.values[index]:.3f}", *(f"{record.scores[task]['value']:.3f}" for task in tasks)]
        passes = max(record.passes.values(), default=0.0)
        rows.append([record.label, *cells, str(record.seed), f"{passes:.2f}"])
    tests = [f"test {task}" for task in tasks]
    headings = ["mixture", *fitted.sources, fitted.target.name, *tests, "seed", "most passes over a source"]
    return Table(headings, rows, "All runs, best first")
