"""Keys and values of completions under way.

``SharedDecoder`` prefills prompts packed behind each other and keeps one copy of a prompt's keys and values for all of
its completions, which read it as one matrix product per group. Rows that have ended leave, waiting prompts enter.
``CacheDecoder`` does the same work with transformers' own cache, for models that take no attention plan.
``StaticDecoder`` in ``static`` is the ``SharedDecoder`` with tensors of fixed shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from mmpost.adapters.layout import pack_prompts
from mmpost.core.batch import Encoded
from mmpost.core.protocols import Adapter
from mmpost.models.attention import Packed
from mmpost.models.policy import Policy, upcast

# Completion keys and values are stored in steps of this many tokens.
GROW = 64


Pair = tuple[Tensor, Tensor]


class Decoder(Protocol):
    """Rows of completions in a fixed order; new rows come last.

    Attributes:
        keeps_cheaply: Whether ``keep`` moves nothing, so that rows should leave as soon as they have ended.
    """

    keeps_cheaply: bool

    def vacant(self, room: int, n: int) -> int:
        """Number of prompts with ``n`` completions each that may enter now, where at most ``room`` fit."""
        ...

    def admit(self, prompts: Sequence[Encoded], n: int) -> Tensor:
        """Prefill prompts; logits ``[len(prompts) * n, V]`` of the first token of their new rows."""
        ...

    def advance(self, tokens: Tensor) -> Tensor:
        """Feed one token to each row, int64 ``[R]``; logits ``[R, V]`` of the next."""
        ...

    def keep(self, index: Tensor) -> None:
        """Keep only these rows, int64 sorted."""
        ...


def open_decoder(policy: Policy, adapter: Adapter) -> Decoder:
    """The fastest decoder that the model can use."""
    return SharedDecoder(policy, adapter) if policy.packs else CacheDecoder(policy, adapter)


class _Prefill(Packed):
    """Plan of the prompts; keeps keys and values of every layer, ``[T, h, d]``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept: dict[int, Pair] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        self.kept[layer] = key, value
        return super().attend(layer, query, key, value, scale)


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Prompts that the model has read.

    Attributes:
        pairs: Keys and values of each layer, ``[K, h, P, d]``, short prompts filled behind their end.
        lengths: Tokens of each prompt, int64 ``[K]`` on the CPU.
        after: Position behind each prompt, likewise.
        logits: Of the first token behind each prompt, ``[K, V]``.
    """

    pairs: dict[int, Pair]
    lengths: Tensor
    after: Tensor
    logits: Tensor


def prefill(policy: Policy, adapter: Adapter, prompts: Sequence[Encoded]) -> Prefilled:
    """Read prompts as one sequence without padding."""
    batch = pack_prompts(adapter, prompts).to(policy.device)
    assert batch.segments is not None
    plan = _Prefill(batch.segments, policy.device)
    states = policy.hidden(batch.inputs, plan)[batch.at]
    lengths = torch.tensor([segment.length for segment in batch.segments])
    starts = torch.tensor([segment.start for segment in batch.segments])
    place = torch.arange(int(lengths.max()))
    index = torch.where(place < lengths[:, None], starts[:, None] + place, starts[:, None]).to(policy.device)
    pairs = {layer: _pair(tensor[index].transpose(1, 2) for tensor in pair) for layer, pair in plan.kept.items()}
    after = torch.tensor([int(prompt.positions[:, -1].max()) + 1 for prompt in prompts])
    return Prefilled(pairs, lengths, after, policy.logits(states))


class SharedDecoder:
    """One copy of each prompt's keys and values; rows of a group are neighbours."""

    keeps_cheaply = False

    def __init__(self, policy: Policy, adapter: Adapter) -> None:
        self.policy, self.adapter, self.device = policy, adapter, policy.device
        # Per layer: prompts [K, h, P, d] and completions [R, h, capacity, d].
        self.prompt: dict[int, Pair] = {}
        self.own: dict[int, Pair] = {}
        empty = torch.empty(0, dtype=torch.long, device=self.device)
        self.group, self.length, self.next = empty, empty, empty
        self.prompt_length = empty
        self.capacity = 0

    def vacant(self, room: int, n: int) -> int:
        """See ``Decoder``."""
        return room - -(-len(self.group) // n)

    def admit(self, prompts: Sequence[Encoded], n: int) -> Tensor:
        """See ``Decoder``."""
        read = prefill(self.policy, self.adapter, prompts)
        rows = len(prompts) * n
        for layer, fresh in read.pairs.items():
            kept = self.prompt.get(layer)
            self.prompt[layer] = _pair(_stack(kept[i], fresh[i]) if kept else fresh[i].contiguous() for i in (0, 1))
            own = self.own.get(layer)
            room = fresh[0].new_zeros(rows, fresh[0].shape[1], self.capacity, fresh[0].shape[3])
            self.own[layer] = _pair(torch.cat([own[i], room]) if own else room.clone() for i in (0, 1))
        first = len(self.prompt_length)
        self.prompt_length = torch.cat([self.prompt_length, read.lengths.to(self.device)])
        fresh_groups = torch.arange(first, first + len(prompts), device=self.device).repeat_interleave(n)
        self.group = torch.cat([self.group, fresh_groups])
        self.length = torch.cat([self.length, self.length.new_zeros(rows)])
        self.next = torch.cat([self.next, read.after.repeat_interleave(n).to(self.device)])
        self._arrange()
        return read.logits.repeat_interleave(n, 0)

    def advance(self, tokens: Tensor) -> Tensor:
        """See ``Decoder``."""
        self._reserve(int(self.length.max()) + 1)
        axes = self.adapter.position_axes
        positions = self.next.expand(axes, 1, -1) if axes > 1 else self.next[None]
        self.steps = int(self.length.max()) + 1
        self.ragged = bool((self.length + 1 != self.steps).any())
        self.unseen = self._unseen()
        states = self.policy.continued(tokens[None], positions, self)
        self.length, self.next = self.length + 1, self.next + 1
        return self.policy.logits(states)

    def _unseen(self) -> Tensor | None:
        """What each row must not see of its prompt's filling and of its own unused room, ``[R, 1, 1, P + steps]``."""
        if not self.filled and not self.ragged:
            return None
        own = torch.arange(self.steps, device=self.device) > self.length[:, None]
        prompt = torch.arange(int(self.prompt_length.max()), device=self.device) >= self.prompt_length[self.group, None]
        return torch.cat([prompt, own], 1)[:, None, None]

    def keep(self, index: Tensor) -> None:
        """See ``Decoder``."""
        index = index.to(self.device)
        self.own = {layer: _pair(tensor[index] for tensor in pair) for layer, pair in self.own.items()}
        self.length, self.next = self.length[index], self.next[index]
        groups, self.group = torch.unique(self.group[index], return_inverse=True)
        if len(groups) < len(self.prompt_length):
            self.prompt_length = self.prompt_length[groups]
            longest = int(self.prompt_length.max()) if len(groups) else 0
            self.prompt = {
                layer: _pair(tensor[groups, :, :longest] for tensor in pair) for layer, pair in self.prompt.items()
            }
        self._arrange()

    def _arrange(self) -> None:
        """Place of each row in the grid ``[K, n]`` of its group, and which prompt tokens are filling."""
        counts = torch.bincount(self.group, minlength=len(self.prompt_length))
        self.width = int(counts.max()) if len(counts) else 0
        starts = counts.cumsum(0) - counts
        column = torch.arange(len(self.group), device=self.device) - starts[self.group]
        self.place = self.group * self.width + column
        self.full = bool((counts == self.width).all())
        self.grid = torch.zeros(len(counts) * self.width, dtype=torch.long, device=self.device)
        self.grid[self.place] = torch.arange(len(self.group), device=self.device)
        self.every = torch.arange(len(self.group), device=self.device)
        self.filled = bool((self.prompt_length != self.prompt_length.max()).any()) if len(counts) else False

    def _reserve(self, tokens: int) -> None:
        if tokens <= self.capacity:
            return
        more = max(GROW, self.capacity)
        self.capacity += more
        for layer, pair in self.own.items():
            self.own[layer] = _pair(
                torch.cat([tensor, tensor.new_zeros(*tensor.shape[:2], more, tensor.shape[3])], 2) for tensor in pair
            )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """One token per row against its prompt and its own tokens, in one softmax.

        Shapes as in ``attention.Plan`` with ``T = R``.
        """
        own_key, own_value = self.own[layer]
        if self.ragged:
            own_key[self.every, :, self.length], own_value[self.every, :, self.length] = key, value
        else:
            own_key[:, :, self.steps - 1], own_value[:, :, self.steps - 1] = key, value
        query = query * (scale if scale is not None else query.shape[-1] ** -0.5)
        own = own_key[:, :, : self.steps], own_value[:, :, : self.steps]
        spots = None if self.full else (self.grid, self.place)
        return read_both(query, own, self.prompt[layer], self.width, self.unseen, spots)


def read_both(
    query: Tensor, own: Pair, prompt: Pair, width: int, unseen: Tensor | None, spots: Pair | None = None
) -> Tensor:
    """One token per row against its prompt and its own tokens, in one softmax; ``[R, H, d]``.

    Args:
        query: ``[R, H, d]``, scaled.
        own: Keys and values of the rows, ``[R, h, C, d]``.
        prompt: Those of the prompts, ``[K, h, P, d]``, each read by its rows as one matrix product.
        width: Rows of the largest group; ``R = K * width`` without ``spots``.
        unseen: True where a row does not look, broadcast to ``[R, h, H / h, P + C]``; None where it sees all.
        spots: Where groups differ in size: the row at each place of the grid ``[K * width]`` (any, where there is
            none), and the place of each row, ``[R]``.
    """
    rows, heads, size = query.shape
    kv_heads, steps = own[0].shape[1:3]
    repeat = heads // kv_heads
    (own_key, own_value), (prompt_key, prompt_value) = (_pair(t.flatten(0, 1) for t in pair) for pair in (own, prompt))
    on_own = torch.bmm(query.reshape(-1, repeat, size), own_key.transpose(1, 2)).unflatten(0, (rows, kv_heads))
    grouped = query if spots is None else query[spots[0]]
    grouped = grouped.view(-1, width, kv_heads, repeat, size).transpose(1, 2)
    on_prompt = torch.bmm(grouped.reshape(-1, width * repeat, size), prompt_key.transpose(1, 2))
    # [K * h, n * rep, P] -> [R, h, rep, P]
    on_prompt = on_prompt.view(-1, kv_heads, width, repeat, on_prompt.shape[-1]).transpose(1, 2).flatten(0, 1)
    on_prompt = on_prompt if spots is None else on_prompt[spots[1]]
    scores = upcast(torch.cat([on_prompt, on_own], -1))
    if unseen is not None:
        scores = scores.masked_fill(unseen, -torch.inf)
    weights = scores.softmax(-1).to(own_value.dtype)
    on_prompt, on_own = weights.split([on_prompt.shape[-1], steps], -1)
    out = torch.bmm(on_own.reshape(-1, repeat, steps), own_value).view(rows, heads, size)
    # And back: [R, h, rep, P] -> [K * h, n * rep, P]
    on_prompt = on_prompt if spots is None else on_prompt[spots[0]]
    on_prompt = on_prompt.unflatten(0, (-1, width)).transpose(1, 2)
    read = torch.bmm(on_prompt.reshape(-1, width * repeat, on_prompt.shape[-1]), prompt_value)
    read = read.view(-1, kv_heads, width, repeat, size).transpose(1, 2).reshape(-1, heads, size)
    return out + (read if spots is None else read[spots[1]])


def _pair(tensors: Any) -> Pair:
    first, second = tensors
    return first, second


def _stack(old: Tensor, new: Tensor) -> Tensor:
    """Prompts ``[K, h, P, d]`` under each other, the shorter filled with zeros."""
    longest = max(old.shape[2], new.shape[2])
    return torch.cat([_lengthen(old, longest), _lengthen(new, longest)])


def _lengthen(tensor: Tensor, length: int) -> Tensor:
    rows, heads, present, width = tensor.shape
    if present == length:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(rows, heads, length - present, width)], 2)


class CacheDecoder:
    """transformers' cache: prompts padded on the left, prefilled once, then copied for every completion."""

    keeps_cheaply = False

    def __init__(self, policy: Policy, adapter: Adapter) -> None:
        self.policy, self.adapter = policy, adapter
        self.cache: Any = None

    def vacant(self, room: int, n: int) -> int:
        """See ``Decoder``; all prompts at once, because the cache has one length."""
        return room if self.cache is None else 0

    def admit(self, prompts: Sequence[Encoded], n: int) -> Tensor:
        """See ``Decoder``; once only."""
        batch = self.adapter.collate(prompts, left=True).to(self.policy.device)
        self.cache = DynamicCache(config=self.policy.inner.config.get_text_config())
        out = self.policy.inner.base_model(**batch.inputs, past_key_values=self.cache, use_cache=True)
        self.cache.batch_repeat_interleave(n)
        self.attend = batch.inputs["attention_mask"].repeat_interleave(n, 0)
        positions = batch.inputs["position_ids"]
        # All axes go on behind the position of the prompt's last token; padding is on the left.
        self.next = (positions[..., -1:] + 1).repeat_interleave(n, -2)
        if positions.dim() == 3:
            self.next = self.next.amax(0, keepdim=True).expand(3, -1, -1)
        return self.policy.logits(out.last_hidden_state[:, -1]).repeat_interleave(n, 0)

    def advance(self, tokens: Tensor) -> Tensor:
        """See ``Decoder``."""
        self.attend = torch.cat([self.attend, self.attend.new_ones(len(tokens), 1)], 1)
        inputs = {"input_ids": tokens[:, None], "attention_mask": self.attend, "position_ids": self.next}
        out = self.policy.inner.base_model(**inputs, past_key_values=self.cache, use_cache=True)
        self.next = self.next + 1
        return self.policy.logits(out.last_hidden_state[:, -1])

    def keep(self, index: Tensor) -> None:
        """See ``Decoder``."""
        index = index.to(self.policy.device)
        self.cache.batch_select_indices(index)
        self.attend, self.next = self.attend[index], self.next.index_select(-2, index)
