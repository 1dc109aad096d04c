"""The network of FID: Inception-v3 as TensorFlow released it on 2015-12-05, from a local file of its weights.

It is torchvision's network but for three things: average pools leave the padding out of the mean, the last block pools
by maximum, and there are 1,008 classes. Inputs are resized as TensorFlow 1 did it (bilinear, corners of pixels instead
of centres), since the published scores were made that way; pytorch-fid resizes by centres and therefore differs a
little. Nothing is downloaded.

Source: Szegedy et al., arXiv 1512.00567; Heusel et al., arXiv 1706.08500.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.inception import (  # type: ignore[import-untyped]
    Inception3,
    InceptionA,
    InceptionC,
    InceptionE,
)

from mmpost_tokenizers.features import load_strictly

# A tensor that tells this network from others.
MARK = "Mixed_5b.branch_pool.conv.weight"
# How the SHA-256 of the published file begins (pt_inception-2015-12-05-6726825d.pth, as its name says). Other weights
# in the same layout are welcome, but their score is not an FID.
OFFICIAL = ("6726825d",)
SIDE = 299
CLASSES = 1008


class _ExactMean:
    """Replaces the pooled branch, which torchvision puts last, by one without padding in its mean."""

    branch_pool: nn.Module

    def _forward(self, x: Tensor) -> list[Tensor]:
        branches: list[Tensor] = super()._forward(x)  # type: ignore[misc]  # of the torchvision block
        branches[-1] = self.branch_pool(self._pool(x))
        return branches

    def _pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(_ExactMean, InceptionA):
    pass


class _BlockC(_ExactMean, InceptionC):
    pass


class _BlockE(_ExactMean, InceptionE):
    pass


class _LastBlock(_ExactMean, InceptionE):
    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, stride=1, padding=1)


def fid_network() -> Inception3:
    """The network without weights; ``forward`` maps ``[B, 3, 299, 299]`` in [-1, 1) to 1,008 logits."""
    net = Inception3(num_classes=CLASSES, aux_logits=False, transform_input=False, init_weights=False)
    net.Mixed_5b = _BlockA(192, pool_features=32)
    net.Mixed_5c = _BlockA(256, pool_features=64)
    net.Mixed_5d = _BlockA(288, pool_features=64)
    for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        setattr(net, name, _BlockC(768, channels_7x7=width))
    net.Mixed_7b = _BlockE(1280)
    net.Mixed_7c = _LastBlock(2048)
    return net


def tf1_resize(images: Tensor, side: int) -> Tensor:
    """Bilinear resize of float ``[B, C, H, W]`` to ``side`` as TensorFlow 1 did: output i reads input i * H / side."""
    for axis in (2, 3):
        size = images.shape[axis]
        at = torch.arange(side, device=images.device, dtype=torch.float32) * (size / side)
        low = at.floor().long().clamp(max=size - 1)
        high = (low + 1).clamp(max=size - 1)
        share = (at - low).view(-1, 1) if axis == 2 else at - low
        first, second = images.index_select(axis, low), images.index_select(axis, high)
        images = first + (second - first) * share
    return images


class InceptionFeatures(nn.Module):
    """2,048 pooled features and 1,008 logits; see ``FeatureExtractor``."""

    dim = 2048
    classes: Tensor

    def __init__(self, weights: Mapping[str, Tensor], *, sha256: str, official: tuple[str, ...] = OFFICIAL) -> None:
        """Fill the network.

        Args:
            weights: Tensors by the names of the published file.
            sha256: Of the file.
            official: Beginnings of the hashes that may be called Inception.

        Raises:
            MmpostError: MMP-V074 when names or shapes differ.
        """
        super().__init__()
        net = fid_network()
        load_strictly(net, weights, "Inception-v3 weights")
        # Without the bias, as the published Inception Score has it.
        self.register_buffer("classes", net.fc.weight.detach().clone())
        net.fc = nn.Identity()
        self.net = net.eval().requires_grad_(False)
        self.sha256 = sha256
        self.is_inception = sha256.startswith(official)
        self.name = "inception-v3-2015-12-05" if self.is_inception else f"inception-v3-layout-{sha256[:8]}"
        self.facts: dict[str, Any] = {"resize": "tf1-bilinear-299"}

    def train(self, mode: bool = True) -> InceptionFeatures:
        """Stay in evaluation mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, 2048]`` of uint8 ``[B, 3, H, W]``."""
        pixels = tf1_resize(images.float(), SIDE)
        return self.net((pixels - 128) / 128)

    def logits(self, features: Tensor) -> Tensor:
        """Logits without bias ``[N, 1008]`` of features ``[N, 2048]``, for the Inception Score."""
        return features.to(self.classes) @ self.classes.T
