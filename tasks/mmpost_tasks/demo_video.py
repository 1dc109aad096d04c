"""When does it happen: short films of moving photographs of clothes, with intervals in seconds as answers.

A film has 8 frames of 56x28 pixels, one a second. Pictures of Fashion-MNIST are its actors. Kinds:

=======  ================================================================  ==========================
kind     what is seen                                                      question
=======  ================================================================  ==========================
alone    a piece, in one interval                                          When do you see the bag?
beside   two pieces side by side, each in an interval of its own           When do you see the bag?
moves    a piece is there all the time and moves in one interval           When does the bag move?
=======  ================================================================  ==========================

Both ends of an interval are borders of frames, whole seconds, and it lasts two to five seconds. The 22 possible
intervals are dealt from shuffled blocks that hold each of them once. Frames in another order keep what is seen and lose
when: an answer can then only be guessed.

Pictures never cross splits, see ``mmpost_tasks.tiles``. ``heldout`` is always the same rows; ``seed`` recomposes
``train`` only. Films are animated PNGs, so that no codec changes a pixel.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from mmpost.config.schema import MediaSection
from mmpost.core.sample import Part, Sample, Turn
from mmpost.core.seeding import generator, uniform
from mmpost.media import video
from mmpost.rewards.temporal import interval_overlaps
from mmpost_tasks import tiles
from mmpost_tasks.demo_vqa import Draws
from mmpost_tasks.task import Task

ROWS = {"train": 6000, "heldout": 600}
FRAMES, FPS = 8, 1
TILE = 28
WIDTH = 2 * TILE
PLACES = (0, WIDTH - TILE)  # where a tile may stand
DRAWS_PER_ROW = 8
SHORTEST, LONGEST = 2, 5  # frames
INTERVALS = tuple(
    (start, start + length) for length in range(SHORTEST, LONGEST + 1) for start in range(FRAMES - length + 1)
)
KINDS = ("alone", "beside", "moves")
SEEN, MOVES = "When do you see the {}?", "When does the {} move?"
ANSWER = "Answer in <answer> tags."


def load(split: str, *, limit: int | None = None, seed: int = 0) -> list[Sample]:
    """Films of one split.

    Args:
        split: ``train`` or ``heldout``.
        limit: Rows from the start; None gives 6,000 or 600. Kinds take turns.
        seed: Composition of ``train``; ignored by ``heldout``.

    Raises:
        MmpostError: MMP-C006 for an unknown split.
    """
    tiles.known(split, tuple(ROWS), "splits of demo_video")
    count = ROWS[split] if limit is None else limit
    return list(_rows(split, count, seed if split == "train" else 0))


def _rows(split: str, count: int, seed: int) -> Iterator[Sample]:
    pictures = tiles.load("clothes", split)
    for row in range(count):
        turn, number = divmod(row, len(KINDS))
        kind = KINDS[number]
        start, end = interval(kind, split, seed, turn)
        draws = Draws(uniform(seed, f"demo_video/{split}", row, np.arange(DRAWS_PER_ROW)))
        labels = draws.some(tiles.CLOTHES, 2 if kind == "beside" else 1)
        chosen = [draws.below(len(pictures[label].ids)) for label in labels]
        actors = [pictures[label].pixels[i] for label, i in zip(labels, chosen, strict=True)]
        film = _moves(actors[0], (start, end), draws) if kind == "moves" else _seen(actors, (start, end), draws)
        columns = {
            "solution": [start // FPS, end // FPS],
            "kind": kind,
            "pictures": [pictures[label].ids[i] for label, i in zip(labels, chosen, strict=True)],
        }
        question = f"{(MOVES if kind == 'moves' else SEEN).format(labels[0])} {ANSWER}"
        said = f"<answer>{start // FPS} to {end // FPS}</answer>"
        turns = (
            Turn("user", (Part("video", ref=animated_png(film, 1000 // FPS)), Part("text", question))),
            Turn("assistant", (Part("text", said),)),
        )
        yield Sample(f"{split}-{seed}-{row + 1}", turns, columns, f"task:demo_video/{split}:{row + 1}")


def interval(kind: str, split: str, seed: int, turn: int) -> tuple[int, int]:
    """First frame and frame after the last of question number ``turn`` of a kind."""
    block, place = divmod(turn, len(INTERVALS))
    return INTERVALS[_block_order(kind, split, seed, block)[place]]


@cache
def _block_order(kind: str, split: str, seed: int, block: int) -> tuple[int, ...]:
    keys = uniform(seed, f"demo_video/{split}/{kind}", block, np.arange(len(INTERVALS)))
    return tuple(np.argsort(keys, kind="stable").tolist())


def _seen(actors: list[np.ndarray], interval: tuple[int, int], draws: Draws) -> np.ndarray:
    """The first actor is there in its interval, a second one beside it in another; uint8 ``[T, H, W]``."""
    other = draws.one([one for one in INTERVALS if one != interval])
    film = np.zeros((FRAMES, TILE, WIDTH), np.uint8)
    places = draws.some(PLACES, 2)
    for actor, (start, end), left in zip(actors, (interval, other), places, strict=False):
        film[start:end, :, left : left + TILE] = actor
    return film


def _moves(actor: np.ndarray, interval: tuple[int, int], draws: Draws) -> np.ndarray:
    """The actor rests, crosses the picture in its interval, and rests again; uint8 ``[T, H, W]``."""
    start, end = interval
    left, right = draws.some(PLACES, 2)
    film = np.zeros((FRAMES, TILE, WIDTH), np.uint8)
    # The frame before the interval shows the place that it leaves; every frame of the interval shows another one.
    steps = np.linspace(left, right, end - start + 1).round().astype(int)[1:]
    for frame in range(FRAMES):
        x = left if frame < start else right if frame >= end else int(steps[frame - start])
        film[frame, :, x : x + TILE] = actor
    return film


def animated_png(frames: np.ndarray, each_ms: int) -> bytes:
    """Frames as an animated PNG, each shown for the same time.

    Args:
        frames: uint8 ``[T, H, W]`` grey or ``[T, H, W, 3]`` RGB.
        each_ms: Milliseconds of a frame.
    """
    count, height, width = frames.shape[:3]
    grey = frames.ndim == 3
    lines = np.zeros((count, height, 1 + width * (1 if grey else 3)), np.uint8)  # a line begins with its filter, 0
    lines[:, :, 1:] = frames.reshape(count, height, -1)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0 if grey else 2, 0, 0, 0)),
        (b"acTL", struct.pack(">II", count, 1)),
    ]
    number = 0
    for at in range(count):
        chunks.append((b"fcTL", struct.pack(">IIIIIHHBB", number, width, height, 0, 0, each_ms, 1000, 0, 0)))
        body = zlib.compress(lines[at].tobytes(), 1)
        number += 1
        if at == 0:
            chunks.append((b"IDAT", body))
        else:
            chunks.append((b"fdAT", struct.pack(">I", number) + body))
            number += 1
    chunks.append((b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def shuffled(sample: Sample, *, seed: int = 0) -> Sample:
    """The row with the frames of its films in a random order, which belongs to ``seed`` and the row, at the same times.

    Args:
        sample: A row whose films have evenly spaced frames.
        seed: Of the order.

    Raises:
        MmpostError: What decoding the film raises.
    """
    random = generator(seed, f"demo_video/shuffled/{sample.id}")

    def moved(part: Part) -> Part:
        if part.kind != "video" or part.ref is None:
            return part
        clip = video.load(part.ref, section=MediaSection(fps=FPS, max_frames=FRAMES), origin=sample.origin)
        return replace(part, ref=animated_png(clip.shuffled(random).frames, 1000 // FPS))

    turns = tuple(replace(turn, parts=tuple(moved(part) for part in turn.parts)) for turn in sample.turns)
    return replace(sample, turns=turns)


def best_guess(rows: Sequence[Sample]) -> float:
    """Largest mean temporal IoU that one answer to all rows reaches: what can be had without looking."""
    asked = [np.array([row.columns["solution"]]) for row in rows]
    guesses = np.array(INTERVALS) / FPS
    return float(np.mean([interval_overlaps(guesses, one)[:, 0] for one in asked], axis=0).max())


TASK = Task(
    name="demo_video",
    version="1",
    description="when something happens in short films of real photographs of clothes; needs no download",
    splits=ROWS,
    load=load,
    rewards=("temporal_iou", "format"),
    group_by="kind",
    licence="MIT (Zalando SE)",
    citation="Xiao, Rasul and Vollgraf 2017, Fashion-MNIST, arXiv:1708.07747",
)
