"""torchcodec: needs FFmpeg's shared libraries on the machine and a release that fits torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mmpost.media.backends.frames import CHUNK, Allocate, clockwise, fitted, read_turns
from mmpost.media.backends.source import MediaFile
from mmpost.media.backends.timeline import Timeline

if TYPE_CHECKING:
    from av.container import InputContainer


def load_library() -> None:
    """Import torchcodec, which loads FFmpeg."""
    from torchcodec.decoders import VideoDecoder  # noqa: F401, PLC0415 - optional


def read(
    file: MediaFile,
    container: InputContainer,
    timeline: Timeline,
    picks: npt.NDArray[np.int64],
    max_pixels: int,
    allocate: Allocate,
) -> int:
    """See ``VideoBackend.read``. Frames are asked for by time, and the times that come back are compared."""
    from torchcodec.decoders import VideoDecoder  # noqa: PLC0415 - optional
    from torchcodec.transforms import Resize  # noqa: PLC0415 - optional

    turns = read_turns(file, container, timeline)
    source = file.path if file.path is not None else file.blob
    seconds = timeline.pts[picks] * float(timeline.tick)
    try:
        decoder = VideoDecoder(source, stream_index=timeline.index, dimension_order="NHWC")
        height, width = int(decoder.metadata.height or 0), int(decoder.metadata.width or 0)
        target = fitted(width, height, max_pixels)
        if target != (width, height):
            shrink = [Resize(size=(target[1], target[0]))]
            decoder = VideoDecoder(source, stream_index=timeline.index, dimension_order="NHWC", transforms=shrink)
        # A thousandth of the spacing on, since times of floats may fall just short of their frame.
        out = None
        for at in range(0, len(seconds), CHUNK):
            part = seconds[at : at + CHUNK]
            batch = decoder.get_frames_played_at([float(each) + 0.001 * _gap(timeline) for each in part])
            if np.abs(batch.pts_seconds.numpy() - part).max() > 0.45 * _gap(timeline):
                raise file.error("MMP-D087", "gets other frame times from torchcodec", "Set data.media.decoder=pyav")
            out = allocate((len(seconds), *batch.data.shape[1:])) if out is None else out
            out[at : at + CHUNK] = batch.data.numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        why = lines[0][:200] if lines else type(error).__name__
        raise file.refused("torchcodec", why, others="pyav, decord") from error
    return clockwise(turns)


def _gap(timeline: Timeline) -> float:
    """Shortest distance of two frames in seconds."""
    return float(np.diff(timeline.pts).min() * timeline.tick) if len(timeline.pts) > 1 else 1.0
