"""Decode one audio reference to one channel of float samples.

What is done to sound: the channels are averaged (the loudest one alone where they cancel each other), the rate is
changed band-limited, nothing is made louder or cut. A file that holds less than its header promises is an error, and
so are clips that are longer than ``max_audio_seconds`` or too short to give an encoder a single token.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmpost.config.schema import MediaSection
from mmpost.media import limits
from mmpost.media.backends import pcm, sound
from mmpost.media.backends.sound_rules import Want
from mmpost.media.backends.source import MediaFile
from mmpost.media.ref import inline_bytes, locate, shown

# Qwen2-Audio gives zero tokens below 50 ms and trains as text without a word (transformers 5.23).
MIN_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Audio:
    """A decoded clip.

    Attributes:
        samples: float32 ``[n]``, one channel, full scale 1; codecs may overshoot it a little.
        rate: Samples per second.
        seconds: ``n / rate``.
        source_rate: Samples per second in the file.
        channels: Channels in the file.
        backend: ``wav`` (read without a decoder), ``soundfile`` or ``pyav``.
        notes: Remarks, each with its code.
    """

    samples: npt.NDArray[np.float32]
    rate: int
    seconds: float
    source_rate: int
    channels: int
    backend: str
    notes: tuple[str, ...] = ()


def load(
    ref: str | bytes,
    *,
    section: MediaSection | None = None,
    origin: str = "",
    roots: Sequence[Path] = (),
    start: float = 0.0,
    end: float | None = None,
    min_seconds: float = MIN_SECONDS,
) -> Audio:
    """Decode a clip, or the sound track of a video, under a time limit; plain WAV is read here, without a decoder.

    Args:
        ref: Path, ``file://`` address, data URI, base64 text, or the bytes of an encoded file.
        section: ``sample_rate``, ``max_audio_seconds`` and ``decode_timeout``; None takes the defaults.
        origin: ``file:row`` for messages; empty when unknown.
        roots: Folders for relative paths, asked in order; empty means the working directory.
        start: First second of the part that is wanted.
        end: Last second of that part; None for the end of the file.
        min_seconds: Shorter parts are refused.

    Raises:
        MmpostError: MMP-D007 no such file, MMP-D008 damaged or no sound, MMP-D009 too slow, MMP-D011 too long,
            MMP-D035 a URL, MMP-D080 cut, MMP-D081 too short, MMP-D082 not finite, MMP-D083 absurd header or too
            much memory, MMP-D084 the decoder crashed, MMP-D085 no sound track, MMP-D088 damaged inside, MMP-D089
            part outside of the file, MMP-E090 a library is missing, MMP-E093 no decode process.
    """
    section = section or MediaSection()
    path, blob = resolve(ref, "audio", origin, roots)
    want = wanted(section, start, end, min_seconds)
    asked = Want(**want)
    plain = pcm.read(path, blob, asked)
    if plain is not None:
        file = MediaFile("audio", shown(ref), origin, path, blob)
        mixed = sound.finish(file, plain, section.sample_rate, asked, "wav")
        return built(mixed.facts, mixed.samples, tuple(mixed.notes))
    job = {"op": "audio", "path": path, "name": shown(ref), "origin": origin, "want": want}
    heard = limits.run(job, ref=ref, blob=blob, limit_s=section.decode_timeout, backend="soundfile")
    return built(heard.said["sound"], heard.arrays[0], tuple(heard.said["notes"]))


def resolve(
    ref: str | bytes, kind: str, origin: str, roots: Sequence[str | Path]
) -> tuple[str, None] | tuple[None, bytes]:
    """A path that exists, or the bytes of the file; the other one is None.

    Raises:
        MmpostError: MMP-D007, MMP-D008 or MMP-D035, as ``ref.open_ref``.
    """
    blob = ref if isinstance(ref, bytes) else inline_bytes(ref, kind=kind, origin=origin)
    if blob is not None:
        return None, blob
    assert isinstance(ref, str)
    return os.path.abspath(locate(ref, kind=kind, origin=origin, roots=roots)), None


def wanted(section: MediaSection, start: float, end: float | None, min_seconds: float) -> dict[str, Any]:
    """The fields of ``sound_rules.Want``."""
    return {
        "rate": section.sample_rate,
        "max_seconds": section.max_audio_seconds,
        "min_seconds": min_seconds,
        "start": start,
        "end": end,
    }


def built(facts: dict[str, Any], samples: npt.NDArray[Any], notes: tuple[str, ...]) -> Audio:
    """An ``Audio`` from what the decode process said."""
    return Audio(samples, seconds=len(samples) / facts["rate"], notes=notes, **facts)
