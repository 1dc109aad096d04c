"""What decoder post-training minimises: a distance of two images and, if wanted, a discriminator's judgement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmpost.core.errors import MmpostError
from mmpost_tokenizers import losses
from mmpost_tokenizers.objective import Objective

DISCRIMINATOR_FILE = "discriminator.pt"

PairLoss = Callable[[Tensor, Tensor], Tensor]


def pixel_loss(features: Callable[[Tensor, Tensor], Tensor] | None = None, weight: float = 1.0) -> PairLoss:
    """Mean squared error, plus ``weight`` times a distance of deep features.

    Args:
        features: Scalar distance of output and target, for example ``losses.DeepFeatureLoss()``.
        weight: Its factor.
    """

    def loss(output: Tensor, target: Tensor) -> Tensor:
        error = functional.mse_loss(output, target)
        return error if features is None else error + weight * features(output, target)

    return loss


def objective_loss(objective: Objective) -> PairLoss:
    """The reconstruction and perceptual terms of a main training; the others depend on frozen parts only."""
    options = objective.options

    def loss(output: Tensor, target: Tensor) -> Tensor:
        total = options.reconstruction_weight * losses.reconstruction_loss(output, target, options.reconstruction)
        if objective.perceptual is not None and options.perceptual_weight:
            total = total + options.perceptual_weight * objective.perceptual(output, target)
        return total

    return loss


class Adversary(Protocol):
    """A discriminator that goes on training beside the decoder."""

    def generator_loss(
        self, output: Tensor, likelihood: Tensor, last_layer: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Weighted loss of the decoder; ``likelihood`` is its other loss."""
        ...

    def discriminator_loss(self, images: Tensor, output: Tensor, generator: torch.Generator) -> Tensor:
        """Loss of the discriminator on real images and reconstructions."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights of the discriminator."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """From checkpoints."""
        ...


class ObjectiveAdversary(nn.Module):
    """The discriminator of a main training's objective, with its weight, adaptive balance and LeCam."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        assert objective.discriminator is not None
        self.judge, self.lecam = objective.discriminator, objective.lecam
        # Not a submodule: perceptual nets and projections do not belong into a checkpoint of the discriminator.
        self._objective = (objective,)

    def generator_loss(
        self, output: Tensor, likelihood: Tensor, last_layer: Tensor, generator: torch.Generator
    ) -> Tensor:
        """See ``Adversary``."""
        options = self._objective[0].options
        fooled = losses.hinge_generator(self.judge(output, generator))
        weight = losses.adaptive_weight(likelihood, fooled, last_layer) if options.adaptive else 1.0
        return options.adversarial * weight * fooled

    def discriminator_loss(self, images: Tensor, output: Tensor, generator: torch.Generator) -> Tensor:
        """See ``Adversary``."""
        return self._objective[0].discriminator_loss(self.judge, images, output, generator)[0]


def adversary_of(
    objective: Objective, *, how: str, tokenizer_folder: str | Path | None = None
) -> ObjectiveAdversary | None:
    """The adversary that the option ``discriminator`` asks for.

    Args:
        objective: Of a configuration with ``losses.adversarial`` above 0, unless ``how`` is ``none``.
        how: ``none``; ``reuse`` loads the discriminator that was saved beside the tokenizer; ``reset`` keeps the fresh
            one of the objective.
        tokenizer_folder: Folder of the tokenizer.

    Raises:
        MmpostError: MMP-C108 when there is no discriminator to reuse, or the saved one has another shape.
    """
    if how == "none":
        return None
    if objective.discriminator is None:
        raise MmpostError(
            "MMP-C108",
            f"discriminator={how} needs a discriminator, but losses.adversarial is 0.",
            "Set losses.adversarial, or discriminator=none",
        )
    if how == "reuse":
        file = None if tokenizer_folder is None else Path(tokenizer_folder) / DISCRIMINATOR_FILE
        if file is None or not file.is_file():
            raise MmpostError(
                "MMP-C108",
                f"there is no discriminator to reuse in '{tokenizer_folder}'.",
                "Give the final folder of a main training with losses.adversarial, or set discriminator=reset or none",
            )
        _load(objective.discriminator, file)
    return ObjectiveAdversary(objective)


def _load(discriminator: nn.Module, file: Path) -> None:
    saved = torch.load(file, weights_only=True, map_location="cpu")
    own = discriminator.state_dict()
    # A frozen trunk is not saved; everything that is saved must fit.
    misfits = sorted(name for name, value in saved.items() if name not in own or own[name].shape != value.shape)
    trained = {name for name, weight in discriminator.named_parameters() if weight.requires_grad}
    misfits += sorted(trained - set(saved))
    if misfits:
        raise MmpostError(
            "MMP-C108",
            f"the discriminator in '{file}' has another shape: {', '.join(misfits[:3])}.",
            "Use the losses.discriminator options of the main training",
        )
    discriminator.load_state_dict(saved, strict=False)
