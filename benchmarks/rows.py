"""The rows that all trainers get: pictures as PNG files, questions, answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmpost.data.sampler import Sampler

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 70, 220),
    "yellow": (230, 210, 50),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
QUESTION = "What colour is the square?"
GRAIN = 7  # side of the grey tiles behind the square; single-pixel noise would make the PNG files huge


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One picture with a question.

    Attributes:
        image: PNG file.
        edge: Side of the square picture in pixels.
        question: What the user says.
        answer: What the assistant says; only supervised training uses it.
    """

    image: str
    edge: int
    question: str
    answer: str


def write(
    folder: Path, edges: Sequence[int], *, words: Sequence[tuple[int, int]] = (), seed: int = 0
) -> list[BenchRow]:
    """Draw one picture per edge.

    Args:
        folder: Where the PNG files go; made if missing.
        edges: Side of each picture in pixels.
        words: Words that each question and each answer is made longer by; empty for none.
        seed: Of colours and backgrounds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for index, edge in enumerate(edges):
        name = list(COLOURS)[int(rng.integers(len(COLOURS)))]
        tiles = -(-edge // GRAIN)
        picture = rng.integers(90, 160, size=(tiles, tiles, 3), dtype=np.uint8)
        picture = picture.repeat(GRAIN, 0).repeat(GRAIN, 1)[:edge, :edge]
        quarter = edge // 4
        picture[quarter : 3 * quarter, quarter : 3 * quarter] = COLOURS[name]
        file = folder / f"{index:05d}.png"
        Image.fromarray(picture).save(file)
        before, after = words[index] if words else (0, 0)
        question = " ".join([QUESTION, *_words(rng, before)])
        rows.append(BenchRow(str(file), edge, question, " ".join([f"It is {name}.", *_words(rng, after)])))
    return rows


def _words(rng: np.random.Generator, count: int) -> list[str]:
    names = list(COLOURS)
    return [names[int(i)] for i in rng.integers(len(names), size=count)]


def in_drawing_order(rows: Sequence[BenchRow], seed: int) -> list[BenchRow]:
    """Rows as mmpost will draw them in its first epoch, so that a trainer that does not shuffle sees the same steps."""
    return [rows[draw.row] for draw in Sampler([len(rows)], [1.0], seed=seed).draw(len(rows))]


def for_mmpost(rows: Sequence[BenchRow], *, answers: bool) -> list[dict[str, Any]]:
    """Rows as ``mmpost.load_data`` reads them."""
    out = []
    for row in rows:
        messages = [{"role": "user", "content": f"<image>{row.question}"}]
        if answers:
            messages.append({"role": "assistant", "content": row.answer})
        out.append({"messages": messages, "images": [row.image]})
    return out


def for_trl(rows: Sequence[BenchRow], *, answers: bool) -> Any:
    """Rows as a ``datasets.Dataset`` whose pictures are decoded when a row is fetched, as ours are."""
    from datasets import Dataset, Features, Image, List

    columns: dict[str, list[Any]] = {"prompt": [[{"role": "user", "content": row.question}] for row in rows]}
    if answers:
        columns["completion"] = [[{"role": "assistant", "content": row.answer}] for row in rows]
    inferred = Dataset.from_dict(columns).features
    return Dataset.from_dict(
        {**columns, "images": [[row.image] for row in rows]}, features=Features({**inferred, "images": List(Image())})
    )
