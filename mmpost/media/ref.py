"""Where the bytes of a media reference are: file, encoded bytes, data URI or base64. Never the network."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, unquote_to_bytes

from mmpost.core.errors import MmpostError

_DATA_URI = re.compile(r"data:(?P<type>[^;,]*)(?P<options>(?:;[^,]*)*),", re.IGNORECASE)
# What the first bytes of JPEG, PNG, GIF, WebP/WAV, TIFF, FLAC, Ogg, MP3 with a tag, Matroska and MP4 look like in
# base64. Without such a start a text is a path: most short names are valid base64 too.
_BASE64_STARTS = (
    *("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK"),
    *("ZkxhQ", "T2dnU", "SUQzB", "SUQzA", "GkXfo", "AAAAGGZ0eX", "AAAAHGZ0eX", "AAAAIGZ0eX"),
)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_BASE64_MIN_CHARS = 64


def shown(ref: str | bytes) -> str:
    """The reference as messages print it; embedded files print as ``<bytes>``."""
    return "<bytes>" if isinstance(ref, bytes) or _is_inline(ref) else ref


def is_url(ref: str | bytes) -> bool:
    """True for http and https addresses."""
    return isinstance(ref, str) and ref[:8].lower().startswith(("http://", "https://"))


def _is_inline(ref: str) -> bool:
    if _DATA_URI.match(ref):
        return True
    return len(ref) >= _BASE64_MIN_CHARS and ref.startswith(_BASE64_STARTS) and _BASE64.fullmatch(ref) is not None


def decode_base64(text: str, *, kind: str, origin: str = "") -> bytes:
    """Bytes of a base64 text; white space is allowed.

    Raises:
        MmpostError: MMP-D008 when it is not base64.
    """
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise undecodable(kind, b"", "base64", str(error), origin=origin) from error


def inline_bytes(ref: str, *, kind: str, origin: str = "") -> bytes | None:
    """Bytes that the text itself carries (data URI or base64), or None if it is a path or URL.

    Raises:
        MmpostError: MMP-D008 when the base64 part is broken.
    """
    if not _is_inline(ref):
        return None
    match = _DATA_URI.match(ref)
    if match is None:
        return decode_base64(ref, kind=kind, origin=origin)
    body = ref[match.end() :]
    if ";base64" in match["options"].lower():
        return decode_base64(unquote(body), kind=kind, origin=origin)
    return unquote_to_bytes(body)


def local_path(ref: str) -> str:
    """The path of a ``file://`` address; every other text unchanged."""
    return unquote(ref[len("file://") :]) if ref.startswith("file://") else ref


def find(ref: str, roots: Sequence[str | Path] = ()) -> str | None:
    """First existing path for ``ref``, or None.

    Args:
        ref: Absolute or relative path, or a ``file://`` address.
        roots: Folders for relative paths, asked in order; empty means the working directory.
    """
    path = local_path(ref)
    candidates = [os.path.join(root, path) for root in roots] or [path]
    return next((candidate for candidate in candidates if os.path.exists(candidate)), None)


def locate(ref: str, *, kind: str, origin: str = "", roots: Sequence[str | Path] = ()) -> str:
    """Existing path for ``ref``.

    Raises:
        MmpostError: MMP-D007 when there is none, MMP-D035 for a URL.
    """
    if is_url(ref):
        raise MmpostError(
            "MMP-D035",
            f"{_at(origin)}{kind} '{ref}' is a URL, and nothing is downloaded while rows are read.",
            "Download it first and put the file's path in the row",
        )
    path = find(ref, roots)
    if path is None:
        raise missing(kind, ref, origin=origin, roots=roots)
    return path


def open_ref(ref: str | bytes, *, kind: str, origin: str = "", roots: Sequence[str | Path] = ()) -> BinaryIO:
    """Open a reference for reading; the caller closes it.

    Raises:
        MmpostError: MMP-D007 no such file, MMP-D008 not readable, MMP-D035 a URL.
    """
    if isinstance(ref, bytes):
        return io.BytesIO(ref)
    inline = inline_bytes(ref, kind=kind, origin=origin)
    if inline is not None:
        return io.BytesIO(inline)
    path = locate(ref, kind=kind, origin=origin, roots=roots)
    try:
        return open(path, "rb")
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise undecodable(kind, ref, "file system", why, origin=origin) from error


def missing(kind: str, ref: str, *, origin: str = "", roots: Sequence[str | Path] = ()) -> MmpostError:
    """The MMP-D007 of one file that is not there, with the folders where it was looked for."""
    name = local_path(ref)
    looked = [str(root) or os.getcwd() for root in roots] if not os.path.isabs(name) else []
    folders = ", ".join(looked or [os.path.dirname(name) or os.getcwd()])
    return MmpostError(
        "MMP-D007",
        f"{_at(origin)}{kind} file not found: '{name}'. Looked in: {folders}.",
        "Set Source.media_root",
    )


def undecodable(
    kind: str, ref: str | bytes, backend: str, why: str, *, origin: str = "", others: str = "none"
) -> MmpostError:
    """The MMP-D008 of one reference that ``backend`` refuses."""
    name = "<bytes>" if isinstance(ref, bytes) else shown(ref)
    return MmpostError(
        "MMP-D008",
        f"{_at(origin)}cannot decode {kind} '{name}': {backend}: {why}.",
        f"Other backends: {others}",
    )


def _at(origin: str) -> str:
    return f"{origin}: " if origin else ""
