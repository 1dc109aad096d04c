"""Spatial model that fills positions in random order (MAR), and the generator made of it and a head.

The encoder sees a class and the positions that are known, as de-quantized values; the decoder gives features z at all
positions. Guidance mixes z with and without class before the head.

Sources: arXiv 2406.11838 (MAR), arXiv 2503.16430 (TokenBridge).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.bridge.spatial import (
    HEADS,
    NO_CLASS,
    SpatialConfig,
    SpatialGenerator,
    SpatialModel,
    both_ways,
    class_vectors,
    guidance_at,
    mixed,
)

__all__ = ["HEADS", "NO_CLASS", "SIZES", "MaskedBackbone", "MaskedConfig", "MaskedGenerator", "cosine_schedule"]

PAPER_STEPS = 256


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(SpatialConfig):
    """Sizes of the spatial model, and how it is masked; ``width`` is that of encoder and decoder.

    Attributes:
        encoder_depth: Blocks of the encoder.
        decoder_depth: Blocks of the decoder.
        heads: Attention heads.
        mlp_ratio: Inner width of the feed-forward layers, in widths.
        buffer: Tokens with the class that are put before the sequence.
        dropout: After attention and feed-forward layers, and on attention weights.
        label_dropout: Share of the training images whose class is hidden.
        mask_min: Smallest mask rate; rates are normal around 1 with deviation ``mask_std``, cut to [mask_min, 1].
        mask_std: Deviation before the cut.
    """

    encoder_depth: int = 16
    decoder_depth: int = 16
    heads: int = 16
    mlp_ratio: float = 4.0
    buffer: int = 64
    dropout: float = 0.1
    label_dropout: float = 0.1
    mask_min: float = 0.7
    mask_std: float = 0.25


# The released sizes; L and H go with heads of width 1024 and depth 4 and 6.
SIZES = {
    "B": MaskedConfig(width=768, encoder_depth=12, decoder_depth=12, heads=12),
    "L": MaskedConfig(width=1024, encoder_depth=16, decoder_depth=16, heads=16),
    "H": MaskedConfig(width=1280, encoder_depth=20, decoder_depth=20, heads=16),
}


class MaskedBackbone(SpatialModel):
    """Encoder over known positions, decoder over all."""

    config: MaskedConfig

    def __init__(self, config: MaskedConfig) -> None:
        """Draw weights from torch's global generator."""
        super().__init__()
        self.config = config
        width, norm = config.width, partial(nn.LayerNorm, eps=1e-6)
        blocks = partial(
            Block,
            width,
            config.heads,
            config.mlp_ratio,
            qkv_bias=True,
            proj_drop=config.dropout,
            attn_drop=config.dropout,
            norm_layer=norm,
        )
        self.class_embedding = nn.Embedding(config.classes, width)
        self.any_class = nn.Parameter(_small(width))
        self.enter = nn.Linear(config.channels, width)
        self.encoder_position = nn.Parameter(_small(config.buffer + config.length, width))
        self.enter_norm = norm(width)
        self.encoder = nn.ModuleList(blocks() for _ in range(config.encoder_depth))
        self.encoder_norm = norm(width)
        self.cross = nn.Linear(width, width)
        self.mask_token = nn.Parameter(_small(width))
        self.decoder_position = nn.Parameter(_small(config.buffer + config.length, width))
        self.decoder = nn.ModuleList(blocks() for _ in range(config.decoder_depth))
        self.decoder_norm = norm(width)
        self.output_position = nn.Parameter(_small(config.length, width))
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, values: Tensor, labels: Tensor, order: Tensor, masked: int) -> Tensor:
        """Features of every position.

        Args:
            values: De-quantized latents ``[N, L, C]``; those at masked positions are not looked at.
            labels: int64 ``[N]``; ``NO_CLASS`` for any class.
            order: Permutation of the positions of each image, int64 ``[N, L]``; the first ``masked`` are masked.
            masked: Number of masked positions, 0 to L.

        Returns:
            ``[N, L, width]``.
        """
        buffer, known = self.config.buffer, order[:, masked:]
        one = class_vectors(self.class_embedding, self.any_class, labels)
        tokens = self.enter(_pick(values, known)) + self.encoder_position[buffer:][known]
        prefix = one[:, None] + self.encoder_position[:buffer]
        x = self.enter_norm(torch.cat([prefix, tokens], 1))
        for block in self.encoder:
            x = block(x)
        x = self.cross(self.encoder_norm(x))
        everywhere = self.mask_token.to(x.dtype).expand(len(x), self.config.length, -1)
        place = known[..., None].expand(-1, -1, x.shape[-1])
        x = torch.cat([x[:, :buffer], everywhere.scatter(1, place, x[:, buffer:])], 1) + self.decoder_position
        for block in self.decoder:
            x = block(x)
        return self.decoder_norm(x)[:, buffer:] + self.output_position


class MaskedGenerator(SpatialGenerator):
    """Fills positions in random order, several at a time."""

    kind: ClassVar[str] = "masked"
    config_class = MaskedConfig
    backbone_class = MaskedBackbone
    backbone: MaskedBackbone

    def nats(self, indices: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Negative log-likelihood of the masked positions, ``[N, masked, C]``, of one random mask.

        Args:
            indices: int64 ``[N, H, W, C]``.
            labels: int64 ``[N]``.
            generator: On the CPU. One mask rate is drawn for the batch, and an order for each image.
        """
        config = self.backbone.config
        masked = math.ceil(config.length * mask_rate(config, generator))
        order = random_order(len(indices), config.length, generator).to(indices.device)
        labels = self._hidden(labels, config.label_dropout, generator)
        flat = indices.flatten(1, 2)
        z = self.backbone(self.quantizer.dequantize(flat), labels, order, masked)
        predicted = order[:, :masked]
        # Only masked positions go through the head.
        probs = self.head.log_probs(_pick(z, predicted).flatten(0, 1), _pick(flat, predicted).flatten(0, 1))
        return -probs.unflatten(0, (len(indices), masked))

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
        """As in ``SpatialGenerator``; the number of known positions follows a cosine."""
        length = self.backbone.config.length
        steps = min(PAPER_STEPS, length) if steps is None else steps
        if not 1 <= steps <= length:
            what = f"bridge: {steps} steps for {length} positions."
            raise MmpostError("MMP-C096", what, f"Take 1 to {length} steps.")
        device = labels.device
        order = random_order(len(labels), length, generator).to(device)
        indices = torch.zeros(len(labels), length, self.head.config.channels, dtype=torch.int64, device=device)
        masked = length
        for remaining in cosine_schedule(length, steps):
            # As released: the share after this step, but the last step counts one position as open.
            scale = guidance_at(guidance, schedule, (length - max(remaining, 1)) / length)
            z = self._features(self.quantizer.dequantize(indices), labels, order, masked, scale)
            now = order[:, remaining:masked]
            drawn = self.head.sample(_pick(z, now).flatten(0, 1), temperature=temperature, generator=generator)
            place = now[..., None].expand(-1, -1, indices.shape[-1])
            indices = indices.scatter(1, place, drawn.unflatten(0, now.shape))
            masked = remaining
        return indices.unflatten(1, self.backbone.config.grid)

    def _features(self, values: Tensor, labels: Tensor, order: Tensor, masked: int, scale: float) -> Tensor:
        if scale == 1:
            return self.backbone(values, labels, order, masked)
        both = self.backbone(values.repeat(2, 1, 1), both_ways(labels), order.repeat(2, 1), masked)
        return mixed(both, scale)


def mask_rate(config: MaskedConfig, generator: torch.Generator) -> float:
    """Draw a mask rate: normal around 1, cut to [mask_min, 1], from one uniform number of ``generator``."""
    low = 0.5 * math.erfc((1 - config.mask_min) / config.mask_std / math.sqrt(2))
    uniform = torch.rand((), generator=generator, dtype=torch.float64)
    rate = 1 + config.mask_std * float(torch.special.ndtri(low + uniform * (0.5 - low)))
    return min(max(rate, config.mask_min), 1.0)


def random_order(images: int, length: int, generator: torch.Generator) -> Tensor:
    """Random permutation for every image, int64 ``[images, length]``, on the device of the generator."""
    return torch.rand(images, length, generator=generator, device=generator.device).argsort(1)


def cosine_schedule(length: int, steps: int) -> list[int]:
    """Open positions after each step: follows a cosine, falls by one at least, ends at 0."""
    left, open_now = [], length
    for step in range(1, steps):
        wanted = math.floor(length * math.cos(math.pi / 2 * step / steps))
        open_now = max(1, min(open_now - 1, wanted))
        left.append(open_now)
    return [*left, 0]


def _pick(values: Tensor, positions: Tensor) -> Tensor:
    """Rows ``positions`` ``[N, m]`` of ``values`` ``[N, L, c]``."""
    return values.gather(1, positions[..., None].expand(-1, -1, values.shape[-1]))


def _small(*shape: int) -> Tensor:
    return 0.02 * torch.randn(*shape)
