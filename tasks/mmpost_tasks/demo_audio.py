"""Questions about real sounds, half of which can be answered without listening.

A clip lasts one second: one recording of drums, a synthesiser bass or a robot's noises (``data/README-sounds.md``), at
a random place and loudness, in a little noise. Four of the six classes are offered, in random order, and the answer is
the words of one. Kinds:

========  ============================================================  ==========================
kind      question                                                      answered by
========  ============================================================  ==========================
listen    What do you hear? Options: tabla, kick, robot, snare.         listening; chance is 25 %
hint      It is played with the foot. What do you hear? Options: ...    knowing what is said there
========  ============================================================  ==========================

The kind is the planted truth of what ``mmpost data contribution`` is to find: ``hint`` rows are weak, ``listen`` rows
strong. Nothing in a ``listen`` row but its sound speaks for its answer: classes are dealt from shuffled blocks, so
that every prefix of a split is balanced, and the other three options and all orders are drawn evenly.

``blind`` rows are ``train`` rows without sound. A model from random weights learns from them what a language model
knows before it is given ears: to answer from the text where that is possible, and to guess evenly where it is not.

Splits: ``train``, ``blind`` and ``pool`` use the train recordings (other draws each), ``heldout`` the others. ``pool``
is what is filtered. ``seed`` recomposes all splits but ``heldout``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files

import numpy as np

from mmpost.config.schema import MediaSection
from mmpost.core.sample import Part, Sample, Turn
from mmpost.core.seeding import uniform
from mmpost.media import audio, wav
from mmpost_tasks.demo_vqa import Draws
from mmpost_tasks.task import Task
from mmpost_tasks.tiles import known

ROWS = {"train": 2400, "blind": 1200, "pool": 960, "heldout": 480}
CLASSES = ("kick", "snare", "cymbal", "tabla", "bass", "robot")
KINDS = ("listen", "hint")
OPTIONS = 4
SECONDS = 1.0
QUESTIONS = ("What do you hear?", "Which sound is this?", "Name the sound.")
# What a person knows; one fact fits one class alone.
HINTS = {
    "kick": ("It is played with the foot.", "It is the largest drum of the kit."),
    "snare": ("Wires rattle below its skin.", "It leads a march."),
    "cymbal": ("It is a round plate of bronze.", "It has no skin and hangs on a stand."),
    "tabla": ("It comes from India.", "Two hands and fingers play the pair."),
    "bass": ("It has strings or plays the lowest line.", "It gives the harmony its ground."),
    "robot": ("It is a machine that talks.", "It is made of metal and moves on motors."),
}
_DRAWS = 16
_NOISE = 1e-3  # of full scale; the recordings peak at 0.1 to 0.5
_LATEST = 0.25  # seconds before a recording begins, at most


@dataclass(frozen=True, slots=True)
class Recording:
    """One recorded sound.

    Attributes:
        name: Its name in Sonic Pi.
        samples: float32 ``[n]`` at ``rate``, peak 0.9.
        rate: Samples per second.
    """

    name: str
    samples: np.ndarray
    rate: int


@cache
def recordings(split: str) -> dict[str, tuple[Recording, ...]]:
    """Recordings by class.

    Args:
        split: ``train`` or ``heldout``.

    Raises:
        MmpostError: MMP-E090 when no library decodes FLAC (extra ``media``).
    """
    data = files("mmpost_tasks") / "data"
    notes = json.loads((data / "sounds.json").read_text(encoding="utf-8"))
    section = MediaSection(sample_rate=notes["rate"], max_audio_seconds=60.0)
    found = {}
    for sheet in notes["sheets"]:
        with as_file(data / sheet["file"]) as path:
            sound = audio.load(str(path), section=section)
        found[sheet["label"]] = tuple(
            Recording(one["name"], sound.samples[one["start"] : one["start"] + one["samples"]], sound.rate)
            for one in sheet["recordings"]
            if one["split"] == split
        )
    return found


def load(split: str, *, limit: int | None = None, seed: int = 0) -> list[Sample]:
    """Questions of one split; see ``Load`` for the arguments. Both kinds take turns.

    Raises:
        MmpostError: MMP-C006 for an unknown split, MMP-E090 when no library decodes FLAC.
    """
    known(split, tuple(ROWS), "splits of demo_audio")
    count = ROWS[split] if limit is None else limit
    return list(_rows(split, count, 0 if split == "heldout" else seed))


def _rows(split: str, count: int, seed: int) -> Iterator[Sample]:
    sounds = recordings("heldout" if split == "heldout" else "train")
    for row in range(count):
        turn, number = divmod(row, len(KINDS))
        kind = KINDS[number]
        draws = Draws(uniform(seed, f"demo_audio/{split}", row, np.arange(_DRAWS)))
        label = _label(kind, split, seed, turn)
        choices = draws.some([other for other in CLASSES if other != label], OPTIONS - 1)
        choices.insert(draws.below(OPTIONS), label)
        sound = draws.one(sounds[label])
        text = f"{draws.one(QUESTIONS)} Options: {', '.join(choices)}. Answer in <answer> tags."
        if kind == "hint":
            text = f"{draws.one(HINTS[label])} {text}"
        clip = _clip(sound, draws, uniform(seed, f"demo_audio/{split}/noise", row, np.arange(_length(sound.rate))))
        columns = {"solution": label, "kind": kind, "options": choices, "sound": sound.name}
        heard = () if split == "blind" else (Part("audio", ref=wav.encode(clip, sound.rate)),)
        answer = Turn("assistant", (Part("text", f"<answer>{label}</answer>"),))
        turns = (Turn("user", (*heard, Part("text", text))), answer)
        yield Sample(f"{split}-{seed}-{row + 1}", turns, columns, f"task:demo_audio/{split}:{row + 1}")


def _label(kind: str, split: str, seed: int, turn: int) -> str:
    """Class of question number ``turn`` of a kind: blocks of all classes, each shuffled by itself."""
    block, place = divmod(turn, len(CLASSES))
    keys = uniform(seed, f"demo_audio/{split}/{kind}", block, np.arange(len(CLASSES)))
    return CLASSES[int(np.argsort(keys, kind="stable")[place])]


def _length(rate: int) -> int:
    return round(SECONDS * rate)


def _clip(sound: Recording, draws: Draws, noise: np.ndarray) -> np.ndarray:
    """A recording at a random place and loudness in a little noise, float64 ``[length]``."""
    start = draws.below(int(_LATEST * sound.rate) + 1)
    peak = 0.1 * 5.0 ** (draws.below(1001) / 1000.0)
    clip = (noise - 0.5) * (2.0 * _NOISE)
    kept = sound.samples[: len(clip) - start]
    clip[start : start + len(kept)] += kept * (peak / float(np.abs(sound.samples).max()))
    return clip


TASK = Task(
    name="demo_audio",
    version="1",
    description="questions about real sounds, half of them answered by the text alone; needs no download",
    splits=ROWS,
    load=load,
    rewards=("answer", "format"),
    group_by="kind",
    licence="CC0-1.0 (recordings of freesound.org that come with Sonic Pi)",
    citation="Aaron, Sonic Pi 3.2.2, samples; question kinds after AudioMCQ, arXiv:2509.21060",
)
