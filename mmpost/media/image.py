"""Decode one image reference to upright 8-bit RGB, or read its size from the header alone.

What is done to pixels: EXIF orientation is applied, transparency is put on white, 16-bit grey is scaled (not
clipped) to 8 bits, palettes and CMYK are converted. Colour profiles are ignored. Of an animation the first
frame is used.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmpost.core.errors import MmpostError
from mmpost.media.ref import open_ref, shown, undecodable

# Raster formats only. Pillow also opens EPS and WMF, for which it starts other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "MPO", "ICO", "DIB")
# Everything that Pillow's plug-ins raise on damaged files (Pillow 10 to 13).
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112


def load(ref: str | bytes, *, origin: str = "", roots: Sequence[Path] = ()) -> Image.Image:
    """Decode an image completely.

    Args:
        ref: Path, ``file://`` address, data URI, base64 text, or the bytes of an encoded file.
        origin: ``file:row`` for messages; empty when unknown.
        roots: Folders for relative paths, asked in order; empty means the working directory.

    Returns:
        Mode ``RGB``, upright, independent of the file.

    Raises:
        MmpostError: MMP-D007 no such file, MMP-D008 damaged or not an image, MMP-D027 too large, MMP-D035 a
            URL.
    """
    with open_ref(ref, kind="image", origin=origin, roots=roots) as file:
        image = _open(file, ref, origin)
        turn = _TURN.get(_orientation(image))
        try:
            image.load()
            flat = _to_rgb(image)
        except Image.DecompressionBombError as error:
            raise _too_large(ref, image.size, origin) from error
        except _DECODE_ERRORS as error:
            raise undecodable("image", ref, "Pillow", _why(error), origin=origin) from error
    return flat if turn is None else flat.transpose(turn)


def size(ref: str | bytes, *, origin: str = "", roots: Sequence[Path] = ()) -> tuple[int, int]:
    """Width and height in pixels that ``load`` would give, from the header alone.

    Raises:
        MmpostError: MMP-D007, MMP-D008, MMP-D027 or MMP-D035, as ``load``; damage behind the header is not
            seen.
    """
    with open_ref(ref, kind="image", origin=origin, roots=roots) as file:
        image = _open(file, ref, origin)
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def encode(image: Image.Image) -> bytes:
    """PNG bytes of an image that exists only in memory; lossless."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _open(file: BinaryIO, ref: str | bytes, origin: str) -> Image.Image:
    """Read the header."""
    try:
        return Image.open(file, formats=_formats())
    except Image.DecompressionBombError as error:
        announced = _announced_size(file)
        if announced is None:
            raise undecodable("image", ref, "Pillow", _why(error), origin=origin) from error
        raise _too_large(ref, announced, origin) from error
    except UnidentifiedImageError as error:
        file.seek(0)
        head = file.read(8)
        why = f"not an image (the file starts with {head.hex(' ')})" if head else "the file is empty"
        raise undecodable("image", ref, "Pillow", why, origin=origin) from error
    except _DECODE_ERRORS as error:
        raise undecodable("image", ref, "Pillow", _why(error), origin=origin) from error


def _announced_size(file: BinaryIO) -> tuple[int, int] | None:
    """Size in the header of a file that ``Image.open`` refuses as too large; None if no plug-in tells.

    The refusal itself names only the number of pixels, so the plug-ins are asked directly.
    """
    for name in _formats():
        factory, accept = Image.OPEN[name]
        file.seek(0)
        if accept is not None and accept(file.read(16)) in (False, None):
            continue
        file.seek(0)
        try:
            return factory(file, "").size
        except (*_DECODE_ERRORS, Image.DecompressionBombError):
            continue
    return None


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 that is still to be applied; 1 when absent or unreadable.

    Broken metadata is not broken pixels, so it does not stop the row.
    """
    # Pillow turns TIFF by itself while loading and reports the turned size before. For PNG without EXIF in
    # front of the pixels, getexif() would decode the whole file.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODE_ERRORS:
        return 1
    return value if value in _TURN else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB; ValueError where a mode has no agreed brightness."""
    if image.mode.startswith("I"):
        return _deep_grey_to_rgb(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed brightness; convert the file to 8 or 16 bits")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        colour = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, colour).convert("RGB")
    return image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion clips everything above 255 to white."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 0xFFFF:
        raise ValueError("integer pixels outside 0..65535 have no agreed brightness; convert the file to 8 or 16 bits")
    eight = ((grey + 128) // 257).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        eight[grey == clear] = 255
    return Image.fromarray(eight).convert("RGB")


def _too_large(ref: str | bytes, pixels: tuple[int, int], origin: str) -> MmpostError:
    width, height = pixels
    at = f"{origin}: " if origin else ""
    return MmpostError(
        "MMP-D027",
        f"{at}image '{shown(ref)}' is {width}×{height} ({width * height / 1e6:.1f} MP); "  # noqa: RUF001
        "larger than Pillow's safety limit",
    )


def _why(error: BaseException) -> str:
    text = str(error).strip().rstrip(".")
    return text or type(error).__name__
