"""Features of torchvision's MobileNetV2, from a local file of its ImageNet weights.

A stand-in where Inception is not at hand; its scores are never called FID or LPIPS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import mobilenet_v2  # type: ignore[import-untyped]

from mmpost_tokenizers.features import load_strictly

# A tensor that tells this network from others.
MARK = "features.18.1.running_var"
SIDE = 128
# Blocks of which feature maps are compared, and the one that gives the features.
LAYERS = (1, 3, 6, 13, 18)
FEATURES = 13
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MobileNetFeatures(nn.Module):
    """96 averaged channels of block 13; see ``FeatureExtractor`` and ``LayeredExtractor``."""

    dim = 96
    is_inception = False
    mean: Tensor
    std: Tensor

    def __init__(self, weights: Mapping[str, Tensor], *, sha256: str) -> None:
        """Fill the network.

        Raises:
            MmpostError: MMP-V074 when names or shapes differ.
        """
        super().__init__()
        net = mobilenet_v2()
        load_strictly(net, weights, "MobileNetV2 weights")
        self.blocks = net.features.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1))
        self.sha256 = sha256
        self.name = f"mobilenetv2-{sha256[:8]}"
        self.facts: dict[str, Any] = {"resize": f"bilinear-{SIDE}"}

    def train(self, mode: bool = True) -> MobileNetFeatures:
        """Stay in evaluation mode whatever is asked."""
        return super().train(False)

    def layers(self, images: Tensor) -> list[Tensor]:
        """Feature maps of five blocks of uint8 ``[B, 3, H, W]``; see ``LayeredExtractor``."""
        pixels = F.interpolate(images.float() / 255, (SIDE, SIDE), mode="bilinear", antialias=True)
        maps, here = [], (pixels - self.mean) / self.std
        for number, block in enumerate(self.blocks):
            here = block(here)
            if number in LAYERS:
                maps.append(here)
        return maps

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, 96]`` of uint8 ``[B, 3, H, W]``."""
        return self.layers(images)[LAYERS.index(FEATURES)].mean((2, 3))
