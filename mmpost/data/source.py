"""One data source as a table of samples: faults are collected, then the policy on bad rows decides."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmpost.config.schema import Source
from mmpost.core.catalog import Catalog
from mmpost.core.errors import ManyErrors, MmpostError, raise_all
from mmpost.core.sample import Part, Sample, Turn
from mmpost.data import CONTAINERS, READERS
from mmpost.data.files import data_files, digest, missing_source, saved_data_set
from mmpost.data.readers.features import undecoded
from mmpost.data.readers.row import RawRow, Reader, Row, no_conversation, rows_of

Policy = Literal["error", "skip", "quarantine"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(slots=True)
class Table:
    """The rows of one source.

    Attributes:
        samples: Rows without a fault, in the order of the source.
        faults: Everything wrong with the others; empty under the policy ``error``, which raises them instead.
        name: Name of the source; ``Sample.source`` of its rows.
        path: Where they came from, as shown to people.
        rows: Rows read, good and bad.
        sha256: Hash of the file, or of the files' hashes, or of the samples when there is no file.
        bad_rows: One JSON-ready object per bad row: origin, code, reason, raw.
        roots: Folders that relative media paths were looked up in.
    """

    samples: list[Sample]
    faults: list[MmpostError]
    name: str
    path: str
    rows: int
    sha256: str
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    roots: tuple[str, ...] = ()


def read_source(
    source: Source,
    *,
    on_bad_row: Policy = "error",
    max_bad_share: float = 0.05,
    extra_columns: Mapping[str, Any] | None = None,
) -> Table:
    """Read a file, a folder or a hub data set.

    Args:
        source: What to read; ``task:`` paths belong to the caller.
        on_bad_row: ``error`` raises all faults together; ``skip`` and ``quarantine`` leave the rows out.
        max_bad_share: Largest share of bad rows that the latter two accept, 0 to 1.
        extra_columns: Columns for every row that does not have them.

    Raises:
        MmpostError: Row faults under ``error``; MMP-D026 offline, MMP-D029 no rows, MMP-D030 no such file,
            MMP-D033 split, MMP-D034 unreadable file, MMP-D050 too many bad rows.
    """
    if source.path.startswith("task:"):
        raise ValueError("rows of a task are given by the task")
    raw, files = _open(source)
    folder = str(Path(source.path).parent if Path(source.path).is_file() else Path(source.path))
    roots = (source.media_root,) if source.media_root else _search(folder) if files else ()
    return _read(
        raw,
        path=source.path,
        name=source.name or Path(source.path).stem,
        roots=roots,
        options=source,
        policy=on_bad_row,
        max_bad_share=max_bad_share,
        extra_columns=extra_columns,
        sha256=lambda samples: digest(files) if files else _digest_of_samples(samples),
    )


def read_rows(
    rows: Iterable[Any],
    *,
    name: str = "rows",
    columns: Mapping[str, str] | None = None,
    media_root: str | None = None,
    format: str = "auto",
    system: str | None = None,
    limit: int | None = None,
    on_bad_row: Policy = "error",
    max_bad_share: float = 0.05,
    extra_columns: Mapping[str, Any] | None = None,
) -> Table:
    """Read rows given in Python: a list of dicts, a ``datasets.Dataset`` or a streaming one.

    Args:
        rows: The rows; media features of ``datasets`` are not decoded.
        name: Name of the source, also the file name in messages.
        columns: Our column name to the rows' name.
        media_root: Folder of relative media paths; None means the working directory.
        format: Reader's name, or ``auto``.
        system: System message for rows that have none.
        limit: Use only the first rows.
        on_bad_row: As in ``read_source``.
        max_bad_share: As in ``read_source``.
        extra_columns: As in ``read_source``.

    Raises:
        MmpostError: As ``read_source``.
    """
    return _read(
        rows_of(name, iter(undecoded(rows, name=name))),
        path=name,
        name=name,
        roots=(media_root,) if media_root else (),
        options=Source.model_validate(
            {"path": name, "format": format, "columns": dict(columns or {}), "system": system, "limit": limit}
        ),
        policy=on_bad_row,
        max_bad_share=max_bad_share,
        extra_columns=extra_columns,
        sha256=_digest_of_samples,
    )


def _search(folder: str) -> tuple[str, ...]:
    """The data file's folder, then the working directory."""
    return ("",) if folder in ("", ".") else (folder, "")


def _open(source: Source) -> tuple[Iterator[RawRow], list[Path]]:
    """Rows of the source, and the files they are in (none for a hub data set)."""
    path, containers = Path(source.path), Catalog("containers", CONTAINERS)
    if not path.exists():
        if _is_hub_id(source.path):
            return containers.get("hub data set")(source.path, source.split), []
        raise missing_source(source.path)
    if saved_data_set(path):
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return containers.get("data set on disk")(path, source.path, source.split), files
    files = data_files(path, source.path, source.split)
    return _rows_of_files(files, source, containers), files


def _is_hub_id(text: str) -> bool:
    """True for ``organisation/name`` that is no mistyped local path."""
    return (
        _HUB_ID.fullmatch(text) is not None
        and Path(text).suffix.lower() not in CONTAINERS
        and not Path(text).parent.exists()
    )


def _rows_of_files(files: Sequence[Path], source: Source, containers: Catalog) -> Iterator[RawRow]:
    for file in files:
        shown = source.path if len(files) == 1 and Path(source.path).is_file() else str(file)
        read = containers.get(file.suffix.lower())
        options = {"columns": source.columns} if file.suffix.lower() == ".parquet" else {}
        yield from read(file, shown, **options)


def _read(
    raw: Iterator[RawRow],
    *,
    path: str,
    name: str,
    roots: tuple[str, ...],
    options: Source,
    policy: Policy,
    max_bad_share: float,
    extra_columns: Mapping[str, Any] | None,
    sha256: Callable[[list[Sample]], str],
) -> Table:
    table = Table([], [], name, path, 0, "", roots=roots)
    read = _reader(options.format)
    for number, one in enumerate(raw, 1):
        if options.limit is not None and number > options.limit:
            break
        table.rows = number
        row = _row(one, number, table, options.columns)
        sample = read(row) if not row.faults else None
        if row.faults or sample is None:
            table.faults += row.faults
            table.bad_rows.append(_bad_row(one, row))
        else:
            table.samples.append(_completed(sample, options.system, extra_columns))
    if table.rows == 0:
        tail = "" if path.lower().endswith(".parquet") else "; expected one JSON object per line"
        raise MmpostError("MMP-D029", f"{path}: no rows{tail}")
    _apply(policy, table, max_bad_share)
    table.sha256 = sha256(table.samples)
    return table


def _reader(name: str) -> Callable[[Row], Sample | None]:
    """The function that reads rows in this format; ``auto`` asks each row."""
    catalog = Catalog("readers", READERS)
    if name != "auto":
        chosen = catalog.get(name)
        return chosen.read if isinstance(chosen, Reader) else chosen
    readers: list[Reader] = [catalog.get(known) for known in READERS]

    def read(row: Row) -> Sample | None:
        reader = next((reader for reader in readers if reader.recognise(row)), None)
        if reader is None:
            row.faults.append(no_conversation(row))
            return None
        return reader.read(row)

    return read


def _row(one: RawRow, number: int, table: Table, columns: Mapping[str, str]) -> Row:
    row = Row({}, f"{one.file}:{one.number}", number, table.roots, table.name)
    if one.fault is not None:
        row.faults.append(one.fault)
    elif not isinstance(one.value, Mapping):
        row.wrong_shape("row", one.value, "an object")
    else:
        row.values = _renamed(one.value, columns)
    if one.file == table.path:  # a single file: ids follow the rows that messages name
        row.number = one.number
    return row


def _renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Columns under our names; a mapping to a column that this row lacks changes nothing."""
    present = {ours: theirs for ours, theirs in columns.items() if theirs in values}
    kept = {name: value for name, value in values.items() if name not in present.values()}
    return {**kept, **{ours: values[theirs] for ours, theirs in present.items()}}


def _completed(sample: Sample, system: str | None, extra: Mapping[str, Any] | None) -> Sample:
    turns, columns = sample.turns, sample.columns
    if system and all(turn.role != "system" for turn in turns):
        turns = (Turn("system", (Part("text", system),)), *turns)
    if extra:
        columns = {**extra, **columns}
    return Sample(sample.id, turns, columns, sample.origin, sample.source)


def _apply(policy: Policy, table: Table, max_bad_share: float) -> None:
    """Raise what the policy does not accept."""
    if policy == "error":
        raise_all(table.faults)
    bad = len(table.bad_rows)
    if bad > max_bad_share * table.rows:
        raise MmpostError(
            "MMP-D050",
            f"{table.path}: {bad} of {table.rows} rows are faulty ({bad / table.rows:.1%}), more than "
            f"data.max_bad_share allows ({max_bad_share:.1%}). First: {table.faults[0].what}.",
            "Correct the rows or raise data.max_bad_share",
        )


def _bad_row(one: RawRow, row: Row) -> dict[str, Any]:
    reason = str(ManyErrors(row.faults))
    return {"origin": row.origin, "code": row.faults[0].code, "reason": reason, "raw": _plain(one.value)}


def _plain(value: Any) -> Any:
    """The value as JSON can hold it; encoded media become their length."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes | bytearray):
        return f"<{len(value)} bytes>"
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _digest_of_samples(samples: Sequence[Sample]) -> str:
    total = hashlib.sha256()
    for sample in samples:
        total.update(sample.id.encode() + b"\0" + sample.content_hash().encode() + b"\n")
    return total.hexdigest()
