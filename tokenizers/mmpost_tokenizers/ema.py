"""Running means of weights: what is evaluated and handed on, while the raw weights go on training."""

from __future__ import annotations

import copy

import torch

from mmpost_tokenizers.base import DiscreteTokenizer


class RunningMean:
    """An exponential moving average of a tokenizer's weights.

    The decay is warmed up, ``min(decay, (1 + step) / (10 + step))``, so that the random start is soon forgotten.

    Attributes:
        model: The mean as a tokenizer in eval mode; the tokenizer itself with decay 0.
    """

    def __init__(self, tokenizer: DiscreteTokenizer, decay: float) -> None:
        self.decay = decay
        self._of = tokenizer
        self.model = copy.deepcopy(tokenizer).eval().requires_grad_(False) if decay else tokenizer
        mine, theirs = self.model.state_dict(keep_vars=True), tokenizer.state_dict(keep_vars=True)
        # Counters and tables of integers cannot be averaged; codes that follow running means already have theirs.
        trained = {id(weight) for weight in tokenizer.parameters()}
        averaged = [name for name, value in theirs.items() if id(value) in trained and value.is_floating_point()]
        self._means = [mine[name] for name in averaged]
        self._weights = [theirs[name] for name in averaged]
        self._copies = [(mine[name], theirs[name]) for name in theirs if name not in set(averaged)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after the 0-based ``step``."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._means, self._weights, 1 - decay)
        for mean, value in self._copies:
            mean.copy_(value)

    def evaluated(self) -> DiscreteTokenizer:
        """The tokenizer to measure and to save."""
        return self.model
