"""Decode one video reference to frames with the exact times at which they are shown.

What is done to pictures: the turn that a phone recorded is applied, frames above ``video_max_pixels`` are shrunk,
everything becomes 8-bit RGB. Frames are those nearest to a regular grid of seconds by their time stamps, never by
their number, so files with a variable rate keep their true times. Files that hold less than their header promises are
an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmpost.config.schema import MediaSection
from mmpost.core.errors import MmpostError
from mmpost.media import audio as audio_media
from mmpost.media import limits
from mmpost.media.audio import Audio
from mmpost.media.ref import shown


@dataclass(frozen=True, slots=True)
class Video:
    """Decoded frames and what is true about their file.

    Attributes:
        frames: uint8 ``[T, H, W, 3]``, RGB, upright.
        times: float64 ``[T]``, seconds at which the frames are shown, from the start of the file, ascending.
        fps: Mean frames per second of the file, measured.
        duration: Seconds from the first frame of the file to the end of its last.
        total_frames: Frames that the file shows.
        variable: The frames of the file are not evenly spaced.
        tick: Seconds of one unit of the file's time stamps; ``times`` are multiples of it from the first.
        rotation: Degrees clockwise by which the stored frames were turned.
        codec: FFmpeg's name of the codec.
        backend: Who decoded: ``pyav``, ``torchcodec``, ``decord``, or ``pillow`` for animated pictures.
        audio: The sound of the same part, if it was asked for.
        notes: Remarks, each with its code.
    """

    frames: npt.NDArray[np.uint8]
    times: npt.NDArray[np.float64]
    fps: float
    duration: float
    total_frames: int
    variable: bool
    tick: float
    rotation: int
    codec: str
    backend: str
    audio: Audio | None = None
    notes: tuple[str, ...] = ()

    @property
    def sampled_fps(self) -> float:
        """Frames per second of ``times``; the file's own rate if there is one frame."""
        span = float(self.times[-1] - self.times[0])
        return (len(self.times) - 1) / span if span > 0 else self.fps

    def shuffled(self, random: np.random.Generator) -> Video:
        """The same frames in a random order at the same times."""
        return replace(self, frames=self.frames[random.permutation(len(self.frames))])

    def padded(self, multiple: int) -> Video:
        """The same with its last frame and time repeated until their number is a multiple, for paired frames."""
        missing = -len(self.times) % multiple
        if missing == 0:
            return self
        frames = np.concatenate([self.frames, np.repeat(self.frames[-1:], missing, axis=0)])
        return replace(self, frames=frames, times=np.append(self.times, [self.times[-1]] * missing))


def load(
    ref: str | bytes,
    *,
    section: MediaSection | None = None,
    origin: str = "",
    roots: Sequence[Path] = (),
    start: float = 0.0,
    end: float | None = None,
    with_audio: bool = False,
) -> Video:
    """Decode frames of a video under a time limit.

    Args:
        ref: Path, ``file://`` address, data URI, base64 text, or the bytes of an encoded file.
        section: ``fps``, ``max_frames``, ``video_max_pixels``, ``decoder``, ``decode_timeout``, and the options of
            sound; None takes the defaults.
        origin: ``file:row`` for messages; empty when unknown.
        roots: Folders for relative paths, asked in order; empty means the working directory.
        start: First second of the part that is wanted.
        end: Last second of that part; None for the end of the file.
        with_audio: Decode the sound track too.

    Raises:
        MmpostError: As ``audio.load``, and MMP-D085 no pictures, MMP-D086 no time stamps, MMP-D087 the back end
            contradicts the time stamps, MMP-E091 no back end works, MMP-E092 the chosen one does not.
    """
    section = section or MediaSection()
    path, blob = audio_media.resolve(ref, "video", origin, roots)
    backend = chosen_backend(section.decoder)
    sound = audio_media.wanted(section, start, end, 0.0) if with_audio else None
    job = {
        "op": "video",
        "path": path,
        "name": shown(ref),
        "origin": origin,
        "ask": {
            "backend": backend,
            "fps": section.fps,
            "max_frames": section.max_frames,
            "max_pixels": section.video_max_pixels,
            "start": start,
            "end": end,
            "sound": sound,
        },
    }
    seen = limits.run(job, ref=ref, blob=blob, limit_s=section.decode_timeout, backend=backend)
    facts = dict(seen.said["video"])
    times = np.array(facts.pop("times"), dtype=np.float64)
    track = audio_media.built(seen.said["sound"], seen.arrays[1], ()) if with_audio else None
    return Video(seen.arrays[0], times, audio=track, notes=tuple(seen.said["notes"]), **facts)


def chosen_backend(decoder: str) -> str:
    """``decoder`` itself, or for ``auto`` the first back end that has decoded a clip in this process.

    Raises:
        MmpostError: MMP-E091 when none does.
    """
    if decoder != "auto":
        return decoder
    from mmpost.media import probe  # noqa: PLC0415 - probe decodes through this module

    name = probe.proven_backend()
    if name is None:
        raise MmpostError("MMP-E091", "no video back end works here.", "pip install av, then run: mmpost doctor")
    return name
