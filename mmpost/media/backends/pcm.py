"""Plain WAV without a decoder: samples of 16 bits or 32-bit floats, at the rate that is wanted.

No codec runs here, so the training process reads such files itself; a process that can be killed would cost more than
the reading. Whatever is unusual about a file, or wrong with it, is left to ``sound``, which has the words for it.
"""

from __future__ import annotations

import os
import stat
import struct
from io import BytesIO
from typing import Any

import numpy as np

from mmpost.media.backends import promise
from mmpost.media.backends.sound_rules import MAX_CHANNELS, MAX_RAW_BYTES, Samples, Want

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
# The rest of the sixteen bytes that name a format behind its first two.
_SUBFORMAT = bytes.fromhex("000000001000800000aa00389b71")
_HEAD_BYTES = 4096  # what lies further behind is unusual
_KINDS = {(_PCM, 16): "<i2", (_FLOAT, 32): "<f4"}


def read(path: str | None, blob: bytes | None, want: Want) -> Samples | None:
    """All channels of the window.

    Args:
        path: Where the file lies; None if ``blob`` holds it.
        blob: The file; None if it lies on disk.
        want: Rate, window and limits.

    Returns:
        float32 ``[n, channels]``, the same as libsndfile gives; None for every file that is not plain, whole, of the
        wanted rate and within the limits.
    """
    if blob is not None:
        return _read(BytesIO(blob), len(blob), want)
    try:
        with open(path or "", "rb", buffering=0, opener=_without_waiting) as file:
            facts = os.fstat(file.fileno())
            return _read(file, facts.st_size, want) if stat.S_ISREG(facts.st_mode) else None
    except OSError:
        return None


def _without_waiting(path: str, flags: int) -> int:
    """A pipe without a writer would keep ``open`` waiting."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _read(file: Any, size: int, want: Want) -> Samples | None:
    plain = _layout(file.read(_HEAD_BYTES))
    if plain is None:
        return None
    kind, channels, rate, begin, promised = plain
    frame = channels * np.dtype(kind).itemsize
    if rate != want.rate or promised % frame or begin + promised > size:
        return None
    frames = promised // frame
    last = frames if want.end is None else min(round(want.end * rate), frames)
    first = round(want.start * rate)
    seconds = (last - first) / rate
    inside = 0 <= first < last and (want.end is None or want.end * rate <= frames)
    if not (inside and want.min_seconds <= seconds <= want.max_seconds):
        return None
    if (last - first) * channels * 4 > MAX_RAW_BYTES:
        return None
    raw = np.empty((last - first, channels), kind)
    file.seek(begin + first * frame)
    if file.readinto(raw.view(np.uint8).data) != raw.nbytes:
        return None
    if kind == "<f4":
        return raw.astype(np.float32, copy=False)
    return np.multiply(raw, np.float32(1 / 32768), dtype=np.float32)


def _layout(head: bytes) -> tuple[str, int, int, int, int] | None:
    """Kind of the samples, channels, rate, first byte and number of bytes of the sound; None if not plain."""
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    shape = None
    for name, at, size in promise.chunks(head, "<"):
        if not all(32 <= letter < 127 for letter in name):  # libsndfile gives up here too
            return None
        if name == b"fmt " and size >= 16:
            shape = _shape(head[at : at + min(size, 40)])
        if name == b"data":
            return None if shape is None or size in promise.UNKNOWN_32 else (*shape, at, size)
    return None


def _shape(fields: bytes) -> tuple[str, int, int] | None:
    if len(fields) < 16:
        return None
    tag, channels, rate, _, block, bits = struct.unpack("<HHIIHH", fields[:16])
    if tag == _EXTENSIBLE and len(fields) == 40 and fields[26:] == _SUBFORMAT:
        whole = int.from_bytes(fields[18:20], "little") == bits
        tag = int.from_bytes(fields[24:26], "little") if whole else tag
    kind = _KINDS.get((tag, bits))
    if kind is None or not 1 <= channels <= MAX_CHANNELS or block != channels * bits // 8:
        return None
    return kind, channels, rate
