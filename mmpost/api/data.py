"""Rows by path, by task, or from Python objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mmpost.config.schema import DataSection, Source
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError, raise_all
from mmpost.core.sample import Sample
from mmpost.data import check
from mmpost.data.source import Table, read_rows, read_source
from mmpost_tasks import TASKS

TASK_PREFIX = "task:"
# ``data.verify=auto`` decodes every file up to this many, and only looks for them beyond.
DECODE_ALL_UP_TO = 1000
MANIFEST = "data_manifest.json"


@dataclass(slots=True)
class Data:
    """Rows of one source.

    Attributes:
        name: For logs and reports.
        samples: Rows in the order of the source.
        weight: Share of the draws.
        faults: Rows that were left out under ``skip`` or ``quarantine``.
        bad_rows: The same as plain records, to be written.
        sha256: Of the files; empty for tasks.
        is_task: Rows of a task carry their answers; reinforcement learning takes only the prompts.
    """

    name: str
    samples: list[Sample]
    weight: float = 1.0
    faults: list[MmpostError] = field(default_factory=list)
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    sha256: str = ""
    is_task: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def load_data(
    data: str | Path | Sequence[dict[str, Any]] | Any,
    *,
    media_root: str | Path | None = None,
    split: str | None = None,
    columns: dict[str, str] | None = None,
    limit: int | None = None,
    weight: float = 1.0,
    on_bad_row: Literal["error", "skip", "quarantine"] = "error",
) -> Data:
    """Read training or prompt rows.

    Args:
        data: A file, a folder, ``task:NAME``, a list of rows, or a ``datasets.Dataset``.
        media_root: Folder that relative media paths start from.
        split: Split of a task or data set.
        columns: Our column name to the file's.
        limit: Use only the first rows.
        weight: Share of the draws when several sources are given.
        on_bad_row: ``error``, ``skip`` or ``quarantine``.

    Raises:
        MmpostError: All faults of the rows at once.
    """
    if isinstance(data, str | Path):
        source = Source(
            path=str(data),
            media_root=str(media_root) if media_root else None,
            split=split,
            columns=columns or {},
            limit=limit,
            weight=weight,
        )
        return open_source(source, DataSection(on_bad_row=on_bad_row), seed=0)
    table = read_rows(
        data,
        columns=columns,
        media_root=str(media_root) if media_root else None,
        limit=limit,
        on_bad_row=on_bad_row,
    )
    return _of_table(table, weight)


def open_source(source: Source, section: DataSection, *, seed: int) -> Data:
    """Read one source of the configuration."""
    if source.path.startswith(TASK_PREFIX):
        task = Catalog("tasks", TASKS).get(source.path.removeprefix(TASK_PREFIX))
        name = source.name or task.name
        samples = [
            replace(sample, source=name) for sample in task.load(source.split or "train", limit=source.limit, seed=seed)
        ]
        return Data(name, samples, source.weight, is_task=True)
    source = source.model_copy(update={"columns": {**section.columns, **source.columns}})
    table = read_source(source, on_bad_row=section.on_bad_row, max_bad_share=section.max_bad_share)
    return _of_table(table, source.weight)


def _of_table(table: Table, weight: float) -> Data:
    return Data(table.name, table.samples, weight, table.faults, table.bad_rows, table.sha256)


def open_all(section: DataSection, *, seed: int) -> list[Data]:
    """Read every source of the configuration.

    Raises:
        MmpostError: MMP-C031 when there is none, else what the sources say.
    """
    if not section.train:
        raise MmpostError("MMP-C031", "no training data: data.train is empty.", "Set data.train=[{path: FILE}].")
    return [open_source(source, section, seed=seed) for source in section.train]


def prepare(data: Sequence[Data], section: DataSection, *, command: Literal["sft", "grpo", "upt"]) -> None:
    """Make rows fit the command and look for faults before training: last roles, empty answers, ids, media files.

    Rows with faults are left out when the section says so, else all faults are raised at once.
    """
    faults: list[MmpostError] = []
    use: Literal["sft", "grpo"] = "sft" if command == "sft" else "grpo"
    for source in data:
        if (source.is_task and use == "grpo") or command == "upt":
            source.samples = [sample.prompt() for sample in source.samples]
        media = section.verify
        if media == "auto":
            files = len({part.ref for sample in source for part in sample.media()})
            media = "decode" if files <= DECODE_ALL_UP_TO else "exists"
        found = check.check(source.samples, command=use, media=media, id_scope={}, budgets=section.media)
        if found and section.on_bad_row != "error":
            _leave_out(source, found, section)
        else:
            faults.extend(found)
    raise_all(faults)


def _leave_out(source: Data, found: list[MmpostError], section: DataSection) -> None:
    """Drop rows that faults name and keep the record of why."""
    by_origin: dict[str, list[MmpostError]] = {}
    for fault in found:
        origin = next((s.origin for s in source.samples if fault.what.startswith(f"{s.origin}:")), "")
        by_origin.setdefault(origin, []).append(fault)
    if "" in by_origin:
        raise_all(by_origin[""])
    total = len(source.samples) + len(source.faults)
    bad = len(source.faults) + len(by_origin)
    if bad > section.max_bad_share * total:
        raise MmpostError(
            "MMP-D050",
            f"{source.name}: {bad} of {total} rows are faulty, more than data.max_bad_share {section.max_bad_share:g}. "
            f"First: {found[0]}",
            "Mend the rows, or raise data.max_bad_share.",
        )
    source.samples = [sample for sample in source.samples if sample.origin not in by_origin]
    for origin, errors in by_origin.items():
        source.faults.extend(errors)
        source.bad_rows.append({"origin": origin, "code": errors[0].code, "reason": str(errors[0])})


def manifest(data: Sequence[Data]) -> list[dict[str, Any]]:
    """What the run trained on, for ``data_manifest.json``."""
    return [
        {
            "name": source.name,
            "rows": len(source.samples),
            "left_out": len(source.faults),
            "weight": source.weight,
            "sha256": source.sha256,
            "media": sum(len(sample.media()) for sample in source.samples),
        }
        for source in data
    ]


def write_manifest(folder: Path, data: Sequence[Data]) -> None:
    """Write what the run trains on."""
    (folder / MANIFEST).write_text(json.dumps(manifest(data), indent=1) + "\n")


def check_same(folder: Path, data: Sequence[Data]) -> None:
    """An earlier run in the folder read the same rows.

    Raises:
        MmpostError: MMP-E021 when it did not; going on would mix two runs.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return
    before = {(entry["name"], entry["sha256"]) for entry in json.loads(file.read_text())}
    changed = [source.name for source in data if (source.name, source.sha256) not in before]
    if changed or len(before) != len({(source.name, source.sha256) for source in data}):
        raise MmpostError(
            "MMP-E021",
            f"'{folder}' holds a run on other data: {', '.join(changed) or 'a source is missing'}.",
            "Choose another train.output_dir, or train.overwrite=true to delete that run.",
        )


def write_bad_rows(path: Path, data: Sequence[Data]) -> int:
    """Write rows that were left out; returns their number."""
    rows = [{"source": source.name, **row} for source in data for row in source.bad_rows]
    if rows:
        path.write_text("".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    return len(rows)
