"""Codes of a whole image set in one file, so that the generator's training never runs the tokenizer.

The file is a safetensors file: ``codes [n, crops, *grid]`` (or ``[..., G]``; 16 bits where the codebook allows it),
``labels [n]``, and the images' keys. Its metadata hold the layout with the tokenizer's hash, the names of the classes,
and marks of the images it was made of. Latent perturbation is never applied: ``tokenize`` has no such option.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmpost.core.errors import MmpostError
from mmpost.train.checkpoint import move_into_place
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.batches import evaluation_batches
from mmpost_tokenizers.generator.identity import layout_of
from mmpost_tokenizers.generator.layout import CodeLayout
from mmpost_tokenizers.images import CONTENTS, ImageSet, Item
from mmpost_tokenizers.inputs import differing

CODES_FILE = "codes.safetensors"
# The ten-crop recipe enlarges images by this factor before the crops are cut.
ENLARGE = 1.1
# Which of (centre, top left, top right, bottom left, bottom right) and their mirror images are used.
CROPS = {1: (0,), 2: (0, 5), 5: (0, 1, 2, 3, 4), 10: tuple(range(10))}


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes of an image set.

    Attributes:
        layout: Of the codes; holds the tokenizer's hash.
        codes: Integers ``[n, crops, *layout.shape]``.
        labels: int64 ``[n]``, -1 for none.
        keys: Name of each image.
        classes: Names of the class numbers; empty where images had none.
    """

    layout: CodeLayout
    codes: Tensor
    labels: Tensor
    keys: list[str]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def crops(self) -> int:
        """Crops per image."""
        return self.codes.shape[1]

    def subset(self, rows: Tensor) -> Codes:
        """The images ``rows``, int64."""
        keys = [self.keys[row] for row in rows.tolist()]
        return Codes(self.layout, self.codes[rows], self.labels[rows], keys, self.classes)

    def marks(self) -> dict[str, str]:
        """What tells these codes from others, in words, for ``inputs``."""
        digest = hashlib.sha256()
        for some in self.codes.split(4096):
            digest.update(some.contiguous().view(torch.uint8).numpy().data)
        return {
            "tokenizer": self.layout.tokenizer_sha256,
            "number of images": str(len(self)),
            "crops": str(self.crops),
            "names of images": hashlib.sha256("\n".join(self.keys).encode()).hexdigest(),
            "classes of images": hashlib.sha256(f"{self.labels.tolist()} {list(self.classes)}".encode()).hexdigest(),
            "codes": digest.hexdigest(),
        }

    def save(self, file: Path, *, made_of: dict[str, str] | None = None) -> None:
        """Write one file; a kill leaves the old file or the new one.

        Args:
            file: Its place.
            made_of: Marks of the images and of the tokenizer.
        """
        text = [key.encode() for key in self.keys]
        tensors = {
            "codes": self.codes.contiguous(),
            "labels": self.labels,
            "keys": torch.frombuffer(bytearray(b"".join(text) or b"\0"), dtype=torch.uint8),
            "key_ends": torch.tensor([len(key) for key in text], dtype=torch.long).cumsum(0),
        }
        partial = file.with_name(f"{file.name}.partial")
        about = {"layout": asdict(self.layout), "classes": self.classes, "made_of": made_of or {}}
        # One entry: safetensors writes several in no fixed order.
        save_file(tensors, partial, {"about": json.dumps(about)})
        partial.replace(file)

    @classmethod
    def open(cls, path: str | Path) -> Codes:
        """Read a file of ``save``, or the one in a folder of ``pretokenize``; codes stay on disk until they are used.

        Raises:
            MmpostError: MMP-T076 for a file that cannot be read.
        """
        file = Path(path) / CODES_FILE if Path(path).is_dir() else Path(path)
        try:
            about = _about(file)
            record = about["layout"]
            tensors = load_file(file)
            letters = tensors["keys"].numpy().tobytes()
            ends = [0, *tensors["key_ends"].tolist()]
            keys = [letters[start:end].decode() for start, end in itertools.pairwise(ends)]
            layout = CodeLayout(**{**record, "grid": tuple(record["grid"])})
            return cls(layout, tensors["codes"], tensors["labels"], keys, tuple(about["classes"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise MmpostError(
                "MMP-T076", f"'{file}' holds no codes.", "Write it with `mmpost tokenizer pretokenize`"
            ) from error


def _about(file: Path) -> dict[str, Any]:
    """Metadata of a file of codes; KeyError for another safetensors file."""
    with safe_open(file, "pt") as handle:
        about: dict[str, Any] = json.loads((handle.metadata() or {})["about"])
    return about


def source_size(image_size: int, crops: int) -> int:
    """Side that images must have before the crops are cut: 1.1 times the tokenizer's, where there is more than one.

    Raises:
        MmpostError: MMP-C107 for a number of crops that is not 1, 2, 5 or 10.
    """
    _check_crops(crops)
    return image_size if crops <= 2 else int(image_size * ENLARGE)


def cut(image: Tensor, size: int, crops: int) -> Tensor:
    """Crops ``[crops, 3, size, size]`` of an image ``[3, S, S]``, the centre first, mirror images last.

    Raises:
        MmpostError: MMP-C107 for an image that is too small.
    """
    _check_crops(crops)
    height, width = image.shape[1:]
    if min(height, width) < size or (crops == 1 and (height, width) != (size, size)):
        raise MmpostError(
            "MMP-C107",
            f"an image of {width}x{height} pixels cannot give {crops} crop(s) of {size}.",
            f"Open the images with size={source_size(size, crops)}",
        )
    middle = ((height - size) // 2, (width - size) // 2)
    corners = [(0, 0), (0, width - size), (height - size, 0), (height - size, width - size)]
    views = [image[:, top : top + size, left : left + size] for top, left in [middle, *corners]]
    views += [view.flip(-1) for view in views]
    return torch.stack([views[number] for number in CROPS[crops]])


def pretokenize(
    images: ImageSet,
    tokenizer: DiscreteTokenizer,
    folder: str | Path,
    *,
    crops: int = 1,
    batch_size: int = 64,
    shard_size: int = 4096,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Codes:
    """Tokenize every image and write ``codes.safetensors``; a second call goes on after the last whole shard.

    Args:
        images: All of side ``source_size(tokenizer.config.image_size, crops)``.
        tokenizer: Runs in evaluation mode, on the device it is on.
        folder: Where the file and, until it is written, the shards go.
        crops: 1, 2, 5 or 10 views per image (10: LlamaGen's recipe).
        batch_size: Views tokenized together.
        shard_size: Images per shard.
        workers: Processes that decode images.
        progress: Called with images done and images in all after each shard.

    Returns:
        The codes of all images.

    Raises:
        MmpostError: MMP-C101, MMP-C107; MMP-T077 when the folder holds codes of another tokenizer, image set or
            number of crops; the message names what differs.

    Source: arXiv 2406.06525 (ten crops of images enlarged by 1.1, one drawn at random per epoch).
    """
    source_size(tokenizer.config.image_size, crops)
    place, layout = Path(folder), layout_of(tokenizer)
    shards = place / "shards"
    made_of = {**_tokenizer_marks(layout), "number of crops": str(crops), **images.marks()}
    if (place / CODES_FILE).is_file():
        done = Codes.open(place)
        _refuse_others(place, _about(place / CODES_FILE)["made_of"], made_of)
        return done
    # A file that was mended since an earlier call concerns its own shard only.
    header = {name: mark for name, mark in made_of.items() if name != CONTENTS}
    _begin(shards, {**header, "images per shard": str(shard_size)})
    for start in range(0, len(images), shard_size):
        rows = range(start, min(start + shard_size, len(images)))
        file = shards / f"{start:09d}.safetensors"
        mark = {CONTENTS: images.contents(rows)}
        if not file.is_file() or _about(file)["made_of"] != mark:
            _tokenize(_Part(images, rows), tokenizer, layout, crops, batch_size, workers).save(file, made_of=mark)
        if progress is not None:
            progress(rows.stop, len(images))
    whole = _join([Codes.open(file) for file in sorted(shards.glob("*.safetensors"))], layout)
    whole.save(place / CODES_FILE, made_of=made_of)
    shutil.rmtree(shards)
    return Codes.open(place)


class _Part:
    """Some neighbouring pictures of a set."""

    def __init__(self, images: ImageSet, rows: range) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        return self.images[self.rows[index]]


def _tokenize(
    part: _Part, tokenizer: DiscreteTokenizer, layout: CodeLayout, crops: int, batch_size: int, workers: int
) -> Codes:
    device = next(tokenizer.parameters()).device
    size, small = tokenizer.config.image_size, layout.codebook_size <= torch.iinfo(torch.uint16).max + 1
    codes, labels, keys = [], [], []
    batches = evaluation_batches(
        part,  # type: ignore[arg-type]  # has the two methods that are used
        batch_size=max(1, batch_size // crops),
        workers=workers,
    )
    for pictures, classes, names in batches:
        views = torch.cat([cut(picture, size, crops) for picture in pictures]).to(device)
        indices = tokenizer.tokenize(views).cpu().unflatten(0, (len(pictures), crops))
        codes.append(indices.to(torch.uint16 if small else torch.int32))
        labels.append(classes)
        keys += names
    return Codes(layout, torch.cat(codes), torch.cat(labels).long(), keys, part.images.classes)


def _tokenizer_marks(layout: CodeLayout) -> dict[str, str]:
    shape = f"{layout.codebook_size} codes, {layout.groups} groups, grid {layout.grid}"
    return {"codebook or grid of the tokenizer": shape, "weights of the tokenizer": layout.tokenizer_sha256}


def _begin(shards: Path, header: dict[str, str]) -> None:
    """Remember what the shards belong to, or see that they belong to the same."""
    file = shards / "header.json"
    if not file.is_file():
        scratch = shards.with_name("shards.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        (scratch / "header.json").write_text(json.dumps(header))
        move_into_place(scratch, shards)
    else:
        _refuse_others(shards.parent, json.loads(file.read_text()), header)


def _join(parts: list[Codes], layout: CodeLayout) -> Codes:
    keys = [key for part in parts for key in part.keys]
    codes, labels = torch.cat([part.codes for part in parts]), torch.cat([part.labels for part in parts])
    return Codes(layout, codes, labels, keys, parts[0].classes)


def _check_crops(crops: int) -> None:
    if crops not in CROPS:
        raise MmpostError(
            "MMP-C107", f"crops={crops} is not one of {', '.join(map(str, CROPS))}.", "Choose one of them"
        )


def _refuse_others(place: Path, before: dict[str, str], now: dict[str, str]) -> None:
    other = differing(before, now)
    if other:
        what = f"'{place}' holds codes of something else; what differs: {'; '.join(other)}."
        raise MmpostError("MMP-T077", what, "Choose another folder, or delete this one")
