"""PyAV: FFmpeg's libraries with all their codecs, shipped in the wheel. Turns frames that a phone marked as turned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from mmpost.media.backends.frames import Allocate, Pixels, clockwise, fitted, quarter_turns
from mmpost.media.backends.pyav_open import open_container
from mmpost.media.backends.source import MediaFile
from mmpost.media.backends.timeline import Timeline, check_size

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

# A jump costs about as much as decoding this many frames (the decoder starts anew).
_JUMP_FRAMES = 8


def load_library() -> None:
    """Import PyAV."""
    import av  # noqa: F401, PLC0415 - optional


def read(
    file: MediaFile,
    container: InputContainer,
    timeline: Timeline,
    picks: npt.NDArray[np.int64],
    max_pixels: int,
    allocate: Allocate,
) -> int:
    """See ``VideoBackend.read``. Jumps to key frames where that saves decoding."""
    import av  # noqa: PLC0415 - optional

    wanted = timeline.pts[picks]
    sink = _Sink(file, len(wanted), max_pixels, allocate)
    try:
        if _collect(container, timeline, wanted, sink, jumping=True):
            return sink.turned
        with open_container(file) as again:  # some indexes send a jump to a place behind its goal
            if _collect(again, timeline, wanted, sink, jumping=False):
                return sink.turned
    except av.FFmpegError as error:
        raise file.error("MMP-D088", f"is damaged: {sink.place()} (PyAV: {error.strerror})") from error
    raise file.error("MMP-D088", f"is damaged: {sink.place()}")


class _Sink:
    """Where frames go; takes memory when the first one tells its size."""

    def __init__(self, file: MediaFile, count: int, max_pixels: int, allocate: Allocate) -> None:
        self.file, self.count, self.max_pixels, self.allocate = file, count, max_pixels, allocate
        self.out: Pixels | None = None
        self.turned, self.done = 0, 0

    def put(self, at: int, frame: VideoFrame) -> None:
        """Convert one frame into its place."""
        if frame.is_corrupt:
            raise self.file.error("MMP-D088", f"has a damaged frame at {frame.time or 0:.2f} s")
        quarters = quarter_turns(frame.rotation)
        if self.out is None:
            check_size(self.file, frame.width, frame.height)
            width, height = fitted(frame.width, frame.height, self.max_pixels)
            self.size = (width, height)
            self.turned = clockwise(quarters)
            self.out = self.allocate((self.count, *((width, height) if quarters % 2 else (height, width)), 3))
        pixels = _rgb(frame, *self.size)
        self.out[at] = np.rot90(pixels, quarters) if quarters else pixels
        self.done = at + 1

    def place(self) -> str:
        """How far decoding came, for messages."""
        return f"only {self.done} of {self.count} frames that were asked for can be decoded"


def _rgb(frame: VideoFrame, width: int, height: int) -> Pixels:
    """Pixels ``[height, width, 3]``; a view of memory that belongs to FFmpeg."""
    plane = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC").planes[0]
    rows = np.frombuffer(cast(Any, plane), np.uint8).reshape(height, plane.line_size)
    return np.asarray(rows[:, : 3 * width].reshape(height, width, 3))


def _collect(
    container: InputContainer, timeline: Timeline, wanted: npt.NDArray[np.int64], sink: _Sink, *, jumping: bool
) -> bool:
    """Put every wanted frame; False when one did not come by."""
    stream = next(each for each in container.streams.video if each.index == timeline.index)
    for leg in _legs(timeline, wanted) if jumping else [_Leg(0, len(wanted), None)]:
        if leg.key is not None:
            container.seek(leg.key, stream=stream, backward=True)
        at = leg.first
        for frame in container.decode(stream):
            if frame.pts is None or frame.pts < wanted[at]:
                continue
            if frame.pts > wanted[at]:
                return False
            sink.put(at, frame)
            at += 1
            if at == leg.stop:
                break
        if at < leg.stop:
            return False
    return True


@dataclass(frozen=True, slots=True)
class _Leg:
    """A stretch that is decoded without a jump: wanted frames from ``first`` to before ``stop``.

    ``key`` is the key frame to jump to; None goes on from where the decoder is.
    """

    first: int
    stop: int
    key: int | None


def _legs(timeline: Timeline, wanted: npt.NDArray[np.int64]) -> list[_Leg]:
    """Where jumps to key frames save decoding."""
    if len(timeline.keys) == 0:
        return [_Leg(0, len(wanted), None)]
    places = np.searchsorted(timeline.pts, wanted)
    keys = timeline.keys[np.maximum(np.searchsorted(timeline.keys, wanted, side="right") - 1, 0)]
    saved = np.searchsorted(timeline.pts, keys) - np.concatenate([[0], places[:-1]])
    starts = [0, *(int(at) for at in np.flatnonzero(saved > _JUMP_FRAMES) if at > 0)]
    stops = [*starts[1:], len(wanted)]
    return [_Leg(first, stop, int(keys[first])) for first, stop in zip(starts, stops, strict=True)]
