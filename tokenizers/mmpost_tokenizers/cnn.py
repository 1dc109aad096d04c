"""Convolutional VQ tokenizer on the encoder and decoder blocks of diffusers.

``CNNConfig.llamagen()`` is the shape of LlamaGen's VQ-16, ``CNNConfig()`` with other numbers anything smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn
from torch.nn import functional

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.base import DiscreteTokenizer, TokenizerConfig, build_quantizer
from mmpost_tokenizers.quantizers.configs import VQConfig


@dataclass(frozen=True, kw_only=True)
class CNNConfig(TokenizerConfig):
    """Shape of a CNN tokenizer.

    Attributes:
        block_out_channels: Channels of each resolution level, finest first; each level but the last halves the side.
        layers_per_block: Residual blocks of a level in the encoder; the decoder has one more.
        z_channels: Channels between the backbone and the 1x1 convolutions around the quantizer.
        stem_patch: Side of the pixel blocks that become channels before the first convolution and pixels again after
            the last. 1 is the published shape; 2 or 4 make small images cheap.
        norm_groups: Groups of every GroupNorm; must divide all of ``block_out_channels``.
        lowest_attention: Self-attention after each residual block of the lowest level, as in LlamaGen.
        mid_attention: Self-attention in the middle block.
    """

    kind: ClassVar[str] = "cnn"
    block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    layers_per_block: int = 2
    z_channels: int = 256
    stem_patch: int = 1
    norm_groups: int = 32
    lowest_attention: bool = True
    mid_attention: bool = True

    def __post_init__(self) -> None:
        if any(channels % self.norm_groups for channels in self.block_out_channels):
            raise MmpostError(
                "MMP-C071",
                f"tokenizer 'cnn': norm_groups={self.norm_groups} does not divide {list(self.block_out_channels)}.",
                "Choose norm_groups that divides every entry of block_out_channels.",
            )
        if self.image_size % self.factor:
            raise MmpostError(
                "MMP-C071",
                f"tokenizer 'cnn': image_size={self.image_size} is not a multiple of {self.factor}, a token's side.",
                "Choose another image_size, fewer levels or a smaller stem_patch.",
            )

    @property
    def factor(self) -> int:
        """Pixels that a token spans in each direction."""
        return self.stem_patch * 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def llamagen(cls, *, image_size: int = 256, downsample: int = 16) -> CNNConfig:
        """The published VQ-16 (72M parameters), or VQ-8 with ``downsample=8``.

        Source: arXiv 2406.06525, released ``vq_model.py``: ch 128, ch_mult (1, 1, 2, 2, 4) or (1, 2, 2, 4), codebook of
        16384 unit vectors of 8 channels.
        """
        channels = {16: (128, 128, 256, 256, 512), 8: (128, 256, 256, 512)}[downsample]
        return cls(image_size=image_size, quantizer=VQConfig(codebook_size=16384, dim=8), block_out_channels=channels)


class CNNTokenizer(DiscreteTokenizer):
    """Encoder, 1x1 ``quant_conv``, quantizer, 1x1 ``post_quant_conv``, decoder. The grid is ``(H, W)``."""

    config_class = CNNConfig
    config: CNNConfig

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        self.config = config
        side = config.image_size // config.factor
        self.grid = (side, side)
        levels = len(config.block_out_channels)
        last = "Attn" if config.lowest_attention else ""
        pixels = 3 * config.stem_patch**2
        self.encoder = Encoder(
            in_channels=pixels,
            out_channels=config.z_channels,
            down_block_types=("DownEncoderBlock2D",) * (levels - 1) + (f"{last}DownEncoderBlock2D",),
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_groups,
            double_z=False,
            mid_block_add_attention=config.mid_attention,
        )
        self.decoder = Decoder(
            in_channels=config.z_channels,
            out_channels=pixels,
            up_block_types=(f"{last}UpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_groups,
            mid_block_add_attention=config.mid_attention,
        )
        self.quantizer = build_quantizer(config.quantizer)
        self.quant_conv = nn.Conv2d(config.z_channels, self.quantizer.dim, 1)
        self.post_quant_conv = nn.Conv2d(self.quantizer.dim, config.z_channels, 1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The last convolution."""
        weight: nn.Parameter = self.decoder.conv_out.weight
        return weight

    def decoder_modules(self) -> list[nn.Module]:
        """``post_quant_conv`` and the decoder."""
        return [self.post_quant_conv, self.decoder]

    def features(self, images: Tensor) -> Tensor:
        """Latents ``[B, H, W, C]`` after ``quant_conv``."""
        hidden = self.encoder(functional.pixel_unshuffle(images, self.config.stem_patch))
        latents: Tensor = self.quant_conv(hidden)
        return latents.permute(0, 2, 3, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Images from latents ``[B, H, W, C]``."""
        hidden = self.post_quant_conv(latents.permute(0, 3, 1, 2))
        return functional.pixel_shuffle(self.decoder(hidden), self.config.stem_patch)
