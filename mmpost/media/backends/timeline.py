"""When each frame of a video is shown, read from the packets without decoding, and which frames to take.

Headers lie about frame counts and rates, and frame lists have no times at all; packets carry the time stamps that
players use. Reading them costs a percent or two of decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mmpost.core.errors import MmpostError
from mmpost.media.backends.pyav_open import durations_are_stated
from mmpost.media.backends.source import MediaFile
from mmpost.media.backends.structure import matroska_fault

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.stream import Stream
    from av.video.stream import VideoStream

MAX_FRAME_PIXELS = 1 << 26  # twice 8K
_ATTACHED_PICTURE = 1 << 10
# The last frame may be shown as long as the longest one before it, or a little less.
_SLACK_GAPS = 0.9


@dataclass(frozen=True, slots=True)
class Timeline:
    """What the packets say.

    Attributes:
        index: Number of the stream in its container.
        codec: FFmpeg's name of the codec.
        width: Stored width in pixels, before rotation.
        height: Stored height in pixels, before rotation.
        tick: Seconds of one unit of ``pts``.
        zero: Second at which the container starts; frame times count from there.
        pts: int64 ``[n]``, presentation time of every frame, ascending.
        keys: int64 ``[k]``, those of the frames that need no other frame.
        last_duration: Units that the last frame is shown.
        has_sound: There is a sound track.
    """

    index: int
    codec: str
    width: int
    height: int
    tick: Fraction
    zero: Fraction
    pts: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]
    last_duration: int
    has_sound: bool

    @property
    def times(self) -> npt.NDArray[np.float64]:
        """Seconds of every frame from the start of the container, float64 ``[n]``."""
        return np.asarray(self.pts * float(self.tick) - float(self.zero), np.float64)

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return float((int(self.pts[-1] - self.pts[0]) + self.last_duration) * self.tick)


def read(file: MediaFile, container: InputContainer) -> Timeline:
    """Read the time stamps of a file; ``container`` is left at its end.

    Raises:
        MmpostError: MMP-D080 cut, MMP-D083 absurd size, MMP-D085 no pictures, MMP-D086 no time stamps, MMP-D088
            damaged.
    """
    stream = pictures(container)
    if stream is None:
        raise file.error("MMP-D085", "has no video stream", "Check the file, or list it as audio")
    check_size(file, stream.codec_context.width, stream.codec_context.height)
    found = _demux(file, container, [stream, *container.streams.audio])
    line = _timeline(file, container, stream, found)
    fault = matroska_fault(file)
    if fault is not None:
        raise file.error("MMP-D088", f"has {fault}")
    return line


def pictures(container: InputContainer) -> VideoStream | None:
    """The first video stream that is no cover picture."""
    for stream in container.streams.video:
        if not int(stream.disposition) & _ATTACHED_PICTURE:
            return stream
    return None


def check_size(file: MediaFile, width: int, height: int) -> None:
    """Raise MMP-D083 for frames that are larger than any camera's, before memory is taken for one."""
    if width * height > MAX_FRAME_PIXELS:
        what = f"has frames of {width}x{height} pixels, more than {MAX_FRAME_PIXELS / 1e6:.0f} million"
        raise file.error("MMP-D083", what)
    if width <= 0 or height <= 0:
        raise file.refused("PyAV", "the header states no frame size")


@dataclass(slots=True)
class _Packets:
    """Sums over the packets of a container."""

    pts: list[int]
    keys: list[int]
    last_duration: int = 0
    last_pts: int = -(1 << 62)
    hidden: int = 0
    end: Fraction = Fraction(-(1 << 40))  # seconds at which the last packet of any stream ends


def _demux(file: MediaFile, container: InputContainer, streams: list[Stream]) -> _Packets:
    import av  # noqa: PLC0415 - optional

    out = _Packets([], [])
    wanted = streams[0].index
    ends = dict.fromkeys((stream.index for stream in streams), -(1 << 62))
    bases = {stream.index: stream.time_base for stream in streams}
    try:
        for packet in _packets(file, container, streams):
            if packet.pts is None:
                if packet.stream_index == wanted:
                    raise _unstamped(file)
                continue
            index, end = packet.stream_index, packet.pts + (packet.duration or 0)
            ends[index] = max(ends[index], end)
            if index == wanted:
                _count(file, packet, packet.pts, out)
    except av.FFmpegError as error:
        raise file.error("MMP-D088", f"is damaged after {len(out.pts)} frames (PyAV: {error.strerror})") from error
    out.end = max((Fraction(end) * (bases[index] or 1) for index, end in ends.items()), default=Fraction(0))
    return out


def _packets(file: MediaFile, container: InputContainer, streams: list[Stream]) -> Iterator[Packet]:
    """Packets with content. What FFmpeg skips to go on after damage, it tells only its log.

    Raises:
        MmpostError: MMP-D088 with the log's words.
    """
    import av  # noqa: PLC0415 - optional

    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as log:
            for packet in container.demux(streams):
                if packet.size:
                    yield packet
                if log:
                    raise file.error("MMP-D088", f"is damaged (FFmpeg: {log[0][2].strip().rstrip('.')})")
    finally:
        av.logging.set_level(None)


def _count(file: MediaFile, packet: Packet, pts: int, out: _Packets) -> None:
    if packet.is_corrupt:
        raise file.error("MMP-D088", f"is damaged after {len(out.pts)} frames")
    if packet.is_discard:  # cut off by an edit list: decoded, but never shown
        out.hidden += 1
        return
    out.pts.append(pts)
    if packet.is_keyframe:
        out.keys.append(pts)
    if pts > out.last_pts:
        out.last_pts, out.last_duration = pts, packet.duration or 0


def _unstamped(file: MediaFile) -> MmpostError:
    return file.error("MMP-D086", "has no time stamps", "Put it into a container: ffmpeg -i FILE -c copy FILE.mp4")


def _timeline(file: MediaFile, container: InputContainer, stream: VideoStream, found: _Packets) -> Timeline:
    if not found.pts or stream.time_base is None:
        raise file.error("MMP-D085", "has no frames", "Check the file, or leave the row out")
    pts = np.unique(np.array(found.pts, np.int64))
    tick = stream.time_base
    spacing = int(pts[-1] - pts[0]) / max(1, len(pts) - 1)
    starts = [
        Fraction(each.start_time) * each.time_base
        for each in (stream, *container.streams.audio)
        if each.start_time is not None and each.time_base is not None
    ]
    zero = min(starts, default=Fraction(0))
    longest = float(np.diff(pts).max() * tick) if len(pts) > 1 else found.last_duration * float(tick)
    _check_promise(file, container, stream, found, float(zero), longest)
    return Timeline(
        stream.index,
        stream.codec_context.codec.canonical_name,
        stream.codec_context.width,
        stream.codec_context.height,
        tick,
        zero,
        pts,
        np.unique(np.array(found.keys, np.int64)),
        found.last_duration or round(spacing),
        bool(container.streams.audio),
    )


def _check_promise(
    file: MediaFile, container: InputContainer, stream: VideoStream, found: _Packets, zero: float, longest: float
) -> None:
    """Raise MMP-D080 where the header states more than the packets hold."""
    count = len(found.pts) + found.hidden
    # Only MP4 and its relatives list every frame; AVI counts frames that were dropped while recording.
    if "mov" in container.format.name and stream.frames > count:
        raise file.truncated(f"{stream.frames} frames", f"{count}")
    if not durations_are_stated(container):
        return
    slack = _SLACK_GAPS * longest
    promised = container.duration / 1e6 if container.duration else 0.0
    if float(found.end) - zero < promised - slack:
        raise file.truncated(f"{promised:.2f} s", f"{float(found.end) - zero:.2f} s")
    own = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
    held = (max(found.pts) - min(found.pts)) * float(stream.time_base or 1) + longest
    if held < own - slack and not found.hidden:
        raise file.truncated(f"{own:.2f} s of pictures", f"{held:.2f} s")


@dataclass(frozen=True, slots=True)
class Choice:
    """Which frames to take.

    Attributes:
        picks: int64 ``[t]``, positions in the list of all times, ascending, none twice.
        wanted: How many were asked for.
    """

    picks: npt.NDArray[np.int64]
    wanted: int


def choose(
    times: npt.NDArray[np.float64], end: float, *, fps: float, max_frames: int, part: tuple[float, float | None]
) -> Choice:
    """Frames nearest to a regular grid of seconds.

    Args:
        times: Seconds of all frames, ascending ``[n]``, n at least 1.
        end: Second at which the last frame ends.
        fps: Frames per second asked for.
        max_frames: Most frames; a longer part gets a wider grid.
        part: First and last second; None for the end.

    Returns:
        No position when the part holds no frame.
    """
    start, stop = part[0], end if part[1] is None else min(part[1], end)
    inside = np.flatnonzero((times >= start - 1e-6) & (times < stop + 1e-6)) if part != (0.0, None) else None
    if inside is not None and len(inside) == 0:
        return Choice(np.zeros(0, np.int64), 0)
    usable = times if inside is None else times[inside]
    first = float(usable[0])
    span = max(stop - first, 0.0)
    wanted = max(1, min(max_frames, int(np.ceil(span * fps - 1e-6))))
    grid = first + np.arange(wanted) * (max(1 / fps, span / max_frames) if wanted > 1 else 0.0)
    near = nearest(usable, grid)
    return Choice(np.unique(near) + (0 if inside is None else int(inside[0])), wanted)


def nearest(times: npt.NDArray[np.float64], at: Iterable[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Position of the entry of ``times`` nearest to each of ``at``; the earlier one of two equally near."""
    at = np.asarray(at, dtype=np.float64)
    after = np.clip(np.searchsorted(times, at), 0, len(times) - 1)
    before = np.maximum(after - 1, 0)
    closer = at - times[before] <= times[after] - at + 1e-9
    return np.where(closer, before, after).astype(np.int64)
