"""ShareGPT and LLaVA rows: ``conversations`` with from and value, media as marks with an ``image`` column."""

from __future__ import annotations

from mmpost.core.sample import Role, Sample
from mmpost.data.readers.messages import MEDIA_NAMES
from mmpost.data.readers.row import Reader, Row, finish, no_conversation
from mmpost.data.readers.turns import OWN_ROLES, read_turns

ROLE_NAMES: dict[str, Role] = {
    **OWN_ROLES,
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}


def _recognise(row: Row) -> bool:
    return row.has("conversations")


def _read(row: Row) -> Sample | None:
    """Sample of a ``conversations`` row; a ``function_call`` is an assistant turn with the call's JSON."""
    conversations = row.values.get("conversations")
    if conversations is None:
        row.faults.append(no_conversation(row))
        return None
    turns = read_turns(row, conversations, column="conversations", roles=ROLE_NAMES)
    return finish(row, turns, {"conversations"} | MEDIA_NAMES)


READER = Reader(_recognise, _read)
