"""What every reader gets and gives: a raw row with its place, and the faults found in it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mmpost.core.errors import MmpostError
from mmpost.core.sample import Sample


class RawRow(NamedTuple):
    """One row as a container holds it.

    Attributes:
        number: 1-based row, or line for JSON lines.
        value: The decoded row, or the raw text when it cannot be decoded.
        fault: Why it cannot be decoded, else None.
        file: The file it is in, as shown to people.
    """

    number: int
    value: Any
    fault: MmpostError | None
    file: str


@dataclass(slots=True)
class Row:
    """One row on its way to a sample.

    Attributes:
        values: Column name to value, after the user's renaming; None counts as absent.
        origin: ``file:row`` for messages.
        number: 1-based number inside the source; the id of a row without ``id``.
        roots: Folders for relative media paths, asked in order; empty means the working directory.
        source: Name of the source.
        faults: What is wrong with the row; readers append and go on, so that all faults are reported at once.
    """

    values: Mapping[str, Any]
    origin: str
    number: int
    roots: tuple[str, ...] = ()
    source: str = ""
    faults: list[MmpostError] = field(default_factory=list)

    def has(self, *names: str) -> bool:
        """True if the row has a value in each of these columns."""
        return all(self.values.get(name) is not None for name in names)

    def error(self, code: str, what: str, fix: str = "") -> MmpostError:
        """An error that names this row."""
        return MmpostError(code, f"{self.origin}: {what}", fix)

    def fault(self, code: str, what: str, fix: str = "") -> None:
        """Note a fault of this row."""
        self.faults.append(self.error(code, what, fix))

    def wrong_shape(self, what: str, value: Any, expected: str) -> None:
        """Note the MMP-D032 of a value of the wrong type."""
        self.fault("MMP-D032", f"{what} is {type(value).__name__}; expected {expected}")


class Reader(NamedTuple):
    """A row format.

    Attributes:
        recognise: Whether a row is in this format, from its columns.
        read: Row to sample; faults go to the row, and the sample of a faulty row is thrown away.
    """

    recognise: Callable[[Row], bool]
    read: Callable[[Row], Sample | None]


def rows_of(file: str, values: Iterator[Any]) -> Iterator[RawRow]:
    """Number values that need no decoding."""
    for number, value in enumerate(values, 1):
        yield RawRow(number, value, None, file)


def no_conversation(row: Row) -> MmpostError:
    """The MMP-D002 of a row in no known format."""
    present = [name for name, value in row.values.items() if value is not None]
    return row.error(
        "MMP-D002",
        f"no conversation found. Fields present: {', '.join(present) or 'none'}. "
        "Expected one of messages, conversations, prompt, instruction, query.",
        f"Map yours with data.columns={{messages: {_guess(row.values)}}}",
    )


def _guess(values: Mapping[str, Any]) -> str:
    """The column that most likely holds the conversation."""
    for name, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and _speaks(value[0]):
            return name
    usual = [
        "messages",
        "conversations",
        "conversation",
        "dialog",
        "chat",
        "prompt",
        "problem",
        "text",
        "query",
    ]
    texts = [name for name, value in values.items() if isinstance(value, str) and name != "id"]
    for name in texts:
        if difflib.get_close_matches(name.lower(), usual, n=1):
            return name
    return max(texts, key=lambda name: len(values[name]), default="COLUMN")


def _speaks(message: Mapping[str, Any]) -> bool:
    return "role" in message or "from" in message


def finish(row: Row, turns: Any, used: set[str]) -> Sample:
    """The sample of a row whose turns are read.

    Args:
        row: The row.
        turns: Its turns.
        used: Columns that the turns were made from; all others go to ``Sample.columns``.
    """
    identity = row.values.get("id")
    columns = {name: value for name, value in row.values.items() if name not in used and name != "id"}
    return Sample(
        id=str(row.number if identity is None else identity),
        turns=tuple(turns),
        columns=columns,
        origin=row.origin,
        source=row.source,
    )
