"""What a training step minimises: the generator's loss and the discriminator's, from images and a pass over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mmpost.core.errors import MmpostError
from mmpost_tokenizers import losses
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.discriminators import make_discriminator
from mmpost_tokenizers.options import DinoSettings, LossesSection

if TYPE_CHECKING:
    from mmpost_tokenizers.perturbation import LatentPerturbation


class Pass(NamedTuple):
    """One pass of a batch; a tuple of tensors, because DDP looks into it for what has a gradient.

    Attributes:
        images: Reconstructions ``[B, 3, S, S]``, of perturbed latents where those were perturbed.
        latents: What the semantic loss sees ``[B, *grid, C]``: the clean quantised latents.
        indices: Clean indices.
        losses: Scalars of the quantizer by name.
        z: Encoder outputs, without gradient.
        changed: Share of the tokens whose index the perturbation changed.
    """

    images: Tensor
    latents: Tensor
    indices: Tensor
    losses: dict[str, Tensor]
    z: Tensor
    changed: Tensor


class TrainingPass(nn.Module):
    """Encode, quantize, perturb, decode."""

    def __init__(self, tokenizer: DiscreteTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(
        self,
        images: Tensor,
        perturb: LatentPerturbation | None = None,
        generator: torch.Generator | None = None,
        ratio: float = 1.0,
    ) -> Pass:
        """Reconstruct a batch; quantizer losses and ``latents`` are those of the clean indices.

        Args:
            images: ``[B, 3, S, S]`` in [-1, 1].
            perturb: Replaces indices between quantizer and decoder.
            generator: Source of its draws, and of those of a quantizer that drops levels.
            ratio: What annealing has left of alpha and delta.
        """
        tokenizer = self.tokenizer
        z = tokenizer.encode(images)
        clean = tokenizer.quantize(z, generator=generator)
        latents, meant, changed = clean.latents, clean.latents, torch.zeros((), device=images.device)
        if perturb is not None:
            moved = perturb(tokenizer, clean.indices, z=z, generator=generator, ratio=ratio)
            latents = tokenizer.quantizer.straight_through(clean, moved.indices)
            changed = moved.changed.float().mean()
            if perturb.semantic_sees_perturbed:
                meant = latents
        return Pass(tokenizer.decode(latents), meant, clean.indices, clean.losses, z.detach(), changed)


class Objective(nn.Module):
    """All losses of a configuration, with the networks that they need.

    Args:
        options: Weights and kinds.
        image_size: Side of the images in pixels.
        dim: Channels of the codes, for the semantic loss.
        seed: Of the networks that train (discriminator, projection).
    """

    def __init__(self, options: LossesSection, *, image_size: int, dim: int, seed: int = 0) -> None:
        super().__init__()
        self.options = options
        self.perceptual: nn.Module | None = None
        if options.perceptual == "lpips":
            self.perceptual = losses.LPIPSLoss(options.perceptual_weights or "vgg16-397923af.pth")
        elif options.perceptual == "features":
            self.perceptual = losses.DeepFeatureLoss()
        self.discriminator: nn.Module | None = None
        self.guide: losses.SemanticGuide | None = None
        self.projection: nn.Linear | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if options.adversarial:
                self.discriminator = _discriminator(options, image_size)
            if options.semantic:
                self.guide = losses.SemanticGuide(options.semantic_model, options.semantic_weights, image_size)
                self.projection = nn.Linear(self.guide.dim, dim, bias=False)
        self.lecam = losses.LeCam() if options.lecam else None

    def trained(self) -> list[nn.Parameter]:
        """Weights that train with the tokenizer."""
        return list(self.projection.parameters()) if self.projection is not None else []

    def generator_loss(
        self,
        done: Pass,
        images: Tensor,
        last_layer: Tensor,
        *,
        adversarial: bool,
        generator: torch.Generator | None = None,
        project: nn.Module | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the tokenizer minimises.

        Args:
            done: A pass.
            images: Its targets, always the clean images.
            last_layer: Weight for the adaptive balance.
            adversarial: Whether the adversarial loss has begun.
            generator: Source of the discriminator's augmentation.
            project: The tokenizer's own map to code space, used as published where it takes the guide's feature; else
                a projection that is trained for it.

        Returns:
            The loss, and its parts for the log, detached.
        """
        options = self.options
        output = done.images.float()
        pixel = losses.reconstruction_loss(output, images, options.reconstruction)
        parts = {"rec": pixel}
        likelihood = options.reconstruction_weight * pixel
        if self.perceptual is not None and options.perceptual_weight:
            distance = self.perceptual(output, images)
            # The name says what it is: "lpips" with the published weights alone.
            parts[str(self.perceptual.name)] = distance
            likelihood = likelihood + options.perceptual_weight * distance
        total = likelihood
        for name, value in done.losses.items():
            parts[name] = value
            total = total + value
        if self.guide is not None:
            fits = isinstance(project, nn.Linear) and project.in_features == self.guide.dim
            projection = project if fits and project is not None else self.projection
            assert projection is not None
            # Means over positions first: little is then exchanged.
            pooled = done.latents.reshape(len(done.latents), -1, done.latents.shape[-1]).mean(1)
            parts["semantic"] = losses.semantic_loss(
                losses.of_all_processes(pooled)[:, None],
                losses.of_all_processes(projection(self.guide(images))),
                normalise=options.semantic_normalise,
            )
            total = total + options.semantic * parts["semantic"]
        if adversarial and self.discriminator is not None:
            fooled = losses.hinge_generator(self.discriminator(output, generator))
            weight = losses.adaptive_weight(likelihood, fooled, last_layer) if options.adaptive else 1.0
            parts |= {"adversarial": fooled, "adaptive": torch.as_tensor(weight, device=fooled.device)}
            total = total + options.adversarial * weight * fooled
        return total, {name: value.detach() for name, value in parts.items()}

    def discriminator_loss(
        self, module: nn.Module, images: Tensor, output: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the discriminator minimises.

        Args:
            module: The discriminator as wrapped for the processes.
            images: Real images.
            output: Reconstructions; their graph is cut here.
            generator: Source of the augmentation.
        """
        real = module(images, generator).float()
        fake = module(output.detach().float(), generator).float()
        loss = losses.hinge_discriminator(real, fake)
        parts = {"discriminator": loss, "real_logits": real.mean(), "fake_logits": fake.mean()}
        if self.lecam is not None:
            penalty = self.lecam(real, fake)
            self.lecam.update(real.detach(), fake.detach())
            parts["lecam"] = penalty
            loss = loss + self.options.lecam * penalty
        return loss, {name: value.detach() for name, value in parts.items()}


def _discriminator(options: LossesSection, image_size: int) -> nn.Module:
    chosen = options.discriminator
    shape: dict[str, Any] = {"ndf": 64, "layers": 3, "norm": "batch", "weights": None}
    if isinstance(chosen, DinoSettings):
        shape["weights"] = chosen.weights
    else:
        shape |= {"ndf": chosen.ndf, "layers": chosen.layers, "norm": chosen.norm}
    made = make_discriminator(chosen.kind, **shape)
    if image_size < made.smallest_side:
        raise MmpostError(
            "MMP-C113",
            f"losses.discriminator.layers={shape['layers']} needs images of {made.smallest_side} pixels; "
            f"tokenizer.image_size is {image_size}.",
            "Lower losses.discriminator.layers.",
        )
    return made
