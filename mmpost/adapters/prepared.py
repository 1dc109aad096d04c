"""Media that were decoded and prepared lately, by content, so that rows with the same picture prepare it once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mmpost.core.sample import Kind

# The step's media, not the run's: whole rows are remembered elsewhere.
CACHE_BYTES = 256 << 20
# Longer texts are no paths.
MAX_PATH = 4096


def content_key(kind: Kind, ref: str | bytes) -> tuple[str, ...]:
    """What two references to the same medium have in common.

    Pictures are read and hashed. Sounds and videos can be large; a file of theirs is known by path, size and time of
    its last change.
    """
    if isinstance(ref, bytes):
        return kind, hashlib.blake2b(ref, digest_size=16).hexdigest()
    try:
        if len(ref) > MAX_PATH or ref.startswith("data:"):
            raise ValueError
        path = Path(ref.removeprefix("file://"))
        if kind == "image":
            return kind, hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        facts = path.stat()
    except (OSError, ValueError):
        # Encoded text; or a path that cannot be read, about which whoever decodes it complains.
        return kind, hashlib.blake2b(ref.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return kind, str(path.absolute()), str(facts.st_size), str(facts.st_mtime_ns)


@dataclass(slots=True)
class _Entry:
    item: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)
    size: int = 0


class Prepared:
    """The newest media up to ``CACHE_BYTES``, and what was made of them.

    Args:
        limit: Bytes of pictures, sounds and tensors that are kept; the newest medium is kept whatever its size.
    """

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit = limit
        self._entries: OrderedDict[tuple[str, ...], _Entry] = OrderedDict()
        self._keys: dict[int, tuple[str, ...]] = {}
        self._bytes = 0

    def item(self, key: tuple[str, ...], load: Callable[[], Any]) -> Any:
        """The decoded medium of a key; ``load`` decodes it, or raises, in which case nothing is kept."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(load())
            self._keys[id(entry.item)] = key
            self._grow(entry, _item_bytes(entry.item))
        self._entries.move_to_end(key)
        return entry.item

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return key in self._entries

    def tensors(self, item: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of a medium that ``item`` gave; ``make`` makes them. They are shared and must not be changed."""
        entry = self._entries.get(self._keys.get(id(item), ()))
        if entry is None or entry.item is not item:
            return make()
        if not entry.tensors:
            entry.tensors = make()
            self._grow(entry, sum(t.numel() * t.element_size() for t in entry.tensors.values()))
        return entry.tensors

    def _grow(self, entry: _Entry, size: int) -> None:
        entry.size += size
        self._bytes += size
        while self._bytes > self.limit and next(iter(self._entries.values())) is not entry:
            _, dropped = self._entries.popitem(last=False)
            del self._keys[id(dropped.item)]
            self._bytes -= dropped.size


def _item_bytes(item: Any) -> int:
    """Bytes of a decoded picture, video or sound."""
    array = getattr(item, "frames", getattr(item, "samples", None))
    if array is not None:
        return int(array.nbytes)
    width, height = item.size
    return int(width * height * 3)
