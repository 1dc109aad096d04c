"""Media entries of a row as references: paths resolved, base64 decoded, files left closed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmpost.core.errors import MmpostError
from mmpost.core.sample import Kind
from mmpost.data.readers.row import Row
from mmpost.media import image as image_codec
from mmpost.media.ref import decode_base64, find, inline_bytes, is_url, local_path, shown

# Columns that hold media, by kind; at most one of each group may be filled.
COLUMNS: dict[Kind, tuple[str, str]] = {
    "image": ("images", "image"),
    "video": ("videos", "video"),
    "audio": ("audios", "audio"),
}


@dataclass(frozen=True, slots=True)
class MediaColumn:
    """The media of one kind that a row lists beside its conversation.

    Attributes:
        name: Column that they stand in; the plural name when the row has none.
        refs: References in the order of the column.
    """

    name: str
    refs: tuple[str | bytes, ...] = ()

    @property
    def names(self) -> str:
        """The entries for messages, at most three by name."""
        listed = [shown(ref) for ref in self.refs[:3]] + ["..."] * (len(self.refs) > 3)
        return ", ".join(listed) or "none"


def media_columns(row: Row) -> dict[Kind, MediaColumn]:
    """Read the media columns; a column of the wrong type is noted as MMP-D005."""
    columns: dict[Kind, MediaColumn] = {}
    for kind, names in COLUMNS.items():
        filled = [name for name in names if row.has(name)]
        if len(filled) == 2 and row.values[names[0]] and row.values[names[1]]:
            row.fault("MMP-D032", f"'{names[1]}' and '{names[0]}' are both given; expected one of them")
        name = filled[0] if filled else names[0]
        columns[kind] = MediaColumn(name, _entries(row, kind, name, row.values.get(name)))
    return columns


def _entries(row: Row, kind: Kind, name: str, value: Any) -> tuple[str | bytes, ...]:
    if value is None or (isinstance(value, str) and not value):
        return ()
    many = list(value) if isinstance(value, list | tuple) else [value]
    refs = []
    for entry in many:
        ref = entry_ref(row, kind, entry)
        if ref is None:
            what = type(value).__name__ if value is entry else f"a list with {_type_name(entry)}"
            row.fault("MMP-D005", f"'{name}' is {what}; expected a path or a list of paths")
            break
        refs.append(ref)
    return tuple(refs)


def _type_name(entry: Any) -> str:
    return "an empty text" if entry == "" else type(entry).__name__


def entry_ref(row: Row, kind: Kind, entry: Any) -> str | bytes | None:
    """Reference of one entry, or None if it has a type that names no media.

    Accepted: path, URL, data URI, base64 text, encoded bytes, a Pillow image, ``{"bytes", "path"}`` as
    Hugging Face stores it, ``{"url"}`` and ``{"data"}`` as chat APIs send it.
    """
    if isinstance(entry, Mapping):
        return _struct_ref(row, kind, entry)
    if isinstance(entry, bytes | bytearray):
        return bytes(entry) or None
    if isinstance(entry, os.PathLike):
        return resolve(os.fspath(entry), row.roots)
    if isinstance(entry, Image.Image):
        return image_codec.encode(entry)
    if not isinstance(entry, str) or not entry:
        return None
    return _noting(row, inline_bytes, entry, kind) or resolve(entry, row.roots)


def _struct_ref(row: Row, kind: Kind, entry: Mapping[str, Any]) -> str | bytes | None:
    for key in ("data", "base64"):
        if isinstance(entry.get(key), str):
            return base64_ref(row, kind, entry[key])
    for key in ("bytes", "path", "url"):
        if entry.get(key):
            return entry_ref(row, kind, entry[key])
    return None


def base64_ref(row: Row, kind: Kind, text: str) -> bytes:
    """Bytes of a base64 text or data URI; a broken one is noted as MMP-D008."""
    if text.startswith("data:"):
        return _noting(row, inline_bytes, text, kind) or b""
    return _noting(row, decode_base64, text, kind) or b""


def _noting(row: Row, decode: Any, text: str, kind: Kind) -> bytes | None:
    try:
        return decode(text, kind=kind, origin=row.origin)
    except MmpostError as error:
        row.faults.append(error)
        return b"broken"


def resolve(path: str, roots: Sequence[str]) -> str:
    """Path with its folder: the first root that has it, else the first root. URLs and absolute paths stay."""
    if is_url(path):
        return path
    path = local_path(path)
    if not roots or os.path.isabs(path):
        return path
    # Looking is needed only where there is a choice; whether the file exists is mmpost.data.check's question.
    found = find(path, roots) if len(roots) > 1 else None
    return found or os.path.join(roots[0], path.removeprefix("./"))
