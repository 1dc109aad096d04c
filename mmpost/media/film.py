"""Frames as a video file in memory, losslessly."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from mmpost.core.errors import MmpostError

_TICKS = 90000  # per second, as in MPEG


def encode(frames: npt.NDArray[np.uint8], times: npt.NDArray[np.float64], fps: float) -> bytes:
    """A Matroska file with FFV1 frames.

    Args:
        frames: uint8 ``[T, H, W, 3]``, RGB.
        times: float64 ``[T]``, seconds, ascending.
        fps: Frames per second, noted in the file.

    Raises:
        MmpostError: MMP-E090 when PyAV is not installed.
    """
    try:
        import av  # noqa: PLC0415
    except ImportError as error:
        raise MmpostError(
            "MMP-E090", "writing videos needs av, which is not installed.", "Run: pip install 'mmpost-toolkit[media]'"
        ) from error
    memory = io.BytesIO()
    base = Fraction(1, _TICKS)
    with av.open(memory, "w", format="matroska") as file:
        stream: Any = file.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "bgr0"
        stream.time_base = stream.codec_context.time_base = base
        for shown, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(shown), format="rgb24")
            frame.pts, frame.time_base = round(float(time - times[0]) * _TICKS), base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return memory.getvalue()
