"""How many samples the header of a sound file promises.

libsndfile corrects the length in its header to what is there, so a file that was cut looks whole through it. Read
here are the headers of the formats that state a length; None means that the format or this file states none.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from mmpost.media.backends.source import HEAD_BYTES, MediaFile

UNKNOWN_32 = (0, 0xFFFFFFFF, 0x7FFFFFFF)  # what encoders write that could not go back to the header
_MIRROR = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_MP3_DELAY = 529  # samples that every decoder of layer III adds in front


def promised_bytes(file: MediaFile) -> tuple[int, int] | None:
    """Bytes of sound that a WAV, RF64, AIFF or AU header promises, and bytes that are there."""
    head = file.head(HEAD_BYTES)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":
        return _chunk(file, head, "<" if head[:4] != b"RIFX" else ">", b"data")
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _chunk(file, head, ">", b"SSND")
    if head[:4] == b".snd" and len(head) >= 12:
        offset, size = struct.unpack(">II", head[4:12])
        return None if size in UNKNOWN_32 else (size, max(0, file.size() - offset))
    return None


def _chunk(file: MediaFile, head: bytes, order: str, wanted: bytes) -> tuple[int, int] | None:
    """Promised and present size of one chunk of an IFF file."""
    big = None
    for name, at, size in chunks(head, order):
        if name == b"ds64" and at + 16 <= len(head):
            big = struct.unpack("<Q", head[at + 8 : at + 16])[0]
        if name == wanted:
            stated = big if size == 0xFFFFFFFF and big is not None else size
            streamed = stated in UNKNOWN_32 and (stated != 0 or file.size() > at)
            return None if streamed else (stated, max(0, file.size() - at))
    return None


def chunks(head: bytes, order: str) -> Iterator[tuple[bytes, int, int]]:
    """Name, first byte of the content and stated size of the chunks of an IFF file whose header begins in ``head``."""
    at = 12
    while at + 8 <= len(head):
        name, size = head[at : at + 4], struct.unpack(order + "I", head[at + 4 : at + 8])[0]
        yield name, at + 8, size
        at += 8 + size + size % 2


def mp3_samples(file: MediaFile) -> int | None:
    """Samples per channel that the Xing or Info header of an MP3 promises, encoder delay and padding taken off."""
    head = file.head(10)
    at = 0
    if head[:3] == b"ID3" and len(head) == 10:
        at = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    frame = file.read()[at : at + 4096] if at + 4096 > HEAD_BYTES else file.head(at + 4096)[at:]
    if len(frame) < 200 or frame[0] != 0xFF or frame[1] & 0xE0 != 0xE0 or (frame[1] >> 1) & 3 != 1:
        return None
    first_version, mono = (frame[1] >> 3) & 3 == 3, frame[3] >> 6 == 3
    side = (17 if mono else 32) if first_version else (9 if mono else 17)
    tag = frame[4 + side :]
    if tag[:4] not in (b"Xing", b"Info") or not tag[7] & 1:
        return None
    frames = struct.unpack(">I", tag[8:12])[0]
    samples = frames * (1152 if first_version else 576)
    fields = tag[12 + 4 * bool(tag[7] & 2) + 100 * bool(tag[7] & 4) + 4 * bool(tag[7] & 8) :]
    if fields[:4].isalpha() and len(fields) >= 24:  # the encoder's name: LAME, Lavf, Lavc
        delay, padding = fields[21] << 4 | fields[22] >> 4, (fields[22] & 15) << 8 | fields[23]
        samples -= delay + padding
    return max(0, samples - _MP3_DELAY)


def ogg_fault(file: MediaFile) -> str | None:
    """What is wrong with the pages of an Ogg file, or None; libogg leaves damaged pages out without a word."""
    if file.head(4) != b"OggS":
        return None
    data = file.read()
    at, last, numbers = 0, 0, dict[int, int]()
    while at < len(data):
        if data[at : at + 4] != b"OggS" or at + 27 > len(data):
            return f"no page where one should begin, at byte {at}"
        flags, _, serial, number, checksum, segments = struct.unpack("<BqIIIB", data[at + 5 : at + 27])
        end = at + 27 + segments + sum(data[at + 27 : at + 27 + segments])
        if end > len(data):
            return f"a page of {end - at} bytes with {len(data) - at}"
        page = data[at : at + 22] + bytes(4) + data[at + 26 : end]
        if _ogg_checksum(page) != checksum:
            return f"a damaged page at byte {at}"
        if number != numbers.get(serial, -1) + 1:
            return f"a gap before page {number}"
        numbers[serial], at, last = number, end, flags
    return None if last & 4 else "no last page"


def _ogg_checksum(page: bytes) -> int:
    """The CRC of Ogg: the common polynomial, highest bit first, so that zlib computes it on mirrored bits."""
    mirrored = zlib.crc32(page.translate(_MIRROR), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
