"""The shared decoder with tensors of fixed shapes, so that one compiled step, or one CUDA graph, serves every token.

The batch has slots, one per prompt with all of its completions. A slot is free again when the last of its completions
has ended; the next waiting prompt then enters it. Tensors stay where they are from one rollout to the next, and only
their sizes that ``ladder`` names are ever used, so that there are few shapes to compile.

A step costs as much as the sizes say, not as what is in them: free slots and completions that have ended are computed
and thrown away. That pays where a step is bound by launching its kernels, as on a GPU, and not on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmpost.core.batch import Encoded
from mmpost.core.errors import MmpostError
from mmpost.core.protocols import Adapter
from mmpost.models.policy import Policy
from mmpost.rollout.decode import Pair, prefill, read_both

Compile = bool | Literal["auto"]

# Prompts take a multiple of this many tokens.
PROMPT_STEP = 64
# Completions see their first 128 tokens, then four times as many, and so on; fewer sizes mean fewer compilations.
FIRST_TOKENS, TOKENS_FACTOR = 128, 4
# The batch shrinks once this many times fewer slots would do.
SHRINK = 4
# Variants of the step that torch keeps; its own limit of 8 is for functions that have one good shape.
VARIANTS = 64

_log = logging.getLogger(__name__)


def ladder(count: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least ``count``."""
    power = 1 << (count - 1).bit_length()
    half_way = 3 * power // 4
    return half_way if power >= 4 and half_way >= count else power


def token_sizes(limit: int) -> list[int]:
    """Sizes of the completions' part in ascending order; the last holds ``limit`` tokens."""
    sizes = [FIRST_TOKENS]
    while sizes[-1] < limit:
        sizes.append(sizes[-1] * TOKENS_FACTOR)
    return [*sizes[:-1], min(sizes[-1], -(-limit // PROMPT_STEP) * PROMPT_STEP)]


class View:
    """The part of the buffers that a step uses; an object per shape, because torch compiles for each.

    Attributes:
        prompt: Keys and values of the prompts by layer, ``[K, h, P, d]``.
        own: Those of the completions, ``[K * n, h, C, d]``.
        prompt_length: int64 ``[K]``; 0 for a free slot.
        length: Tokens that each slot's completions have, int64 ``[K]``.
        next: Position of their next token, int64 ``[K]``.
        width: Completions per prompt, n.
        axes: Axes of the position ids.
    """

    def __init__(self, buffers: Buffers, slots: int, width: int, tokens: int, axes: int) -> None:
        rows = slots * width
        self.prompt = {i: (k[:slots], v[:slots]) for i, (k, v) in buffers.prompt.items()}
        self.own = {i: (k[:rows, :, :tokens], v[:rows, :, :tokens]) for i, (k, v) in buffers.own.items()}
        self.prompt_length = buffers.prompt_length[:slots]
        self.length = buffers.length[:slots]
        self.next = buffers.next[:slots]
        self.width, self.axes = width, axes
        pairs = [*self.prompt.values(), *self.own.values()]
        for tensor in (*(t for pair in pairs for t in pair), self.prompt_length, self.length, self.next):
            # CUDA graphs then read and write them in place. A new address makes a new graph, not a new compilation.
            torch._dynamo.mark_static_address(tensor, guard=False)


class _Step:
    """The plan of one token per row."""

    def __init__(self, view: View) -> None:
        self.view = view
        device = view.length.device
        slots, width = len(view.length), view.width
        key = next(iter(view.own.values()))[0]
        prompts = next(iter(view.prompt.values()))[0].shape[2]
        beyond = torch.arange(prompts, device=device) >= view.prompt_length[:, None]
        ahead = torch.arange(key.shape[2], device=device) > view.length[:, None]
        self.unseen = torch.cat([beyond, ahead], 1).repeat_interleave(width, 0)[:, None, None]
        self.row = torch.arange(slots * width, device=device)
        self.at = view.length.repeat_interleave(width)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See ``attention.Plan``."""
        own_key, own_value = self.view.own[layer]
        own_key[self.row, :, self.at] = key
        own_value[self.row, :, self.at] = value
        query = query * (scale if scale is not None else query.shape[-1] ** -0.5)
        return read_both(query, (own_key, own_value), self.view.prompt[layer], self.view.width, self.unseen)


def step(policy: Policy, view: View, tokens: Tensor) -> Tensor:
    """Logits ``[K * n, V]`` behind one more token of each row, int64 ``[K * n]``; what is compiled."""
    positions = view.next.repeat_interleave(view.width)[None]
    if view.axes > 1:
        positions = positions.expand(view.axes, 1, -1)
    return policy.logits(policy.continued(tokens[None], positions, _Step(view)))


class Buffers:
    """Keys and values for at most so many slots, rows and tokens; they are zero until written, hence finite."""

    def __init__(self, like: dict[int, Pair], *, slots: int, rows: int, prompt: int, tokens: int) -> None:
        self.slots, self.rows, self.prompt_tokens, self.tokens = slots, rows, prompt, tokens
        self.prompt: dict[int, Pair] = {}
        self.own: dict[int, Pair] = {}
        for layer, (key, value) in like.items():
            shapes = [(t, t.shape[1], t.shape[3]) for t in (key, value)]
            first, second = (t.new_zeros(slots, heads, prompt, size) for t, heads, size in shapes)
            self.prompt[layer] = first, second
            first, second = (t.new_zeros(rows, heads, tokens, size) for t, heads, size in shapes)
            self.own[layer] = first, second
        self.like = next(iter(like.values()))[0]
        self.prompt_length, self.length, self.next = (
            torch.zeros(slots, dtype=torch.long, device=self.like.device) for _ in range(3)
        )

    def fits(self, like: dict[int, Pair], *, slots: int, rows: int, prompt: int, tokens: int) -> bool:
        """Whether the buffers are large enough and of the right kind."""
        fresh = next(iter(like.values()))[0]
        large = slots <= self.slots and rows <= self.rows and prompt <= self.prompt_tokens and tokens <= self.tokens
        return large and fresh.dtype == self.like.dtype and fresh.device == self.like.device


class StaticDecoder:
    """A ``Decoder`` for models that take plans; one object serves all rollouts of a run.

    Args:
        policy: The model.
        adapter: Packs prompts.
        compiled: Whether the step runs through ``torch.compile``; ``auto``: on CUDA, and without where that fails.
        backend: Of ``torch.compile``; tests name others.
    """

    keeps_cheaply = True

    def __init__(self, policy: Policy, adapter: Adapter, compiled: Compile = False, backend: str = "inductor") -> None:
        self.policy, self.adapter, self.device = policy, adapter, policy.device
        self.required = compiled is True
        self.compiled = compiled if isinstance(compiled, bool) else self.device.type == "cuda"
        self._step: Any = step
        if self.compiled:
            self._step = _compile(backend)
        self.buffers: Buffers | None = None
        self.views: dict[tuple[int, int, int], View] = {}
        self.longest_prompt = 0

    def begin(self, prompts: Sequence[Encoded], n: int, room: int, limit: int) -> None:
        """Say what the rollout needs, before its first prompt enters.

        Args:
            prompts: All that will enter.
            n: Completions of each.
            room: Prompts in the batch at most.
            limit: Tokens of a completion at most.
        """
        self.width, self.most = n, min(room, ladder(min(room, len(prompts))))
        longest = max(len(prompt) for prompt in prompts)
        # Never shorter than before: another length would be another shape.
        self.longest_prompt = max(self.longest_prompt, PROMPT_STEP * ladder(-(-longest // PROMPT_STEP)))
        self.sizes = token_sizes(limit)
        self.emptied()

    def emptied(self) -> StaticDecoder:
        """The decoder with all slots free."""
        self.slots = self.most
        self.free = list(range(self.slots))
        self.count = [0] * self.slots  # tokens of each slot's completions, as ``Buffers.length``
        self.rows = torch.empty(0, dtype=torch.long)
        return self

    def vacant(self, room: int, n: int) -> int:
        """See ``Decoder``."""
        return len(self.free)

    def admit(self, prompts: Sequence[Encoded], n: int) -> Tensor:
        """See ``Decoder``."""
        read = prefill(self.policy, self.adapter, prompts)
        buffers = self._room(read.pairs)
        taken, self.free = self.free[: len(prompts)], self.free[len(prompts) :]
        spots = torch.tensor(taken)
        there = spots.to(self.device)
        for layer, fresh in read.pairs.items():
            for kept, tensor in zip(buffers.prompt[layer], fresh, strict=True):
                kept[there, :, : tensor.shape[2]] = tensor
        buffers.prompt_length[there] = read.lengths.to(self.device)
        buffers.length[there] = 0
        buffers.next[there] = read.after.to(self.device)
        for slot in taken:
            self.count[slot] = 0
        self.rows = torch.cat([self.rows, (spots[:, None] * n + torch.arange(n)).flatten()])
        return read.logits.repeat_interleave(n, 0)

    def _room(self, like: dict[int, Pair]) -> Buffers:
        """Buffers that are large enough; new ones only while nothing is in them."""
        needs = {
            "slots": self.most,
            "rows": self.most * self.width,
            "prompt": self.longest_prompt,
            "tokens": self.sizes[-1],
        }
        old = self.buffers
        if old is None or not old.fits(like, **needs):
            if old is not None:
                had = {"slots": old.slots, "rows": old.rows, "prompt": old.prompt_tokens, "tokens": old.tokens}
                needs = {name: max(size, had[name]) for name, size in needs.items()}
            self.buffers, self.views = None, {}
            self.buffers = Buffers(like, **needs)
        assert self.buffers is not None
        return self.buffers

    def advance(self, tokens: Tensor) -> Tensor:
        """See ``Decoder``."""
        self._shrink()
        assert self.buffers is not None
        used = self._used()
        longest = max(self.count[slot] for slot in used) + 1
        size = next(size for size in self.sizes if size >= longest)
        view = self._view(size)
        every = torch.zeros(self.slots * self.width, dtype=torch.long, device=self.device)
        rows = self.rows.to(self.device)
        every[rows] = tokens
        logits = self._run(view, every)
        there = torch.tensor(used, device=self.device)
        self.buffers.length[there] += 1
        self.buffers.next[there] += 1
        for slot in used:
            self.count[slot] += 1
        # A copy: the next replay of a CUDA graph overwrites its outputs.
        return logits[rows]

    def keep(self, index: Tensor) -> None:
        """See ``Decoder``."""
        before = self._used()
        self.rows = self.rows[index.cpu()]
        after = set(self._used())
        gone = [slot for slot in before if slot not in after]
        self.free = sorted([*self.free, *gone])

    def _used(self) -> list[int]:
        """Slots with completions under way."""
        found: list[int] = torch.unique(self.rows // self.width).tolist()
        return found

    def _view(self, tokens: int) -> View:
        key = self.slots, self.width, tokens
        if key not in self.views:
            assert self.buffers is not None
            self.views[key] = View(self.buffers, self.slots, self.width, tokens, self.adapter.position_axes)
        return self.views[key]

    def _shrink(self) -> None:
        """Use fewer slots when most are free; no prompt is waiting then, or it would have entered."""
        used = self._used()
        slots = self.slots
        while slots > 1 and len(used) <= -(-slots // SHRINK) < slots:
            slots = -(-slots // SHRINK)
        if slots == self.slots:
            return
        assert self.buffers is not None
        targets = [slot for slot in range(slots) if slot not in set(used)]
        for slot in [slot for slot in used if slot >= slots]:
            self._move(slot, targets.pop(0))
        self.slots, self.free = slots, targets

    def _move(self, old: int, new: int) -> None:
        """Bring a slot to another place."""
        buffers, width = self.buffers, self.width
        assert buffers is not None
        for layer in buffers.prompt:
            for tensor in buffers.prompt[layer]:
                tensor[new] = tensor[old]
            for tensor in buffers.own[layer]:
                tensor[new * width : (new + 1) * width] = tensor[old * width : (old + 1) * width]
        for counts in (buffers.prompt_length, buffers.length, buffers.next):
            counts[new] = counts[old]
        self.count[new] = self.count[old]
        self.rows = torch.where(self.rows // width == old, self.rows + (new - old) * width, self.rows)

    def _run(self, view: View, tokens: Tensor) -> Tensor:
        """One step, compiled where that was asked for and works."""
        if not self.compiled:
            return step(self.policy, view, tokens)
        try:
            torch.compiler.cudagraph_mark_step_begin()
            logits: Tensor = self._step(self.policy, view, tokens)
            return logits
        except torch._dynamo.exc.TorchDynamoException as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if self.required:
                raise MmpostError(
                    "MMP-E066",
                    f"rollout.compile is true, but torch.compile cannot take the decode step of this model: {why}",
                    "Set rollout.compile=auto, which goes on without it, or false.",
                ) from error
            _log.warning("rollouts go on without torch.compile, which failed: %s", why)
            self.compiled = False
            return step(self.policy, view, tokens)


def _compile(backend: str) -> Any:
    """The step as one graph for each shape, on CUDA as a CUDA graph."""
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, VARIANTS)
    # Only inductor has modes; this one records CUDA graphs.
    mode = "reduce-overhead" if backend == "inductor" else None
    return torch.compile(step, backend=backend, fullgraph=True, dynamic=False, mode=mode)


def usable(policy: Policy) -> bool:
    """Whether the model takes plans; says once when not."""
    if not policy.packs:
        _log.warning("rollout.cache=static needs a model with full attention in every layer; it stays dynamic")
    return policy.packs
