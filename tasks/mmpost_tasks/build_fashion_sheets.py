"""Write the sprite sheets of ``data/`` from the four official Fashion-MNIST files, to check or redo them.

    python -m mmpost_tasks.build_fashion_sheets FOLDER_WITH_IDX_GZ_FILES OUTPUT_FOLDER

Selection rule, per class: sort the pictures of the official training file by the SHA-256 of their 784 pixel
bytes; the first 180 are ``train``, the next 80 ``unlabelled``. The first 60 of the official test file, in the
same order, are ``heldout``. A picture whose bytes occurred before in the class is skipped; in the official files
no two pictures are equal.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mmpost_tasks.tiles import CLOTHES

# Split, official file it is taken from, and pictures per class; also the order of rows in a sheet.
PLAN = (("train", "train", 180), ("unlabelled", "train", 80), ("heldout", "t10k", 60))
SIDE = 28
COLUMNS = 20


def read_idx(folder: Path, stem: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 ``[N, 28, 28]`` and class numbers uint8 ``[N]`` of one official file pair."""
    images = gzip.decompress((folder / f"{stem}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
    return (
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, SIDE, SIDE),
        np.frombuffer(labels, np.uint8, offset=8),
    )


def select(files: dict[str, tuple[np.ndarray, np.ndarray]], class_number: int) -> dict[str, list[int]]:
    """Positions in the official files, by split, after the rule above."""
    seen: set[str] = set()
    queues: dict[str, list[int]] = {}
    for stem, (images, labels) in files.items():
        digests = {
            int(i): hashlib.sha256(images[i].tobytes()).hexdigest() for i in np.flatnonzero(labels == class_number)
        }
        queues[stem] = []
        for position in sorted(digests, key=lambda i: (digests[i], i)):
            if digests[position] not in seen:
                seen.add(digests[position])
                queues[stem].append(position)
    chosen: dict[str, list[int]] = {}
    for split, stem, count in PLAN:
        chosen[split], queues[stem] = queues[stem][:count], queues[stem][count:]
    return chosen


def sheet_of(pictures: np.ndarray) -> np.ndarray:
    """Pictures ``[N, 28, 28]`` as a sheet ``[N / 20 * 28, 560]``, row by row."""
    rows = pictures.reshape(-1, COLUMNS, SIDE, SIDE)
    return rows.transpose(0, 2, 1, 3).reshape(-1, COLUMNS * SIDE)


def build(source: Path, target: Path) -> None:
    """Write ten sheets and ``fashion.json`` into ``target``."""
    files = {stem: read_idx(source, stem) for stem in ("train", "t10k")}
    official = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(source.glob("*-ubyte.gz"))}
    sheets = []
    for class_number, label in enumerate(CLOTHES):
        chosen = select(files, class_number)
        pictures = np.concatenate([files[stem][0][chosen[split]] for split, stem, _ in PLAN])
        path = target / f"fashion_{class_number}.png"
        Image.fromarray(sheet_of(pictures)).save(path, optimize=True)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        sheets.append({"file": path.name, "label": label, "sha256": digest, "official_positions": chosen})
    counts = {split: count for split, _, count in PLAN}
    notes = {
        "side_px": SIDE,
        "columns": COLUMNS,
        "per_class": counts,
        "official_sha256": official,
        "sheets": sheets,
    }
    lines = json.dumps(notes, indent=1)
    (target / "fashion.json").write_text(_lists_on_one_line(lines) + "\n", encoding="utf-8")


def _lists_on_one_line(text: str) -> str:
    """Join lists of numbers, which json spreads over a line each."""
    joined: list[str] = []
    for line in text.splitlines():
        bare = line.strip()
        if bare.rstrip(",").isdigit() or (bare.startswith("]") and joined[-1].rstrip()[-1].isdigit()):
            joined[-1] += bare
        else:
            joined.append(line)
    return "\n".join(joined)


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
