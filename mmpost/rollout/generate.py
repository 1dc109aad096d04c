"""Completions by the local model: each prompt is preprocessed, encoded and prefilled once, whatever the group size.

Sampling is counter-based: the random number behind a token is a function of (seed, prompt, generation, position), so
completions depend neither on batch composition, nor on the number of processes, nor on an interruption.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmpost.core import seeding
from mmpost.core.batch import Encoded
from mmpost.core.protocols import Adapter
from mmpost.core.rollout import Rollout
from mmpost.models.policy import Policy
from mmpost.rollout.decode import Decoder, open_decoder
from mmpost.rollout.static import StaticDecoder

# Rows that have ended leave the batch once they are this share of it; below, copying the cache costs more.
COMPACT_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        max_new_tokens: Length limit.
        temperature: Logits are divided by it; 0 takes the most likely token.
        top_p: Smallest set of tokens with at least this probability is kept; 1 keeps all.
        seed: Seed of the run.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def complete(
    policy: Policy,
    adapter: Adapter,
    prompts: Sequence[Encoded],
    uids: Sequence[int],
    *,
    n: int,
    sampling: Sampling,
    batch_size: int,
    first_generation: Sequence[int] | int = 0,
    static: StaticDecoder | None = None,
) -> list[list[Rollout]]:
    """Sample ``n`` completions of each prompt.

    Args:
        policy: The model; it is run in evaluation mode without gradient.
        adapter: Packs prompts and decodes completions.
        prompts: Encoded prompts, distinct or not.
        uids: Number of each prompt in the run; keys the random draws.
        n: Completions per prompt.
        sampling: Length, temperature, nucleus, seed.
        batch_size: Completions decoded together.
        first_generation: Number of each prompt's first completion, when it has been completed before.
        static: Decodes in tensors of fixed shapes; None takes the fastest decoder whose shapes follow the rows.

    Returns:
        Rollouts per prompt in generation order. ``logp`` is that of the sampled token under the policy at the
        sampling temperature, before the nucleus cut and before media tokens are ruled out.
    """
    first = np.broadcast_to(np.asarray(first_generation, dtype=np.int64), len(prompts))
    keys = np.repeat(np.asarray(uids, dtype=np.int64), n), (first[:, None] + np.arange(n)).ravel()
    was_training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            rows = _Rows(adapter, keys, sampling, policy.device)
            room = max(1, batch_size // n)
            if static is not None and prompts:
                static.begin(prompts, n, room, sampling.max_new_tokens)
            _decode(policy, adapter, prompts, n, rows, room, static)
    finally:
        policy.train(was_training)
    done = rows.rollouts()
    return [done[i : i + n] for i in range(0, len(done), n)]


def _decode(
    policy: Policy,
    adapter: Adapter,
    prompts: Sequence[Encoded],
    n: int,
    rows: _Rows,
    room: int,
    static: StaticDecoder | None,
) -> None:
    """Run all prompts, ``room`` of them at a time; a prompt enters when the rows of others have ended."""
    waiting = deque(range(len(prompts)))
    live = np.empty(0, dtype=np.int64)
    while waiting or len(live):
        if not len(live):
            decoder: Decoder = open_decoder(policy, adapter) if static is None else static.emptied()
        free = decoder.vacant(room, n)
        if waiting and free > 0:
            entering = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            logits = decoder.admit([prompts[i] for i in entering], n)
            fresh = (np.asarray(entering)[:, None] * n + np.arange(n)).ravel()
            rows.draw(fresh, logits)
            live = np.concatenate([live, fresh])
        else:
            rows.draw(live, decoder.advance(rows.last(live)))
        ended = rows.ended[live]
        if ended.all():
            live = live[:0]
        elif ended.any() and (decoder.keeps_cheaply or ended.mean() > COMPACT_SHARE):
            decoder.keep(torch.from_numpy((~ended).nonzero()[0]))
            live = live[~ended]


class _Rows:
    """What has been drawn for every completion of a call."""

    def __init__(
        self, adapter: Adapter, keys: tuple[np.ndarray, np.ndarray], sampling: Sampling, device: torch.device
    ) -> None:
        self.adapter, self.keys, self.sampling, self.device = adapter, keys, sampling, device
        count = len(keys[0])
        self.tokens = np.zeros((count, sampling.max_new_tokens), dtype=np.int64)
        self.logps = np.zeros((count, sampling.max_new_tokens), dtype=np.float32)
        self.lengths = np.zeros(count, dtype=np.int64)
        self.stopped = np.zeros(count, dtype=bool)
        self.ended = np.zeros(count, dtype=bool)
        self.media = torch.tensor(adapter.media_token_ids, device=device)

    def draw(self, index: np.ndarray, logits: Tensor) -> None:
        """One more token for the rows ``index``; those that have ended already get none."""
        at = np.minimum(self.lengths[index], self.sampling.max_new_tokens - 1)
        uids, generations = self.keys[0][index], self.keys[1][index]
        chosen, logp = _sample(logits, self.media, self.sampling, uids, generations, at)
        open_rows = ~self.ended[index]
        fresh, place = index[open_rows], at[open_rows]
        self.tokens[fresh, place] = chosen.cpu().numpy()[open_rows]
        self.logps[fresh, place] = logp.float().cpu().numpy()[open_rows]
        self.lengths[fresh] += 1
        self.stopped[fresh] = np.isin(self.tokens[fresh, place], self.adapter.stop_token_ids)
        self.ended[fresh] = self.stopped[fresh] | (self.lengths[fresh] == self.sampling.max_new_tokens)

    def last(self, index: np.ndarray) -> Tensor:
        """Newest token of each row."""
        return torch.from_numpy(self.tokens[index, self.lengths[index] - 1]).to(self.device)

    def rollouts(self) -> list[Rollout]:
        """All completions in order."""
        return [
            Rollout(
                self.tokens[i, :length],
                self.logps[i, :length],
                self.adapter.decode(self.tokens[i, :length].tolist()),
                truncated=not bool(self.stopped[i]),
            )
            for i, length in enumerate(self.lengths)
        ]


def _sample(
    logits: Tensor, media: Tensor, sampling: Sampling, uids: np.ndarray, generations: np.ndarray, t: np.ndarray | int
) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF in float64, and its log-probability before any cut."""
    scaled = logits / (sampling.temperature or 1.0)
    # A sampled media placeholder would have no features behind it. It is ruled out before the softmax: a large logit
    # of a placeholder must not push all other tokens to probability 0.
    allowed = scaled.index_fill(-1, media, -torch.inf)
    if sampling.temperature == 0:
        chosen = allowed.argmax(-1)
    else:
        probability = allowed.double().softmax(-1)
        if sampling.top_p < 1:
            probability = _nucleus(probability, sampling.top_p)
        u = torch.from_numpy(np.atleast_1d(seeding.uniform(sampling.seed, "sampling", uids, generations, t)))
        edges = probability.cumsum(-1)
        chosen = torch.searchsorted(edges, u.to(edges.device)[:, None] * edges[:, -1:], right=True)[:, 0]
        chosen = chosen.clamp(max=logits.shape[-1] - 1)
    return chosen, scaled.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]


def _nucleus(probability: Tensor, top_p: float) -> Tensor:
    """Zero all but the most likely tokens that together reach ``top_p``."""
    ordered, index = probability.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0)
    return torch.zeros_like(probability).scatter(-1, index, kept)
