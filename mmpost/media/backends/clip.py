"""A part of a video: times first, then the frames, then the sound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmpost.core.errors import MmpostError
from mmpost.media.backends import animation, frames, sound, timeline
from mmpost.media.backends.pyav_open import open_container
from mmpost.media.backends.sound_rules import Want
from mmpost.media.backends.source import MediaFile


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of a video file.

    Attributes:
        backend: Name in ``frames.NAMES``.
        fps: Frames per second.
        max_frames: Most frames.
        max_pixels: Most pixels of one frame.
        start: First second.
        end: Last second; None for the end.
        sound: How to read the sound track; None leaves it out.
    """

    backend: str
    fps: float
    max_frames: int
    max_pixels: int
    start: float = 0.0
    end: float | None = None
    sound: Want | None = None


@dataclass(slots=True)
class Clip:
    """Everything about decoded frames but their pixels, which are where ``allocate`` put them.

    Attributes:
        facts: Fields of ``mmpost.media.video.Video``.
        notes: Remarks that are no errors, each with its code.
        sound: The sound track.
    """

    facts: dict[str, Any]
    notes: list[str]
    sound: sound.Sound | None


def decode(file: MediaFile, ask: Ask, allocate: frames.Allocate) -> Clip:
    """Decode the frames nearest to a regular grid of seconds.

    Raises:
        MmpostError: As ``timeline.read``, ``VideoBackend.read`` and ``sound.decode``; MMP-D089 for a part that is not
            in the file, MMP-E092 when the back end does not work here.
    """
    if not file.head(1):
        raise file.refused("PyAV", "the file is empty")
    if animation.is_animation(file.head(12)):
        return _decode_animation(file, ask, allocate)
    backend = frames.backend(ask.backend)
    with open_container(file) as container:
        line = timeline.read(file, container)
        times = line.times
        end = float(times[0]) + line.duration
        choice = _choose(file, ask, times, end)
        turned = backend.read(file, container, line, choice.picks, ask.max_pixels, allocate)
    facts = {
        "codec": line.codec,
        "backend": ask.backend,
        "tick": float(line.tick),
        "rotation": turned,
        **_facts(times, end, choice),
    }
    track = None
    if ask.sound is not None:
        if not line.has_sound:
            raise file.error("MMP-D085", "has no sound track", "Leave the sound out of the row")
        track = sound.decode(file, ask.sound)
    return Clip(facts, _notes(file, ask, choice), track)


def _decode_animation(file: MediaFile, ask: Ask, allocate: frames.Allocate) -> Clip:
    if ask.sound is not None:
        raise file.error("MMP-D085", "has no sound track", "Leave the sound out of the row")
    shown = animation.read_times(file)
    choice = _choose(file, ask, shown.times, shown.duration)
    animation.read(file, choice.picks, ask.max_pixels, allocate)
    facts = {"codec": shown.codec, "backend": "pillow", "tick": 0.001, "rotation": 0}
    return Clip(facts | _facts(shown.times, shown.duration, choice), _notes(file, ask, choice), None)


def _choose(file: MediaFile, ask: Ask, times: np.ndarray, end: float) -> timeline.Choice:
    part = (ask.start, ask.end)
    if ask.start < 0 or (ask.end is not None and (ask.end <= ask.start or ask.end > end + 1)):
        raise _outside(file, ask, end)
    choice = timeline.choose(times, end, fps=ask.fps, max_frames=ask.max_frames, part=part)
    if len(choice.picks) == 0:
        raise _outside(file, ask, end)
    return choice


def _outside(file: MediaFile, ask: Ask, end: float) -> MmpostError:
    part = f"{ask.start:g} s to {'the end' if ask.end is None else f'{ask.end:g} s'}"
    return file.error("MMP-D089", f"ends at {end:.2f} s; {part} is not in it", "Correct start and end of the row")


def _facts(times: np.ndarray, end: float, choice: timeline.Choice) -> dict[str, Any]:
    gaps = np.diff(times)
    span = end - float(times[0])
    return {
        "times": [float(each) for each in times[choice.picks]],
        "fps": len(times) / span if span > 0 else 0.0,
        "duration": span,
        "total_frames": len(times),
        "variable": bool(len(gaps) and gaps.max() > 1.5 * gaps.min()),
    }


def _notes(file: MediaFile, ask: Ask, choice: timeline.Choice) -> list[str]:
    got = len(choice.picks)
    if got >= choice.wanted:
        return []
    at = f"{file.origin}: " if file.origin else ""
    return [
        f"{at}video '{file.name}' has {got} readable frames; {choice.wanted} requested at fps {ask.fps:g} [MMP-D010]"
    ]
