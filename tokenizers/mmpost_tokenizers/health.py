"""How well a codebook is used while it trains: usage, perplexity, dead codes.

Counts are dense ``[groups, codebook_size]`` up to ``MAX_DENSE`` codes. Above, nobody can list the codes of an LFQ, BSQ
or FSQ: counts are then sparse tensors of the same shape, which hold only codes that were hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# More codes than this are counted sparsely; a dense count of each step of a window would take gigabytes.
MAX_DENSE = 1 << 20
# The default said aloud; torch warns of it otherwise.
torch.sparse.check_sparse_tensor_invariants.disable()


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
    """Health from hit counts ``[groups, codebook_size]``, dense or sparse."""
    hits = hits_of(counts)
    groups, size = counts.shape
    used = sum(len(row) for row in hits) / (groups * size)
    perplexity = float(entropies(counts).exp().mean())
    dead = groups * size - sum(len(row) for row in hits)
    return Health(used, perplexity, dead, max(int(row.sum()) for row in hits))


def entropies(counts: Tensor) -> Tensor:
    """Entropy of the hits of each group in nats, float64 ``[groups]``; 0 without any hit."""
    shares = [row.double() / row.sum().clamp_min(1) for row in hits_of(counts)]
    return torch.stack([-torch.special.xlogy(share, share).sum() for share in shares])


def hits_of(counts: Tensor) -> list[Tensor]:
    """Per group the numbers of hits of the codes that were hit, most used first."""
    if counts.is_sparse:
        whole = counts.coalesce()
        group, values = whole.indices()[0], whole.values()
        rows = [values[group == number] for number in range(len(counts))]
    else:
        rows = list(counts)
    return [row[row > 0].sort(descending=True).values for row in rows]


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
            return count(torch.zeros(0, self.groups, dtype=torch.int64), self.codebook_size, self.groups)
        return merged(self.steps)

    def health(self) -> Health:
        """Health over the window."""
        return health_of(self.total())

    def state_dict(self) -> dict[str, Any]:
        """Counts of the steps."""
        dense = self.steps and not self.steps[0].is_sparse
        return {"steps": torch.stack(self.steps) if dense else list(self.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.steps = list(state["steps"])


def count(indices: Tensor, codebook_size: int, groups: int) -> Tensor:
    """Hits ``[groups, codebook_size]``, int64, of indices ``[..., groups]``, or ``[...]`` for one group.

    Sparse above ``MAX_DENSE`` codes.
    """
    flat = indices.reshape(-1, groups)
    group = torch.arange(groups, device=flat.device)
    if codebook_size <= MAX_DENSE:
        offset = group * codebook_size
        hits = torch.bincount((flat + offset).flatten(), minlength=groups * codebook_size)
        return hits.view(groups, codebook_size)
    places = torch.stack([group.expand_as(flat).flatten(), flat.flatten()])
    ones = torch.ones(places.shape[1], dtype=torch.int64, device=flat.device)
    return _sparse(places, ones, (groups, codebook_size))


def merged(parts: Sequence[Tensor]) -> Tensor:
    """Sum of counts of the same shape."""
    if not parts[0].is_sparse:
        return torch.stack(list(parts)).sum(0)
    wholes = [part.coalesce() for part in parts]
    places, values = torch.cat([one.indices() for one in wholes], 1), torch.cat([one.values() for one in wholes])
    return _sparse(places, values, tuple(parts[0].shape))


def _sparse(places: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(places, values, shape).coalesce()
