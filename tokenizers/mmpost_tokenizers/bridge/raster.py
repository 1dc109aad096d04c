"""Spatial model that fills positions row by row: a causal transformer of transformers over de-quantized values.

The paper's backbone is the masked one of ``masked``; this one is cheaper to sample (one pass per position with kept
keys and values) and gives an exact likelihood of a whole image, which the masked one does not.

Source: arXiv 2503.16430, section 3.3 (the head takes z from any spatial model); LLaMA blocks as in LlamaGen, arXiv
2406.06525. Differs: values enter through a linear layer instead of an embedding of indices, and positions are learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.bridge.spatial import (
    SpatialConfig,
    SpatialGenerator,
    SpatialModel,
    both_ways,
    class_vectors,
    guidance_at,
    mixed,
)


@dataclass(frozen=True, kw_only=True)
class RasterConfig(SpatialConfig):
    """Sizes of the spatial model.

    Attributes:
        depth: Blocks.
        heads: Attention heads.
        mlp_ratio: Inner width of the gated feed-forward layers, in widths; 8/3 has the weights of a plain one of 4.
        dropout: On what enters, and on attention weights.
        label_dropout: Share of the training images whose class is hidden.
    """

    depth: int = 24
    heads: int = 16
    mlp_ratio: float = 8 / 3
    dropout: float = 0.1
    label_dropout: float = 0.1


class RasterBackbone(SpatialModel):
    """Features of each position from the class and the positions before it, row by row."""

    config: RasterConfig

    def __init__(self, config: RasterConfig) -> None:
        """Draw weights from torch's global generator."""
        super().__init__()
        self.config = config
        self.class_embedding = nn.Embedding(config.classes, config.width)
        self.any_class = nn.Parameter(0.02 * torch.randn(config.width))
        self.enter = nn.Linear(config.channels, config.width)
        self.position = nn.Parameter(0.02 * torch.randn(config.length, config.width))
        shape = LlamaConfig(
            vocab_size=1,
            hidden_size=config.width,
            intermediate_size=round(config.width * config.mlp_ratio),
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.length,
            attention_dropout=config.dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.transformer = LlamaModel(shape)
        # It is fed values; a table of one row would be a weight that never trains.
        self.transformer.embed_tokens = nn.Identity()
        nn.init.normal_(self.class_embedding.weight, std=0.02)

    def forward(self, values: Tensor, labels: Tensor) -> Tensor:
        """Features ``[N, T + 1, width]`` of the first T + 1 positions, given the values of the first T.

        Args:
            values: De-quantized latents ``[N, T, C]``, 0 <= T < L.
            labels: int64 ``[N]``; ``NO_CLASS`` for any class.
        """
        first = class_vectors(self.class_embedding, self.any_class, labels)[:, None]
        x = torch.cat([first, self.enter(values)], 1) + self.position[: values.shape[1] + 1]
        x = F.dropout(x, self.config.dropout, self.training)
        out: Tensor = self.transformer(inputs_embeds=x, use_cache=False).last_hidden_state
        return out

    def step(self, values: Tensor | None, labels: Tensor, place: int, cache: DynamicCache) -> Tensor:
        """Features ``[N, width]`` of ``place`` given the values ``[N, C]`` of the position before; None at first."""
        first = values is None
        x = class_vectors(self.class_embedding, self.any_class, labels) if first else self.enter(values)
        x = (x + self.position[place])[:, None]
        out: Tensor = self.transformer(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state
        return out[:, 0]


class RasterGenerator(SpatialGenerator):
    """Fills positions row by row, one at a time."""

    kind: ClassVar[str] = "raster"
    config_class = RasterConfig
    backbone_class = RasterBackbone
    backbone: RasterBackbone

    def nats(self, indices: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Negative log-likelihood of all positions, ``[N, L, C]``, each given those before it.

        Args:
            indices: int64 ``[N, H, W, C]``.
            labels: int64 ``[N]``.
            generator: On the CPU; hides classes while training.
        """
        labels = self._hidden(labels, self.backbone.config.label_dropout, generator)
        flat = indices.flatten(1, 2)
        z = self.backbone(self.quantizer.dequantize(flat[:, :-1]), labels)
        probs = self.head.log_probs(z.flatten(0, 1), flat.flatten(0, 1))
        return -probs.unflatten(0, flat.shape[:2])

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        *,
        steps: int | None = None,
        guidance: float = 1.0,
        schedule: str = "linear",
        temperature: float = 1.0,
        generator: torch.Generator,
    ) -> Tensor:
        """As in ``SpatialGenerator``; ``steps`` can only be the number of positions."""
        config = self.backbone.config
        if steps not in (None, config.length):
            what = f"bridge: {steps} steps for {config.length} positions that are filled one by one."
            raise MmpostError("MMP-C096", what, f"Take {config.length} steps, or leave --steps out.")
        cache, plain = DynamicCache(config=self.backbone.transformer.config), guidance == 1
        rows = labels if plain else both_ways(labels)
        drawn: list[Tensor] = []
        values: Tensor | None = None
        for place in range(config.length):
            z = self.backbone.step(values, rows, place, cache)
            z = z if plain else mixed(z, guidance_at(guidance, schedule, (place + 1) / config.length))
            drawn.append(self.head.sample(z, temperature=temperature, generator=generator))
            values = self.quantizer.dequantize(drawn[-1]).repeat(1 if plain else 2, 1)
        return torch.stack(drawn, 1).unflatten(1, config.grid)
