"""Rows as files that training reads: prompt and completion, media beside them or where they were."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpost.core.files import write_whole
from mmpost.core.sample import Part, Sample, Turn
from mmpost.media.ref import is_url

MEDIA = "media"
# First bytes of files that come as bytes, and how their names end.
_SUFFIXES = (
    (b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"GIF8", ".gif"), (b"fLaC", ".flac"), (b"OggS", ".ogg"),
    (b"ID3", ".mp3"), (b"\x1aE\xdf\xa3", ".mkv"),
)  # fmt: skip


def write_rows(samples: Sequence[Sample], out: Path) -> None:
    """Write rows as JSON lines that ``mmpost sft`` and ``mmpost grpo`` read, in one move.

    A row has ``prompt`` (messages), where it has an answer ``completion``, and its columns. Media that are bytes go to
    ``media/`` beside the file, named by their content; paths are written as seen from there.

    Args:
        samples: Rows.
        out: The file; its folder is made.
    """
    lines = [json.dumps(_row(sample, out.parent), ensure_ascii=False, default=str) + "\n" for sample in samples]
    write_whole(out, "".join(lines))


def _row(sample: Sample, folder: Path) -> dict[str, Any]:
    prompt = sample.prompt()
    columns = {name: value for name, value in sample.columns.items() if value is not None}
    row = {**columns, "id": sample.id, "prompt": [_message(turn, folder) for turn in prompt.turns]}
    row.pop("completion", None)
    if len(prompt.turns) < len(sample.turns):
        row["completion"] = [_message(sample.turns[-1], folder)]
    return row


def _message(turn: Turn, folder: Path) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": [_part(part, turn, folder) for part in turn.parts]}
    return message if turn.train else {**message, "train": False}


def _part(part: Part, turn: Turn, folder: Path) -> dict[str, Any]:
    if part.kind == "text":
        text = part.text if turn.role not in ("user", "system") else _escaped(part.text)
        return {"type": "text", "text": text} | ({} if part.train else {"train": False})
    return {"type": part.kind, part.kind: reference(part.ref, folder)}


def _escaped(text: str) -> str:
    """Literal marks as the reader expects them, or it would look for one more medium."""
    for kind in ("image", "video", "audio"):
        text = text.replace(f"<{kind}>", f"\\<{kind}>")
    return text


def reference(ref: str | bytes | None, folder: Path) -> str:
    """A medium as a row of a file in ``folder`` names it; bytes become a file."""
    if isinstance(ref, bytes):
        path = folder / MEDIA / f"{hashlib.sha256(ref).hexdigest()[:20]}{_suffix(ref)}"
        if not path.is_file() or path.stat().st_size != len(ref):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            partial.write_bytes(ref)
            partial.replace(path)
        return f"{MEDIA}/{path.name}"
    assert ref is not None
    if is_url(ref) or not Path(ref).is_file():
        return ref
    return os.path.relpath(ref, folder)


def _suffix(data: bytes) -> str:
    if data[:4] == b"RIFF":
        return ".webp" if data[8:12] == b"WEBP" else ".wav"
    if data[4:8] == b"ftyp":
        return ".mp4"
    return next((suffix for start, suffix in _SUFFIXES if data.startswith(start)), ".bin")
