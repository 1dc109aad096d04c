"""Training losses of a discrete tokenizer (spec 1.3), each one a function of tensors and nothing else.

``L = rec + perceptual + adaptive * adversarial + quantizer losses + semantic``. The quantizer returns its own losses
already multiplied by their published weights; this module holds the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.features import file_digest

# Limits of the adaptive weight of the adversarial term (VQGAN).
ADAPTIVE_MAX, ADAPTIVE_EPS = 1e4, 1e-4
LECAM_DECAY = 0.999
# How the hash of torchvision's VGG16 file begins (vgg16-397923af.pth): the trunk that the LPIPS heads were made for.
VGG_TRUNK = "397923af"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def reconstruction_loss(output: Tensor, target: Tensor, kind: Literal["l1", "l2"] = "l2") -> Tensor:
    """Mean absolute or squared error of images in [-1, 1]; both ``[B, 3, S, S]``."""
    return functional.l1_loss(output, target) if kind == "l1" else functional.mse_loss(output, target)


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """``-mean D(fake)``."""
    return -fake_logits.mean()


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``(mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2``."""
    return 0.5 * (functional.relu(1 - real_logits).mean() + functional.relu(1 + fake_logits).mean())


def adaptive_weight(likelihood: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """``|grad likelihood| / (|grad adversarial| + 1e-4)`` at the last decoder weight, in [0, 1e4], without gradient.

    Args:
        likelihood: Reconstruction plus perceptual loss, a scalar whose graph is kept.
        adversarial: Generator loss, likewise.
        last_layer: Weight of the decoder's last layer; both losses depend on it.

    With several processes the gradients are those of the whole batch, so that all take the same weight.
    """
    (of_likelihood,) = torch.autograd.grad(likelihood, last_layer, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    ratio = _process_mean(of_likelihood).norm() / (_process_mean(of_adversarial).norm() + ADAPTIVE_EPS)
    return ratio.clamp(0.0, ADAPTIVE_MAX).detach()


class LeCam(nn.Module):
    """Regulariser that keeps a discriminator near the running means of its own logits.

    ``mean relu(D(real) - ema_fake)^2 + mean relu(ema_real - D(fake))^2`` with means of decay 0.999.
    """

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = LECAM_DECAY) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    @torch.no_grad()
    def update(self, real_logits: Tensor, fake_logits: Tensor) -> None:
        """Move the running means towards the means of this batch, of all processes."""
        self.real.lerp_(_process_mean(real_logits.mean()).to(self.real), 1 - self.decay)
        self.fake.lerp_(_process_mean(fake_logits.mean()).to(self.fake), 1 - self.decay)

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The penalty, a scalar >= 0; the running means are constants in it."""
        above = functional.relu(real_logits - self.fake).square().mean()
        return above + functional.relu(self.real - fake_logits).square().mean()


def binary_entropy_loss(probabilities: Tensor) -> Tensor:
    """Soft per-bit entropy loss of binary codes: tokens certain, the batch diverse.

    Args:
        probabilities: Chance of each bit being one, ``[..., bits]`` in [0, 1].

    Returns:
        Mean over tokens of the summed bit entropies minus the summed entropies of the mean, in nats; >= -bits ln 2.
    """
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    return _bit_entropy(flat).sum(-1).mean() - _bit_entropy(flat.mean(0)).sum()


def _bit_entropy(probability: Tensor) -> Tensor:
    return -(torch.special.xlogy(probability, probability) + torch.special.xlogy(1 - probability, 1 - probability))


def semantic_loss(tokens: Tensor, features: Tensor, *, scale: float = 1.0, normalise: bool = False) -> Tensor:
    """Symmetric contrastive loss between mean-pooled quantised tokens and a frozen encoder's class features.

    Args:
        tokens: Clean quantised latents ``[B, *grid, C]``; perturbed ones must never come here.
        features: ``[B, C]``, projected to the width of the codes.
        scale: Factor of the logits.
        normalise: Give both sides unit length first.

    Returns:
        Mean of the two cross entropies, in nats; ln(B) for features that say nothing.
    """
    pooled = tokens.reshape(len(tokens), -1, tokens.shape[-1]).mean(1).float()
    features = features.float()
    if normalise:
        pooled, features = functional.normalize(pooled, dim=-1), functional.normalize(features, dim=-1)
    logits = scale * pooled @ features.T
    target = torch.arange(len(logits), device=logits.device)
    return 0.5 * (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target))


def of_all_processes(rows: Tensor) -> Tensor:
    """Rows ``[B, ...]`` of all processes, by rank; their gradients come back to the process they belong to.

    Every process then computes the same loss and gets, for its own rows, the sum of the gradients of all of them: world
    times that of the one loss. The mean over processes, which DDP takes of weights, is therefore the gradient itself.
    """
    return torch.cat(all_gather(rows.contiguous())) if _several() else rows


def _process_mean(value: Tensor) -> Tensor:
    """Mean over processes of a tensor without gradient."""
    if not _several():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class DeepFeatureLoss(nn.Module):
    """Distance of channel-normalised features of a small convolutional net with fixed random weights.

    It stands where LPIPS would, for machines without its weights, and is not LPIPS: it is named ``features`` in every
    log. Random features keep edges and textures apart that a mean squared error averages away. The net is drawn from a
    generator of its own and is none of the networks that score results.
    """

    name = "features"

    def __init__(self, widths: Sequence[int] = (16, 32, 64), *, seed: int = 7919) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.stages = nn.ModuleList()
        before = 3
        for width in widths:
            conv = nn.Conv2d(before, width, 3, stride=2, padding=1)
            with torch.no_grad():
                conv.weight.normal_(0.0, (2.0 / (9 * before)) ** 0.5, generator=generator)
                conv.bias.zero_()  # type: ignore[union-attr]
            self.stages.append(conv)
            before = width
        self.requires_grad_(False)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared distance summed over stages; images ``[B, 3, S, S]`` in [-1, 1], sides of at least 8."""
        # Both at once: small convolutions cost more in calls than in arithmetic.
        both = torch.cat([output, target])
        total = output.new_zeros(())
        for stage in self.stages:
            both = functional.relu(stage(both))
            here, there = functional.normalize(both, dim=1, eps=1e-6).chunk(2)
            total = total + (here - there).square().sum(1).mean()
        return total


class LPIPSLoss(nn.Module):
    """LPIPS with a VGG16 trunk; the published linear heads come with torchmetrics, the trunk is a file of the user.

    Attributes:
        name: ``lpips`` only with torchvision's published trunk, recognised by its hash; with other weights of that
            layout ``vgg16_layout_HASH``, since the heads were made for the published ones.
        sha256: Of the trunk's file.

    Args:
        trunk: torchvision's ``vgg16`` weights (``vgg16-397923af.pth``).

    Raises:
        MmpostError: MMP-C112 without that file, or when it holds something else.
    """

    def __init__(self, trunk: str | Path) -> None:
        super().__init__()
        from torchmetrics.functional.image.lpips import _LPIPS  # noqa: PLC0415  # needs torchvision: 1 s

        if not Path(trunk).is_file():
            raise MmpostError(
                "MMP-C112",
                f"losses.perceptual is lpips, but there is no file '{trunk}' with the VGG16 trunk.",
                "Set losses.perceptual_weights to vgg16-397923af.pth, or losses.perceptual=features.",
            )
        self.sha256 = file_digest(Path(trunk))
        published = self.sha256.startswith(VGG_TRUNK)
        self.name = "lpips" if published else f"vgg16_layout_{self.sha256[:8]}"
        self.net = _LPIPS(pretrained=True, net="vgg", pnet_rand=True, eval_mode=True)
        own = self.net.net.state_dict()
        try:
            state = torch.load(trunk, map_location="cpu", weights_only=True)
            # The slices of the trunk keep torchvision's layer numbers behind their own names.
            self.net.net.load_state_dict({name: state[f"features.{name.split('.', 1)[1]}"] for name in own})
        except Exception as error:  # torch raises whatever pickle, zipfile or struct raised
            raise MmpostError(
                "MMP-C112",
                f"'{trunk}' holds no VGG16 trunk: {type(error).__name__}.",
                "Set losses.perceptual_weights to vgg16-397923af.pth, or losses.perceptual=features.",
            ) from error
        self.requires_grad_(False)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean LPIPS of images in [-1, 1]."""
        distance: Tensor = self.net(output, target)
        return distance.mean()


class SemanticGuide(nn.Module):
    """A frozen timm encoder whose class feature guides the codes.

    Args:
        model: timm name, for example ``vit_base_patch14_dinov2.lvd142m``.
        weights: Its weights as a file, or None to let timm look for them.
        image_size: Side of the images in pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: str, weights: str | Path | None, image_size: int) -> None:
        super().__init__()
        import timm  # noqa: PLC0415  # only recipes with this loss need it

        options: dict[str, object] = {"img_size": image_size, "patch_size": 16} if "patch14" in model else {}
        if weights is not None:
            if not Path(weights).is_file():
                raise MmpostError(
                    "MMP-C112",
                    f"losses.semantic is on, but there is no file '{weights}'.",
                    f"Set losses.semantic_weights to weights of {model}, or losses.semantic=0.",
                )
            options["checkpoint_path"] = str(weights)
        try:
            self.model = timm.create_model(model, pretrained=weights is None, num_classes=0, **options)
        except Exception as error:  # timm and the hub raise many kinds, all of which mean the same here
            raise MmpostError(
                "MMP-C112",
                f"losses.semantic needs the weights of {model}: {str(error).splitlines()[0]}.",
                "Set losses.semantic_weights to a file, or losses.semantic=0.",
            ) from error
        self.requires_grad_(False)
        self.eval()
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    @property
    def dim(self) -> int:
        """Width of the feature."""
        return int(self.model.num_features)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Class features ``[B, dim]`` of images in [-1, 1]."""
        pixels = ((images + 1) / 2 - self.mean) / self.std
        features: Tensor = self.model.forward_features(pixels)[:, 0]
        return features
