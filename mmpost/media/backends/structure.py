"""Walks over the blocks of GIF and Matroska files, whose readers jump over damage without a word.

Neither format has checksums, but blocks must follow each other without a gap; where they do not, frames are lost.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmpost.media.backends.source import Data, MediaFile

_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
# Void and CRC-32 may stand anywhere.
_ANYWHERE = {0xEC, 0xBF}
_TOP = {0x114D9B74, 0x1549A966, 0x1654AE6B, _CLUSTER, 0x1C53BB6B, 0x1043A770, 0x1254C367, 0x1941A469} | _ANYWHERE
# Timestamp, SimpleBlock, BlockGroup, PrevSize, Position, SilentTracks, EncryptedBlock.
_IN_CLUSTER = {0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0x5854, 0xAF} | _ANYWHERE


def matroska_fault(file: MediaFile) -> str | None:
    """Where the elements of a Matroska or WebM file stop to follow each other, or None."""
    if file.head(4) != b"\x1a\x45\xdf\xa3":
        return None
    with file.mapped() as data:
        for name, begin, end in _elements(data, 0, len(data)):
            if name is None:
                return f"no element at byte {begin}"
            if name == _SEGMENT:
                return _segment_fault(data, begin, min(end, len(data)))
            if name not in _ANYWHERE | {_EBML}:
                return f"an element that does not belong at byte {begin}"
    return "no segment"


def _segment_fault(data: Data, begin: int, end: int) -> str | None:
    for name, inside, stop in _elements(data, begin, end):
        # A cluster of unknown length, as live recordings have, is followed by its children as if they were ours.
        if name is None or name not in _TOP | _IN_CLUSTER:
            return f"no element at byte {inside}"
        if stop > end:
            return f"an element that ends {stop - end} bytes behind the end"
        if name != _CLUSTER or stop < 0:
            continue
        for child, place, last in _elements(data, inside, stop):
            if child is None or child not in _IN_CLUSTER or last > stop:
                return f"no block at byte {place}"
    return None


def _elements(data: Data, at: int, end: int) -> Iterator[tuple[int | None, int, int]]:
    """Every element between two places: its name, where its content begins, and where it ends (-1: unknown).

    The last one is (None, place, place) if no element can begin there.
    """
    while at < end:
        name_size = _width(data[at])
        if name_size > 4 or at + name_size >= end:
            yield None, at, at
            return
        name = int.from_bytes(data[at : at + name_size], "big")
        place = at + name_size
        size_size = _width(data[place])
        if size_size > 8 or place + size_size > end:
            yield None, at, at
            return
        size = int.from_bytes(data[place : place + size_size], "big") & ((1 << 7 * size_size) - 1)
        begin = place + size_size
        if size == (1 << 7 * size_size) - 1:
            yield name, begin, end if name == _SEGMENT else -1
            at = begin
        else:
            yield name, begin, begin + size
            at = begin + size


def _width(first: int) -> int:
    """Bytes of a number of variable length, from its first byte; 9 if that is 0."""
    return 9 - first.bit_length()


def gif_fault(file: MediaFile) -> str | None:
    """Where the blocks of a GIF stop to follow each other, or None."""
    if file.head(3) != b"GIF":
        return None
    with file.mapped() as data:
        if len(data) < 13:
            return "no header"
        at = 13 + _palette(data[10])
        while at < len(data):
            kind = data[at]
            if kind == 0x3B:
                return None
            if kind == 0x21:
                at += 2
            elif kind == 0x2C and at + 9 < len(data):
                at += 11 + _palette(data[at + 9])
            else:
                return f"no block at byte {at}"
            while at < len(data) and data[at]:
                at += 1 + data[at]
            at += 1
    return "no end mark"


def _palette(flags: int) -> int:
    """Bytes of the colour table that a byte of flags announces."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0
