r"""Messages to turns: roles, content parts, and the marks ``<image> <video> <audio>``.

A mark stands for the next entry of the media column of its kind.

Marks count in user and system text only; in assistant and tool text they are ordinary characters.
``\<image>`` writes a literal mark. A content part without a reference, such as ``{"type": "image"}``, counts
as a mark.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmpost.core.sample import ROLES, Kind, Part, Role, Turn
from mmpost.data.readers.media import MediaColumn, base64_ref, entry_ref, media_columns
from mmpost.data.readers.row import Row

MARK = re.compile(r"(\\?)<(image|video|audio)>")
OWN_ROLES: dict[str, Role] = {role: role for role in ROLES}
_FOREIGN_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}
# Type names of chat APIs beside our own.
_PART_KINDS: dict[str, Kind] = {
    "text": "text", "input_text": "text", "output_text": "text",
    "image": "image", "image_url": "image", "input_image": "image",
    "video": "video", "video_url": "video",
    "audio": "audio", "audio_url": "audio", "input_audio": "audio",
    "action": "action",
}  # fmt: skip


def read_turns(
    row: Row, messages: Any, *, column: str, roles: Mapping[str, Role] = OWN_ROLES, media_first: bool = False
) -> tuple[Turn, ...]:
    """Turns of a message list with the media columns put at their marks.

    Args:
        row: The row; its faults grow.
        messages: List of objects with ``role`` and ``content``, or ``from`` and ``value``.
        column: Where the messages stand, for messages to people.
        roles: The file's role names and what they mean.
        media_first: Put the media of a row without any mark before its first user text.

    Returns:
        The turns, without marks. Rows with faults give turns that nobody uses.
    """
    if not isinstance(messages, list | tuple) or not messages:
        what = f"'{column}'" if not isinstance(messages, list | tuple) else f"'{column}' without messages"
        row.wrong_shape(what, messages, "a list of messages")
        return ()
    system = row.values.get("system")
    turns = [turn for i, message in enumerate(messages, 1) if (turn := _turn(row, i, message, roles)) is not None]
    if isinstance(system, str) and system and all(turn.role != "system" for turn in turns):
        turns.insert(0, Turn("system", tuple(_text_parts(system, marks=True))))
    return _place_media(row, turns, media_columns(row), media_first=media_first)


def _turn(row: Row, i: int, message: Any, roles: Mapping[str, Role]) -> Turn | None:
    if not isinstance(message, Mapping):
        row.wrong_shape(f"message {i}", message, "an object with role and content")
        return None
    name = message.get("role") if message.get("role") is not None else message.get("from")
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        expected = "system, user, assistant or tool"
        row.fault("MMP-D003", f"message {i} has role '{name}'; expected {expected}{_role_hint(name, roles)}")
        return None
    content = message.get("content") if message.get("content") is not None else message.get("value")
    parts = _content(row, i, content, marks=role in ("user", "system"))
    if name == "function_call":
        _check_payload(row, content)
    if message.get("tool_calls"):
        parts = [*parts, Part("text", _tool_calls(row, message["tool_calls"]))]
    return Turn(role, tuple(_merged(parts)), train=_trains(message))


def _role_hint(name: Any, roles: Mapping[str, Role]) -> str:
    lowered = str(name).strip().lower()
    near = difflib.get_close_matches(lowered, list(roles), n=1)
    guess = _FOREIGN_ROLES.get(lowered) or (near[0] if near else None)
    return f"; did you mean '{guess}'?" if guess else ""


def _trains(message: Mapping[str, Any]) -> bool:
    """False if the message is out of the loss: ``train`` here, ``loss`` in ms-swift, ``weight`` at OpenAI."""
    return not any(
        message.get(key) in (False, 0) for key in ("train", "loss", "weight") if message.get(key) is not None
    )


def _content(row: Row, i: int, content: Any, *, marks: bool) -> list[Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return _text_parts(content, marks=marks)
    if not isinstance(content, list | tuple):
        row.wrong_shape(f"content of message {i}", content, "a text or a list of parts")
        return []
    return [part for k, item in enumerate(content, 1) for part in _item_parts(row, k, item, marks=marks)]


def _item_parts(row: Row, k: int, item: Any, *, marks: bool) -> Iterable[Part]:
    """Parts of one entry of a content list."""
    if isinstance(item, str):
        return _text_parts(item, marks=marks)
    if not isinstance(item, Mapping):
        row.wrong_shape(f"content part {k}", item, "an object with a type")
        return ()
    given = {key: value for key, value in item.items() if value is not None}
    name = given.get("type") or next((key for key in given if key in _PART_KINDS), None)
    kind = _PART_KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        row.fault("MMP-D006", f"content part {k} has type '{name}'; expected text, image, video, audio or action")
        return ()
    if kind == "text":
        text = given.get("text", given.get("content", ""))
        if not isinstance(text, str):
            row.wrong_shape(f"text of content part {k}", text, "a text")
            return ()
        parts = _text_parts(text, marks=marks)
        return parts if _trains(given) else [replace(part, train=False) for part in parts]
    if kind == "action":
        return (_action(row, given),)
    return (_media_part(row, kind, str(name), given),)


def _media_part(row: Row, kind: Kind, name: str, given: Mapping[str, Any]) -> Part:
    """A medium named inside the conversation; without a reference it is a mark for the media column."""
    if isinstance(given.get("base64"), str):
        return Part(kind, ref=base64_ref(row, kind, given["base64"]))
    for key in (kind, name, "url", "path", "bytes", "source", "data"):
        if key in given and key != "type":
            ref = entry_ref(row, kind, given[key])
            if ref is None:
                what = "an empty text" if given[key] == "" else type(given[key]).__name__
                row.fault("MMP-D005", f"'{key}' is {what}; expected a path or a list of paths")
            return Part(kind, ref=ref)
    return Part(kind)


def _action(row: Row, given: Mapping[str, Any]) -> Part:
    """An action as JSON text; its meaning belongs to the action adapter."""
    payload = _check_payload(row, given.get("action", given.get("data")))
    return Part("action", ref=json.dumps(payload, sort_keys=True, ensure_ascii=False, default=str))


def _check_payload(row: Row, payload: Any, *, what: str = "it") -> Any:
    """The payload as an object; anything else is noted as MMP-D028."""
    if isinstance(payload, str):
        try:
            payload = json.loads(payload)
        except json.JSONDecodeError as error:
            row.fault("MMP-D028", f"tool/action payload is not an object: {error.msg} at column {error.colno}")
            return {}
    many = payload if isinstance(payload, list) and payload else [payload]
    for one in many:
        if not isinstance(one, Mapping):
            row.fault("MMP-D028", f"tool/action payload is not an object: {what} is {type(one).__name__}")
            return {}
    return payload


def _tool_calls(row: Row, calls: Any) -> str:
    """Tool calls of a chat API as one JSON line each, which is what the model learns to write."""
    lines = []
    for given in calls if isinstance(calls, list) else [calls]:
        call = _check_payload(row, given)
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        arguments = _check_payload(row, function.get("arguments") or {}, what="arguments")
        lines.append(json.dumps({"name": function.get("name"), "arguments": arguments}, ensure_ascii=False))
    return "\n".join(lines)


def _text_parts(text: str, *, marks: bool) -> list[Part]:
    """Split a text at its marks; escaped marks lose their backslash."""
    if not marks:
        return [Part("text", text)]
    parts, start, plain = [], 0, ""
    for match in MARK.finditer(text):
        plain += text[start : match.start()]
        start = match.end()
        if match[1]:
            plain += f"<{match[2]}>"
        else:
            kind = _PART_KINDS[match[2]]
            parts += [Part("text", plain), Part(kind)]
            plain = ""
    return [*parts, Part("text", plain + text[start:])]


def _merged(parts: Iterable[Part]) -> list[Part]:
    """Join neighbouring texts and drop empty ones, so that equal content has one form and one hash."""
    merged: list[Part] = []
    for part in parts:
        if part.kind == "text" and not part.text:
            continue
        if part.kind == "text" and merged and merged[-1].kind == "text" and merged[-1].train == part.train:
            merged[-1] = replace(part, text=merged[-1].text + part.text)
        else:
            merged.append(part)
    return merged


def _place_media(
    row: Row, turns: Sequence[Turn], columns: Mapping[Kind, MediaColumn], *, media_first: bool
) -> tuple[Turn, ...]:
    """Fill the parts without reference from the media columns, in order; MMP-D004 where counts differ."""
    if row.faults:  # a missing turn or entry would only make the counts differ too
        return ()
    places = [part.kind for turn in turns for part in turn.parts if part.kind in columns and part.ref is None]
    refs = {kind: iter(column.refs) for kind, column in columns.items()}
    if media_first and not places and not any(part.ref for turn in turns for part in turn.parts):
        turns = _with_media_first(turns, columns)
        places = [kind for kind, column in columns.items() for _ in column.refs]
    for kind, column in columns.items():
        marks = places.count(kind)
        if marks != len(column.refs):
            row.fault(
                "MMP-D004",
                f"{marks} <{kind}> marks in user/system text but {len(column.refs)} entries "
                f"in '{column.name}' ({column.names}).",
                f"Marks inside assistant text are not counted; write \\<{kind}> for a literal",
            )

    def filled(part: Part) -> Part:
        if part.kind not in columns or part.ref is not None:
            return part
        return Part(part.kind, ref=next(refs[part.kind], None))

    return tuple(Turn(turn.role, tuple(map(filled, turn.parts)), turn.train) for turn in turns)


def _with_media_first(turns: Sequence[Turn], columns: Mapping[Kind, MediaColumn]) -> list[Turn]:
    places = tuple(Part(kind) for kind, column in columns.items() for _ in column.refs)
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return list(turns)
    return [Turn(t.role, places + t.parts, t.train) if i == first else t for i, t in enumerate(turns)]
