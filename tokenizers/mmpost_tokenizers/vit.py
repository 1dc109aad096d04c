"""ViT tokenizer: learned latent tokens gather the image, and decode it again, on any plain ViT of timm.

Encoder: ``[prefix, patches, latent tokens]`` through a ViT; only the outputs at the latent tokens are kept, mapped to
the quantizer's channels. Decoder: ``[prefix, copies of one mask token, quantized latents]`` through a second ViT; the
outputs at the mask tokens become pixels. ``ViTConfig.robustok`` and ``ViTConfig.titok`` are the published shapes.

Source: arXiv 2406.07550 (TiTok), arXiv 2509.12474 (RobusTok).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.base import DiscreteTokenizer, TokenizerConfig, build_quantizer
from mmpost_tokenizers.published.maskgit import MaskGITHead
from mmpost_tokenizers.quantizers.configs import VQConfig

# Width, depth and heads of TiTok's ViTs.
TITOK_SHAPES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}


@dataclass(frozen=True, kw_only=True)
class ViTConfig(TokenizerConfig):
    """Shape of a ViT tokenizer.

    Attributes:
        backbone: timm name of the encoder's ViT.
        decoder_backbone: timm name of the decoder's; None takes ``backbone``.
        shape: Width, depth and heads of the encoder instead of those that the name implies.
        decoder_shape: The same of the decoder; None takes ``shape`` unless ``decoder_backbone`` is given.
        patch_size: Side of a patch in pixels.
        num_latent_tokens: Number of tokens N of an image.
        positions: ``learned``: latent tokens have positions of their own, and the grid is ``(N,)``, as in TiTok.
            ``shared``: they lie on a square grid with the backbone's positions, both kinds of token get a learned level
            embedding, and the decoder puts a second copy of the prefix before the latents, as in RobusTok.
        pixels: ``linear``: patches from one linear layer. ``linear_conv``: a 3x3 convolution after it, as in TiTok of
            one stage. ``maskgit``: a mixture of the codes of MaskGIT's VQGAN through that decoder, as in two stages.
        interleaved_latents: Latents are read in the scrambled order that TiTok of two stages was trained with.
        unit_range: The network works on [0, 1] instead of [-1, 1]; what goes in and out stays [-1, 1].
        drop_path: Largest rate of stochastic depth while training.
    """

    kind: ClassVar[str] = "vit"
    backbone: str = "vit_small_patch16_224"
    decoder_backbone: str | None = None
    shape: tuple[int, int, int] | None = None
    decoder_shape: tuple[int, int, int] | None = None
    patch_size: int = 16
    num_latent_tokens: int = 256
    positions: Literal["learned", "shared"] = "learned"
    pixels: Literal["linear", "linear_conv", "maskgit"] = "linear"
    interleaved_latents: bool = False
    unit_range: bool = False
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        side = round(self.num_latent_tokens**0.5)
        for field, value, good, expected in (
            ("image_size", self.image_size, self.image_size % self.patch_size == 0, "a multiple of patch_size"),
            ("positions", self.positions, self.positions in ("learned", "shared"), "learned or shared"),
            ("pixels", self.pixels, self.pixels in ("linear", "linear_conv", "maskgit"), "a known head"),
            (
                "num_latent_tokens",
                self.num_latent_tokens,
                self.positions == "learned" or side * side == self.num_latent_tokens,
                "a square number, which shared positions need",
            ),
            ("patch_size", self.patch_size, self.pixels != "maskgit" or self.patch_size == 16, "16, as maskgit needs"),
        ):
            if not good:
                what = f"tokenizer 'vit': {field}={value!r} is not {expected}."
                raise MmpostError("MMP-C071", what, f"Correct {field}.")

    @classmethod
    def robustok(cls, *, image_size: int = 256, codebook_size: int = 4096, dim: int = 64) -> ViTConfig:
        """RobusTok: DINOv2-B on both sides, 256 tokens, 4096 unit codes of 64 channels."""
        return cls(
            image_size=image_size,
            quantizer=VQConfig(codebook_size=codebook_size, dim=dim),
            backbone="vit_base_patch14_dinov2",
            num_latent_tokens=(image_size // 16) ** 2,
            positions="shared",
            drop_path=0.1,
        )

    @classmethod
    def titok(
        cls,
        *,
        encoder: Literal["small", "base", "large"] = "large",
        decoder: Literal["small", "base", "large"] = "large",
        num_latent_tokens: int = 32,
        two_stage: bool = True,
        quantizer: VQConfig | None = None,
    ) -> ViTConfig:
        """TiTok: by default L-32 of two stages; ``two_stage=False`` is the layout of the 8192-code models."""
        published = (
            VQConfig(codebook_size=4096, dim=12) if two_stage else VQConfig(codebook_size=8192, dim=64, l2_norm=False)
        )
        return cls(
            image_size=256,
            quantizer=quantizer or published,
            # A plain ViT with a norm before the blocks and epsilon 1e-5; sizes follow below.
            backbone="vit_base_patch16_clip_224",
            shape=TITOK_SHAPES[encoder],
            decoder_shape=TITOK_SHAPES[decoder],
            num_latent_tokens=num_latent_tokens,
            pixels="maskgit" if two_stage else "linear_conv",
            interleaved_latents=two_stage,
            unit_range=True,
        )


class ViTTokenizer(DiscreteTokenizer):
    """Two ViTs around a quantizer, see the module."""

    config_class = ViTConfig
    config: ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        side = round(config.num_latent_tokens**0.5)
        self.grid = (side, side) if config.positions == "shared" else (config.num_latent_tokens,)
        self.quantizer = build_quantizer(config.quantizer)
        self.encoder = _Trunk(config, config.backbone, config.shape, has_patches=True)
        same = config.shape if config.decoder_backbone is None else None
        name = config.decoder_backbone or config.backbone
        self.decoder = _Trunk(config, name, config.decoder_shape or same, has_patches=False)
        self.quant_conv = nn.Linear(self.encoder.width, self.quantizer.dim)
        self.post_quant_conv = nn.Linear(self.quantizer.dim, self.decoder.width)
        self.to_pixels = _pixel_head(config, self.decoder.width)

    @property
    def last_layer(self) -> nn.Parameter:
        """The last layer of the pixel head."""
        head = self.to_pixels
        last = head.last if isinstance(head, MaskGITHead | _PatchHead) else head
        return cast(nn.Parameter, last.weight)

    def decoder_modules(self) -> list[nn.Module]:
        """``post_quant_conv``, the second ViT and the pixel head."""
        return [self.post_quant_conv, self.decoder, self.to_pixels]

    def load_backbones(self) -> None:
        """Take timm's pretrained weights for both ViTs, resized to this patch size and grid.

        Raises:
            MmpostError: MMP-E075 when timm has no weights of that name, or cannot fetch them.
        """
        for trunk in (self.encoder, self.decoder):
            trunk.load_pretrained()

    def features(self, images: Tensor) -> Tensor:
        """Latents ``[B, *grid, C]`` from the outputs at the latent tokens."""
        hidden = self.encoder.run((images + 1) / 2 if self.config.unit_range else images, None)
        hidden = hidden[:, -self.config.num_latent_tokens :]
        if self.config.interleaved_latents:
            # The published code reads [B, N, width] as [B, width, N] without transposing.
            hidden = hidden.reshape(len(hidden), self.encoder.width, -1).transpose(1, 2)
        return cast(Tensor, self.quant_conv(hidden)).unflatten(1, self.grid)

    def decode(self, latents: Tensor) -> Tensor:
        """Images from latents ``[B, *grid, C]``."""
        tokens = self.post_quant_conv(latents.flatten(1, -2))
        hidden = self.decoder.run(None, tokens)
        first = self.decoder.num_prefix
        images: Tensor = self.to_pixels(hidden[:, first : first + self.decoder.num_patches])
        return images * 2 - 1 if self.config.unit_range else images


class _Trunk(nn.Module):
    """A ViT with what one side of the tokenizer adds to it."""

    def __init__(self, config: ViTConfig, name: str, shape: tuple[int, int, int] | None, *, has_patches: bool) -> None:
        super().__init__()
        self._name = name
        self._arguments: dict[str, Any] = {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "num_classes": 0,
            "global_pool": "",  # otherwise some models have no final norm over tokens
            "drop_path_rate": config.drop_path,
        }
        if shape is not None:
            self._arguments |= dict(zip(("embed_dim", "depth", "num_heads"), shape, strict=True))
        self.model = _create(name, self._arguments, pretrained=False)
        self.width: int = self.model.embed_dim
        self.num_patches: int = self.model.patch_embed.num_patches
        self.num_prefix: int = self.model.num_prefix_tokens
        self._latent_side = round(config.num_latent_tokens**0.5)
        self.shared = config.positions == "shared"
        scale = 1e-6 if self.shared else self.width**-0.5
        if has_patches:
            if self.model.patch_embed.proj.bias is None:  # as in CLIP; TiTok has one
                self.model.patch_embed.proj.bias = nn.Parameter(torch.zeros(self.width))
            self.latent_tokens = nn.Parameter(scale * torch.randn(1, config.num_latent_tokens, self.width))
        else:
            self.model.patch_embed = nn.Identity()
            self.mask_token = nn.Parameter(scale * torch.randn(1, 1, self.width))
        if self.shared:
            self.level = nn.Parameter(torch.empty(2, self.width))
            nn.init.trunc_normal_(self.level, std=(1 / self.width / 3) ** 0.5)
        else:
            self.latent_positions = nn.Parameter(0.02 * torch.randn(1, config.num_latent_tokens, self.width))

    def run(self, images: Tensor | None, latents: Tensor | None) -> Tensor:
        """Outputs ``[B, prefix + patches + ..., width]``: of images with the latent tokens, or of given latents."""
        model = self.model
        if images is not None:
            patches = model.patch_embed(images)
            latents = self.latent_tokens.expand(len(images), -1, -1)
        else:
            latents = cast(Tensor, latents)
            patches = self.mask_token.expand(len(latents), self.num_patches, -1)
        image_side = self._with_prefix(patches, round(self.num_patches**0.5))
        if self.shared:
            latents = self._with_prefix(latents, self._latent_side)
            # The encoder leaves out the second prefix, the decoder does not.
            latents = latents[:, self.num_prefix :] if images is not None else latents
            tokens = torch.cat([image_side + self.level[0], latents + self.level[1]], dim=1)
        else:
            tokens = torch.cat([image_side, latents + self.latent_positions], dim=1)
        tokens = model.norm_pre(tokens)
        for block in model.blocks:
            tokens = block(tokens)
        return cast(Tensor, model.norm(tokens))

    def _with_prefix(self, tokens: Tensor, side: int) -> Tensor:
        """Tokens of a ``side`` x ``side`` map after the prefix, all with the backbone's positions."""
        model = self.model
        kinds = [token.expand(len(tokens), -1, -1) for token in (model.cls_token, model.reg_token) if token is not None]
        own = 0 if model.no_embed_class else self.num_prefix
        positions = model.pos_embed
        if positions.shape[1] != own + side * side:
            positions = resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=own)
        if model.no_embed_class:
            return torch.cat([*kinds, tokens + positions], dim=1)
        return torch.cat([*kinds, tokens], dim=1) + positions

    def load_pretrained(self) -> None:
        """Copy timm's pretrained weights; what is not part of this trunk is left out."""
        try:
            donor = _create(self._name, self._arguments, pretrained=True)
        except MmpostError:
            raise
        except Exception as error:  # whatever the hub's client raises when it has neither network nor cache
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            what = f"no pretrained weights for '{self._name}': {reason}"
            raise MmpostError("MMP-E075", what, "Go online once, or start from random weights.") from error
        own = self.model.state_dict()
        self.model.load_state_dict(
            {name: value for name, value in donor.state_dict().items() if name in own}, strict=False
        )


def _create(name: str, arguments: dict[str, Any], *, pretrained: bool) -> Any:
    if not timm.is_model(name):
        what = f"timm {timm.__version__} has no model '{name}'."
        raise MmpostError("MMP-C078", what, "See timm.list_models('vit_*').")
    try:
        model = timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise MmpostError("MMP-C078", f"'{name}' is no plain ViT: {error}.", "Choose a model named vit_*.") from error
    if not isinstance(model, VisionTransformer) or model.pos_embed is None:
        what = f"'{name}' is a {type(model).__name__}, not a ViT with position embeddings."
        raise MmpostError("MMP-C078", what, "Choose a model named vit_*.")
    return model


class _PatchHead(nn.Module):
    """Linear layer to patches, then a 3x3 convolution over the whole image."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patches = _Unpatch(width, patch)
        self.last = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        images: Tensor = self.last(self.patches(tokens))
        return images


class _Unpatch(nn.Linear):
    """Tokens ``[B, side^2, width]`` to images; the channels of a patch are rows, columns, colours, in this order."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__(width, patch * patch * 3)
        self.patch = patch

    def forward(self, input: Tensor) -> Tensor:
        side = round(input.shape[1] ** 0.5)
        patches = super().forward(input).unflatten(2, (self.patch, self.patch, 3)).unflatten(1, (side, side))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _pixel_head(config: ViTConfig, width: int) -> nn.Module:
    if config.pixels == "maskgit":
        return MaskGITHead(width)
    return (
        _PatchHead(width, config.patch_size) if config.pixels == "linear_conv" else _Unpatch(width, config.patch_size)
    )


def scaled(config: ViTConfig, *, shape: tuple[int, int, int], image_size: int, num_latent_tokens: int) -> ViTConfig:
    """The same layout at another size, for tests and trials."""
    return replace(config, shape=shape, decoder_shape=shape, image_size=image_size, num_latent_tokens=num_latent_tokens)
