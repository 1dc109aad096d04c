"""Extractors that need no weights from elsewhere: a classifier trained in seconds, and a random network.

Distances in their features order images of one small data set. They say nothing about natural images, so their names
hold what they were made of, and their scores are never called FID.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmpost.core.errors import MmpostError
from mmpost.core.seeding import generator
from mmpost_tokenizers.features import unusable, weights_digest

_HELD_OUT = 0.2
_BATCH = 64
_KIND = "mmpost-classifier-features-1"


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _fill(net: nn.Module, seed: int, purpose: str) -> None:
    """Kaiming weights and zero biases as a function of the seed alone."""
    draw = torch.Generator().manual_seed(int(generator(seed, purpose).integers(2**62)))
    for weight in net.parameters():
        if weight.ndim == 1:
            nn.init.zeros_(weight)
        else:
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=draw)


class _Net(nn.Module):
    """Two strided convolutions, a hidden layer and class logits."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 5, stride=2, padding=2)
        self.second = nn.Conv2d(24, 48, 3, stride=2, padding=1)
        self.hidden = nn.Linear(48 * 16, dim)
        self.classes = nn.Linear(dim, classes)

    def maps(self, images: Tensor) -> list[Tensor]:
        early = F.relu(self.first(_scaled(images)))
        return [early, F.relu(self.second(early))]

    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.hidden(F.adaptive_avg_pool2d(self.maps(images)[-1], 4).flatten(1)))


class ClassifierFeatures(nn.Module):
    """The hidden layer of a small classifier; see ``FeatureExtractor`` and ``LayeredExtractor``.

    Attributes:
        facts: Held-out accuracy, classes, images and seed of its training.
    """

    is_inception = False

    def __init__(self, net: _Net, name: str, facts: dict[str, Any]) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.dim = net.hidden.out_features
        self.name, self.facts = name, facts
        self.sha256 = weights_digest(net.state_dict())

    @classmethod
    def fit(
        cls, images: Tensor, labels: Tensor | Sequence[int], *, source: str, seed: int, dim: int = 32, steps: int = 300
    ) -> ClassifierFeatures:
        """Train on labelled images; a fifth of them is held out for the accuracy.

        Never pass images that will be evaluated: the extractor would know them.

        Args:
            images: uint8 ``[N, 3, H, W]``, training images only.
            labels: Class number from 0 of each image.
            source: Short name of the data; the extractor is called ``<source>-cnn<dim>-seed<seed>``.
            seed: Seed of weights, split and order.
            dim: Features.
            steps: Steps of 64 images.

        Raises:
            MmpostError: MMP-V075 without two classes or with fewer than 10 images.
        """
        target = torch.as_tensor(labels, dtype=torch.int64)
        known = int(target.unique().numel()) if len(target) else 0
        if len(images) < 10 or known < 2 or int(target.min()) < 0:
            raise MmpostError(
                "MMP-V075",
                f"a classifier cannot be trained on {len(images)} images of {known} classes.",
                "Give at least 10 labelled images of two classes, or take another feature extractor",
            )
        net = _Net(dim, int(target.max()) + 1)
        _fill(net, seed, "classifier-features")
        order = torch.from_numpy(generator(seed, "classifier-split").permutation(len(images)))
        held = max(1, round(len(images) * _HELD_OUT))
        _train(net, images[order[held:]], target[order[held:]], seed=seed, steps=steps)
        with torch.no_grad():
            said = torch.cat([net.classes(net.features(part)) for part in images[order[:held]].split(256)]).argmax(1)
        accuracy = float((said == target[order[:held]]).float().mean())
        facts = {"accuracy": round(accuracy, 4), "classes": known, "images": len(images), "seed": seed, "steps": steps}
        return cls(net, f"{source}-cnn{dim}-seed{seed}", facts)

    def layers(self, images: Tensor) -> list[Tensor]:
        """Feature maps of both convolutions; see ``LayeredExtractor``."""
        return self.net.maps(images)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, dim]`` of uint8 ``[B, 3, H, W]``."""
        return self.net.features(images)

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Class number ``[B]`` of uint8 ``[B, 3, H, W]``, for the class accuracy of generated images."""
        return self.net.classes(self.net.features(images)).argmax(1)

    def save(self, path: str | Path) -> None:
        """Write weights, name and facts to a ``.safetensors`` file, so that other runs score with the same."""
        about = {"kind": _KIND, "name": self.name, "facts": json.dumps(self.facts)}
        save_file({name: value.contiguous() for name, value in self.net.state_dict().items()}, path, metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> ClassifierFeatures:
        """Read what ``save`` wrote.

        Raises:
            MmpostError: MMP-V074.
        """
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        except (SafetensorError, OSError) as error:
            raise unusable(Path(path), f"it cannot be read: {error}") from error
        if about.get("kind") != _KIND:
            raise unusable(Path(path), "it was not written by ClassifierFeatures.save")
        classes, dim = weights["classes.weight"].shape
        net = _Net(dim, classes)
        net.load_state_dict(weights)
        return cls(net, about["name"], json.loads(about["facts"]))


def _train(net: _Net, images: Tensor, target: Tensor, *, seed: int, steps: int) -> None:
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.from_numpy(generator(seed, "classifier-batch", step).integers(len(images), size=_BATCH))
        loss = F.cross_entropy(net.classes(net.features(images[rows])), target[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


class RandomConvFeatures(nn.Module):
    """Mean and spread of the channels of an untrained network; for smoke tests only. See ``FeatureExtractor``."""

    is_inception = False

    def __init__(self, *, dim: int = 64, seed: int = 0) -> None:
        """Draw the weights.

        Args:
            dim: Features, an even number.
            seed: Seed of the weights, part of the name.
        """
        super().__init__()
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(3, 16, 3, stride=2, padding=1),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),
                nn.Conv2d(32, dim // 2, 3, padding=1),
            ]
        )
        _fill(self.convolutions, seed, "random-conv-features")
        self.requires_grad_(False)
        self.dim, self.name = dim, f"random-conv{dim}-seed{seed}"
        self.sha256 = weights_digest(self.state_dict())
        self.facts: dict[str, Any] = {"trained": False}

    def layers(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the three convolutions; see ``LayeredExtractor``."""
        maps, here = [], _scaled(images)
        for convolution in self.convolutions:
            here = F.relu(convolution(here))
            maps.append(here)
        return maps

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, dim]`` of uint8 ``[B, 3, H, W]``."""
        last = self.layers(images)[-1].flatten(2)
        return torch.cat([last.mean(2), last.std(2, unbiased=False)], 1)
