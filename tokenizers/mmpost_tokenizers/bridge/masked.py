"""Spatial model that fills positions in random order (MAR), and the generator made of it and a head.

The encoder sees a class and the positions that are known, as de-quantized values; the decoder gives features z at all
positions. Guidance mixes z with and without class before the head.

Sources: arXiv 2406.11838 (MAR), arXiv 2503.16430 (TokenBridge).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.bridge import checkpoint
from mmpost_tokenizers.bridge.head import DimensionHead, Head, HeadConfig, ParallelHead, guided
from mmpost_tokenizers.bridge.levels import PostTrainingQuantizer, config_from_json
from mmpost_tokenizers.bridge.model import IndexModel
from mmpost_tokenizers.published.files import load_strictly

NO_CLASS = -1  # label that stands for "any class"
HEADS: dict[str, type[Head]] = {"autoregressive": DimensionHead, "parallel": ParallelHead}


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """Sizes of the spatial model, and how it is masked.

    Attributes:
        classes: Number of classes; there is one more vector for "any class".
        grid: Height and width of the token map.
        channels: C of the latents.
        width: Width of encoder and decoder.
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

    classes: int = 1000
    grid: tuple[int, int] = (16, 16)
    channels: int = 16
    width: int = 1024
    encoder_depth: int = 16
    decoder_depth: int = 16
    heads: int = 16
    mlp_ratio: float = 4.0
    buffer: int = 64
    dropout: float = 0.1
    label_dropout: float = 0.1
    mask_min: float = 0.7
    mask_std: float = 0.25

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.grid[0] * self.grid[1]


# The released sizes; L and H go with heads of width 1024 and depth 4 and 6.
SIZES = {
    "B": MaskedConfig(width=768, encoder_depth=12, decoder_depth=12, heads=12),
    "L": MaskedConfig(width=1024, encoder_depth=16, decoder_depth=16, heads=16),
    "H": MaskedConfig(width=1280, encoder_depth=20, decoder_depth=20, heads=16),
}


class MaskedBackbone(nn.Module):
    """Encoder over known positions, decoder over all.

    Attributes:
        config: Sizes.
    """

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
        one = self.class_embedding(labels.clamp(min=0))
        one = torch.where((labels == NO_CLASS)[:, None], self.any_class.to(one.dtype), one)
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


class MaskedGenerator(IndexModel):
    """Spatial model, head and levels: likelihood of index maps, and sampling of new ones.

    Attributes:
        backbone: Spatial model.
        head: Distribution of one position.
        quantizer: Turns indices into the values that the spatial model sees.
    """

    def __init__(self, backbone: MaskedBackbone, head: Head, quantizer: PostTrainingQuantizer) -> None:
        """Join the parts.

        Raises:
            MmpostError: MMP-C095 when their channels, levels or widths differ.
        """
        super().__init__()
        self.backbone, self.head, self.quantizer = backbone, head, quantizer
        pairs = {
            "channels": (backbone.config.channels, head.config.channels, quantizer.dim),
            "levels": (head.config.levels, quantizer.codebook_size),
            "width of z": (backbone.config.width, head.config.z_dim),
        }
        for name, sizes in pairs.items():
            if len(set(sizes)) > 1:
                what = f"bridge: {name} of the parts differ: {', '.join(map(str, sizes))}."
                raise MmpostError("MMP-C095", what, "Build the parts from one configuration.")

    def check(self, indices: Tensor, labels: Tensor) -> None:
        """Look whether data are of this model.

        Raises:
            MmpostError: MMP-C095 when indices do not fit grid, channels or levels, or labels the classes.
        """
        config, levels = self.backbone.config, self.quantizer.codebook_size
        shape = (*config.grid, config.channels)
        fix = "Encode the images with the tokenizer that the model was made for."
        if tuple(indices.shape[1:]) != shape:
            what = f"bridge: index maps of shape {tuple(indices.shape[1:])}, but the model has {shape}."
            raise MmpostError("MMP-C095", what, fix)
        for name, values, low, high in (("indices", indices, 0, levels), ("labels", labels, NO_CLASS, config.classes)):
            first, last = int(values.min()), int(values.max())
            if not low <= first <= last < high:
                what = f"bridge: {name} from {first} to {last}, but the model has {low}..{high - 1}."
                raise MmpostError("MMP-C095", what, fix)

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
        if self.training:
            hidden = torch.rand(len(labels), generator=generator) < config.label_dropout
            labels = labels.masked_fill(hidden.to(labels.device), NO_CLASS)
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
        steps: int = 256,
        guidance: float = 1.0,
        schedule: Literal["linear", "constant"] = "linear",
        temperature: float = 1.0,
        generator: torch.Generator,
    ) -> Tensor:
        """Sample index maps int64 ``[N, H, W, C]``; call it in eval mode.

        Args:
            labels: int64 ``[N]``.
            steps: Passes of the spatial model, 1 to L; the number of known positions follows a cosine.
            guidance: Classifier-free guidance on z; 1 is none. The paper has 3.1 (L) and 3.45 (H).
            schedule: ``linear``: guidance rises from 1 with the share of known positions.
            temperature: See ``Head.sample``. The paper has 0.97 (L; the released code 0.96) and 0.91 (H).
            generator: On the device of ``labels``.

        Raises:
            MmpostError: MMP-C096 when ``steps`` is out of range.
        """
        length = self.backbone.config.length
        if not 1 <= steps <= length:
            what = f"bridge: {steps} steps for {length} positions."
            raise MmpostError("MMP-C096", what, f"Take 1 to {length} steps.")
        device = labels.device
        order = random_order(len(labels), length, generator).to(device)
        indices = torch.zeros(len(labels), length, self.head.config.channels, dtype=torch.int64, device=device)
        masked = length
        for remaining in cosine_schedule(length, steps):
            # As released: the share after this step, but the last step counts one position as open.
            scale = 1 + (guidance - 1) * (length - max(remaining, 1)) / length if schedule == "linear" else guidance
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
        nothing = torch.full_like(labels, NO_CLASS)
        both = self.backbone(values.repeat(2, 1, 1), torch.cat([labels, nothing]), order.repeat(2, 1), masked)
        with_class, without = both.chunk(2)
        return guided(with_class, without, scale)

    def describe(self) -> dict[str, Any]:
        """Configuration of all parts as JSON; the order of the channels is a tensor of the head."""
        kind = next(name for name, head in HEADS.items() if type(self.head) is head)
        return {
            "backbone": dataclasses.asdict(self.backbone.config),
            "head": {"kind": kind, **dataclasses.asdict(self.head.config)},
            "quantizer": self.quantizer.config.to_json(),
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Open what ``save_pretrained`` wrote, in eval mode.

        Raises:
            MmpostError: MMP-E082 no usable configuration, MMP-E070 no weights, MMP-E071 keys or shapes that differ,
                MMP-E073 a damaged file.
        """
        config, tensors = checkpoint.read(Path(folder))
        try:
            backbone = {**config["backbone"], "grid": tuple(config["backbone"]["grid"])}
            head = dict(config["head"])
            kind = HEADS[head.pop("kind")]
            parts = MaskedConfig(**backbone), HeadConfig(**head), config_from_json(config["quantizer"])
        except (KeyError, TypeError) as error:
            what = f"'{folder}' is not a TokenBridge generator: {error}."
            raise MmpostError("MMP-E082", what, "Name a folder that its trainer wrote.") from error
        model = cls(MaskedBackbone(parts[0]), kind(parts[1]), PostTrainingQuantizer(parts[2]))
        load_strictly(model, tensors, str(folder))
        return model.eval()


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
