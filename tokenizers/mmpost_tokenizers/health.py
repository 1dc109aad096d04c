"""How well a codebook is used while it trains: usage, perplexity, dead codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Health:
    """State of a codebook over a window of steps.

    Attributes:
        usage: Share of codes that were hit, mean over groups, in [0, 1].
        perplexity: exp of the entropy of the hits, mean over groups, in [1, codebook_size].
        dead: Codes of all groups without a hit.
        tokens: Indices counted per group.
    """

    usage: float
    perplexity: float
    dead: int
    tokens: int

    def as_metrics(self) -> dict[str, float]:
        """For metrics.jsonl, under ``codebook``."""
        return {"usage": self.usage, "perplexity": self.perplexity, "dead": float(self.dead)}


def health_of(counts: Tensor) -> Health:
    """Health from hit counts ``[groups, codebook_size]``."""
    counts = counts.double()
    totals = counts.sum(1, keepdim=True)
    share = counts / totals.clamp_min(1)
    entropy = -torch.special.xlogy(share, share).sum(1)
    used = (counts > 0).double().mean(1)
    return Health(float(used.mean()), float(entropy.exp().mean()), int((counts == 0).sum()), int(totals.max()))


class CodebookMeter:
    """Counts hits over the last ``window`` steps.

    A window, not the whole run: codes that were alive in the first epoch may be dead now. The counts of each step are
    kept, so that the window slides; they are part of a checkpoint.
    """

    def __init__(self, codebook_size: int, groups: int = 1, window: int = 100) -> None:
        self.codebook_size, self.groups, self.window = codebook_size, groups, window
        self.steps: list[Tensor] = []

    def add(self, indices: Tensor) -> None:
        """Count the indices of one step, ``[B, *grid]`` or ``[B, *grid, groups]``."""
        self.steps.append(count(indices, self.codebook_size, self.groups).cpu())
        del self.steps[: -self.window]

    def total(self) -> Tensor:
        """Hits ``[groups, codebook_size]``, int64."""
        if not self.steps:
            return torch.zeros(self.groups, self.codebook_size, dtype=torch.int64)
        return torch.stack(self.steps).sum(0)

    def health(self) -> Health:
        """Health over the window."""
        return health_of(self.total())

    def state_dict(self) -> dict[str, Any]:
        """Counts of the steps."""
        return {"steps": torch.stack(self.steps) if self.steps else torch.zeros(0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.steps = list(state["steps"])


def count(indices: Tensor, codebook_size: int, groups: int) -> Tensor:
    """Hits ``[groups, codebook_size]`` of indices ``[..., groups]``, or ``[...]`` for one group."""
    flat = indices.reshape(-1, groups)
    offset = torch.arange(groups, device=flat.device) * codebook_size
    return torch.bincount((flat + offset).flatten(), minlength=groups * codebook_size).view(groups, codebook_size)
