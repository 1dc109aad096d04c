"""Small pictures beside samples: large ones scaled down, tiny ones scaled up without blur."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

MAX_SIDE = 160  # px; eight of these and their text make a sample file of about 100 kB
MIN_SIDE = 112  # px; a 16-pixel toy image would be a speck otherwise


def write_thumb(ref: Any, folder: Path) -> str:
    """Write the thumbnail of an image into ``folder`` and return its file name ``<sha16>.jpg``.

    Args:
        ref: A PIL image, encoded bytes, or a path.
        folder: Existing folder; equal pictures share one file.

    Raises:
        OSError, ValueError: The image cannot be read.
    """
    data = encode_thumb(ref)
    name = hashlib.sha256(data).hexdigest()[:16] + ".jpg"
    if not (folder / name).exists():
        (folder / name).write_bytes(data)
    return name


def encode_thumb(ref: Any) -> bytes:
    """JPEG bytes with a longer side between 112 and 160 px.

    Raises:
        OSError, ValueError: The image cannot be read.
    """
    # Pillow costs 40 ms, which a command that only lists runs need not pay.
    from PIL import Image, ImageOps  # noqa: PLC0415

    source = io.BytesIO(ref) if isinstance(ref, bytes) else ref
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image = ImageOps.exif_transpose(image).convert("RGBA")
    except (
        Image.DecompressionBombError,
        SyntaxError,
    ) as error:  # Pillow raises SyntaxError for broken PNG chunks
        raise ValueError(str(error)) from error
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    longest = max(image.size)
    if longest > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    elif longest < MIN_SIDE:
        factor = float(-(-MIN_SIDE // longest))  # whole factors keep pixels square
        if longest * factor > MAX_SIDE:
            factor = MIN_SIDE / longest
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def data_uri(content: bytes) -> str:
    """A picture as a data URI; the kind is read from its first bytes."""
    kinds = {b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif"}
    return f"data:image/{kinds.get(content[:4], 'jpeg')};base64,{base64.b64encode(content).decode()}"
