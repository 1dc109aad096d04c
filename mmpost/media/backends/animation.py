"""Animated GIF, WebP and PNG by Pillow; a still picture is a video of one frame."""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageSequence

from mmpost.media.backends.frames import Allocate, fitted
from mmpost.media.backends.source import MediaFile
from mmpost.media.backends.structure import gif_fault
from mmpost.media.backends.timeline import check_size

# Browsers show frames without a duration this long.
_DEFAULT_MS = 100
_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error)


@dataclass(frozen=True, slots=True)
class Times:
    """When the frames of an animation are shown.

    Attributes:
        codec: Name of the format.
        times: Seconds of every frame, float64 ``[n]``.
        duration: Seconds until the end of the last frame.
    """

    codec: str
    times: npt.NDArray[np.float64]
    duration: float


def is_animation(head: bytes) -> bool:
    """True for the first 12 bytes of a GIF, WebP or PNG."""
    return head[:6] in (b"GIF87a", b"GIF89a") or head[:8] == b"\x89PNG\r\n\x1a\n" or _is_webp(head)


def _is_webp(head: bytes) -> bool:
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP"


def read_times(file: MediaFile) -> Times:
    """Read all durations.

    Raises:
        MmpostError: MMP-D008 undecodable, MMP-D080 cut, MMP-D083 absurd size.
    """
    _check_end(file)
    try:
        with Image.open(file.stream()) as image:
            check_size(file, *image.size)
            shown = []
            for frame in ImageSequence.Iterator(image):
                frame.load()
                shown.append(frame.info.get("duration") or _DEFAULT_MS)
            name = image.format or "image"
    except Image.DecompressionBombError as error:
        raise file.error("MMP-D083", f"has frames that are too large ({error})") from error
    except _ERRORS as error:
        if getattr(error, "errno", None) == errno.ENOMEM:
            raise
        raise file.refused("Pillow", str(error) or type(error).__name__) from error
    ends = np.cumsum(np.array(shown, np.float64)) / 1000
    return Times(name.lower(), np.concatenate([[0.0], ends[:-1]]), float(ends[-1]))


def _check_end(file: MediaFile) -> None:
    """Raise MMP-D080 for a file without its end: Pillow takes the loss for the end of the animation."""
    head = file.head(12)
    fault = gif_fault(file)
    if fault == "no end mark" or (head[:4] == b"\x89PNG" and b"IEND" not in file.read()[-1024:]):
        raise file.truncated("an end mark", "none")
    if fault is not None:
        raise file.error("MMP-D088", f"has {fault}")
    if _is_webp(head) and struct.unpack("<I", head[4:8])[0] + 8 > file.size():
        raise file.truncated(f"{struct.unpack('<I', head[4:8])[0] + 8} bytes", f"{file.size()}")


def read(file: MediaFile, picks: npt.NDArray[np.int64], max_pixels: int, allocate: Allocate) -> None:
    """Decode some frames on white ground; see ``VideoBackend.read``."""
    try:
        with Image.open(file.stream()) as image:
            size = fitted(*image.size, max_pixels)
            out = allocate((len(picks), size[1], size[0], 3))
            white = Image.new("RGBA", image.size, "white")
            for at, pick in enumerate(picks):
                image.seek(int(pick))
                frame = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
                out[at] = np.asarray(frame if size == frame.size else frame.resize(size, Image.Resampling.BICUBIC))
    except _ERRORS as error:
        if getattr(error, "errno", None) == errno.ENOMEM:
            raise
        raise file.refused("Pillow", str(error) or type(error).__name__) from error
