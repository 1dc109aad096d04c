"""Completions by the local model: each prompt is preprocessed, encoded and prefilled once, whatever the group size.

Sampling is counter-based: the random number behind a token is a function of (seed, prompt, generation, position), so
completions depend neither on batch composition, nor on the number of processes, nor on an interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from mmpost.core import seeding
from mmpost.core.batch import Encoded
from mmpost.core.protocols import Adapter
from mmpost.core.rollout import Rollout
from mmpost.models.policy import Policy, upcast

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
) -> list[list[Rollout]]:
    """Sample ``n`` completions of each prompt.

    Args:
        policy: The model; it is run in evaluation mode without gradient.
        adapter: Pads prompts and decodes completions.
        prompts: Encoded prompts, distinct or not.
        uids: Number of each prompt in the run; keys the random draws.
        n: Completions per prompt.
        sampling: Length, temperature, nucleus, seed.
        batch_size: Completions decoded together.

    Returns:
        Rollouts per prompt in generation order. ``logp`` is that of the sampled token under the policy at the
        sampling temperature, before the nucleus cut and before media tokens are ruled out.
    """
    per_batch = max(1, batch_size // n)
    was_training = policy.training
    policy.eval()
    done: list[list[Rollout]] = []
    try:
        with torch.no_grad():
            for start in range(0, len(prompts), per_batch):
                part = slice(start, start + per_batch)
                done.extend(_complete_batch(policy, adapter, prompts[part], uids[part], n, sampling))
    finally:
        policy.train(was_training)
    return done


def _complete_batch(
    policy: Policy, adapter: Adapter, prompts: Sequence[Encoded], uids: Sequence[int], n: int, sampling: Sampling
) -> list[list[Rollout]]:
    decoder = _Decoder(policy, adapter, prompts, n)
    rows = len(prompts) * n
    keys = np.repeat(np.asarray(uids, dtype=np.int64), n), np.tile(np.arange(n), len(prompts))
    tokens = torch.zeros(rows, sampling.max_new_tokens, dtype=torch.long)
    logps = torch.zeros(rows, sampling.max_new_tokens)
    lengths = torch.zeros(rows, dtype=torch.long)
    ended = torch.zeros(rows, dtype=torch.bool)
    stop = torch.tensor(adapter.stop_token_ids)
    media = torch.tensor(adapter.media_token_ids, device=policy.device)
    for t in range(sampling.max_new_tokens):
        live = decoder.rows
        chosen, logp = _sample(decoder.logits(), media, sampling, keys[0][live], keys[1][live], t)
        chosen, logp = chosen.cpu(), logp.float().cpu()
        index = torch.from_numpy(live)
        fresh = ~ended[index]
        tokens[index[fresh], t] = chosen[fresh]
        logps[index[fresh], t] = logp[fresh]
        lengths[index[fresh]] += 1
        ended[index] |= torch.isin(chosen, stop)
        if ended.all() or t + 1 == sampling.max_new_tokens:
            break
        open_rows = (~ended[index]).numpy()
        if (~open_rows).mean() > COMPACT_SHARE:
            decoder.keep(open_rows)
            chosen = chosen[torch.from_numpy(open_rows)]
        decoder.advance(chosen.to(policy.device))
    rollouts = [
        Rollout(
            tokens[i, : lengths[i]].numpy(),
            logps[i, : lengths[i]].numpy(),
            adapter.decode(tokens[i, : lengths[i]].tolist()),
            truncated=not bool(ended[i]),
        )
        for i in range(rows)
    ]
    return [rollouts[i : i + n] for i in range(0, rows, n)]


def _sample(
    logits: Tensor, media: Tensor, sampling: Sampling, uids: np.ndarray, generations: np.ndarray, t: int
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


class _Decoder:
    """Cache, attention mask and positions of the completions under way."""

    def __init__(self, policy: Policy, adapter: Adapter, prompts: Sequence[Encoded], n: int) -> None:
        self.policy = policy
        batch = adapter.collate(prompts, left=True).to(policy.device)
        self.cache: Any = DynamicCache(config=policy.inner.config.get_text_config())
        out = policy.hidden(batch.inputs, past_key_values=self.cache, use_cache=True)
        # The one prefill of each prompt is fanned out to its n completions.
        self.cache.batch_repeat_interleave(n)
        self.state = out.last_hidden_state[:, -1].repeat_interleave(n, 0)
        self.attend = batch.inputs["attention_mask"].repeat_interleave(n, 0)
        positions = batch.inputs["position_ids"]
        # All axes go on behind the largest position of the prompt.
        self.next = (positions.amax(-1, keepdim=True) + 1).repeat_interleave(n, -2)
        if positions.dim() == 3:
            self.next = self.next.amax(0, keepdim=True).expand(3, -1, -1)
        self.rows = np.arange(len(prompts) * n)

    def logits(self) -> Tensor:
        """``[rows, V]`` logits of the next token."""
        return upcast(self.policy.head(self.state))

    def advance(self, chosen: Tensor) -> None:
        """Feed one token per row."""
        self.attend = torch.cat([self.attend, self.attend.new_ones(len(chosen), 1)], 1)
        inputs = {"input_ids": chosen[:, None], "attention_mask": self.attend, "position_ids": self.next}
        out = self.policy.hidden(inputs, past_key_values=self.cache, use_cache=True)
        self.state = out.last_hidden_state[:, -1]
        self.next = self.next + 1

    def keep(self, mask: np.ndarray) -> None:
        """Drop rows that have ended."""
        index = torch.from_numpy(mask.nonzero()[0]).to(self.policy.device)
        self.cache.batch_select_indices(index)
        self.attend, self.next = self.attend[index], self.next.index_select(-2, index)
        self.rows = self.rows[mask]
