"""decord: fast and old (FFmpeg of 2021, no AV1). Its frame numbers are matched to time stamps, never trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmpost.media.backends.frames import CHUNK, Allocate, Pixels, clockwise, fitted, read_turns
from mmpost.media.backends.source import MediaFile
from mmpost.media.backends.timeline import Timeline, nearest

if TYPE_CHECKING:
    from av.container import InputContainer


def load_library() -> None:
    """Import decord and silence it. Its bridge, which is global to the process, stays as it is."""
    import decord  # noqa: PLC0415 - optional

    decord.logging.set_level(decord.logging.QUIET)


def read(
    file: MediaFile,
    container: InputContainer,
    timeline: Timeline,
    picks: npt.NDArray[np.int64],
    max_pixels: int,
    allocate: Allocate,
) -> int:
    """See ``VideoBackend.read``. A new reader every time: one that lives through a fork ends the process."""
    import decord  # noqa: PLC0415 - optional

    turns = read_turns(file, container, timeline)
    try:
        reader = decord.VideoReader(file.stream(), ctx=decord.cpu(0), num_threads=1)
        own = np.asarray(reader.get_frame_timestamp(np.arange(len(reader))))[:, 0].astype(np.float64)
        matched = _matched(file, timeline, picks, own)
        out = None
        for at in range(0, len(matched), CHUNK):
            batch = reader.get_batch(matched[at : at + CHUNK]).asnumpy()
            width, height = fitted(batch.shape[2], batch.shape[1], max_pixels)
            out = allocate((len(matched), height, width, 3)) if out is None else out
            out[at : at + CHUNK] = _shrunk(batch, width, height)
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise file.refused("decord", _why(error, timeline), others="pyav, torchcodec") from error
    return clockwise(turns)


def _shrunk(batch: Pixels, width: int, height: int) -> Pixels:
    """Frames of another size; decord's own scaling fails on frames that it turns."""
    if batch.shape[1:3] == (height, width):
        return batch
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in batch]
    return np.stack([np.asarray(frame) for frame in resized])


def _matched(
    file: MediaFile, timeline: Timeline, picks: npt.NDArray[np.int64], own: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """decord's numbers of the frames at the wanted times.

    Raises:
        MmpostError: MMP-D087 when it counts other frames than the file has.
    """
    order = np.argsort(own, kind="stable")
    theirs, all_times = own[order], timeline.pts * float(timeline.tick)
    if len(theirs) == len(all_times):  # it may count from its first frame (AVI)
        theirs = theirs - theirs[0] + all_times[0]
    wanted = all_times[picks]
    found = nearest(theirs, wanted)
    gap = float(np.diff(all_times).min()) if len(all_times) > 1 else 1.0
    if np.abs(theirs[found] - wanted).max() > max(0.45 * gap, float(timeline.tick)):
        what = f"has {len(timeline.pts)} frames, but decord counts {len(own)} and gives them other times"
        raise file.error("MMP-D087", what, "Set data.media.decoder=pyav")
    return np.asarray(order[found])


def _why(error: Exception, timeline: Timeline) -> str:
    """The line of decord's message that tells something."""
    if "cannot find video stream" in str(error):
        return f"its FFmpeg of 2021 cannot decode {timeline.codec}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
