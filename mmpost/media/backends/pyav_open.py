"""Open a container with PyAV, and what may be believed of its header."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mmpost.media.backends.source import MediaFile, missing

if TYPE_CHECKING:
    from av.container import InputContainer

# Containers whose header states the duration. Others get FFmpeg's guess from size and bit rate.
_STATED = {"mov", "mp4", "matroska", "webm", "avi", "asf", "flac", "wav", "gif"}
# A playlist must not make FFmpeg open the network.
_NO_NETWORK = {"protocol_whitelist": "file,pipe,crypto"}
_CLOCK = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")


@contextmanager
def open_container(file: MediaFile, backend: str = "PyAV") -> Iterator[InputContainer]:
    """An open container; FFmpeg's own prints are off.

    Raises:
        MmpostError: MMP-D008 when it cannot be opened, MMP-E090 when PyAV is missing.
    """
    try:
        import av  # noqa: PLC0415 - optional
    except ImportError as error:
        raise missing("av", "read video and sound tracks of containers") from error
    av.logging.set_level(None)
    try:
        container = av.open(file.stream(), "r", metadata_errors="replace", options=_NO_NETWORK)
    except (av.FFmpegError, OSError, ValueError, OverflowError) as error:
        why = "the file is empty" if not file.head(1) else getattr(error, "strerror", None) or str(error)
        raise file.refused(backend, why) from error
    with container:
        yield container


def durations_are_stated(container: InputContainer) -> bool:
    """True where ``duration`` comes from the header."""
    return bool(_STATED & set(container.format.name.split(",")))


def tag_seconds(stream: Any) -> float | None:
    """The ``DURATION`` tag of a Matroska track in seconds."""
    match = _CLOCK.match(stream.metadata.get("DURATION", ""))
    if match is None:
        return None
    hours, minutes, seconds = match.groups()
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
