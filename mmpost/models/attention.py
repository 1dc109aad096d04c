"""Attention that knows how a packed sequence is cut, put into Hugging Face models through their own plug point.

transformers lets an attention implementation be registered by name. Ours hands queries, keys and values to a ``Plan``
when the forward call carries one, and to the model's usual implementation when it does not. Everything else of the
model (projections, rotary positions, norms, feed-forward) works on single tokens and does not care how they lie.

``Packed`` is the plan of training: documents behind each other, and prompts that several completions share. It is
exact: the keys and values that a token sees, and their order, are those of its own unpacked row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmpost.core.batch import Segment

PREFIX = "mmpost_"
# The cost rule counts query-key pairs. These two are estimates for small CPU models, where both ways are close to each
# other wherever the rule is in doubt. Pairs that cost as much as one more call (its launch, gathers and scatters):
CALL_PAIRS = 30_000
# Moving one key and value into a branch's own copy costs as much as this many query-key pairs.
COPY_PAIRS = 2
# Segments share a call while padding them to the longest wastes at most this share of the pairs.
MAX_WASTE = 0.3


class Plan(Protocol):
    """How the tokens of one forward call attend."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention output.

        Args:
            layer: Index of the decoder layer.
            query: ``[T, H, d]`` with rotary positions applied.
            key: ``[T, h, d]``, ``h`` dividing ``H``.
            value: ``[T, h, d]``.
            scale: Factor on the scores; None for 1/sqrt(d).

        Returns:
            ``[T, H, d]``.
        """
        ...


# Masks are made once per forward call, outside of recomputed layers; a plan needs none.
_no_mask: ContextVar[bool] = ContextVar("no_mask", default=False)


@contextmanager
def planned() -> Iterator[None]:
    """Inside, models make no attention mask: the plan of the call says what is seen."""
    token = _no_mask.set(True)
    try:
        yield
    finally:
        _no_mask.reset(token)


def install(model: Any) -> bool:
    """Let a model take plans.

    Args:
        model: A Hugging Face model with the attention implementation that it shall use without a plan.

    Returns:
        False when its language model cannot take plans; the model is then left as it is.
    """
    language = language_model(model)
    if not getattr(language, "_supports_attention_backend", False):
        return False
    config = language.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        # A sliding window counts tokens of a row, not of a packed sequence.
        return False
    base = config._attn_implementation
    if not base.startswith(PREFIX):
        _register(base)
        config._attn_implementation = PREFIX + base
    return True


def language_model(model: Any) -> Any:
    """The decoder inside a model; a text-only model is its own."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    base = inner.base_model
    return getattr(base, "language_model", None) or getattr(base, "text_model", None) or base


def _register(base: str) -> None:
    """Make ``mmpost_<base>`` known to transformers."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        plan: Plan | None = kwargs.pop("plan", None)
        if plan is None:
            usual = ALL_ATTENTION_FUNCTIONS[base] if base != "eager" else _eager(module)
            out: tuple[Tensor, Tensor | None] = usual(module, query, key, value, attention_mask, **kwargs)
            return out
        flat_query, flat_key, flat_value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return plan.attend(module.layer_idx, flat_query, flat_key, flat_value, kwargs.get("scaling"))[None], None

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        if _no_mask.get():
            return None
        made: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **kwargs)
        return made

    AttentionInterface.register(PREFIX + base, attention)
    AttentionMaskInterface.register(PREFIX + base, mask)


def _eager(module: Any) -> Callable[..., Any]:
    """The plain implementation, which each model file has for itself."""
    function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return function


@dataclass(frozen=True, slots=True)
class _Call:
    """Segments that attend together.

    Attributes:
        index: Tokens of the queries, ``[b, l]``; short ones are filled with their first token.
        prefix: Tokens before them that all see, as a range of the packed sequence; keys are ``prefix + index``.
        mask: ``[1 or b, 1, l, keys]``, True where seen; None for plainly causal.
    """

    index: Tensor
    prefix: tuple[int, int] | None
    mask: Tensor | None


class Packed:
    """Plan of a packed sequence.

    A group of completions attends in one of two ways, whichever costs less at its shape: as one block with a mask
    (prompt and completions as one row; quadratic in all of them), or in two passes (the prompt by itself; the
    completions as a batch against the prompt's keys and their own).
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.calls: list[_Call] = []
        places: list[Tensor] = []
        plain, groups = _families(segments)
        blocks: list[list[Segment]] = []
        for prompt, branches in groups:
            if block_costs_less(prompt.length, [branch.length for branch in branches]):
                blocks.append([prompt, *branches])
                continue
            plain.append(prompt)
            index, valid = _index(branches)
            mask = torch.ones(index.shape[1], prompt.length + index.shape[1], dtype=torch.bool).tril(prompt.length)
            self.calls.append(_Call(index, (prompt.start, prompt.start + prompt.length), mask[None, None]))
            places.append(torch.where(valid, index, -1).flatten())
        for bucket in _buckets([[segment] for segment in plain]):
            index, valid = _index([family[0] for family in bucket])
            self.calls.append(_Call(index, None, None))
            places.append(torch.where(valid, index, -1).flatten())
        for bucket in _buckets(blocks):
            index, valid, mask = _blocks(bucket)
            self.calls.append(_Call(index, None, mask))
            places.append(torch.where(valid, index, -1).flatten())
        order = torch.cat(places)
        total = segments[-1].start + segments[-1].length
        back = torch.empty(total, dtype=torch.long)
        real = (order >= 0).nonzero()[:, 0]
        back[order[real]] = real
        self.back = back.to(device)
        self.calls = [
            _Call(call.index.to(device), call.prefix, None if call.mask is None else call.mask.to(device))
            for call in self.calls
        ]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See ``Plan``."""
        outs = [self._call(call, query, key, value, scale) for call in self.calls]
        return torch.cat(outs).index_select(0, self.back)

    def _call(self, call: _Call, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        b, length = call.index.shape
        flat = call.index.flatten()
        q, k, v = (tensor.index_select(0, flat).unflatten(0, (b, length)) for tensor in (query, key, value))
        if call.prefix is not None:
            start, end = call.prefix
            k = torch.cat([key[start:end].expand(b, -1, -1, -1), k], 1)
            v = torch.cat([value[start:end].expand(b, -1, -1, -1), v], 1)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=call.mask,
            is_causal=call.mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2).flatten(0, 1)


def block_costs_less(prompt: int, branches: Sequence[int]) -> bool:
    """The cost rule: whether one masked block is cheaper than two passes.

    Args:
        prompt: Tokens of the prompt.
        branches: Tokens of each completion.
    """
    total = prompt + sum(branches)
    longest = max(branches)
    keys = len(branches) * (prompt + longest)
    two_passes = prompt * prompt / 2 + longest * keys + COPY_PAIRS * keys + CALL_PAIRS
    return total * total < two_passes


def _families(segments: Sequence[Segment]) -> tuple[list[Segment], list[tuple[Segment, list[Segment]]]]:
    """Segments that stand alone, and prefixes with what continues them."""
    branches: dict[int, list[Segment]] = {}
    for segment in segments:
        if segment.prefix is not None:
            branches.setdefault(segment.prefix, []).append(segment)
    alone = [s for number, s in enumerate(segments) if s.prefix is None and number not in branches]
    return alone, [(segments[number], found) for number, found in branches.items()]


def _buckets(families: Sequence[list[Segment]]) -> list[list[list[Segment]]]:
    """Families of similar length, so that padding them to the longest wastes little."""

    def length(family: list[Segment]) -> int:
        return sum(segment.length for segment in family)

    out: list[list[list[Segment]]] = []
    used = 0
    for family in sorted(families, key=length, reverse=True):
        pairs = length(family) ** 2
        if out:
            longest = length(out[-1][0]) ** 2
            grown = longest * (len(out[-1]) + 1)
            if grown - used - pairs <= max(MAX_WASTE * grown, CALL_PAIRS):
                out[-1].append(family)
                used += pairs
                continue
        out.append([family])
        used = pairs
    return out


def _index(segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    """Tokens of segments ``[b, l]`` and which of them are real; filled with the first token, which is always there."""
    lengths = torch.tensor([segment.length for segment in segments])
    starts = torch.tensor([segment.start for segment in segments])
    place = torch.arange(int(lengths.max()))
    valid = place < lengths[:, None]
    return torch.where(valid, starts[:, None] + place, starts[:, None]), valid


def _blocks(families: Sequence[list[Segment]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of whole groups ``[b, l]``, which of them are real, and what sees what ``[b, 1, l, l]``."""
    longest = max(sum(segment.length for segment in family) for family in families)
    index = torch.empty(len(families), longest, dtype=torch.long)
    owner = torch.full((len(families), longest), -1)
    for i, family in enumerate(families):
        tokens = torch.cat([torch.arange(s.start, s.start + s.length) for s in family])
        index[i] = family[0].start
        index[i, : len(tokens)] = tokens
        sizes = torch.tensor([s.length for s in family])
        owner[i, : len(tokens)] = torch.repeat_interleave(torch.arange(len(family)), sizes)
    place = torch.arange(longest)
    causal = place[:, None] >= place
    same = owner[:, :, None] == owner[:, None, :]
    # Owner 0 is the prompt, which all see; filling (-1) sees filling only, so that no row of the mask is empty.
    prompt = (owner[:, None, :] == 0) & (owner[:, :, None] >= 0)
    return index, owner >= 0, (causal & (same | prompt))[:, None]
