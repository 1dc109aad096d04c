"""Which image files have been decoded without fault, remembered from one command to the next.

A command decodes its images before it trains, so that a damaged file is told before anything was paid for. The next
command on the same files would decode them all again; it trusts a file whose size and time of change are the same.
Files with a fault are never remembered: they are looked at, and told, every time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL


class Facts(NamedTuple):
    """What looking at a file found: upright size in pixels, and what is converted in it."""

    width: int
    height: int
    traits: tuple[str, ...]


class Decoded:
    """Files known to be good; without a place it remembers nothing."""

    def __init__(self, place: Path | None = None, root: str = "", rows: dict[str, list[Any]] | None = None) -> None:
        self._place, self._root, self._rows = place, root, rows or {}
        self._changed = False

    @classmethod
    def open(cls, folder: Path | None, paths: Sequence[str]) -> Decoded:
        """What is known of files.

        Args:
            folder: Where the records lie; None for no memory.
            paths: The files; their nearest common folder chooses the record.
        """
        if folder is None or not paths:
            return cls()
        root = os.path.commonpath([os.path.abspath(path) for path in paths])
        # Another decoder may judge otherwise.
        name = hashlib.sha256(f"{root}\nPillow {PIL.__version__}".encode()).hexdigest()[:24]
        place = folder / f"{name}.json"
        try:
            rows = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            rows = {}
        return cls(place, root, rows if isinstance(rows, dict) else {})

    def facts(self, path: str) -> Facts | None:
        """Facts of a file that has not changed since it was decoded."""
        row = self._rows.get(self._name(path)) if self._place is not None else None
        if row is None or row[:2] != _stamp(path):
            return None
        return Facts(row[2], row[3], tuple(row[4]))

    def add(self, path: str, facts: Facts) -> None:
        """Remember a file that was decoded."""
        stamp = _stamp(path) if self._place is not None else None
        if stamp is None:
            return
        row = [*stamp, facts.width, facts.height, list(facts.traits)]
        if self._rows.get(self._name(path)) != row:
            self._rows[self._name(path)] = row
            self._changed = True

    def save(self) -> None:
        """Write what is new; a folder that cannot be written only costs decoding again."""
        if self._place is None or not self._changed:
            return
        partial = self._place.with_name(f"{self._place.name}.{os.getpid()}.partial")
        try:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self._rows, ensure_ascii=False), encoding="utf-8")
            partial.replace(self._place)
        except (OSError, UnicodeEncodeError):
            partial.unlink(missing_ok=True)

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self._root)


def cache_folder() -> Path:
    """Where commands keep the records: ``mmpost/images`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmpost" / "images"


def _stamp(path: str) -> list[int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]
