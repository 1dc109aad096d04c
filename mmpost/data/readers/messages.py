"""The canonical row: ``messages`` with role and content, media as parts or as marks with media columns."""

from __future__ import annotations

import json

from mmpost.core.sample import Sample
from mmpost.data.readers.media import COLUMNS
from mmpost.data.readers.row import Reader, Row, finish, no_conversation
from mmpost.data.readers.turns import read_turns

MEDIA_NAMES = {name for names in COLUMNS.values() for name in names}


def _recognise(row: Row) -> bool:
    return row.has("messages")


def _read(row: Row) -> Sample | None:
    """Sample of a ``messages`` row.

    A text instead of a list is one user message, or the JSON of a list, as some parquet files store it.
    """
    messages = row.values.get("messages")
    if messages is None:
        row.faults.append(no_conversation(row))
        return None
    if isinstance(messages, str):
        messages = _from_text(messages)
    turns = read_turns(row, messages, column="messages")
    return finish(row, turns, {"messages"} | MEDIA_NAMES)


def _from_text(text: str) -> object:
    if text.lstrip().startswith("["):
        try:
            decoded = json.loads(text)
        except json.JSONDecodeError:
            decoded = None
        if isinstance(decoded, list) and decoded and isinstance(decoded[0], dict):
            return decoded
    return [{"role": "user", "content": text}]


READER = Reader(_recognise, _read)
