"""Distribution of the C indices of one position, given what a spatial model says about it.

``DimensionHead`` predicts channel after channel, each given the ones before; ``ParallelHead`` has the same transformer
and predicts all channels at once, independently given the position: the baseline of the paper's comparison.

Callers always use the order of the latent's channels. The order of prediction is a buffer of the head and applied in
here, once in and once out.

Source: arXiv 2503.16430, sections 3.3 and 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.bridge.order import inverse

# Sizes of the paper's table of heads: (width, depth), C = 16 and B = 64.
PUBLISHED = {"3M": (256, 3), "10M": (512, 3), "13M": (512, 4), "65M": (1024, 4), "94M": (1024, 6)}


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Sizes of a head.

    Attributes:
        channels: C.
        levels: B.
        z_dim: Width of the spatial model's features.
        width: Width of the head, a multiple of ``heads``.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Inner width of the feed-forward layers, in widths.
        dropout: After attention and feed-forward layers, and on attention weights.
    """

    channels: int = 16
    levels: int = 64
    z_dim: int = 1024
    width: int = 1024
    depth: int = 4
    heads: int = 8
    mlp_ratio: float = 4.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.width % self.heads:
            what = f"bridge: width={self.width} of the head is not a multiple of heads={self.heads}."
            raise MmpostError("MMP-C090", what, "Correct width or heads.")


class Attention(nn.Module):
    """Self-attention with normalised queries and keys, over C steps."""

    def __init__(self, config: HeadConfig, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = config.heads, causal, config.dropout
        size = config.width // config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.q_norm, self.k_norm = nn.LayerNorm(size, eps=1e-6), nn.LayerNorm(size, eps=1e-6)
        self.proj = nn.Sequential(nn.Linear(config.width, config.width), nn.Dropout(config.dropout))

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        """Attend within ``x`` ``[N, T, d]``; with a cache (keys, values so far, or empty), to what was before too."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        causal = self.causal
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = [k, v]
            causal = causal and q.shape[2] > 1  # a single new step sees everything that there is
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Transformer block whose norms and residuals are modulated by a condition (adaLN-zero)."""

    def __init__(self, config: HeadConfig, *, causal: bool) -> None:
        super().__init__()
        inner = int(config.width * config.mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(config.width, eps=1e-6), nn.LayerNorm(config.width, eps=1e-6)
        self.attention = Attention(config, causal=causal)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, inner),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(inner, config.width),
            nn.Dropout(config.dropout),
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, x: Tensor, condition: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        """``x`` and ``condition`` are ``[N, T, d]``."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, -1)
        x = x + gate_a * self.attention(self.norm1(x) * (1 + scale_a) + shift_a, cache)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class Head(nn.Module):
    """What both heads share: transformer, classifiers, order of the channels.

    Attributes:
        config: Sizes.
        order: Buffer ``[C]``: step c predicts channel ``order[c]``.
    """

    causal: ClassVar[bool]
    order: Tensor

    def __init__(self, config: HeadConfig, order: Sequence[int] | Tensor | None = None) -> None:
        """Draw weights from torch's global generator.

        Args:
            config: Sizes.
            order: Permutation of the channels, see ``dimension_order``; default: as they come.

        Raises:
            MmpostError: MMP-C094 when ``order`` is no permutation of the C channels.
        """
        super().__init__()
        self.config = config
        # On the CPU even where weights are made without memory: an order has values from the start.
        steps = torch.as_tensor(range(config.channels) if order is None else order, dtype=torch.int64, device="cpu")
        if len(steps) != config.channels:
            what = f"bridge: a channel order of {len(steps)} for {config.channels} channels."
            raise MmpostError("MMP-C094", what, "Measure it on latents of this VAE with dimension_order.")
        inverse(steps)  # raises if it is no permutation
        self.register_buffer("order", steps)
        self.enter = nn.Linear(config.z_dim, config.width)
        self.position = nn.Parameter(0.02 * torch.randn(config.channels, config.width))
        self.step = nn.Parameter(0.02 * torch.randn(config.channels, config.width))
        self.blocks = nn.ModuleList(Block(config, causal=self.causal) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.final_norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.final = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))
        self.classifiers = nn.ModuleList(nn.Linear(config.width, config.levels) for _ in range(config.channels))
        self._start()

    def _start(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        modulations = [self.final, *(block.modulation for block in self.blocks if isinstance(block, Block))]
        for layer in (part for modulation in modulations for part in modulation if isinstance(part, nn.Linear)):
            nn.init.zeros_(layer.weight)

    def forward(self, z: Tensor, indices: Tensor) -> Tensor:
        """Logits ``[N, C, B]`` of every channel, teacher-forced.

        Args:
            z: Features ``[N, z_dim]``.
            indices: int64 ``[N, C]``.
        """
        start = self.enter(z)[:, None]
        x = self._inputs(start, indices[:, self.order])
        for block in self.blocks:
            x = block(x, start + self.step)
        return self._logits(x, start + self.step)[:, inverse(self.order)]

    def log_probs(self, z: Tensor, indices: Tensor) -> Tensor:
        """Log-probability of each index, float32 ``[N, C]``; the sum over channels is that of the position."""
        logits = self(z, indices).float().log_softmax(-1)
        return logits.gather(-1, indices[..., None])[..., 0]

    def sample(self, z: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw indices int64 ``[N, C]``.

        Args:
            z: Features ``[N, z_dim]``; guidance is applied to them beforehand, never to logits.
            temperature: Divides the logits of every channel, hence compounds over channels; 0 takes the likeliest.
            generator: On the device of ``z``.
        """
        raise NotImplementedError

    def _inputs(self, start: Tensor, ordered: Tensor) -> Tensor:
        raise NotImplementedError

    def _logits(self, x: Tensor, condition: Tensor, first: int = 0) -> Tensor:
        """Logits ``[N, T, B]`` of steps ``first`` to ``first + T``, in the order of prediction."""
        scale, shift = self.final(condition).chunk(2, -1)
        x = self.final_norm(self.norm(x)) * (1 + scale) + shift
        each = [self.classifiers[first + i](x[:, i]) for i in range(x.shape[1])]
        return torch.stack(each, 1)


class DimensionHead(Head):
    """Autoregressive over channels: step 0 sees z, step c the index of the step before, each with its own embedding."""

    causal = True

    def __init__(self, config: HeadConfig, order: Sequence[int] | Tensor | None = None) -> None:
        super().__init__(config, order)
        self.embeddings = nn.ModuleList(nn.Embedding(config.levels, config.width) for _ in range(config.channels - 1))

    def _inputs(self, start: Tensor, ordered: Tensor) -> Tensor:
        before = [embedding(ordered[:, i])[:, None] for i, embedding in enumerate(self.embeddings)]
        return torch.cat([start, *before], 1) + self.position

    @torch.no_grad()
    def sample(self, z: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """As in ``Head``; keys and values of earlier steps are kept. Call it in eval mode."""
        start = self.enter(z)[:, None]
        x, drawn = start, []
        caches: list[list[Tensor]] = [[] for _ in self.blocks]
        for step in range(self.config.channels):
            condition = start + self.step[step]
            x = x + self.position[step]
            for block, cache in zip(self.blocks, caches, strict=True):
                x = block(x, condition, cache)
            drawn.append(_draw(self._logits(x, condition, step), temperature, generator))
            if step + 1 < self.config.channels:
                x = self.embeddings[step](drawn[-1])
        return torch.cat(drawn, 1)[:, inverse(self.order)]


class ParallelHead(Head):
    """All channels at once: every step sees z and the other steps' positions, no index."""

    causal = False

    def _inputs(self, start: Tensor, ordered: Tensor) -> Tensor:
        return start + self.position

    @torch.no_grad()
    def sample(self, z: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """As in ``Head``: one pass. Call it in eval mode."""
        logits = self(z, torch.zeros(len(z), self.config.channels, dtype=torch.int64, device=z.device))
        return _draw(logits, temperature, generator)


def guided(z: Tensor, z_without: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on features: ``scale`` 1 is ``z`` itself, 0 the features without class."""
    return z if scale == 1 else z_without + scale * (z - z_without)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Indices ``[N, T]`` from logits ``[N, T, B]``."""
    if temperature == 0:
        return logits.argmax(-1)
    shares = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(shares.flatten(0, 1), 1, generator=generator).view(logits.shape[:2])
