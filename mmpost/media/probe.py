"""Which decoders work here: each is asked to decode a small file made on the spot, since installed is not working."""

from __future__ import annotations

import functools
import io
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmpost.config.schema import MediaSection
from mmpost.core.errors import MmpostError
from mmpost.media import audio, image, video
from mmpost.media.backends.frames import NAMES

_LEVELS = (40, 120, 200)  # grey of the three frames, one second apart
_SIDE = 32
_LIMIT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line about a decoder.

    Attributes:
        name: The decoder.
        works: It decoded the probe and what came out is right.
        detail: What it decoded, or why it did not.
        fix: What to do; empty if it works.
    """

    name: str
    works: bool
    detail: str
    fix: str = ""


@functools.cache
def proven_backend() -> str | None:
    """The first video back end, in the order of ``frames.NAMES``, that decodes a clip; None if none does."""
    return next((name for name in NAMES if check_video(name).works), None)


def findings() -> list[Finding]:
    """What ``mmpost doctor`` prints about decoders: pictures, sound, every video back end."""
    return [check_image(), check_audio(), check_resampler(), *(check_video(name) for name in NAMES)]


def check_video(name: str) -> Finding:
    """Decode a clip of three grey frames with one back end."""
    section = MediaSection(fps=1.0, max_frames=8, decoder=name, decode_timeout=_LIMIT_SECONDS)
    try:
        seen = video.load(tiny_clip(), section=section)
    except MmpostError as error:
        return Finding(name, False, error.what, error.fix)
    grey = seen.frames.reshape(len(seen.frames), -1).mean(axis=1)
    right = len(grey) == len(_LEVELS) and np.abs(grey - _LEVELS).max() < 12
    if not right or np.abs(seen.times - np.arange(len(_LEVELS))).max() > 1e-3:
        return Finding(name, False, f"decodes other frames than were encoded ({grey.round().tolist()})", "Reinstall it")
    return Finding(name, True, f"{len(grey)} frames of {seen.codec}")


def check_audio() -> Finding:
    """Decode a tenth of a second."""
    try:
        heard = audio.load(tiny_sound(), section=MediaSection(sample_rate=16000, decode_timeout=_LIMIT_SECONDS))
    except MmpostError as error:
        return Finding("sound", False, error.what, error.fix)
    return Finding("sound", True, f"{len(heard.samples)} samples by {heard.backend}")


def check_resampler() -> Finding:
    """Change the rate of the same sound."""
    try:
        heard = audio.load(tiny_sound(), section=MediaSection(sample_rate=8000, decode_timeout=_LIMIT_SECONDS))
    except MmpostError as error:
        return Finding("sound rates", False, error.what, error.fix)
    return Finding("sound rates", len(heard.samples) == 800, f"16000 to 8000 samples per second: {len(heard.samples)}")


def check_image() -> Finding:
    """Decode a JPEG and a WebP."""
    grey = Image.new("RGB", (_SIDE, _SIDE), (90, 90, 90))
    try:
        for name in ("JPEG", "WEBP"):
            buffer = io.BytesIO()
            grey.save(buffer, name)
            image.load(buffer.getvalue())
    except (MmpostError, OSError, KeyError) as error:
        return Finding("images", False, str(error), "pip install --force-reinstall pillow")
    return Finding("images", True, "JPEG and WebP by Pillow")


def tiny_sound() -> bytes:
    """1600 samples of 16 kHz as a Sun audio file: plain WAV would be read without the decoder that is on trial."""
    samples = (8000 * np.sin(np.arange(1600) / 10)).astype(">i2").tobytes()
    return struct.pack(">4s5I", b".snd", 24, len(samples), 3, 16000, 1) + samples


def tiny_clip() -> bytes:
    """A motion-JPEG AVI of three grey frames, written by hand: no encoder has to work before a decoder is tried."""
    frames = []
    for level in _LEVELS:
        buffer = io.BytesIO()
        Image.new("RGB", (_SIDE, _SIDE), (level, level, level)).save(buffer, "JPEG", quality=95)
        frames.append(buffer.getvalue() + b"\0" * (len(buffer.getvalue()) % 2))
    movie = b"".join(_chunk(b"00dc", frame) for frame in frames)
    places, at = [], 4
    for frame in frames:
        places.append(struct.pack("<4sIII", b"00dc", 0x10, at, len(frame)))
        at += 8 + len(frame)
    count = len(frames)
    avih = struct.pack("<14I", 1_000_000, 0, 0, 0x10, count, 0, 1, 0, _SIDE, _SIDE, 0, 0, 0, 0)
    strh = struct.pack("<4s4sIHHIIIIIIiI4H", b"vids", b"MJPG", 0, 0, 0, 0, 1, 1, 0, count, 0, -1, 0, 0, 0, _SIDE, _SIDE)
    strf = struct.pack("<IiiHH4sIiiII", 40, _SIDE, _SIDE, 1, 24, b"MJPG", 3 * _SIDE * _SIDE, 0, 0, 0, 0)
    stream = _list(b"strl", _chunk(b"strh", strh) + _chunk(b"strf", strf))
    header = _list(b"hdrl", _chunk(b"avih", avih) + stream)
    body = b"AVI " + header + _list(b"movi", movie) + _chunk(b"idx1", b"".join(places))
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body


def _list(name: bytes, body: bytes) -> bytes:
    return _chunk(b"LIST", name + body)
