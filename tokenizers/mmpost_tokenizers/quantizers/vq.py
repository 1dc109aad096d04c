"""Quantizers with a learned codebook: moved by a loss (VQ, own code) or by running means (VQ-EMA, the library's).

``docs/decisions/0010-quantizers.md`` says why.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from vector_quantize_pytorch import VectorQuantize

from mmpost_tokenizers.base import Quantized, Quantizer
from mmpost_tokenizers.quantizers.configs import EMAConfig, VQConfig

# Largest distance matrix that is held at once, in numbers; 256 MiB of float32.
MAX_DISTANCES = 1 << 26


def nearest(z: Tensor, codes: Tensor) -> Tensor:
    """Index of the code nearest to each latent.

    Args:
        z: ``[n, c]``.
        codes: ``[K, c]``.

    Returns:
        int64 ``[n]``; the lowest index among equals. Computed in float32 without autocast.
    """
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        codes = codes.float()
        squares = codes.square().sum(1)
        rows = max(1, MAX_DISTANCES // len(codes))
        # |z|^2 is the same for all codes of a row.
        parts = [torch.addmm(squares, part.float(), codes.T, alpha=-2).argmin(1) for part in z.split(rows)]
        return torch.cat(parts) if parts else z.new_zeros(0, dtype=torch.int64)


class _Codebook(Quantizer):
    """What both learned codebooks share: normalisation, search and lookup. ``weight`` holds the codes ``[K, C]``."""

    l2_norm: bool
    weight: Tensor

    def normalise(self, z: Tensor) -> Tensor:
        """Unit vectors with ``l2_norm``, else ``z`` itself."""
        return functional.normalize(z, dim=-1) if self.l2_norm else z

    def project(self, z: Tensor, group: int = 0) -> Tensor:
        """What is compared with the codes."""
        return self.normalise(z)

    def code_vectors(self, group: int = 0) -> Tensor:
        """The codes as the decoder sees them."""
        return self.normalise(self.weight.detach())

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of ``indices``, of unit length with ``l2_norm``."""
        # Rows are normalised after the gather: the same values as normalising the codebook, at less cost.
        return self.normalise(functional.embedding(indices, self.weight))

    def _revive(self, dead: Tensor, z: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices of dead codes, and as many latents drawn from ``z``."""
        where = dead.reshape(-1).nonzero().squeeze(1)
        latents = self.normalise(z.detach()).reshape(-1, self.dim)
        draws = torch.rand(max(len(latents), 1), generator=generator, device=generator.device).to(z.device)
        # Every latent once before any is taken twice.
        chosen = draws.argsort()[torch.arange(len(where), device=z.device) % len(latents)]
        return where, latents[chosen]


class VectorQuantizer(_Codebook):
    """VQ with a straight-through gradient.

    ``i = argmin |z - e_i|^2``; with ``l2_norm`` both are unit vectors and the decoder sees unit codes.
    ``vq = w_vq mean|sg(z) - e|^2`` moves the codebook, ``commit = w_c mean|z - sg(e)|^2`` moves the encoder.
    The weight of commitment is on the encoder's term, unlike diffusers' ``legacy=True``.

    Source: spec of VQ-GAN (arXiv 2012.09841) as in LlamaGen (arXiv 2406.06525).
    """

    config: VQConfig

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size, self.dim, self.l2_norm = config.codebook_size, config.dim, config.l2_norm
        codes = torch.empty(config.codebook_size, config.dim).uniform_(
            -1 / config.codebook_size, 1 / config.codebook_size
        )
        self.weight: nn.Parameter = nn.Parameter(self.normalise(codes))

    def forward(self, z: Tensor, *, generator: torch.Generator | None = None) -> Quantized:
        """Quantize ``z`` ``[B, *grid, C]``."""
        z = self.normalise(z)
        indices = nearest(z.reshape(-1, self.dim), self.code_vectors()).view(z.shape[:-1])
        codes = self.lookup(indices)
        losses = {
            "vq": self.config.vq_weight * functional.mse_loss(codes.float(), z.detach().float()),
            "commit": self.config.commit_weight * functional.mse_loss(z.float(), codes.detach().float()),
        }
        return Quantized(z + (codes - z).detach(), indices, losses)

    @torch.no_grad()
    def revive(self, dead: Tensor, z: Tensor, *, generator: torch.Generator) -> int:
        """Replace dead codes; see ``Quantizer.revive``."""
        where, latents = self._revive(dead, z, generator)
        self.weight[where] = latents.to(self.weight.dtype)
        return len(where)


class EMAQuantizer(_Codebook):
    """VQ whose codes are running means of the latents they were chosen for; updated by ``forward`` in training mode.

    ``n_i <- d n_i + (1 - d) count_i`` and ``m_i <- d m_i + (1 - d) sum of latents``, ``e_i = m_i / n_i`` with Laplace
    smoothing of the counts by ``epsilon``, and of unit length with ``l2_norm``. There is no ``vq`` loss. Sums run over
    all processes if there are several when it is built. By ``vector_quantize_pytorch``, whose random replacement of
    dead codes, k-means start and rotation trick are off.

    Source: arXiv 1711.00937, appendix A.1.
    """

    config: EMAConfig

    def __init__(self, config: EMAConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size, self.dim, self.l2_norm = config.codebook_size, config.dim, config.l2_norm
        self.library = VectorQuantize(
            dim=config.dim,
            codebook_size=config.codebook_size,
            decay=config.decay,
            eps=config.epsilon,
            use_cosine_sim=config.l2_norm,
            rotation_trick=False,
            kmeans_init=False,
            threshold_ema_dead_code=0,
        )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The codes ``[K, C]``."""
        codes: Tensor = self.library.codebook
        return codes

    def forward(self, z: Tensor, *, generator: torch.Generator | None = None) -> Quantized:
        """Quantize ``z`` ``[B, *grid, C]``; in training mode the codes move after they were looked up."""
        z = self.normalise(z)
        # The library has neither gradient nor loss in eval mode, so both are made here.
        codes, indices, _ = self.library(z.detach().reshape(len(z), -1, self.dim))
        codes = codes.detach().view(z.shape)
        commit = self.config.commit_weight * functional.mse_loss(z.float(), codes.float())
        return Quantized(z + (codes - z).detach(), indices.view(z.shape[:-1]), {"commit": commit})

    @torch.no_grad()
    def revive(self, dead: Tensor, z: Tensor, *, generator: torch.Generator) -> int:
        """Replace dead codes; their counts start again at 1. See ``Quantizer.revive``."""
        where, latents = self._revive(dead, z, generator)
        inner = self.library._codebook  # the running sums have no public name
        for buffer in (inner.embed, inner.embed_avg):
            buffer[0, where] = latents.to(buffer.dtype)
        inner.cluster_size[0, where] = 1.0
        return len(where)
