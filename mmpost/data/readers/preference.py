"""Preference rows: ``chosen`` and ``rejected``. They can be checked and shown; both answers stay columns."""

from __future__ import annotations

from mmpost.core.sample import Sample
from mmpost.data.readers.messages import MEDIA_NAMES
from mmpost.data.readers.row import Reader, Row, finish, no_conversation
from mmpost.data.readers.turns import read_turns

ANSWERS = ("chosen", "rejected")


def _recognise(row: Row) -> bool:
    return row.has(*ANSWERS)


def _read(row: Row) -> Sample | None:
    """Sample of what both answers reply to: the ``prompt``, or ``chosen`` without its last message."""
    prompt, chosen = row.values.get("prompt"), row.values.get("chosen")
    if prompt is None and isinstance(chosen, list | tuple) and len(chosen) > 1:
        prompt = list(chosen)[:-1]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompt is None:
        row.faults.append(no_conversation(row))
        return None
    turns = read_turns(row, prompt, column="prompt", media_first=True)
    return finish(row, turns, {"prompt"} | MEDIA_NAMES)


READER = Reader(_recognise, _read)
