"""Sound tracks of containers that libsndfile does not read: MP4, M4A, MKV, WebM, AVI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmpost.media.backends.pyav_open import durations_are_stated, open_container, tag_seconds
from mmpost.media.backends.sound_rules import (
    MAX_RAW_BYTES,
    SLACK_SECONDS,
    Samples,
    Want,
    check_shape,
    outside,
    too_big,
    window,
)
from mmpost.media.backends.source import MediaFile

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer

_GAP_SECONDS = 0.1
_FULL_SCALE = {"u1": 1 << 7, "i2": 1 << 15, "i4": 1 << 31, "i8": 1 << 63}


def read(file: MediaFile, want: Want, soundfile_says: str) -> tuple[Samples, int]:
    """All channels ``[n, channels]`` of the window, and their rate.

    Args:
        file: What to read.
        want: Window and limits.
        soundfile_says: Why soundfile did not read it, for the message when this fails too.

    Raises:
        MmpostError: As ``sound.decode``.
    """
    with open_container(file, f"soundfile: {soundfile_says}; PyAV") as container:
        stream = next(iter(container.streams.audio), None)
        if stream is None:
            raise file.error("MMP-D085", "has no sound track", "Check the file, or leave the sound out of the row")
        rate = int(stream.rate or 0)
        check_shape(file, rate, stream.channels)
        promised = _promised_seconds(container, stream)
        if promised is not None:
            window(file, want, promised)
        channels = _decode(file, want, container, stream)
    seconds = len(channels) / rate
    whole = want.start == 0 and want.end is None
    if promised is not None and whole and seconds < promised - SLACK_SECONDS:
        raise file.truncated(f"{promised:.2f} s of sound", f"{seconds:.2f} s")
    if len(channels) == 0 and not whole:
        raise outside(file, want.start, want.end, seconds)
    end = None if want.end is None else min(want.end, promised if promised is not None else want.end)
    if end is not None and seconds < end - want.start - SLACK_SECONDS:
        raise file.truncated(f"{end - want.start:.2f} s of sound from {want.start:g} s on", f"{seconds:.2f} s")
    if seconds > want.max_seconds + SLACK_SECONDS:
        raise file.too_long(seconds, want.max_seconds)
    return channels, rate


def _promised_seconds(container: InputContainer, stream: AudioStream) -> float | None:
    if not durations_are_stated(container):
        return None
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    tagged = tag_seconds(stream)
    if tagged is not None:
        return tagged
    alone = len(container.streams) == 1
    return container.duration / 1e6 if alone and container.duration else None


def _decode(file: MediaFile, want: Want, container: InputContainer, stream: AudioStream) -> Samples:
    """Samples of the window; the time of the first sample of the stream counts as 0."""
    import av  # noqa: PLC0415 - optional

    rate, at, origin, size = int(stream.rate or 0), 0, None, 0
    blocks: list[list[Samples]] = []
    first = round(want.start * rate)
    limit = first + int((want.max_seconds + 1) * rate)
    last = min(limit, round(want.end * rate)) if want.end is not None else limit
    try:
        for frame in container.decode(stream):
            block = _floats(frame)
            time = frame.time
            if time is not None:
                origin = time - at / rate if origin is None else origin
                gap = time - origin - at / rate
                if gap > _GAP_SECONDS:
                    raise file.error("MMP-D088", f"lacks {gap:.2f} s of sound at {at / rate:.2f} s")
            if blocks and len(block) != len(blocks[0]):
                raise file.error("MMP-D088", f"changes its number of channels at {at / rate:.2f} s")
            span = slice(max(0, first - at), max(0, last - at))
            at += len(block[0])
            part = [channel[span] for channel in block]
            if part[0].size:
                blocks.append(part)
                size += part[0].nbytes * len(part)
            if size > MAX_RAW_BYTES:
                raise too_big(file, size)
            if at >= last:
                break
    except av.FFmpegError as error:
        raise file.error("MMP-D088", f"is damaged at {at / rate:.2f} s (PyAV: {error.strerror})") from error
    if not blocks:
        return np.zeros((0, 1), np.float32)
    whole = np.empty((len(blocks[0]), size // 4 // len(blocks[0])), np.float32)
    for channel, row in enumerate(whole):
        np.concatenate([block[channel] for block in blocks], out=row)
    return whole.T


def _floats(frame: Any) -> Sequence[Samples]:
    """One block, float32 ``[n]`` per channel, full scale 1."""
    if frame.format.name == "fltp":  # what most codecs give, with less ado than to_ndarray makes
        count = frame.samples
        return [np.frombuffer(plane, np.float32, count).copy() for plane in frame.planes]
    block = frame.to_ndarray()
    block = block if frame.format.is_planar else block.reshape(-1, len(frame.layout.channels)).T
    kind = block.dtype.str[1:]
    if kind not in _FULL_SCALE:
        return list(np.asarray(block, dtype=np.float32))
    scale = _FULL_SCALE[kind]
    centred = block.astype(np.float32) - (scale if kind == "u1" else 0)
    return list(np.asarray(centred / np.float32(scale), dtype=np.float32))
