"""One file to decode, as the child process sees it, and the errors that several back ends raise about it."""

from __future__ import annotations

import functools
import io
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mmpost.core.errors import MmpostError
from mmpost.media.ref import undecodable

HEAD_BYTES = 1 << 16
Data = bytes | mmap.mmap
MEND = "Copy or record the file again, or leave the row out with data.on_bad_row=quarantine"


@dataclass(frozen=True)
class MediaFile:
    """An encoded file, on disk or in memory.

    Attributes:
        kind: ``audio`` or ``video``, for messages.
        name: The reference as messages print it.
        origin: ``file:row`` for messages; empty when unknown.
        path: Where it lies; None if ``blob`` holds it.
        blob: Its bytes; None if it lies on disk.
    """

    kind: str
    name: str
    origin: str
    path: str | None
    blob: bytes | None

    def stream(self) -> str | io.BytesIO:
        """What PyAV and decord open."""
        return self.path if self.path is not None else io.BytesIO(self.blob or b"")

    def descriptor(self) -> int:
        """An open file descriptor at the start of the file; the caller closes it.

        libsndfile reads descriptors itself, whereas Python file objects cost one callback per block, and paths make
        it believe the extension.

        Raises:
            MmpostError: MMP-D008 when the file cannot be opened.
        """
        if self.path is not None:
            try:
                return os.open(self.path, os.O_RDONLY)
            except OSError as error:
                raise self.refused("file system", error.strerror or type(error).__name__) from error
        with tempfile.TemporaryFile() as spool:
            spool.write(self.blob or b"")
            spool.flush()
            spool.seek(0)
            return os.dup(spool.fileno())

    def head(self, count: int) -> bytes:
        """The first bytes, at most ``HEAD_BYTES``; fewer if the file is shorter.

        Raises:
            MmpostError: MMP-D008 when the file cannot be read.
        """
        return self._head[:count]

    @functools.cached_property
    def _head(self) -> bytes:
        if self.blob is not None:
            return self.blob[:HEAD_BYTES]
        try:
            with open(self.path or "", "rb", buffering=0) as file:
                return file.read(HEAD_BYTES)
        except OSError as error:
            raise self.refused("file system", error.strerror or type(error).__name__) from error

    def read(self) -> bytes:
        """All bytes."""
        if self.blob is not None:
            return self.blob
        with open(self.path or "", "rb") as file:
            return file.read()

    @contextmanager
    def mapped(self) -> Iterator[Data]:
        """All bytes without reading them before they are looked at."""
        if self.blob is not None or self.size() == 0:
            yield self.blob or b""
            return
        with open(self.path or "", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            yield view

    def size(self) -> int:
        """Bytes of the file."""
        return len(self.blob) if self.blob is not None else os.path.getsize(self.path or "")

    def error(self, code: str, what: str, fix: str = MEND) -> MmpostError:
        """An error about this file; ``what`` goes on after its name."""
        return MmpostError(code, f"{self._at}{self.kind} '{self.name}' {what}.", fix)

    def refused(self, backend: str, why: str, *, others: str = "none") -> MmpostError:
        """The MMP-D008 of this file."""
        ref = b"" if self.blob is not None else self.name
        why = why.strip().rstrip(".") or "no reason given"
        return undecodable(self.kind, ref, backend, why, origin=self.origin, others=others)

    def truncated(self, promised: str, held: str) -> MmpostError:
        """The MMP-D080: the header promises more than the file holds."""
        return self.error("MMP-D080", f"promises {promised} but holds {held}")

    def too_long(self, seconds: float, limit: float) -> MmpostError:
        """The MMP-D011 of a clip that is longer than one may be."""
        return MmpostError(
            "MMP-D011",
            f"{self._at}audio '{self.name}' lasts {seconds:.1f} s; the adapter uses {limit:g} s per clip.",
            "Raise data.media.max_audio_seconds or split the clip",
        )

    @property
    def _at(self) -> str:
        return f"{self.origin}: " if self.origin else ""


def missing(package: str, purpose: str) -> MmpostError:
    """The MMP-E090 of a library that is not installed."""
    what = f"'{package}' is needed to {purpose}, and is not installed."
    return MmpostError("MMP-E090", what, f"pip install {package}")
