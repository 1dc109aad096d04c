"""Pictures that come many to a file: labelled sheets, and crops of scikit-learn's two photographs.

A sheet description is a JSON file: ``side_px`` is the side of a picture, and ``sheets`` lists per class ``file`` (an
image beside the JSON file, pictures row by row), ``label``, optionally ``sha256`` of the file, and
``official_positions``: split to the positions that its pictures had in the official data set. Pictures of a sheet are
in the order of the splits in the description.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmpost.core.errors import MmpostError
from mmpost.data.files import missing_source
from mmpost_tokenizers.features import file_digest

# Photographs are divided by area: what is left of this share of the width trains.
_TRAIN_WIDTH = 0.7
# Crops of one colour teach nothing; standard deviation of 8-bit values.
_FLAT = 8.0


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pictures in memory with labels.

    Attributes:
        pixels: uint8 ``[N, H, W]`` or ``[N, H, W, 3]``.
        labels: Class number of each.
        rest: ``keys``, ``classes`` and ``notes``, as ``images_from_arrays`` takes them.
    """

    pixels: np.ndarray
    labels: list[int]
    rest: dict[str, Any]


def read_sheets(description: Path, split: str | None) -> Pieces:
    """Pictures of one split, or of all splits.

    Raises:
        MmpostError: MMP-D030 no such file, MMP-D033 no such split, MMP-D075 for a description or sheet that is not
            what it should be.
    """
    if not description.is_file():
        raise missing_source(str(description))
    try:
        notes = json.loads(description.read_text(encoding="utf-8"))
        side, listed = int(notes["side_px"]), list(notes["sheets"])
        splits = list(listed[0]["official_positions"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        why = f"{type(error).__name__} {error}"
        raise _broken(description, f"it describes no sheets: {why}") from error
    if split is not None and split not in splits:
        raise MmpostError(
            "MMP-D033", f"{description}: there is no split '{split}' among {', '.join(splits)}.", "Check split"
        )
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    keys: list[str] = []
    for number, sheet in enumerate(listed):
        tiles = _tiles(description.parent / sheet["file"], side, sheet.get("sha256"))
        start = 0
        for name, positions in sheet["official_positions"].items():
            here = tiles[start : start + len(positions)]
            start += len(positions)
            if split in (None, name):
                pixels.append(here)
                labels += [number] * len(here)
                keys += [f"{name}/{sheet['label']}/{position}" for position in positions]
        if start != len(tiles):
            raise _broken(description, f"'{sheet['file']}' holds {len(tiles)} pictures, {start} are described")
    classes = tuple(str(sheet["label"]) for sheet in listed)
    return Pieces(np.concatenate(pixels), labels, {"keys": keys, "classes": classes})


def _tiles(path: Path, side: int, sha256: str | None) -> np.ndarray:
    """uint8 ``[N, side, side]`` or ``[N, side, side, 3]``, row by row."""
    if not path.is_file():
        raise _broken(path, "the sheet is not there")
    if sha256 is not None and file_digest(path) != sha256:
        raise _broken(path, "the sheet is not the one that is described (another SHA-256)")
    with Image.open(path) as image:
        grid = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    rows, columns = grid.shape[0] // side, grid.shape[1] // side
    colours = grid.shape[2:]
    return grid.reshape(rows, side, columns, side, *colours).swapaxes(1, 2).reshape(-1, side, side, *colours)


def _broken(path: Path, why: str) -> MmpostError:
    return MmpostError("MMP-D075", f"{path}: {why}.", "Write the sheets and their description again")


def photographs(side: int, split: str | None) -> Pieces:
    """Square crops of scikit-learn's photographs of a temple and a flower; the label says of which.

    Crops do not overlap. ``train`` is the left part of both, ``heldout`` the right part, so that no pixel is in both.

    Raises:
        MmpostError: MMP-D033 for another split.
    """
    from sklearn.datasets import load_sample_images  # noqa: PLC0415  only this source needs it

    if split not in (None, "train", "heldout"):
        raise MmpostError(
            "MMP-D033", f"sklearn:photos: there is no split '{split}' among train, heldout.", "Check split"
        )
    bunch = load_sample_images()
    names = tuple(Path(name).stem for name in bunch.filenames)
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    keys: list[str] = []
    flat = 0
    for number, photo in enumerate(bunch.images):
        border = int(photo.shape[1] * _TRAIN_WIDTH)
        start, end = {"train": (0, border), "heldout": (border, photo.shape[1])}.get(str(split), (0, photo.shape[1]))
        for top in range(0, photo.shape[0] - side + 1, side):
            for left in range(start, end - side + 1, side):
                crop = photo[top : top + side, left : left + side]
                if crop.std() < _FLAT:
                    flat += 1
                    continue
                pixels.append(crop)
                labels.append(number)
                keys.append(f"{names[number]}@{left},{top}")
    if not pixels:
        raise MmpostError("MMP-D070", f"sklearn:photos: no crop of {side} px fits.", "Take smaller images")
    notes = (f"{flat} crops of nearly one colour were left out",) if flat else ()
    return Pieces(np.stack(pixels), labels, {"keys": keys, "classes": names, "notes": notes})
