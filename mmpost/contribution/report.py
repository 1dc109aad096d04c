"""report.html and summary.json of a contribution filter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmpost.contribution.labels import LABELS, RULES
from mmpost.contribution.rows import reference
from mmpost.contribution.score import WITH
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Kind, Sample
from mmpost.eval.stats import wilson
from mmpost.runs.page import Block, Drawing, Paragraph, Pictures, Section, Table, Tiles, write_page
from mmpost.runs.svg import Bar, bar_chart, histogram

_SHOWN = 12  # rows of each label
_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)
_WORDS = {
    "weak": "answered without the medium",
    "strong": "answered with it only",
    "hard": "not answered with it either",
    "harmful": "answered better without it",
    "unscored": "no verifier applies",
}
_CAUTION = (
    "The labels are about these models: a row that they have learnt by heart is weak to them. Ask models of other "
    "families that have not seen the data, and look at the tables below before trusting a split."
)


def summary(
    records: Sequence[Mapping[str, Any]], *, modality: Kind, models: Sequence[str], nulls: Sequence[str], rule: str
) -> dict[str, Any]:
    """Counts, accuracies and intervals of all rows; depends on nothing but the votes.

    Args:
        records: Lines of ``scores.jsonl``.
        modality: What was taken away.
        models: Names of the voters.
        nulls: Names of the nulls.
        rule: Rule by which the files were split.
    """
    known = [one for one in records if one["robust"] != "unscored"]
    return {
        "modality": modality,
        "rows": len(records),
        "rule": rule,
        "labels": {name: {label: _count(records, name, label) for label in LABELS} for name in RULES},
        "accuracy": {
            "with": _mean([one["with"] for one in known]),
            "without": _mean([one["without"] for one in known]),
            **{null: _mean([one["by_null"][null] for one in known]) for null in nulls},
        },
        "chance": sum(one["chance"] for one in known) / max(len(known), 1),
        "contribution": sum(one["contribution"] for one in known) / max(len(known), 1),
        "models": {
            name: {
                condition: _mean([share for one in known if (share := _share(one, name, condition)) is not None])
                for condition in (WITH, *nulls)
            }
            for name in models
        },
    }


def _count(records: Sequence[Mapping[str, Any]], rule: str, label: str) -> int:
    return sum(one[rule] == label for one in records)


def _mean(values: Sequence[float]) -> dict[str, Any]:
    """Mean of shares over rows, with Wilson's interval as if every row had one vote, which errs on the wide side."""
    right = sum(values)
    return {"value": right / max(len(values), 1), "ci": list(wilson(right, len(values))), "n": len(values)}


def _share(record: Mapping[str, Any], model: str, condition: str) -> float | None:
    votes = [vote for vote in record["models"][model][condition]["right"] if vote is not None]
    return sum(votes) / len(votes) if votes else None


def write_report(
    out: Path, found: Mapping[str, Any], records: Sequence[Mapping[str, Any]], rows: Sequence[Sample]
) -> Path:
    """Write the page.

    Args:
        out: The file.
        found: What ``summary`` says.
        records: Lines of ``scores.jsonl``.
        rows: The rows, in the same order.
    """
    rule = str(found["rule"])
    counts = found["labels"][rule]
    accuracy = found["accuracy"]
    nulls = [name for name in accuracy if name not in ("with", "without")]
    tiles = [
        ("rows", str(found["rows"])),
        *((label, f"{count} ({count / max(found['rows'], 1):.0%})") for label, count in counts.items() if count),
        ("accuracy with", f"{accuracy['with']['value']:.3f}"),
        ("accuracy without", f"{accuracy['without']['value']:.3f}"),
        ("chance", f"{found['chance']:.3f}"),
    ]
    bars = [Bar(name, accuracy[name]["value"], *accuracy[name]["ci"]) for name in ("with", *nulls)]
    known = [one for one in records if one["robust"] != "unscored"]
    blocks: list[Block] = [
        Tiles(tiles),
        Drawing(bar_chart(bars, title="Accuracy", high=1.0), "Accuracy", "bars with 95 % intervals"),
        Drawing(
            histogram([one["contribution"] for one in known], title="Contribution"),
            "Contribution",
            f"share of right votes with {found['modality']} minus without, by row",
        ),
        _joint(known),
        _by_model(found),
        _by_rule(found),
        Paragraph(_CAUTION),
    ]
    sections = [Section("Summary", blocks)]
    for label in LABELS:
        chosen = [(record, row) for record, row in zip(records, rows, strict=True) if record[rule] == label]
        if chosen:
            sections.append(Section(f"{label}: {_WORDS[label]}", _rows(chosen, found["modality"], nulls, out.parent)))
    models = ", ".join(found["models"])
    title = f"mmpost: contribution of {found['modality']}"
    return write_page(out, title=title, sections=sections, subtitle=f"asked: {models}; rule: {rule}")


def _joint(records: Sequence[Mapping[str, Any]]) -> Table:
    """Number of rows by share of right votes with and without: a scatter of values that are few."""
    cells = Counter((_step(one["with"]), _step(one["without"])) for one in records)
    body = [
        [f"with {high:g}", *(str(cells[high, low]) if cells[high, low] else "" for low in _STEPS)]
        for high in reversed(_STEPS)
    ]
    return Table(["rows", *(f"without {low:g}" for low in _STEPS)], body, "Rows by share of right votes")


def _step(value: float) -> float:
    return min(_STEPS, key=lambda step: abs(step - value))


def _by_model(found: Mapping[str, Any]) -> Table:
    conditions = list(next(iter(found["models"].values())))
    body = [[name, *(f"{one[c]['value']:.3f}" for c in conditions)] for name, one in found["models"].items()]
    return Table(["model", *conditions], body, "Accuracy by model")


def _by_rule(found: Mapping[str, Any]) -> Table:
    body = [[rule, *(str(found["labels"][rule][label]) for label in LABELS)] for rule in RULES]
    return Table(["rule", *LABELS], body, "Labels by rule")


def _rows(
    chosen: Sequence[tuple[Mapping[str, Any], Sample]], modality: Kind, nulls: Sequence[str], folder: Path
) -> list[Block]:
    """Some rows of a label, evenly spread, with the names of their media and small pictures."""
    step = max(1, len(chosen) // _SHOWN)
    some = chosen[::step][:_SHOWN]
    body = [
        [
            record["id"],
            " ".join(turn.text for turn in row.turns if turn.role == "user").strip()[:200],
            str(record["solution"]),
            ", ".join(Path(reference(part.ref, folder)).name for part in row.media(modality)),
            f"{record['with']:.2f}",
            *(f"{record['by_null'][null]:.2f}" for null in nulls),
        ]
        for record, row in some
    ]
    blocks: list[Block] = [Table(["row", "question", "answer", modality, "with", *nulls], body)]
    if modality == "image":
        pictures = [found for record, row in some if (found := _picture(record, row)) is not None]
        blocks.append(Pictures(pictures))
    return blocks


def _picture(record: Mapping[str, Any], row: Sample) -> tuple[str, bytes] | None:
    from mmpost.media import image  # noqa: PLC0415

    part = row.media("image")[0]
    assert part.ref is not None
    try:
        picture = image.load(part.ref, origin=row.origin)
    except MmpostError:
        return None
    picture.thumbnail((160, 160))
    return str(record["id"]), image.encode(picture)
