"""What a row says: turns of text and media, and the columns beside them.

Media stay undecoded (a path, a URL or encoded bytes) until the worker that batches them asks ``mmpost.media``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["text", "image", "video", "audio", "action"]
Role = Literal["system", "user", "assistant", "tool"]
KINDS: tuple[Kind, ...] = ("text", "image", "video", "audio", "action")
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of one kind inside a turn.

    Attributes:
        kind: What the part is.
        text: The text; empty for every other kind.
        ref: Path, URL or encoded file bytes of undecoded media; None for text.
        train: False keeps a text of an assistant turn out of the loss, for example a context it was given.
    """

    kind: Kind
    text: str = ""
    ref: str | bytes | None = None
    train: bool = True


@dataclass(frozen=True, slots=True)
class Turn:
    """One message.

    Attributes:
        role: Who speaks.
        parts: Text and media in reading order.
        train: False keeps an assistant turn out of the loss.
    """

    role: Role
    parts: tuple[Part, ...]
    train: bool = True

    @property
    def text(self) -> str:
        """All text of the turn, media left out."""
        return "".join(part.text for part in self.parts if part.kind == "text")


@dataclass(frozen=True, slots=True)
class Sample:
    """One row in canonical form.

    Attributes:
        id: Unique inside its source.
        turns: The conversation.
        columns: Everything else in the row; rewards receive it by name.
        origin: ``file:row`` (1-based) for messages to people.
        source: Name of the source that the row was drawn from.
    """

    id: str
    turns: tuple[Turn, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    source: str = ""

    def media(self, kind: Kind | None = None) -> list[Part]:
        """Media parts in reading order, all or of one kind."""
        parts = [part for turn in self.turns for part in turn.parts if part.kind != "text"]
        return parts if kind is None else [part for part in parts if part.kind == kind]

    def prompt(self) -> Sample:
        """The same row without its final assistant turn, which is what a policy is asked to write."""
        turns = self.turns[:-1] if self.turns and self.turns[-1].role == "assistant" else self.turns
        return Sample(self.id, turns, self.columns, self.origin, self.source)

    def content_hash(self) -> str:
        """Hash of turns and media references, the same on every machine; columns and id do not enter."""
        digest = hashlib.sha256()
        for turn in self.turns:
            for part in turn.parts:
                ref = part.ref if isinstance(part.ref, bytes) else (part.ref or "").encode()
                head = json.dumps([turn.role, part.kind, part.text, len(ref)], ensure_ascii=False)
                digest.update(head.encode() + b"\0" + ref)
        return digest.hexdigest()
