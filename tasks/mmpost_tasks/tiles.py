"""Real labelled pictures that need no download, each in exactly one split for good.

Two domains: ``digits``, scikit-learn's 1,797 handwritten digits (8x8), and ``clothes``, 3,200 photographs of
Fashion-MNIST (28x28) that ship in ``data/``. Both are grey, light on dark.

The splits are frozen because other results build on them; changing a rule below is a new data set, not a fix.

* clothes: the split is part of the selection, see ``build_fashion_sheets``; held-out pictures come from the
  official test file.
* digits: the first 32 bits of the SHA-256 of the 64 pixel bytes, modulo 100: below 55 ``train``, below 75
  ``unlabelled``, else ``heldout``. Equal pictures can therefore never part. The rule is spelled out here instead
  of using a general splitter, so that nothing else can move a picture.

Left out: who wrote a digit is not recorded in scikit-learn's copy, so the same hand occurs in several splits.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from mmpost.core.errors import MmpostError

SPLITS = ("train", "unlabelled", "heldout")
DIGITS = tuple("0123456789")
# In the order of the official class numbers.
CLOTHES = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
LABELS = {"digits": DIGITS, "clothes": CLOTHES}


@dataclass(frozen=True, slots=True)
class Tiles:
    """Pictures of one domain, split and label.

    Attributes:
        pixels: uint8 ``[N, side, side]``, 0 dark to 255 light.
        ids: Where each picture comes from, for example ``fashion-mnist/train/41862``.
    """

    pixels: np.ndarray
    ids: tuple[str, ...]


def load(domain: str, split: str) -> dict[str, Tiles]:
    """Pictures of a domain and split by label, in their own size (8 px digits, 28 px clothes).

    Raises:
        MmpostError: MMP-C006 for an unknown domain or split.
    """
    known(domain, tuple(LABELS), "picture domains")
    known(split, SPLITS, "splits")
    return (_digits if domain == "digits" else _clothes)()[split]


@cache
def scaled(domain: str, split: str, side_px: int) -> dict[str, Tiles]:
    """The same at ``side_px`` pixels a side; digits and clothes are resized with a bicubic filter."""
    return {label: Tiles(_resized(tiles.pixels, side_px), tiles.ids) for label, tiles in load(domain, split).items()}


def known(name: str, names: tuple[str, ...], kind: str) -> None:
    """Refuse a name that is not among ``names``.

    Raises:
        MmpostError: MMP-C006.
    """
    if name not in names:
        raise MmpostError("MMP-C006", f"unknown name '{name}' among {kind}.", f"Known: {', '.join(names)}")


def _resized(pixels: np.ndarray, side_px: int) -> np.ndarray:
    if pixels.shape[1] == side_px:
        return pixels
    size = (side_px, side_px)
    return np.stack([np.asarray(Image.fromarray(tile).resize(size, Image.Resampling.BICUBIC)) for tile in pixels])


def _digit_split(pixels: np.ndarray) -> str:
    share = int(hashlib.sha256(pixels.tobytes()).hexdigest()[:8], 16) % 100
    return "train" if share < 55 else "unlabelled" if share < 75 else "heldout"


def _digit_table() -> np.ndarray:
    """Pixels and label of each digit, uint8 ``[1797, 65]``; ``load_digits`` would import scikit-learn, for seconds."""
    found = find_spec("sklearn")
    assert found is not None, "scikit-learn is a requirement"
    file = Path((found.submodule_search_locations or [""])[0], "datasets", "data", "digits.csv.gz")
    return np.loadtxt(file, delimiter=",").astype(np.uint8)


@cache
def _digits() -> dict[str, dict[str, Tiles]]:
    table = _digit_table()
    counts = table[:, :64].reshape(-1, 8, 8)  # 0..16 ink pixels of a 4x4 block of the scan
    pixels = np.round(counts * (255 / 16)).astype(np.uint8)
    positions: dict[tuple[str, str], list[int]] = {(split, label): [] for split in SPLITS for label in DIGITS}
    for position, (tile, label) in enumerate(zip(counts, table[:, 64], strict=True)):
        positions[_digit_split(tile), str(label)].append(position)

    def tiles(split: str, label: str) -> Tiles:
        here = positions[split, label]
        return Tiles(pixels[here], tuple(f"sklearn-digits/{position}" for position in here))

    return {split: {label: tiles(split, label) for label in DIGITS} for split in SPLITS}


@cache
def _clothes() -> dict[str, dict[str, Tiles]]:
    folder = files("mmpost_tasks") / "data"
    notes = json.loads((folder / "fashion.json").read_text(encoding="utf-8"))
    side = notes["side_px"]
    table: dict[str, dict[str, Tiles]] = {split: {} for split in SPLITS}
    for sheet in notes["sheets"]:
        with as_file(folder / sheet["file"]) as path, Image.open(path) as image:
            grid = np.asarray(image)
        rows, columns = grid.shape[0] // side, grid.shape[1] // side
        pixels = grid.reshape(rows, side, columns, side).transpose(0, 2, 1, 3).reshape(-1, side, side)
        start = 0
        for split in SPLITS:
            here = sheet["official_positions"][split]
            official = "t10k" if split == "heldout" else "train"
            ids = tuple(f"fashion-mnist/{official}/{position}" for position in here)
            table[split][sheet["label"]] = Tiles(pixels[start : start + len(here)], ids)
            start += len(here)
    return table
