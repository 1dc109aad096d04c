"""What every video back end is, by name, and the frame size that all of them use."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import numpy.typing as npt

from mmpost.core.errors import MmpostError
from mmpost.media.backends.source import MediaFile
from mmpost.media.backends.timeline import Timeline

if TYPE_CHECKING:
    from av.container import InputContainer

Pixels = npt.NDArray[np.uint8]
Allocate = Callable[[tuple[int, ...]], Pixels]
CHUNK = 16  # frames that a library decodes at once, so that its own copy stays in the processor's cache
# In the order in which ``auto`` tries them: the widest choice of codecs first.
NAMES = ("pyav", "torchcodec", "decord")


class VideoBackend(Protocol):
    """A module with these two functions; no reader outlives a call."""

    def load_library(self) -> None:
        """Import the library; ImportError, OSError or RuntimeError when it does not work here."""

    def read(
        self,
        file: MediaFile,
        container: InputContainer,
        timeline: Timeline,
        picks: npt.NDArray[np.int64],
        max_pixels: int,
        allocate: Allocate,
    ) -> int:
        """Decode some frames.

        Args:
            file: What to read.
            container: The same, opened by PyAV, at any place.
            timeline: When its frames are shown.
            picks: Positions in ``timeline.pts``, ascending.
            max_pixels: Larger frames are shrunk to this many pixels.
            allocate: Gives memory for ``[t, height, width, 3]``; called once, when the size is known.

        Returns:
            Degrees clockwise by which the stored frames were turned.

        Raises:
            MmpostError: MMP-D008, MMP-D083, MMP-D087 or MMP-D088.
        """


def backend(name: str) -> VideoBackend:
    """The back end of that name with its library loaded.

    Raises:
        MmpostError: MMP-E092 when the library is missing or cannot be loaded.
    """
    module = cast(VideoBackend, importlib.import_module(f"mmpost.media.backends.video_{name}"))
    try:
        module.load_library()
    except (ImportError, OSError, RuntimeError) as error:
        raise MmpostError(
            "MMP-E092",
            f"video back end '{name}' does not work here: {_cause(error)}.",
            "Set data.media.decoder=auto, or install what is missing; `mmpost doctor` shows the back ends that work",
        ) from error
    return module


def _cause(error: BaseException) -> str:
    """The line that names the missing library, or the first line."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "cannot open shared object" in line]
    return (telling or lines or [type(error).__name__])[0]


def quarter_turns(rotation: int) -> int:
    """Quarter turns counter-clockwise of a rotation as PyAV tells it in degrees."""
    return round(rotation / 90) % 4


def read_turns(file: MediaFile, container: InputContainer, timeline: Timeline) -> int:
    """Quarter turns counter-clockwise that a file asks for; only decoded frames tell.

    Raises:
        MmpostError: MMP-D088 when its first frame cannot be decoded.
    """
    import av  # noqa: PLC0415 - optional

    stream = next(each for each in container.streams.video if each.index == timeline.index)
    try:
        container.seek(int(timeline.pts[0]), stream=stream, backward=True)
        frame = next(container.decode(stream), None)
    except av.FFmpegError as error:
        raise file.error("MMP-D088", f"is damaged (PyAV: {error.strerror})") from error
    return 0 if frame is None else quarter_turns(frame.rotation)


def clockwise(turns: int) -> int:
    """Degrees clockwise of quarter turns counter-clockwise."""
    return -90 * turns % 360


def fitted(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Width and height with at most ``max_pixels``, in the same proportion; never enlarged."""
    if width * height <= max_pixels:
        return width, height
    scale = math.sqrt(max_pixels / (width * height))
    return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
