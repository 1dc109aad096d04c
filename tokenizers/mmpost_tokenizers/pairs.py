"""Pairs for decoder post-training: codes that look generated, and the real image that they should decode to.

While the generator samples, each place of the grid keeps the code of the real image with probability sigma; the mixture
is what it sees as context. ``direct`` gives the mixture to the decoder (the paper's figure 1c). ``reencode`` decodes it
with the main-trained decoder to 8 bits and tokenizes the result, as the released code does with PNG files.

Source: arXiv 2509.12474, section 4.3. Its files are stored once and used in every epoch; so are these codes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.batches import Batch, evaluation_batches
from mmpost_tokenizers.features import weights_digest
from mmpost_tokenizers.generator.classes import check_classes, require_same_names
from mmpost_tokenizers.generator.identity import layout_of, require_same
from mmpost_tokenizers.generator.layout import CodeLayout
from mmpost_tokenizers.generator.model import TokenGenerator
from mmpost_tokenizers.generator.sample import Sampling, generate
from mmpost_tokenizers.images import ImageSet, from_uint8, to_uint8
from mmpost_tokenizers.opening import chosen

PairMode = Literal["reencode", "direct"]
_NAMES = ("inputs", "real", "mixed")
# Images whose pairs are lost at most when a call is ended: minutes of a GPU at 256 codes an image.
BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Pairs:
    """What the decoder is trained on; images are read when they are needed.

    Attributes:
        layout: Of the codes; holds the tokenizer's hash.
        inputs: Codes given to the decoder, int32 ``[n, *layout.shape]``.
        real: Codes of the real images, likewise.
        images: The real images, in the same order.
        sigma: Preservation ratio.
        pair_mode: How the inputs were made.
        kept: Share of the mixture's codes that equal the real ones: about sigma + (1 - sigma) * chance matches.
        drift: Share of the mixture's codes that re-encoding changed; 0 in mode ``direct``.
    """

    layout: CodeLayout
    inputs: Tensor
    real: Tensor
    images: ImageSet
    sigma: float
    pair_mode: PairMode
    kept: float
    drift: float

    def __len__(self) -> int:
        return len(self.inputs)

    def subset(self, rows: Sequence[int]) -> Pairs:
        """Some of the pairs; ``kept`` and ``drift`` stay those of all."""
        places, images = list(rows), chosen(self.images, rows)
        return replace(self, inputs=self.inputs[places], real=self.real[places], images=images)


def make_pairs(
    images: ImageSet,
    tokenizer: DiscreteTokenizer,
    generator: TokenGenerator,
    *,
    sigma: float,
    pair_mode: PairMode,
    sampling: Sampling,
    batch_size: int = 64,
    workers: int = 0,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pairs:
    """Sample one mixture per image, with the class of the image.

    Args:
        images: Labelled, centre crops without flips.
        tokenizer: The main-trained one.
        generator: Trained on this tokenizer's codes.
        sigma: Preservation ratio in (0, 1].
        pair_mode: ``reencode`` or ``direct``.
        sampling: As in the evaluation of the generator; its seed and the number of an image key the draws.
        batch_size: Images tokenized together.
        workers: Processes that decode images.
        cache: File that keeps the codes for the next call with the same arguments; anything else in it is replaced.
            Until all are made, blocks of ``BLOCK`` images lie beside it, so that a call that was ended goes on.
        progress: Called with images done and images in all.

    Raises:
        MmpostError: MMP-C102 when the generator belongs to another tokenizer, MMP-C104 for sigma outside (0, 1],
            MMP-C105 for images without a class that the generator knows, MMP-C119 for classes of other names, MMP-T074
            for random crops or flips.
    """
    check_sigma(sigma)
    layout = layout_of(tokenizer)
    require_same(generator.config.layout, layout, owner="the generator", other="the tokenizer")
    if images.is_random:
        raise MmpostError(
            "MMP-T074",
            "the images of the pairs are cut or flipped at random; codes and image would not show the same.",
            "Open them with crop=center and flip=false",
        )
    names = generator.config.class_names
    require_same_names(names, images.classes, owner="the generator", other="the images of the pairs")
    check_classes(torch.tensor(images.labels), generator.config.num_classes)
    about = _about(images, tokenizer, generator, sigma, pair_mode, sampling)
    if cache is not None and (kept := _read(cache, about)) is not None:
        return _pairs(layout, images, sigma, pair_mode, *kept)
    parts = []
    for start in range(0, len(images), BLOCK):
        rows = range(start, min(start + BLOCK, len(images)))
        file = None if cache is None else cache.with_name(f"{cache.name}.{start:09d}")
        part = None if file is None else _read(file, about)
        if part is None:
            some = evaluation_batches(chosen(images, rows), batch_size=batch_size, workers=workers)
            seen = None if progress is None else partial(_advance, progress, len(images))
            part = _block(some, start, tokenizer, generator, sigma, pair_mode, sampling, seen)
            if file is not None:
                _write(file, part, about)
        parts.append(part)
    tensors = [torch.cat([part[number] for part in parts]) for number in range(len(_NAMES))]
    if cache is not None:
        _write(cache, tensors, about)
        for file in cache.parent.glob(f"{cache.name}.{'[0-9]' * 9}"):
            file.unlink()
    return _pairs(layout, images, sigma, pair_mode, *tensors)


def _block(
    batches: Iterable[Batch],
    first: int,
    tokenizer: DiscreteTokenizer,
    generator: TokenGenerator,
    sigma: float,
    pair_mode: PairMode,
    sampling: Sampling,
    seen: Callable[[int], None] | None,
) -> list[Tensor]:
    """Tensors of ``_NAMES`` of neighbouring images, the first of which has the number ``first``."""
    device = next(tokenizer.parameters()).device
    real, mixed, inputs = [], [], []
    done = first
    for pictures, labels, _ in batches:
        codes = tokenizer.tokenize(pictures.to(device)).cpu()
        numbers = np.arange(done, done + len(codes))
        mixture = generate(generator, labels, sampling=sampling, numbers=numbers, forced_tokens=codes, keep_prob=sigma)
        real.append(codes)
        mixed.append(mixture)
        inputs.append(reencode(tokenizer, mixture) if pair_mode == "reencode" else mixture)
        done += len(codes)
        if seen is not None:
            seen(done)
    return [torch.cat(found).int() for found in (inputs, real, mixed)]


def _advance(progress: Callable[[int, int], None], total: int, done: int) -> None:
    progress(done, total)


def _pairs(
    layout: CodeLayout, images: ImageSet, sigma: float, pair_mode: PairMode, inputs: Tensor, real: Tensor, mixed: Tensor
) -> Pairs:
    kept, drift = (mixed == real).double().mean(), (inputs != mixed).double().mean()
    return Pairs(layout, inputs, real, images, sigma, pair_mode, float(kept), float(drift))


def _about(
    images: ImageSet,
    tokenizer: DiscreteTokenizer,
    generator: TokenGenerator,
    sigma: float,
    pair_mode: PairMode,
    sampling: Sampling,
) -> str:
    """Hash of everything that decides about the pairs."""
    total = hashlib.sha256(json.dumps([images.marks(), sigma, pair_mode]).encode())
    total.update(str(replace(sampling, batch_size=1)).encode())
    # The decoder too: it makes the images that are tokenized again.
    for module in (tokenizer, generator):
        assert isinstance(module, nn.Module)
        total.update(weights_digest(module.state_dict()).encode())
    return total.hexdigest()


def _write(file: Path, tensors: Sequence[Tensor], about: str) -> None:
    """Write whole or not at all."""
    scratch = file.with_name(f"{file.name}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(zip(_NAMES, tensors, strict=True)), scratch, {"about": about})
    scratch.replace(file)


def _read(cache: Path, about: str) -> list[Tensor] | None:
    """Tensors of ``_NAMES``, if the file holds the same pairs."""
    try:
        with safe_open(cache, "pt") as handle:
            if (handle.metadata() or {}).get("about") != about:
                return None
            return [handle.get_tensor(name) for name in _NAMES]
    except (OSError, SafetensorError):
        return None


def reencode(tokenizer: DiscreteTokenizer, codes: Tensor) -> Tensor:
    """Codes of the 8-bit images that ``codes`` decode to; on the CPU."""
    device = next(tokenizer.parameters()).device
    return tokenizer.tokenize(from_uint8(to_uint8(tokenizer.detokenize(codes.to(device))))).cpu()


def check_sigma(sigma: float) -> None:
    """Refuse a preservation ratio that makes no pairs.

    Raises:
        MmpostError: MMP-C104.
    """
    if not 0 < sigma <= 1:
        raise MmpostError(
            "MMP-C104",
            f"sigma={sigma:g} is outside (0, 1]: it is the share of real codes that a pair keeps.",
            "Choose 0.7 to 0.9; at 0 the codes have nothing to do with the image",
        )
