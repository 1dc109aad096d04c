"""Quantizers without a codebook: one bit a channel (LFQ), and the same on the unit sphere (BSQ).

The entropy loss is the per-bit form of XQ-GAN, which costs O(dim) instead of O(2^dim); the library's form sums over all
codes, see ``docs/decisions/0010-quantizers.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.base import Quantized, Quantizer
from mmpost_tokenizers.quantizers.configs import LFQConfig

# More codes than this are never listed one by one.
MAX_LISTED = 1 << 20


def bit_entropy_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of the bits' entropies, minus the entropies of the bits' means over all tokens of the batch.

    Args:
        logits: ``[..., dim]``; a bit is 1 with probability sigmoid(logit).

    Returns:
        Scalar in nats, at least ``-dim ln 2``; low when every bit is sure and both values are used equally often.

    Source: arXiv 2412.01762 (XQ-GAN), released ``lookup_free_quantize.py``, ``soft_entropy_loss``.
    """
    logits = logits.float().reshape(-1, logits.shape[-1])
    # H(p) = log(1 + e^l) - l sigmoid(l), without the logarithm of a number that rounds to 0.
    sure = (functional.softplus(logits) - logits * torch.sigmoid(logits)).sum(1).mean()
    mean = torch.sigmoid(logits).mean(0).clamp(1e-7, 1 - 1e-7)
    spread = -(mean * mean.log() + (1 - mean) * torch.log1p(-mean)).sum()
    return sure - spread


class LFQuantizer(Quantizer):
    """``code = sign(z)``; bit d of the index, counted from the lowest, is 1 where ``z_d > 0``.

    ``entropy = w (E_sample H(p) - H(E_batch p))`` with ``p_d = sigmoid(4 z_d s)``, s the magnitude of a code's entries.
    The batch is that of this process.
    """

    config: LFQConfig

    def __init__(self, config: LFQConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.codebook_size = config.dim, 2**config.dim
        self.scale = 1.0

    def forward(self, z: Tensor, *, generator: torch.Generator | None = None) -> Quantized:
        """Quantize ``z`` ``[B, *grid, dim]``."""
        z = self.normalise(z)
        positive = z > 0
        powers = 2 ** torch.arange(self.dim, device=z.device)
        indices = (positive * powers).sum(-1)
        codes = self._codes(positive, z.dtype)
        losses = {"entropy": self.config.entropy_weight * bit_entropy_loss(4 * self.scale * z)}
        if self.config.commit_weight:
            losses["commit"] = self.config.commit_weight * functional.mse_loss(z.float(), codes.float())
        return Quantized(z + (codes - z).detach(), indices, losses)

    def _codes(self, positive: Tensor, dtype: torch.dtype) -> Tensor:
        return (2 * positive.to(dtype) - 1) * self.scale

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of ``indices``: the bits, as plus and minus ``scale``."""
        positive = (indices[..., None] >> torch.arange(self.dim, device=indices.device)) & 1
        return self._codes(positive.bool(), torch.get_default_dtype())

    def project(self, z: Tensor, group: int = 0) -> Tensor:
        """What the signs are taken of."""
        return self.normalise(z)

    def code_vectors(self, group: int = 0) -> Tensor:
        """All codes; at most ``MAX_LISTED`` of them."""
        if self.codebook_size > MAX_LISTED:
            raise too_many(self.codebook_size)
        return self.lookup(torch.arange(self.codebook_size))

    def lattice(self) -> tuple[int, ...]:
        """Two levels a channel, so that the distance of codes is the number of bits that differ."""
        return (2,) * self.dim


class BSQuantizer(LFQuantizer):
    """``z`` is normalised first, ``code = sign(z) / sqrt(dim)``: unit vectors too.

    Source: arXiv 2406.07548 (BSQ), with the entropy loss of XQ-GAN.
    """

    def __init__(self, config: LFQConfig) -> None:
        super().__init__(config)
        self.scale = config.dim**-0.5

    def normalise(self, z: Tensor) -> Tensor:
        """Unit vectors."""
        return functional.normalize(z, dim=-1)


def too_many(codes: int) -> MmpostError:
    """The error for a request that would list more codes than fit into memory."""
    return MmpostError(
        "MMP-C077",
        f"{codes} codes are too many to list one by one (at most {MAX_LISTED}).",
        "Set tokenizer.perturb.neighbour_of=code, which counts neighbours without listing codes.",
    )
