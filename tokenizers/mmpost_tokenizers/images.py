"""Pictures for tokenizers: folders, lists, sheets, arrays and two photographs, as a map-style data set.

An item is ``(float image [3, S, S] in [-1, 1], class number or -1, key)``. Pixels are cut and resized in 8 bits, so
``to_uint8`` of an image gives exactly the pixels that were read. Random crops and flips are a function of seed, epoch
and index alone.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mmpost.core.errors import MmpostError
from mmpost.core.seeding import uniform
from mmpost.data.files import missing_source
from mmpost.media import image as media
from mmpost_tokenizers import sheets
from mmpost_tokenizers.features import file_digest
from mmpost_tokenizers.image_files import (
    Checked,
    Depth,
    Listed,
    Listing,
    OnBad,
    check_files,
    list_file,
    list_folder,
    thinned,
)

Crop = Literal["center", "random", "pad"]
Item = tuple[Tensor, int, str]
PHOTOS = "sklearn:photos"
# Name of a mark of ``ImageSet.marks``.
CONTENTS = "contents of images (size or time of a file)"
LIST_SUFFIXES = (".txt", ".tsv", ".lst")


class PixelSource(Protocol):
    """Where pixels come from; picklable, because workers get a copy."""

    def pixels(self, index: int) -> np.ndarray:
        """uint8 ``[H, W, 3]``."""
        ...

    def digest(self, index: int) -> str:
        """Hash of what is read."""
        ...

    def stamp(self, index: int) -> str:
        """What changes when a picture does, without reading files."""
        ...


@dataclass(frozen=True, slots=True)
class FilePixels:
    """Files, decoded when their turn comes."""

    paths: tuple[str, ...]

    def pixels(self, index: int) -> np.ndarray:
        """uint8 ``[H, W, 3]``; MMP-D007 or MMP-D008 when the file has changed since it was looked at."""
        return np.asarray(media.load(self.paths[index]))

    def digest(self, index: int) -> str:
        """SHA-256 of the file."""
        return file_digest(Path(self.paths[index]))

    def stamp(self, index: int) -> str:
        """Size in bytes and time of change."""
        try:
            found = os.stat(self.paths[index])
        except OSError:
            return "gone"
        return f"{found.st_size} {found.st_mtime_ns}"


@dataclass(frozen=True, slots=True)
class ArrayPixels:
    """Pictures in memory, uint8 ``[N, H, W, 3]``."""

    array: np.ndarray

    def pixels(self, index: int) -> np.ndarray:
        """uint8 ``[H, W, 3]``."""
        return self.array[index]

    def digest(self, index: int) -> str:
        """SHA-256 of the pixels."""
        return hashlib.sha256(self.array[index].tobytes()).hexdigest()

    def stamp(self, index: int) -> str:
        """That of ``digest``."""
        return self.digest(index)


@dataclass(frozen=True, slots=True)
class Cutting:
    """How a picture becomes a square of ``size`` pixels.

    Attributes:
        size: Side in pixels.
        crop: ``center`` scales the shorter side to ``size`` and cuts the middle; ``random`` scales it to ``size`` times
            a number up to ``max_zoom`` and cuts anywhere; ``pad`` scales the longer side down to ``size`` if it is
            longer, and surrounds the picture with black. Scaling is bicubic with antialiasing.
        flip: Mirror half of the pictures; of an evaluation this is False.
        max_zoom: See ``crop``; 1.25 is the published range of random crops (LlamaGen, ADM: 0.8 to 1 of the side).
    """

    size: int
    crop: Crop = "center"
    flip: bool = False
    max_zoom: float = 1.25

    def __call__(self, pixels: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """uint8 ``[S, S, 3]`` of uint8 ``[H, W, 3]``; ``draws`` are four uniform numbers in [0, 1)."""
        zoom = 1 + draws[0] * (self.max_zoom - 1) if self.crop == "random" else 1.0
        if self.crop == "pad":
            square = self._padded(pixels)
        else:
            scaled = _scaled(pixels, round(self.size * zoom) / min(pixels.shape[:2]), at_least=self.size)
            at = draws[1:3] if self.crop == "random" else np.array([0.5, 0.5])
            room = np.array(scaled.shape[:2]) - self.size
            top, left = (at * (room + 1)).astype(int) if self.crop == "random" else room // 2
            square = scaled[top : top + self.size, left : left + self.size]
        return square[:, ::-1] if self.flip and draws[3] < 0.5 else square

    def _padded(self, pixels: np.ndarray) -> np.ndarray:
        small = _scaled(pixels, min(1.0, self.size / max(pixels.shape[:2])), at_least=1)
        square = np.zeros((self.size, self.size, 3), np.uint8)
        top, left = (self.size - small.shape[0]) // 2, (self.size - small.shape[1]) // 2
        square[top : top + small.shape[0], left : left + small.shape[1]] = small
        return square


def _scaled(pixels: np.ndarray, factor: float, *, at_least: int) -> np.ndarray:
    height, width = (max(at_least, round(side * factor)) for side in pixels.shape[:2])
    if (height, width) == pixels.shape[:2]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class ImageSet(Dataset[Item]):
    """Pictures with labels and keys; ``set[index]`` is epoch 0, ``set[epoch, index]`` any other.

    Attributes:
        source: Pixels.
        keys: Name of each picture in results.
        labels: Class number of each, -1 without.
        classes: Names of the class numbers.
        cutting: How pictures become squares.
        seed: Seed of random crops and flips.
        notes: Remarks for the user; to be shown once.
        bad: Pictures that were left out, with why.
    """

    source: PixelSource
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    cutting: Cutting
    classes: tuple[str, ...] = ()
    seed: int = 0
    notes: tuple[str, ...] = ()
    bad: tuple[tuple[str, MmpostError], ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, item: int | tuple[int, int]) -> Item:
        epoch, index = item if isinstance(item, tuple) else (0, item)
        if not 0 <= index < len(self.keys):
            raise IndexError(index)
        draws = uniform(self.seed, "image-cutting", epoch, index, np.arange(4))
        square = self.cutting(self.source.pixels(index), draws)
        return from_uint8(torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1)))), *self._facts(index)

    def _facts(self, index: int) -> tuple[int, str]:
        return self.labels[index], self.keys[index]

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All pictures uint8 ``[N, 3, S, S]`` and labels int64 ``[N]``; for sets that fit into memory."""
        return torch.stack([to_uint8(self[index][0]) for index in range(len(self))]), torch.tensor(self.labels)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of contents, order and cutting: two sets with the same show an evaluation the same pixels."""
        total = hashlib.sha256(f"{self.cutting} {self.seed if self.is_random else '-'}\n".encode())
        for index in range(len(self)):
            total.update(f"{self.source.digest(index)}\n".encode())
        return total.hexdigest()

    def marks(self) -> dict[str, str]:
        """What tells this set from another, in words and without reading files, for ``inputs``.

        A file stands for its name, size and time of change.
        """
        seed = self.seed if self.is_random else "-"
        return {
            "number of images": str(len(self)),
            "names of images": _hashed(self.keys),
            "classes of images": _hashed([*map(str, self.labels), *self.classes]),
            "size, crop or flip": _hashed([str(self.cutting), str(seed)]),
            CONTENTS: self.contents(range(len(self))),
        }

    def contents(self, rows: Sequence[int]) -> str:
        """The mark of what some pictures show."""
        return _hashed([self.source.stamp(row) for row in rows])

    @property
    def is_random(self) -> bool:
        """True when an item depends on the epoch."""
        return self.cutting.crop == "random" or self.cutting.flip


def _hashed(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def from_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] of uint8 images: 0 is -1, 255 is 1."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """uint8 of float images: round((x + 1) * 127.5), clamped to 0..255; exact inverse of ``from_uint8``.

    Differs: the evaluator released with RobusTok truncates 127.5 x + 128 instead of rounding.
    """
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def images_from(
    source: str | Path | Sequence[str | Path],
    *,
    size: int,
    split: str | None = None,
    crop: Crop = "center",
    flip: bool = False,
    max_zoom: float = 1.25,
    seed: int = 0,
    on_bad: OnBad = "error",
    min_side: int = 8,
    depth: Depth = "decode",
    quarantine_file: Path | None = None,
    limit: int | None = None,
    cache: Path | None = None,
) -> ImageSet:
    """Open pictures; every file is looked at first.

    Args:
        source: A folder (searched through, sorted), a text file with a path per line, a ``.json`` that describes
            sheets (``sheets``), ``sklearn:photos``, or a sequence of paths.
        size: Side of the squares in pixels.
        split: Folder of the source folder, split of the sheets, or ``train`` or ``heldout`` of the photographs.
        crop: See ``Cutting``.
        flip: See ``Cutting``.
        max_zoom: See ``Cutting``.
        seed: Seed of random crops and flips.
        on_bad: ``error`` or ``quarantine``, see ``check_files``.
        min_side: Shortest side that a file may have, in pixels.
        depth: See ``check_files``.
        quarantine_file: Where the list of bad files goes.
        limit: Look at and use only this many of the files, evenly spread; pictures in memory are never thinned here.
        cache: See ``check_files``.

    Raises:
        MmpostError: MMP-D030 no such source, MMP-D033 no such split, MMP-D070 to MMP-D076 as their functions say.
    """
    cutting = Cutting(size, crop, flip, max_zoom)
    if source == PHOTOS:
        pieces = sheets.photographs(size, split)
        return images_from_arrays(pieces.pixels, pieces.labels, cutting=cutting, seed=seed, **pieces.rest)
    if isinstance(source, str | Path) and Path(source).suffix.lower() == ".json":
        pieces = sheets.read_sheets(Path(source), split)
        return images_from_arrays(pieces.pixels, pieces.labels, cutting=cutting, seed=seed, **pieces.rest)
    checked = check_files(
        thinned(_listing(source, split), limit),
        on_bad=on_bad,
        min_side=min_side,
        depth=depth,
        quarantine_file=quarantine_file,
        cache=cache,
    )
    return _of_files(checked, cutting, seed)


def _listing(source: str | Path | Sequence[str | Path], split: str | None) -> Listing:
    if not isinstance(source, str | Path):
        if not source:
            raise MmpostError("MMP-D070", "the list names no image files.", "Give at least one path")
        return Listing(tuple(Listed(str(path), str(path), -1) for path in source))
    path = Path(source)
    if path.is_dir():
        return list_folder(path, split)
    if not path.exists():
        raise missing_source(str(source))
    if split is not None:
        raise MmpostError("MMP-D033", f"{source}: a file has no splits, so '{split}' cannot be chosen.", "Remove split")
    if path.suffix.lower() in LIST_SUFFIXES:
        return list_file(path)
    return Listing((Listed(str(path), path.name, -1),))


def _of_files(checked: Checked, cutting: Cutting, seed: int) -> ImageSet:
    files = checked.listing.files
    return ImageSet(
        FilePixels(tuple(file.path for file in files)),
        tuple(file.key for file in files),
        tuple(file.label for file in files),
        cutting,
        classes=checked.listing.classes,
        seed=seed,
        notes=checked.listing.notes,
        bad=checked.bad,
    )


def images_from_arrays(
    pixels: np.ndarray,
    labels: Sequence[int] | None = None,
    *,
    cutting: Cutting,
    keys: Sequence[str] | None = None,
    classes: Sequence[str] = (),
    notes: Sequence[str] = (),
    seed: int = 0,
) -> ImageSet:
    """Pictures that are in memory.

    Args:
        pixels: uint8 ``[N, H, W]`` grey or ``[N, H, W, 3]``.
        labels: Class number of each; None without labels.
        cutting: How pictures become squares.
        keys: Names; positions by default.
        classes: Names of the class numbers.
        notes: Remarks for the user.
        seed: Seed of random crops and flips.

    Raises:
        MmpostError: MMP-D070 without pictures, MMP-D076 for another type or shape.
    """
    array: Any = np.asarray(pixels)
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] != 3):
        raise MmpostError(
            "MMP-D076",
            f"an array of {array.dtype} {list(array.shape)} is no set of pictures.",
            "Give uint8 [N, H, W] or [N, H, W, 3]",
        )
    if not len(array):
        raise MmpostError("MMP-D070", "the array holds no pictures.", "Give at least one")
    colour = array if array.ndim == 4 else np.repeat(array[..., None], 3, axis=3)
    count = len(colour)
    numbers = [-1] * count if labels is None else [int(label) for label in labels]
    names = [str(index) for index in range(count)] if keys is None else list(keys)
    if len(numbers) != count or len(names) != count:
        what = f"{count} pictures have {len(numbers)} labels and {len(names)} keys."
        raise MmpostError("MMP-D076", what, "Give one of each per picture")
    return ImageSet(
        ArrayPixels(colour), tuple(names), tuple(numbers), cutting, tuple(classes), seed=seed, notes=tuple(notes)
    )
