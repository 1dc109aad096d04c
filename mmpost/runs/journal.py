"""Long work in pieces, each on disk before the next begins: a killed command goes on where it was.

One JSONL file: a first line that says what the work is, then one line per finished piece, in their order. A piece may
depend on its number and on the options alone, so that whatever the kills, the same pieces come out. The file stays: the
same command again has nothing left to do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmpost.core.errors import MmpostError


class Journal:
    """Finished pieces of one piece of work.

    Args:
        path: The file; its folder is made.
        work: What decides the result, as plain JSON; a file about other work is refused.

    Attributes:
        pieces: Finished pieces in order, plain JSON.

    Raises:
        MmpostError: MMP-R226 when the file belongs to other work, MMP-R233 when a line of it is damaged.
    """

    def __init__(self, path: Path, work: Mapping[str, Any]) -> None:
        self.path, self._work = path, json.loads(json.dumps(work))
        self.pieces: list[Any] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()
        else:
            self._size = 0
            self._append(self._work)

    def _read(self) -> None:
        data = self.path.read_bytes()
        # What a kill cut off in the middle of a line was never finished.
        whole = data[: data.rfind(b"\n") + 1]
        self._size = len(whole)
        # Not splitlines: a text may hold other line ends, such as U+2028, which JSON leaves as they are.
        lines = whole.split(b"\n")[:-1]
        if not lines:
            self._append(self._work)
            return
        before, *pieces = [self._value(number, line) for number, line in enumerate(lines, start=1)]
        if not isinstance(before, dict):
            raise self._damaged(1)
        if before != self._work:
            names = [key for key in {**before, **self._work} if before.get(key) != self._work.get(key)]
            raise MmpostError(
                "MMP-R226",
                f"'{self.path}' holds work with other options: {', '.join(names)}.",
                "Repeat the earlier command, delete that file, or choose another output.",
            )
        self.pieces = pieces

    def _value(self, number: int, line: bytes) -> Any:
        try:
            return json.loads(line.decode())
        except ValueError as error:  # of the encoding, or of the JSON
            raise self._damaged(number) from error

    def _damaged(self, number: int) -> MmpostError:
        """A kill cuts off the last line only; this one was changed by something else."""
        if number == 1:
            fix = "Delete that file; the same command works everything off anew."
        else:
            fix = f"Delete line {number} and all lines after it; the same command works these pieces off anew."
        return MmpostError("MMP-R233", f"'{self.path}', line {number}: damaged, expected a line of JSON.", fix)

    def _append(self, value: Any) -> None:
        line = json.dumps(value, ensure_ascii=False) + "\n"
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.seek(self._size)
            file.truncate()
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._size += len(line.encode())

    def complete(
        self, count: int, work: Callable[[int], Any], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Work off what is missing.

        Args:
            count: Pieces in all.
            work: From the number of a piece to its result, plain JSON.
            progress: Called with pieces done and pieces in all.
        """
        for number in range(len(self.pieces), count):
            piece = work(number)
            self._append(piece)
            # As it will be read after a kill, so that a resumed command works on equal values.
            self.pieces.append(json.loads(json.dumps(piece)))
            if progress is not None:
                progress(number + 1, count)
