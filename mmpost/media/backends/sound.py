"""Sound: soundfile first, PyAV for what libsndfile cannot read; one channel, one rate, no silent loss."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmpost.media.backends import promise, sound_pyav
from mmpost.media.backends.sound_rules import MAX_RAW_BYTES, SLACK_SECONDS, Samples, Want, check_shape, too_big, window
from mmpost.media.backends.source import MediaFile, missing

Allocate = Callable[[tuple[int, ...], str], Samples]
_UNKNOWN_FRAMES = 1 << 62  # libsndfile's SF_COUNT_MAX, for streams that state no length
_EBML = b"\x1a\x45\xdf\xa3"
_CANCELLED = 0.1  # a mean this much weaker than its loudest channel means opposite phases


@dataclass(slots=True)
class Sound:
    """A decoded part of a file.

    Attributes:
        samples: float32 ``[n]``, one channel, full scale 1.
        facts: ``rate``, ``source_rate``, ``channels``, ``backend``.
        notes: Remarks that are no errors, each with its code.
    """

    samples: Samples
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def decode(file: MediaFile, want: Want, allocate: Allocate = np.empty) -> Sound:
    """Decode, mix to one channel, resample.

    Args:
        file: What to decode.
        want: Rate, window and limits.
        allocate: Gives memory of a shape and type; where a file is as it is wanted, its samples are read into it.

    Raises:
        MmpostError: MMP-D008 undecodable, MMP-D011 too long, MMP-D080 cut, MMP-D081 too short, MMP-D082 not finite,
            MMP-D083 absurd header, MMP-D085 no sound, MMP-D088 damaged, MMP-D089 window outside, MMP-E090 a library
            is missing.
    """
    channels, rate, backend = _read(file, want, allocate)
    return finish(file, channels, rate, want, backend)


def finish(file: MediaFile, channels: Samples, rate: int, want: Want, backend: str) -> Sound:
    """What is done to samples ``[n, channels]`` once they are read.

    Raises:
        MmpostError: MMP-D081 too short, MMP-D082 not finite, MMP-E090 a library is missing.
    """
    seconds = len(channels) / rate
    if seconds < want.min_seconds:
        raise file.error(
            "MMP-D081", f"lasts {seconds * 1000:.0f} ms; at least {want.min_seconds * 1000:.0f} ms is needed"
        )
    mono, notes = _mix(file, channels)
    facts = {"rate": want.rate, "source_rate": rate, "channels": channels.shape[1], "backend": backend}
    return Sound(resample(mono, rate, want.rate), facts, notes)


def resample(samples: Samples, rate: int, new_rate: int) -> Samples:
    """Change the rate of one channel, band-limited; soxr, or torchaudio where soxr is missing.

    Raises:
        MmpostError: MMP-E090 when neither is installed.
    """
    if rate == new_rate:
        return samples
    try:
        import soxr  # noqa: PLC0415 - optional
    except ImportError:
        return _resample_torchaudio(samples, rate, new_rate)
    return np.asarray(soxr.resample(samples, rate, new_rate, quality="HQ"), dtype=np.float32)


def _resample_torchaudio(samples: Samples, rate: int, new_rate: int) -> Samples:
    """The same with a windowed sinc whose filter is about as long as soxr's."""
    try:
        import torch  # noqa: PLC0415 - slow to import, needed only here
        from torchaudio.functional import resample as sinc  # noqa: PLC0415 - optional
    except ImportError as error:
        raise missing("soxr", "change the rate of sound") from error
    out = sinc(torch.from_numpy(samples), rate, new_rate, lowpass_filter_width=64, rolloff=0.95)
    return np.asarray(out.numpy(), dtype=np.float32)


def _read(file: MediaFile, want: Want, allocate: Allocate) -> tuple[Samples, int, str]:
    """All channels ``[n, channels]`` of the window, their rate, and who read them."""
    if not file.head(1):
        raise file.refused("soundfile", "the file is empty")
    _check_bytes(file)
    if file.head(8)[4:] == b"ftyp" or file.head(4) == _EBML:  # MP4 and Matroska, which libsndfile never reads
        return _read_pyav(file, want, "Format not recognised")
    try:
        import soundfile  # noqa: PLC0415 - a broken libsndfile must not break video
    except (ImportError, OSError):
        return _read_pyav(file, want, "soundfile does not work here")
    descriptor = file.descriptor()
    try:
        try:
            opened = soundfile.SoundFile(descriptor, closefd=False)
        except (soundfile.LibsndfileError, TypeError, ValueError) as error:
            return _read_pyav(file, want, _reason(error))
        with opened:
            return (*_read_soundfile(file, want, opened, soundfile.LibsndfileError, allocate), "soundfile")
    finally:
        os.close(descriptor)


def _check_bytes(file: MediaFile) -> None:
    """Raise MMP-D080 or MMP-D088 where readers keep silent about a file that was cut or damaged."""
    sizes = promise.promised_bytes(file)
    if sizes is not None and sizes[1] < sizes[0]:
        raise file.truncated(f"{sizes[0]} bytes of sound", f"{sizes[1]}")
    fault = promise.ogg_fault(file)
    if fault == "no last page":
        raise file.truncated("a last page", "none")
    if fault is not None:
        raise file.error("MMP-D088", f"has {fault}")


def _check_mp3(file: MediaFile, rate: int, samples: int) -> None:
    promised = promise.mp3_samples(file)
    if promised is not None and samples < promised - SLACK_SECONDS * rate:
        raise file.truncated(f"{promised / rate:.2f} s", f"{samples / rate:.2f} s")


def _read_pyav(file: MediaFile, want: Want, soundfile_says: str) -> tuple[Samples, int, str]:
    samples, rate = sound_pyav.read(file, want, soundfile_says)
    if want.start == 0 and want.end is None:
        _check_mp3(file, rate, len(samples))
    return samples, rate, "pyav"


def _read_soundfile(
    file: MediaFile, want: Want, opened: Any, failure: type[Exception], allocate: Allocate
) -> tuple[Samples, int]:
    rate, channels, frames = int(opened.samplerate), int(opened.channels), int(opened.frames)
    check_shape(file, rate, channels)
    known = frames < _UNKNOWN_FRAMES
    if opened.format == "MP3" and known:
        _check_mp3(file, rate, frames)
    first, last = window(file, want, frames / rate if known else math.inf)
    begin = round(first * rate)
    stop = min(round(last * rate), frames) if known else round(min(last, first + want.max_seconds + 1) * rate)
    if (stop - begin) * channels * 4 > MAX_RAW_BYTES:
        raise too_big(file, (stop - begin) * channels * 4)
    try:
        if begin:
            opened.seek(begin)
        as_wanted = known and channels == 1 and rate == want.rate
        out = allocate((stop - begin, 1), "f4") if as_wanted else None
        samples = opened.read(stop - begin, dtype="float32", always_2d=True, out=out)
    except (failure, RuntimeError) as error:
        raise file.refused("soundfile", _reason(error)) from error
    if known and len(samples) < stop - begin:
        raise file.truncated(f"{frames} samples", f"{begin + len(samples)}")
    if not known and len(samples) > want.max_seconds * rate:
        raise file.too_long(len(samples) / rate, want.max_seconds)
    return samples, rate


def _reason(error: Exception) -> str:
    """libsndfile's words without the name of the file in front."""
    return str(getattr(error, "error_string", "") or error)


def _mix(file: MediaFile, channels: Samples) -> tuple[Samples, list[str]]:
    """Mean of the channels, or the loudest one where they cancel each other."""
    with np.errstate(over="ignore", invalid="ignore"):  # told below
        energy = np.array([channel @ channel for channel in channels.T])
    if not np.isfinite(energy).all():
        bad = int((~np.isfinite(channels)).sum())
        peak = float(np.abs(channels).max())
        raise file.error(
            "MMP-D082", f"holds {bad} samples that are not finite" if bad else f"holds samples of up to {peak:.0e}"
        )
    count = channels.shape[1]
    if count == 1:
        return np.ascontiguousarray(channels[:, 0]), []
    mono = channels @ np.full(count, 1 / count, np.float32)
    loudest = int(energy.argmax())
    if math.sqrt(float(mono @ mono)) >= _CANCELLED * math.sqrt(float(energy[loudest])):
        return mono, []
    note = f"channels cancel each other; channel {loudest + 1} of {count} is used alone [MMP-D090]"
    return np.ascontiguousarray(channels[:, loudest]), [note]
