"""Scenes of one or two sounds: what a caption says, what is heard, and which captions are true of which scene.

Two sounds follow each other ("a before b", which is also "b after a") or are heard at once ("a while b", which is also
"b while a"). Captions that are true of a scene are never its negatives, whoever else in the batch they belong to.

Source: TeminAL, arXiv 2408.09269. Differs: how sounds are joined is our own choice; see ``heard``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Relation = Literal["alone", "before", "after", "while"]
Waveform = npt.NDArray[np.float32]
RELATIONS: tuple[Relation, ...] = ("before", "after", "while")
_PEAK = 0.9


@dataclass(frozen=True, slots=True)
class Scene:
    """What is heard, in the words of its caption.

    Attributes:
        first: Class that the caption names first.
        relation: ``alone`` has no second class.
        second: Class that it names second; empty for ``alone``.
    """

    first: str
    relation: Relation = "alone"
    second: str = ""

    @property
    def caption(self) -> str:
        """``rain``, ``rain before bell``, ``bell after rain``, ``rain while bell``."""
        return self.first if self.relation == "alone" else f"{self.first} {self.relation} {self.second}"

    @property
    def meaning(self) -> tuple[object, ...]:
        """Equal for captions that are true of the same sound."""
        if self.relation == "alone":
            return ("alone", self.first)
        if self.relation == "while":
            return ("while", frozenset((self.first, self.second)))
        pair = (self.first, self.second) if self.relation == "before" else (self.second, self.first)
        return ("order", *pair)

    @property
    def order(self) -> tuple[str, ...]:
        """Classes as they are heard; both at once for ``while``."""
        names = (self.first,) if self.relation == "alone" else (self.first, self.second)
        return names[::-1] if self.relation == "after" else names

    def reversed(self) -> Scene:
        """The sounds in the other order; a scene without order is its own reverse."""
        if self.relation in ("alone", "while"):
            return self
        return Scene(self.second, self.relation, self.first)


def matches(scenes: Sequence[Scene], captions: Sequence[Scene]) -> npt.NDArray[np.bool_]:
    """Which captions are true of which scenes, bool ``[scenes, captions]``."""
    return np.array([[scene.meaning == caption.meaning for caption in captions] for scene in scenes])


def heard(scene: Scene, sounds: Mapping[str, Waveform]) -> Waveform:
    """The waveform of a scene.

    Sounds get equal loudness (root mean square) before they are joined, or loudness would tell which is which; sounds
    heard at once are cut to the shorter one and scaled to a peak of 0.9, or clipping would tell that they are two.

    Args:
        scene: Which sounds and how they are joined.
        sounds: Class to a waveform, float32 ``[n]`` at one rate.
    """
    pieces = [_even(sounds[name]) for name in scene.order]
    if scene.relation == "while":
        length = min(len(piece) for piece in pieces)
        joined = np.sum([piece[:length] for piece in pieces], axis=0)
    else:
        joined = np.concatenate(pieces)
    peak = float(np.abs(joined).max(initial=0.0))
    return (joined * (_PEAK / peak) if peak > 0 else joined).astype(np.float32)


def _even(sound: Waveform) -> Waveform:
    loudness = float(np.sqrt(np.mean(np.square(sound, dtype=np.float64))))
    return sound / loudness if loudness > 0 else sound


def draw(
    names: Sequence[str], count: int, stage: Literal["A", "B"], *, random: np.random.Generator, alone: float = 0.5
) -> list[Scene]:
    """Scenes of a batch.

    Args:
        names: Classes.
        count: Scenes.
        stage: ``A`` mixes single sounds with pairs, ``B`` has pairs only.
        random: Draws.
        alone: Share of single sounds in stage A, in [0, 1]. Differs: the paper's share is not published.
    """
    scenes = []
    for _ in range(count):
        first, second = (names[i] for i in random.choice(len(names), 2, replace=False))
        if stage == "A" and random.random() < alone:
            scenes.append(Scene(first))
        else:
            scenes.append(Scene(first, RELATIONS[int(random.integers(len(RELATIONS)))], second))
    return scenes
