"""Which tokenizer codes belong to: their layout and a hash of everything that decides about them."""

from __future__ import annotations

import hashlib
import json

from torch import Tensor

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.features import weights_digest
from mmpost_tokenizers.generator.layout import CodeLayout


def token_hash(tokenizer: DiscreteTokenizer) -> str:
    """SHA-256 of encoder and quantizer, names, types and bytes of all their tensors.

    The decoder is left out: post-training changes it, and the codes of an image stay the same.
    """
    config = tokenizer.config
    settings = json.dumps([config.kind, config.image_size, config.quantizer.to_json()])
    return hashlib.sha256(f"{settings}\n{weights_digest(frozen_state(tokenizer))}".encode()).hexdigest()


def frozen_state(tokenizer: DiscreteTokenizer) -> dict[str, Tensor]:
    """Parameters and buffers by name that post-training must not change: all but those of the decoder modules."""
    decoder = set(tokenizer.decoder_modules())
    prefixes = tuple(f"{name}." for name, module in tokenizer.named_modules() if module in decoder)
    # A decoder module may be a tokenizer's own parameter list; what it may change is also known by identity.
    changing = {id(parameter) for parameter in tokenizer.decoder_parameters()}
    return {
        name: tensor
        for name, tensor in tokenizer.state_dict(keep_vars=True).items()
        if not name.startswith(prefixes) and id(tensor) not in changing
    }


def layout_of(tokenizer: DiscreteTokenizer) -> CodeLayout:
    """Layout of a tokenizer's codes.

    Several indices per place (product and residual quantizers) become groups; indices of another shape, such as those
    of all scales behind each other, become one long row.

    Raises:
        MmpostError: MMP-C101 for a tokenizer without one codebook size or with an open number of codes.
    """
    try:
        shape, size, groups = tuple(tokenizer.index_shape), tokenizer.codebook_size, tokenizer.groups
    except AttributeError as error:
        raise MmpostError(
            "MMP-C101",
            f"{type(tokenizer).__name__} has no codes that a generator could learn ({error}).",
            "Use a tokenizer with one grid of codes, or of groups of codes, per image",
        ) from error
    has_groups = groups > 1 and len(shape) > 1 and shape[-1] == groups
    grid = shape[:-1] if has_groups else shape
    return CodeLayout(int(size), groups if has_groups else 1, grid, token_hash(tokenizer))


def require_same(mine: CodeLayout, theirs: CodeLayout, *, owner: str, other: str) -> None:
    """Refuse two layouts that differ.

    Args:
        mine: Of the first thing.
        theirs: Of the second.
        owner: What the first thing is, with an article.
        other: What the second thing is.

    Raises:
        MmpostError: MMP-C102.
    """
    difference = mine.difference(theirs)
    if difference:
        raise MmpostError(
            "MMP-C102",
            f"{owner} and {other} do not belong together: {difference}.",
            "Use the tokenizer that the codes were made with",
        )
