"""Codes of a whole image set in one file, so that the generator's training never runs the tokenizer.

The file is a safetensors file: ``codes [n, crops, *grid]`` (or ``[..., G]``; 16 bits where the codebook allows it),
``labels [n]``, and the images' keys. Its metadata hold the layout and the tokenizer's hash. Latent perturbation is
never applied: ``tokenize`` has no such option.
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
from mmpost_tokenizers.generator.model import CodeLayout
from mmpost_tokenizers.images import ImageSet, Item

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
    """

    layout: CodeLayout
    codes: Tensor
    labels: Tensor
    keys: list[str]

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def crops(self) -> int:
        """Crops per image."""
        return self.codes.shape[1]

    def subset(self, rows: Tensor) -> Codes:
        """The images ``rows``, int64."""
        return Codes(self.layout, self.codes[rows], self.labels[rows], [self.keys[i] for i in rows.tolist()])

    def save(self, file: Path) -> None:
        """Write one file; a kill leaves the old file or the new one."""
        text = [key.encode() for key in self.keys]
        tensors = {
            "codes": self.codes.contiguous(),
            "labels": self.labels,
            "keys": torch.frombuffer(bytearray(b"".join(text) or b"\0"), dtype=torch.uint8),
            "key_ends": torch.tensor([len(key) for key in text], dtype=torch.long).cumsum(0),
        }
        partial = file.with_name(f"{file.name}.partial")
        save_file(tensors, partial, {"layout": json.dumps(asdict(self.layout))})
        partial.replace(file)

    @classmethod
    def open(cls, path: str | Path) -> Codes:
        """Read a file of ``save``, or the one in a folder of ``pretokenize``; codes stay on disk until they are used.

        Raises:
            MmpostError: MMP-T076 for a file that cannot be read.
        """
        file = Path(path) / CODES_FILE if Path(path).is_dir() else Path(path)
        try:
            with safe_open(file, "pt") as handle:
                record = json.loads((handle.metadata() or {})["layout"])
            tensors = load_file(file)
            letters = tensors["keys"].numpy().tobytes()
            ends = [0, *tensors["key_ends"].tolist()]
            keys = [letters[start:end].decode() for start, end in itertools.pairwise(ends)]
            layout = CodeLayout(**{**record, "grid": tuple(record["grid"])})
            return cls(layout, tensors["codes"], tensors["labels"], keys)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise MmpostError(
                "MMP-T076", f"'{file}' holds no codes.", "Write it with `mmpost tokenizer pretokenize`"
            ) from error


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
            number of crops.

    Source: arXiv 2406.06525 (ten crops of images enlarged by 1.1, one drawn at random per epoch).
    """
    source_size(tokenizer.config.image_size, crops)
    place, layout = Path(folder), layout_of(tokenizer)
    shards = place / "shards"
    header = {"layout": asdict(layout), "crops": crops, "images": _fingerprint(images), "shard_size": shard_size}
    if (place / CODES_FILE).is_file():
        done = Codes.open(place)
        if done.layout != layout or done.crops != crops or done.keys != list(images.keys):
            raise _other(place)
        return done
    _begin(shards, header)
    for start in range(0, len(images), shard_size):
        rows = range(start, min(start + shard_size, len(images)))
        file = shards / f"{start:09d}.safetensors"
        if not file.is_file():
            _tokenize(_Part(images, rows), tokenizer, layout, crops, batch_size, workers).save(file)
        if progress is not None:
            progress(rows.stop, len(images))
    whole = _join([Codes.open(file) for file in sorted(shards.glob("*.safetensors"))], layout)
    whole.save(place / CODES_FILE)
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
    return Codes(layout, torch.cat(codes), torch.cat(labels).long(), keys)


def _fingerprint(images: ImageSet) -> str:
    """Hash of names and cutting; contents are not read."""
    seed = images.seed if images.is_random else "-"
    return hashlib.sha256("\n".join([str(images.cutting), str(seed), *images.keys]).encode()).hexdigest()


def _begin(shards: Path, header: dict[str, Any]) -> None:
    """Remember what the shards belong to, or see that they belong to the same."""
    file = shards / "header.json"
    if not file.is_file():
        scratch = shards.with_name("shards.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        (scratch / "header.json").write_text(json.dumps(header))
        move_into_place(scratch, shards)
    elif json.loads(file.read_text()) != json.loads(json.dumps(header)):
        raise _other(shards.parent)


def _join(parts: list[Codes], layout: CodeLayout) -> Codes:
    keys = [key for part in parts for key in part.keys]
    return Codes(layout, torch.cat([part.codes for part in parts]), torch.cat([part.labels for part in parts]), keys)


def _check_crops(crops: int) -> None:
    if crops not in CROPS:
        raise MmpostError(
            "MMP-C107", f"crops={crops} is not one of {', '.join(map(str, CROPS))}.", "Choose one of them"
        )


def _other(place: Path) -> MmpostError:
    return MmpostError(
        "MMP-T077",
        f"'{place}' holds codes of another tokenizer, image set or number of crops.",
        "Choose another folder, or delete this one",
    )
