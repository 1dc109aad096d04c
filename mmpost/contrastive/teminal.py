"""TeminAL: two stages of post-training that give a contrastive audio-text model a sense of order.

Stage A mixes single sounds with pairs, so that the model learns one from two; stage B has pairs alone and adds every
scene in reverse. The losses are those of ``mmpost.contrastive.loss``: stage A uses plain InfoNCE.

Source: TeminAL, arXiv 2408.09269. Differs: the paper publishes neither code nor constants; learning rates, the share of
single sounds and the weights are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mmpost.contrastive.loss import Embedded, Scales, True_, Weights, temporal_nce
from mmpost.contrastive.scenes import Scene, Waveform, draw, heard, matches
from mmpost.contrastive.zste import Similarity
from mmpost.core.seeding import generator, uniform

# Class to its recordings.
Sounds = Mapping[str, Sequence[Waveform]]


class Towers(Protocol):
    """A contrastive model of sounds and texts."""

    def audio(self, waveforms: Sequence[Waveform]) -> Tensor:
        """Unit vectors of waveforms, float ``[B, D]``."""
        ...

    def text(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors of captions, float ``[B, D]``."""
        ...

    def scales(self) -> Scales:
        """1 / temperature of sounds that ask captions, and of captions that ask sounds."""
        ...

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Weights of the towers, and of projections and temperatures."""
        ...


class Clap:
    """transformers' ``ClapModel`` with its processor.

    Its own ``return_loss`` is not used: version 5.23 transposes the logits of sounds, so that both halves of its loss
    ask from captions to sounds and none the other way round.

    Args:
        model: The model.
        processor: Has ``feature_extractor`` and ``tokenizer``; waveforms come at the extractor's own rate.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.extractor, self.tokenizer = processor.feature_extractor, processor.tokenizer

    def audio(self, waveforms: Sequence[Waveform]) -> Tensor:
        """See ``Towers``."""
        features = self.extractor(list(waveforms), sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        return _unit(self.model.get_audio_features(**features.to(self.model.device)))

    def text(self, captions: Sequence[str]) -> Tensor:
        """See ``Towers``."""
        tokens = self.tokenizer(list(captions), padding=True, return_tensors="pt").to(self.model.device)
        return _unit(
            self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        )

    def scales(self) -> Scales:
        """See ``Towers``."""
        return self.model.logit_scale_a.exp(), self.model.logit_scale_t.exp()

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """See ``Towers``."""
        towers = [*self.model.audio_model.parameters(), *self.model.text_model.parameters()]
        known = {id(parameter) for parameter in towers}
        return towers, [parameter for parameter in self.model.parameters() if id(parameter) not in known]


def _unit(found: Any) -> Tensor:
    """The pooled vectors as unit vectors; newer transformers wrap them."""
    vectors: Tensor = getattr(found, "pooler_output", found)
    return nn.functional.normalize(vectors, dim=-1)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the post-training.

    Attributes:
        name: ``A`` (single sounds and pairs, plain InfoNCE) or ``B`` (pairs and their reverses).
        steps: Optimiser steps.
        batch_size: Scenes of a step.
        learning_rate: Of the towers.
        head_learning_rate: Of projections and temperatures.
        weights: Of reversed scenes; stage A ignores them.
        alone: Share of single sounds in stage A.
    """

    name: Literal["A", "B"]
    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-5
    head_learning_rate: float = 1e-4
    weights: Weights = field(default_factory=Weights)
    alone: float = 0.5


def train(towers: Towers, sounds: Sounds, stage: Stage, *, seed: int) -> list[float]:
    """Run one stage.

    Args:
        towers: Trained in place; the caller puts the model into training mode.
        sounds: At least two classes with at least one recording each.
        stage: What to do.
        seed: Of the scenes.

    Returns:
        The loss of every step, in nats.
    """
    low, high = towers.groups()
    optimizer = torch.optim.AdamW(
        [{"params": low, "lr": stage.learning_rate}, {"params": high, "lr": stage.head_learning_rate}]
    )
    random = generator(seed, f"teminal/{stage.name}")
    losses = []
    for _ in range(stage.steps):
        scenes = draw(sorted(sounds), stage.batch_size, stage.name, random=random, alone=stage.alone)
        loss = batch_loss(towers, scenes, sounds, Weights(0, 0, 0) if stage.name == "A" else stage.weights, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def similarity(towers: Towers, sounds: Sounds, *, seed: int = 0, batch_size: int = 64) -> Similarity:
    """What ``zste`` asks: cosines of the sounds of scenes with captions.

    Args:
        towers: Asked without gradient; the caller puts the model into evaluation mode.
        sounds: Recordings of every class; which one is played depends on the seed and the scene alone.
        seed: Of the choice.
        batch_size: Waveforms embedded together.
    """

    def played(scene: Scene) -> Waveform:
        pieces = {}
        for name in scene.order:
            at = int(uniform(seed, f"zste/{scene.caption}/{name}") * len(sounds[name]))
            pieces[name] = sounds[name][at]
        return heard(scene, pieces)

    def score(scenes: Sequence[Scene], captions: Sequence[str]) -> npt.NDArray[np.float64]:
        with torch.no_grad():
            text = towers.text(captions)
            parts = [scenes[start : start + batch_size] for start in range(0, len(scenes), batch_size)]
            cosines = [towers.audio([played(scene) for scene in part]) @ text.T for part in parts]
        return torch.cat(cosines).double().cpu().numpy()

    return score


def batch_loss(
    towers: Towers, scenes: Sequence[Scene], sounds: Sounds, weights: Weights, random: np.random.Generator
) -> Tensor:
    """``temporal_nce`` of scenes; a scene and its reverse are made of the same recordings."""
    chosen = [{name: sounds[name][int(random.integers(len(sounds[name])))] for name in scene.order} for scene in scenes]
    forward = Embedded(
        towers.audio([heard(scene, pieces) for scene, pieces in zip(scenes, chosen, strict=True)]),
        towers.text([scene.caption for scene in scenes]),
    )
    reverse = None
    turned = [scene.reversed() for scene in scenes]
    if not weights.plain:
        reverse = Embedded(
            towers.audio([heard(scene, pieces) for scene, pieces in zip(turned, chosen, strict=True)]),
            towers.text([scene.caption for scene in turned]),
        )
    device = forward.audio.device
    true = True_(
        torch.from_numpy(matches(scenes, scenes)).to(device), torch.from_numpy(matches(scenes, turned)).to(device)
    )
    return temporal_nce(forward, reverse, towers.scales(), true, weights)
