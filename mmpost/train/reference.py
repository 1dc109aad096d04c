"""A policy that does not train: the starting weights, or a teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from mmpost.core.batch import Batch
from mmpost.models.policy import Other, Policy
from mmpost.train.learner import Learner
from mmpost.train.rows import Row
from mmpost.train.shard import whole


class Frozen:
    """Answers for a policy without changing it.

    Args:
        policy: Gives the policy; asked each time, because a continued run opens its model after this is made.
        without: Gives a context in which the policy is the frozen one, for example with its LoRA weights off.
    """

    def __init__(
        self, policy: Callable[[], Policy], without: Callable[[Policy], Any] = lambda policy: contextlib.nullcontext()
    ) -> None:
        self._policy, self._without = policy, without

    @classmethod
    def copy_of(cls, policy: Policy) -> Frozen:
        """Takes ``policy`` over: it will not train any more."""
        frozen = policy.requires_grad_(False).eval()
        return cls(lambda: frozen)

    @classmethod
    def under_lora(cls, policy: Callable[[], Policy]) -> Frozen:
        """The base under LoRA weights that started as nothing; no second copy is needed."""
        return cls(policy, lambda found: found.model.disable_adapter())

    def __call__(self, learner: Learner, rows: Sequence[Row]) -> list[np.ndarray]:
        """Log-probabilities of the rows' trained positions, float32 ``[n]`` each."""
        policy = self._policy()
        with self._without(policy):
            return learner.log_probs(rows, module=policy)

    @torch.no_grad()
    def view(self, batch: Batch, kind: Literal["forward_kl", "reverse_kl"]) -> Other:
        """What it says at each trained position of a batch, up to its head."""
        policy = self._policy()
        was_training = policy.training
        policy.eval()
        with whole(policy), self._without(policy):
            hidden = policy.picked(batch)
        policy.train(was_training)
        return Other(hidden, _untrained(policy.head), kind)


def _untrained(head: nn.Module) -> nn.Module:
    """The head below LoRA weights or a trained copy of it, which stay off when its turn comes in the backward pass."""
    for name in ("base_layer", "original_module"):
        below = getattr(head, name, None)
        if isinstance(below, nn.Module):
            return below
    return head
