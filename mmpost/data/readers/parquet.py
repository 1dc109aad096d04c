"""Rows of ``.parquet`` files, with the column types checked before any row is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmpost.core.errors import MmpostError
from mmpost.data.readers.media import COLUMNS
from mmpost.data.readers.row import RawRow

# Rows decoded at a time; images may be megabytes each.
_BATCH_ROWS = 64
_CONVERSATIONS = ("messages", "conversations")


def read_parquet(path: Path, shown: str, columns: Mapping[str, str] | None = None) -> Iterator[RawRow]:
    """Rows in the order of the file.

    Args:
        path: File to read.
        shown: Its name in messages.
        columns: Our column name to the file's, so that renamed columns are checked too.

    Raises:
        MmpostError: MMP-D034 when it is no parquet file, MMP-D021 for a column of a type that cannot be read.
    """
    try:
        with pq.ParquetFile(path) as file:
            _check_types(file.schema_arrow, shown, columns or {})
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(number, value, None, shown)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MmpostError("MMP-D034", f"{shown}: cannot be read as parquet: {why}") from error


def _check_types(schema: pa.Schema, shown: str, columns: Mapping[str, str]) -> None:
    for ours in _CONVERSATIONS:
        theirs = columns.get(ours, ours)
        if theirs in schema.names and not _holds_messages(schema.field(theirs).type):
            raise _wrong_type(shown, theirs, schema.field(theirs).type, "a list of structs with role and content")
    for ours in (name for names in COLUMNS.values() for name in names):
        theirs = columns.get(ours, ours)
        if theirs in schema.names and not _holds_media(schema.field(theirs).type):
            expected = "string, binary, struct<bytes, path>, or a list of these"
            raise _wrong_type(shown, theirs, schema.field(theirs).type, expected)


def _holds_messages(kind: pa.DataType) -> bool:
    # A string may hold the JSON of the list; that is known only row by row.
    if _is_text(kind) or pa.types.is_null(kind):
        return True
    return _is_list(kind) and pa.types.is_struct(kind.value_type)


def _holds_media(kind: pa.DataType) -> bool:
    if _is_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        names = {field.name for field in kind}
        return bool(names & {"bytes", "path", "url"})
    return _is_text(kind) or pa.types.is_null(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    # Repeated paths come dictionary-encoded.
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _wrong_type(shown: str, column: str, kind: pa.DataType, expected: str) -> MmpostError:
    return MmpostError("MMP-D021", f"{shown}: parquet column '{column}' has type {kind}; expected {expected}")
