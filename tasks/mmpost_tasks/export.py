"""Write samples as files that people can read and edit: a JSONL of messages and a folder of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmpost.core.sample import Part, Sample, Turn

IMAGE_MARK = "<image>"


def write_jsonl(samples: Iterable[Sample], folder: Path, *, name: str = "rows", answers: bool = True) -> Path:
    """Write ``folder/NAME.jsonl`` and its pictures, and return the path of the former.

    A row holds ``id``, ``messages`` with an ``<image>`` mark per picture, ``images`` with paths relative to the
    folder, and every column of the sample (``solution`` and so on). Columns that are None are left out.

    Args:
        samples: Rows whose only media are pictures. Bytes become files in ``images/``; paths are kept.
        folder: Made if it is missing; existing files of the same names are replaced.
        name: Stem of the JSONL file.
        answers: False leaves out a final assistant turn, as reinforcement learning expects.

    Raises:
        ValueError: A sample holds media other than pictures.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for sample in samples:
            row = _row(sample if answers else sample.prompt(), folder)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def _row(sample: Sample, folder: Path) -> dict[str, Any]:
    others = {part.kind for part in sample.media()} - {"image"}
    if others:
        raise ValueError(f"{sample.origin}: cannot write {', '.join(sorted(others))} to messages JSONL")
    messages = [{"role": turn.role, "content": _content(turn)} for turn in sample.turns]
    images = [_file_of(part, f"{sample.id}-{i}.png", folder) for i, part in enumerate(sample.media("image"))]
    columns = {key: value for key, value in sample.columns.items() if value is not None}
    return {"id": sample.id, "messages": messages, "images": images, **columns}


def _content(turn: Turn) -> str:
    """The turn as one string, with a mark where a picture stands."""
    if turn.role == "assistant":
        return turn.text
    # A mark that is part of the words is written \<image>, or a reader would look for one more picture.
    return "".join(
        part.text.replace(IMAGE_MARK, f"\\{IMAGE_MARK}") if part.kind == "text" else IMAGE_MARK for part in turn.parts
    )


def _file_of(part: Part, name: str, folder: Path) -> str:
    if isinstance(part.ref, bytes):
        (folder / "images" / name).write_bytes(part.ref)
        return f"images/{name}"
    return str(part.ref)
