"""Discriminators of the adversarial loss: PatchGAN from nothing, heads on a frozen DINO when its weights exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from mmpost.core.errors import MmpostError

DINO_DEPTHS = (2, 5, 8, 11)
DINO_MODEL = "vit_small_patch16_224.dino"
_KERNEL = 9
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PatchGAN(nn.Module):
    """Convolutions of stride 2 whose every output judges one patch (pix2pix, VQGAN).

    Args:
        ndf: Width of the first layer; it doubles per layer up to eight times.
        layers: Layers of stride 2.
        norm: ``batch`` as published, ``group`` for small batches, whose statistics are noise.
    """

    def __init__(self, ndf: int = 64, layers: int = 3, norm: Literal["batch", "group"] = "batch") -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        before = ndf
        for number in range(1, layers + 1):
            width = ndf * min(2**number, 8)
            stride = 2 if number < layers else 1
            parts += [nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=norm != "batch")]
            parts += [nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(min(8, width), width)]
            parts += [nn.LeakyReLU(0.2)]
            before = width
        self.net = nn.Sequential(*parts, nn.Conv2d(before, 1, 4, stride=1, padding=1))
        self.smallest_side = 3 * 2**layers
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits ``[B, 1, h, w]`` of images ``[B, 3, S, S]`` in [-1, 1]; nothing is drawn."""
        logits: Tensor = self.net(images)
        return logits


class DinoDiscriminator(nn.Module):
    """Spectral-norm heads on the patch tokens of a frozen DINO ViT (from VAR), on augmented inputs.

    Args:
        weights: File with the weights of the trunk; None lets timm look for them.
        model: timm name of the trunk.
        cutout: Side of the square that is cut out, relative to the image.
        pretrained: False leaves the trunk random, for tests of shapes.

    Raises:
        MmpostError: MMP-C112 when the weights are not to be had.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        model: str = DINO_MODEL,
        cutout: float = 0.2,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        import timm  # noqa: PLC0415  # only recipes with this discriminator need it

        options = {"checkpoint_path": str(weights)} if weights is not None else {}
        try:
            trunk = timm.create_model(model, pretrained=pretrained and weights is None, num_classes=0, **options)
        except Exception as error:  # timm and the hub raise many kinds, all of which mean the same here
            raise MmpostError(
                "MMP-C112",
                f"losses.discriminator.kind is dino, but the weights of {model} are not to be had: "
                f"{str(error).splitlines()[0]}.",
                "Set losses.discriminator.weights to a file, or losses.discriminator.kind=patchgan.",
            ) from error
        self.trunk = trunk.requires_grad_(False).eval()
        self.side = int(trunk.patch_embed.img_size[0])
        self.smallest_side = 1
        self.cutout = cutout
        self.depths = [depth for depth in DINO_DEPTHS if depth < len(trunk.blocks)]
        width = int(trunk.embed_dim)
        self.heads = nn.ModuleList(_head(width) for _ in range(len(self.depths) + 1))
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> DinoDiscriminator:
        """Heads follow ``mode``; the trunk stays frozen."""
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits ``[B, tokens * heads]`` of images ``[B, 3, S, S]`` in [-1, 1]; draws the augmentation."""
        if generator is not None:
            images = augment(images, generator, cutout=self.cutout)
        if images.shape[-1] != self.side:
            mode = "area" if images.shape[-1] > self.side else "bicubic"
            images = functional.interpolate(images, (self.side, self.side), mode=mode)
        pixels = ((images + 1) / 2 - self.mean) / self.std
        tokens = self.trunk.norm_pre(self.trunk._pos_embed(self.trunk.patch_embed(pixels)))
        prefix = self.trunk.num_prefix_tokens
        kept = [tokens[:, prefix:]]
        for number, block in enumerate(self.trunk.blocks):
            tokens = block(tokens)
            if number in self.depths:
                kept.append(tokens[:, prefix:])
        found = [head(part.transpose(1, 2)).flatten(1) for head, part in zip(self.heads, kept, strict=True)]
        return torch.cat(found, 1)


class _Residual(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        # Divided so that the variance stays what it was.
        return (self.inside(x) + x) * 2**-0.5


def _head(width: int) -> nn.Sequential:
    def block(kernel: int) -> nn.Sequential:
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
        return nn.Sequential(spectral_norm(conv), nn.GroupNorm(8, width), nn.LeakyReLU(0.2))

    return nn.Sequential(block(1), _Residual(block(_KERNEL)), spectral_norm(nn.Conv1d(width, 1, 1)))


def augment(images: Tensor, generator: torch.Generator, *, cutout: float = 0.2) -> Tensor:
    """DiffAugment with probability 1: brightness, saturation, contrast, translation, cutout, per image.

    Args:
        images: ``[B, 3, S, S]`` in [-1, 1].
        generator: Source of all draws, on the CPU.
        cutout: Side of the cut square relative to S; 0 cuts nothing.

    Returns:
        The same shape; gradients pass.
    """
    batch, _, height, width = images.shape

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(images)

    out = images + (draw(batch, 1, 1, 1) - 0.5)
    grey = out.mean(1, keepdim=True)
    out = (out - grey) * (draw(batch, 1, 1, 1) * 2) + grey
    level = out.mean((1, 2, 3), keepdim=True)
    out = (out - level) * (draw(batch, 1, 1, 1) + 0.5) + level
    out = _shift(out, draw(batch, 2), reach=0.125)
    if cutout > 0:
        centre = draw(batch, 2)
        inside = _near(centre[:, :1], height, cutout)[:, :, None] & _near(centre[:, 1:], width, cutout)[:, None, :]
        out = out * (~inside)[:, None].to(out)
    return out


def _shift(images: Tensor, where: Tensor, *, reach: float) -> Tensor:
    """Move each image by up to ``reach`` of its sides; what comes in is black (zero)."""
    batch, channels, height, width = images.shape
    span = (int(height * reach + 0.5), int(width * reach + 0.5))
    padded = functional.pad(images, (span[1], span[1], span[0], span[0]))
    top = (where[:, 0] * (2 * span[0] + 1)).long().clamp_max(2 * span[0])
    left = (where[:, 1] * (2 * span[1] + 1)).long().clamp_max(2 * span[1])
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    index = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]
    flat = padded.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, channels, -1))
    return flat.view(batch, channels, height, width)


def _near(centre: Tensor, side: int, share: float) -> Tensor:
    """``[B, side]``: within half of ``share`` of a centre in [0, 1]."""
    places = (torch.arange(side, device=centre.device) + 0.5) / side
    return (places[None] - centre).abs() <= share / 2


def make_discriminator(
    kind: Literal["patchgan", "dino"], *, ndf: int, layers: int, norm: Literal["batch", "group"], weights: str | None
) -> PatchGAN | DinoDiscriminator:
    """The discriminator of a configuration."""
    makers: dict[str, Callable[[], PatchGAN | DinoDiscriminator]] = {
        "patchgan": lambda: PatchGAN(ndf, layers, norm),
        "dino": lambda: DinoDiscriminator(weights),
    }
    return makers[kind]()
