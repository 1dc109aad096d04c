"""From the options of a command to what they name: image sets of several sources, tokenizers, feature extractors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpost.core import seeding
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost_tokenizers import TOKENIZERS
from mmpost_tokenizers.base import DiscreteTokenizer, TokenizerConfig, build_tokenizer
from mmpost_tokenizers.decoded import cache_folder
from mmpost_tokenizers.features import WEIGHTS_VARIABLE, FeatureExtractor, open_extractor
from mmpost_tokenizers.images import ImageSet, Item, PixelSource, from_uint8, images_from
from mmpost_tokenizers.options import CNNSettings, ImageSource, ImagesSection, ViTSettings

# What ``task:NAME`` stands for; only the layer above knows the tasks.
Resolve = Callable[[str], str | Path]
# Enough for a classifier's features, and a set of this size fits into memory at any usual side.
MAX_FIT = 20_000
# Bytes of pictures that are kept in memory.
MAX_RESIDENT = 1 << 28


@dataclass(frozen=True, slots=True)
class _Picked:
    """Pictures of several sources under new numbers."""

    sources: tuple[PixelSource, ...]
    places: tuple[tuple[int, int], ...]

    def pixels(self, index: int) -> np.ndarray:
        """uint8 ``[H, W, 3]``."""
        which, place = self.places[index]
        return self.sources[which].pixels(place)

    def digest(self, index: int) -> str:
        """Hash of what is read."""
        which, place = self.places[index]
        return self.sources[which].digest(place)

    def stamp(self, index: int) -> str:
        """See ``PixelSource``."""
        which, place = self.places[index]
        return self.sources[which].stamp(place)


def open_images(
    sources: Sequence[ImageSource],
    section: ImagesSection,
    *,
    size: int,
    seed: int,
    training: bool,
    resolve: Resolve = str,
    quarantine_file: Path | None = None,
    name: str | None = None,
    quarantine: str = "data.on_bad_image=quarantine",
) -> ImageSet:
    """Open and join sources; every file is looked at before the first is used.

    Args:
        sources: At least one.
        section: Crop, flip, how files are looked at, and what happens to bad ones.
        size: Side of the squares in pixels.
        seed: Of random crops and flips.
        training: False cuts the centre and mirrors nothing, whatever the section says about training.
        resolve: Turns ``task:NAME`` into a path.
        quarantine_file: Where the list of bad files goes.
        name: Option that lists the sources, for the message.
        quarantine: How the user says that bad files are to be left out, for the message.

    Raises:
        MmpostError: MMP-C111 without a source; what ``images_from`` raises.
    """
    if not sources:
        name = name or ("data.train" if training else "data.eval")
        raise MmpostError("MMP-C111", f"no images: {name} is empty.", f"Set {name}=FOLDER.")
    crop = section.crop if training or section.crop == "pad" else "center"
    parts = []
    for source in sources:
        try:
            opened = images_from(
                resolve(source.path),
                size=size,
                split=source.split,
                crop=crop,
                flip=section.flip and training,
                seed=seed,
                on_bad=section.on_bad_image,
                quarantine_file=quarantine_file,
                depth=section.check,
                limit=source.limit,
                cache=cache_folder(),
            )
        except MmpostError as error:
            # Below, the option has the name of the function's argument.
            raise MmpostError(error.code, error.what, error.fix.replace("on_bad=quarantine", quarantine)) from error
        parts.append(pick(opened, source.limit))
    return parts[0] if len(parts) == 1 else _joined(parts)


def pick(images: ImageSet, limit: int | None) -> ImageSet:
    """``limit`` pictures evenly spread over the set, which may be sorted by class; all of them for None."""
    if limit is None or limit >= len(images):
        return images
    return chosen(images, [at * len(images) // limit for at in range(limit)])


def chosen(images: ImageSet, rows: Sequence[int]) -> ImageSet:
    """The pictures ``rows`` of a set, in this order."""
    kept: dict[str, Any] = {}
    if isinstance(images, _Resident) and images.squares is not None:
        kept["squares"] = images.squares[list(rows)]
    return replace(
        images,
        source=_Picked((images.source,), tuple((0, at) for at in rows)),
        keys=tuple(images.keys[at] for at in rows),
        labels=tuple(images.labels[at] for at in rows),
        **kept,
    )


def _joined(parts: Sequence[ImageSet]) -> ImageSet:
    """One set; classes of the same name are one class."""
    names: dict[str, int] = {}
    for part in parts:
        for name in part.classes:
            names.setdefault(name, len(names))
    labels = [
        names[part.classes[label]] if label >= 0 and part.classes else label for part in parts for label in part.labels
    ]
    places = tuple((which, at) for which, part in enumerate(parts) for at in range(len(part)))
    return replace(
        parts[0],
        source=_Picked(tuple(part.source for part in parts), places),
        keys=tuple(key for part in parts for key in part.keys),
        labels=tuple(labels),
        classes=tuple(names),
        notes=tuple(note for part in parts for note in part.notes),
        bad=tuple(bad for part in parts for bad in part.bad),
    )


@dataclass(frozen=True)
class _Resident(ImageSet):
    """Pictures that were cut once and stay in memory."""

    squares: Tensor | None = None

    def __getitem__(self, item: int | tuple[int, int]) -> Item:
        index = item[1] if isinstance(item, tuple) else item
        if not 0 <= index < len(self.keys):
            raise IndexError(index)
        assert self.squares is not None
        return from_uint8(self.squares[index]), self.labels[index], self.keys[index]


def resident(images: ImageSet) -> ImageSet:
    """The same pictures, cut once, where they are the same in every epoch and take little memory; else ``images``.

    Decoding and cutting one picture takes longer than a step of a small tokenizer on it.
    """
    if images.is_random or len(images) * 3 * images.cutting.size**2 > MAX_RESIDENT:
        return images
    own = {name: getattr(images, name) for name in images.__dataclass_fields__}
    return _Resident(**{**own, "squares": images.stacked()[0]})


def new_tokenizer(settings: CNNSettings | ViTSettings, *, seed: int) -> DiscreteTokenizer:
    """A tokenizer with weights drawn from ``seed``; the global random state is left as it was.

    Raises:
        MmpostError: MMP-C071 for numbers that do not fit together, MMP-E075 without the pretrained weights asked for.
    """
    table = settings.model_dump(exclude={"perturb", "pretrained"})
    from mmpost_tokenizers.vit import ViTTokenizer  # noqa: PLC0415  # timm takes a second

    config_class: type[TokenizerConfig] = Catalog("tokenizers", TOKENIZERS).get(settings.kind).config_class
    config = config_class.from_json(table)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seeding.generator(seed, "tokenizer weights").integers(2**62)))
        tokenizer = build_tokenizer(config)
    if isinstance(tokenizer, ViTTokenizer) and isinstance(settings, ViTSettings) and settings.pretrained:
        tokenizer.load_backbones()
    return tokenizer


def choose_extractor(which: str, fit_on: ImageSet | None, *, seed: int = 0, source: str = "images") -> FeatureExtractor:
    """The feature extractor of an evaluation; its name and hash go into every result.

    Args:
        which: ``auto``: the file that MMPOST_FEATURE_WEIGHTS names, else a classifier trained on labelled ``fit_on``,
            else a random network. ``classifier``, ``random-conv`` or a file, as ``open_extractor`` takes it.
        fit_on: Training images, never those that are evaluated.
        seed: Of the classifier.
        source: Short name of those images, part of the classifier's name.

    Raises:
        MmpostError: MMP-V073, MMP-V074, MMP-V075 from ``open_extractor`` and ``ClassifierFeatures.fit``.
    """
    from mmpost_tokenizers.toy_features import ClassifierFeatures  # noqa: PLC0415  # only without a weights file

    labelled = fit_on is not None and len(set(fit_on.labels) - {-1}) > 1
    if which == "auto":
        which = "auto" if os.environ.get(WEIGHTS_VARIABLE) else "classifier" if labelled else "random-conv"
    if which != "classifier":
        return open_extractor(which)
    if fit_on is None or not labelled:
        raise MmpostError(
            "MMP-C114",
            "eval.features=classifier needs labelled training images of two classes or more.",
            "Sort the images of data.train into a folder per class, or set eval.features=random-conv.",
        )
    plain = replace(fit_on, cutting=replace(fit_on.cutting, crop=_still(fit_on.cutting.crop), flip=False))
    pixels, labels = pick(plain, MAX_FIT).stacked()
    return ClassifierFeatures.fit(pixels[labels >= 0], labels[labels >= 0], source=source, seed=seed)


def _still(crop: Any) -> Any:
    return "pad" if crop == "pad" else "center"


def device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
