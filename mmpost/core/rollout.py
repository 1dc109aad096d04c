"""What a policy did with a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmpost.core.sample import Sample


@dataclass(slots=True)
class Rollout:
    """One completion of a prompt.

    Attributes:
        tokens: Sampled ids including the end token if one was sampled, int64 ``[n]``.
        logp: Log-probability of each id under the sampling policy at the sampling temperature, float32 ``[n]``, nats.
        text: The decoded completion without special tokens.
        truncated: True when the length limit ended it.
        score_parts: Reward name to score; None means that the reward does not apply, which is not zero.
        score: Weighted sum of the parts, or None when no part applies.
    """

    tokens: np.ndarray
    logp: np.ndarray
    text: str
    truncated: bool
    score_parts: Mapping[str, float | None] = field(default_factory=dict)
    score: float | None = None


@dataclass(slots=True)
class Group:
    """All completions of one prompt. Advantages never mix groups.

    Attributes:
        prompt: The row without its answer.
        rollouts: The completions in generation order.
        uid: Number of the prompt in the run; random streams are keyed by it.
        notes: What rewards that judge whole groups say about this one, by reward name.
    """

    prompt: Sample
    rollouts: list[Rollout]
    uid: int
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
