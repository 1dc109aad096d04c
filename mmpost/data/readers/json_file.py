"""Rows of ``.jsonl`` and ``.json`` files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmpost.core.errors import MmpostError
from mmpost.data.readers.row import RawRow, rows_of

_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"


def read_jsonl(path: Path, shown: str) -> Iterator[RawRow]:
    """One row per line; blank lines are not rows. A row's number is its line.

    Args:
        path: File to read.
        shown: Its name in messages.

    Yields:
        Rows; a line that is not JSON carries MMP-D001.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = (line.removeprefix(_BOM) if number == 1 else line).strip(_SPACE)
            if text:
                yield _row(text, number, shown)


def _row(text: bytes, number: int, shown: str) -> RawRow:
    try:
        return RawRow(number, json.loads(text.decode()), None, shown)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        fault = _not_json(error, shown, number)
        return RawRow(number, text.decode(errors="replace"), fault, shown)


def read_json(path: Path, shown: str) -> Iterator[RawRow]:
    """Rows of a JSON list. A file that holds one object per line is read as JSON lines whatever its suffix.

    Raises:
        MmpostError: MMP-D001 when the list is not JSON, MMP-D032 when the file is one object.
    """
    data = path.read_bytes().removeprefix(_BOM).strip(_SPACE)
    if not data:
        return
    if data.startswith(b"["):
        yield from rows_of(shown, iter(_list(data, shown)))
        return
    first_line = data.split(b"\n", 1)[0]
    if first_line != data and not _is_json(first_line) and _is_json(data):
        raise MmpostError("MMP-D032", f"{shown}: the file is one object; expected a list of rows")
    yield from read_jsonl(path, shown)


def _list(data: bytes, shown: str) -> list[Any]:
    try:
        return json.loads(data.decode())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise _not_json(error, shown, line) from error


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _not_json(error: ValueError | RecursionError, shown: str, number: int) -> MmpostError:
    if isinstance(error, json.JSONDecodeError):
        column, why = error.colno, error.msg
    elif isinstance(error, UnicodeDecodeError):
        column, why = error.start + 1, f"not UTF-8 (byte 0x{error.object[error.start]:02x})"
    else:
        column, why = 1, "nested too deeply"
    return MmpostError("MMP-D001", f"{shown}:{number}: not valid JSON at column {column}: {why}")
