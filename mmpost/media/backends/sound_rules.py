"""What is asked of a sound file, and what both of its readers refuse before they allocate anything."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmpost.core.errors import MmpostError
from mmpost.media.backends.source import MediaFile

Samples = npt.NDArray[np.float32]
MIN_RATE, MAX_RATE, MAX_CHANNELS = 1000, 768_000, 64
MAX_RAW_BYTES = 1 << 30  # samples of all channels before mixing
SLACK_SECONDS = 0.06  # codecs with blocks start or end up to some blocks away from the stated length


@dataclass(frozen=True, slots=True)
class Want:
    """What is asked of a sound file.

    Attributes:
        rate: Samples per second of the result.
        max_seconds: Longest part; more is an error, never cut in silence.
        min_seconds: Shortest part.
        start: Seconds from the beginning of the file.
        end: Seconds from the beginning of the file; None for its end.
    """

    rate: int
    max_seconds: float
    min_seconds: float
    start: float = 0.0
    end: float | None = None


def check_shape(file: MediaFile, rate: int, channels: int) -> None:
    """Raise MMP-D083 for a rate or a number of channels that no sound has."""
    if not (MIN_RATE <= rate <= MAX_RATE and 1 <= channels <= MAX_CHANNELS):
        raise file.error("MMP-D083", f"has {channels} channels of {rate} samples per second, which cannot be right")


def too_big(file: MediaFile, size: int) -> MmpostError:
    """The MMP-D083 of samples that would need too much memory."""
    limit = MAX_RAW_BYTES >> 20
    return file.error("MMP-D083", f"needs {size >> 20} MB to decode, more than {limit} MB", "Split or resample it")


def window(file: MediaFile, want: Want, seconds: float) -> tuple[float, float]:
    """First and last second to read of a file of ``seconds``.

    Raises:
        MmpostError: MMP-D011 when that is too long, MMP-D089 when it lies outside of the file.
    """
    last = seconds if want.end is None else min(want.end, seconds)
    if want.start < 0 or (want.start and want.start >= last) or (want.end is not None and want.end > seconds + 1):
        raise outside(file, want.start, want.end, seconds)
    if last - want.start > want.max_seconds + 1e-6 and last < math.inf:
        raise file.too_long(last - want.start, want.max_seconds)
    return want.start, last


def outside(file: MediaFile, start: float, end: float | None, seconds: float) -> MmpostError:
    """The MMP-D089 of a part that the file does not have."""
    part = f"{start:g} s to {'the end' if end is None else f'{end:g} s'}"
    return file.error("MMP-D089", f"lasts {seconds:.2f} s; {part} is not in it", "Correct start and end of the row")
