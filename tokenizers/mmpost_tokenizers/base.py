"""What every discrete tokenizer and every quantizer does, and how tokenizers are saved and opened.

Images are float in [-1, 1]. ``grid`` is the shape of the token map: ``(H, W)``, or ``(N,)`` for 1-D tokenizers. Latents
keep channels last, ``[B, *grid, C]``, so that both kinds share all code.

Leaves out how z and images are related: that is ``cnn``, ``vit`` and other tokenizers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost_tokenizers import TOKENIZERS
from mmpost_tokenizers.published import files
from mmpost_tokenizers.quantizers import QUANTIZERS
from mmpost_tokenizers.quantizers.configs import QuantizerConfig, from_fields, quantizer_config

if TYPE_CHECKING:
    from mmpost_tokenizers.perturbation import LatentPerturbation


@dataclass(frozen=True, slots=True)
class Quantized:
    """Outcome of quantizing a batch of latents.

    Attributes:
        latents: ``[B, *grid, C]``; the values are ``lookup(indices)`` up to rounding, the gradient goes straight
            through to the latents that were quantized.
        indices: int64 of shape ``[B, *index_shape]``, see ``Quantizer.index_shape``.
        losses: Scalars by name (``vq``, ``commit``, ``entropy``), each times its weight; their sum is minimised.
    """

    latents: Tensor
    indices: Tensor
    losses: dict[str, Tensor]


class Quantizer(nn.Module):
    """Latents to indices of codes and back.

    Attributes:
        config: What it was built from.
        codebook_size: Number of codes an index can take; per group.
        groups: Number of codebooks that an index tensor runs over in its last axis; 1 means there is no such axis.
        dim: Channels of a latent.
    """

    config: QuantizerConfig
    codebook_size: int
    groups: int = 1
    dim: int

    def forward(self, z: Tensor, *, generator: torch.Generator | None = None) -> Quantized:
        """Quantize ``z`` ``[B, *grid, dim]``; ``generator`` is for quantizers that drop levels while training."""
        raise NotImplementedError

    def lookup(self, indices: Tensor) -> Tensor:
        """Latents ``[B, *grid, dim]`` that the decoder gets for ``indices``."""
        raise NotImplementedError

    def index_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one image's indices: ``grid``, or ``(*grid, groups)`` with several groups."""
        return grid if self.groups == 1 else (*grid, self.groups)

    def normalise(self, z: Tensor) -> Tensor:
        """``z`` on the set where codes live, if that is a sphere; applying it twice changes nothing."""
        return z

    def project(self, z: Tensor, group: int = 0) -> Tensor:
        """Part of ``z`` that is compared with ``code_vectors(group)``, ``[..., c]``."""
        raise self.no_neighbours()

    def code_vectors(self, group: int = 0) -> Tensor:
        """Vectors ``[K, c]`` whose L2 distances say which codes are neighbours: those that the decoder sees.

        Raises:
            MmpostError: MMP-C070 for a quantizer whose codes have no neighbours.
        """
        raise self.no_neighbours()

    @property
    def has_neighbours(self) -> bool:
        """Whether codes have neighbours, so that latents can be perturbed; asked without listing a code."""
        return type(self).code_vectors is not Quantizer.code_vectors or self.lattice() is not None

    def lattice(self) -> tuple[int, ...] | None:
        """Levels per channel if codes are all points of a product of evenly spaced levels, else None.

        The index of a code is then its digits in mixed radix, first channel fastest.
        """
        return None

    def no_neighbours(self) -> MmpostError:
        """The error for a quantizer whose codes have no neighbours."""
        return MmpostError(
            "MMP-C070",
            f"the codes of quantizer '{type(self).__name__}' have no neighbours, so its latents cannot be perturbed.",
            "Choose another quantizer, or set tokenizer.perturb.beta=0.",
        )

    def revive(self, dead: Tensor, z: Tensor, *, generator: torch.Generator) -> int:
        """Replace dead codes with latents of this batch; the trainer calls it, ``forward`` never does.

        Which codes are dead is the caller's to say; ``mmpost_tokenizers.health`` counts use over a window of steps.
        A dead code becomes a latent drawn uniformly from ``z`` (normalised where codes are), each latent at most once
        as long as there are enough. The moments of an optimiser stay as they are.

        Args:
            dead: bool ``[groups, K]``, or ``[K]`` with one group.
            z: ``[B, *grid, dim]``, what ``forward`` was given.
            generator: Draws the latents.

        Returns:
            Number of codes that were replaced.

        Raises:
            MmpostError: MMP-C076 for a quantizer without a learned codebook.
        """
        raise self.no_revival()

    def no_revival(self) -> MmpostError:
        """The error for a quantizer whose codes are fixed."""
        return MmpostError(
            "MMP-C076",
            f"the codes of quantizer '{type(self).__name__}' are fixed, so none can be revived.",
            "Set train.revive_steps=0.",
        )

    def straight_through(self, clean: Quantized, indices: Tensor) -> Tensor:
        """Latents of other indices, with the gradient of ``clean``.

        Args:
            clean: What ``forward`` returned.
            indices: Shape of ``clean.indices``.

        Returns:
            ``[B, *grid, dim]``: where the codes do not differ, exactly the values of ``clean.latents``; elsewhere
            ``z + stopgrad(code - z)``. No gradient reaches the codebook.

        Source: arXiv 2509.12474, section 4.2.
        """
        with torch.no_grad():
            other = self.lookup(indices)
            same = other == self.lookup(clean.indices)
        moved = clean.latents + (other - clean.latents).detach()
        return torch.where(same, clean.latents, moved)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Fields that every tokenizer has.

    Attributes:
        image_size: Side of the square images, in pixels.
        quantizer: Configuration of the quantizer.
    """

    kind: ClassVar[str]
    image_size: int
    quantizer: QuantizerConfig

    def to_json(self) -> dict[str, Any]:
        """Table that ``from_json`` turns back into an equal configuration."""
        table: dict[str, Any] = {"kind": self.kind}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = value.to_json() if isinstance(value, QuantizerConfig) else value
            table[field.name] = list(value) if isinstance(value, tuple) else value
        return table

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Self:
        """The configuration that ``to_json`` wrote.

        Raises:
            MmpostError: MMP-C006 for an unknown kind of quantizer, MMP-C071 for unknown or missing fields.
        """
        values = {name: value for name, value in table.items() if name != "kind"}
        if isinstance(values.get("quantizer"), Mapping):
            values["quantizer"] = quantizer_config(values["quantizer"])
        config: Self = from_fields(cls, values, f"tokenizer '{cls.kind}'")
        return config


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer of ``config``, with codes drawn from torch's global generator."""
    quantizer: Quantizer = Catalog("quantizers", QUANTIZERS).get(config.kind)(config)
    return quantizer


def build_tokenizer(config: TokenizerConfig) -> DiscreteTokenizer:
    """The tokenizer of ``config`` with random weights, drawn from torch's global generator."""
    tokenizer: DiscreteTokenizer = Catalog("tokenizers", TOKENIZERS).get(config.kind)(config)
    return tokenizer


class DiscreteTokenizer(nn.Module):
    """Images to tokens and back. Subclasses define ``features``, ``decode``, ``last_layer`` and ``decoder_modules``.

    Attributes:
        config: What it was built from.
        quantizer: The quantizer.
        grid: Shape of the token map.
    """

    config_class: ClassVar[type[TokenizerConfig]]
    config: TokenizerConfig
    quantizer: Quantizer
    grid: tuple[int, ...]

    @property
    def codebook_size(self) -> int:
        """Number of codes, per group."""
        return self.quantizer.codebook_size

    @property
    def groups(self) -> int:
        """Number of codebooks."""
        return self.quantizer.groups

    @property
    def index_shape(self) -> tuple[int, ...]:
        """Shape of the indices of one image."""
        return self.quantizer.index_shape(self.grid)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that makes the pixels; the adaptive weight of the adversarial loss looks at its gradients."""
        raise NotImplementedError

    def decoder_modules(self) -> list[nn.Module]:
        """What turns quantized latents into images; the only part that decoder post-training changes."""
        raise NotImplementedError

    def decoder_parameters(self) -> list[nn.Parameter]:
        """Parameters of ``decoder_modules``."""
        return [parameter for module in self.decoder_modules() for parameter in module.parameters()]

    def features(self, images: Tensor) -> Tensor:
        """Latents ``[B, *grid, C]`` of checked images, before any normalisation."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, S, S]`` from quantized latents ``[B, *grid, C]``: never quantized again, not clamped."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """Latents ``[B, *grid, C]`` of images ``[B, 3, S, S]`` in [-1, 1]; of unit length with an l2-norm codebook.

        Raises:
            MmpostError: MMP-C074 when the images have another shape.
        """
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise MmpostError(
                "MMP-C074",
                f"images of shape {tuple(images.shape)}, but this tokenizer takes [B, 3, {size}, {size}].",
                f"Resize them to {size} pixels.",
            )
        # One layout of memory, so that equal latents are decoded by the same kernels to equal bits.
        return self.quantizer.normalise(self.features(images).contiguous())

    def quantize(self, z: Tensor, *, generator: torch.Generator | None = None) -> Quantized:
        """Quantize latents ``[B, *grid, C]``; a multi-scale quantizer in training mode needs ``generator``."""
        quantized: Quantized = self.quantizer(z) if generator is None else self.quantizer(z, generator=generator)
        return quantized

    def lookup(self, indices: Tensor) -> Tensor:
        """Latents that the decoder gets for ``indices``."""
        return self.quantizer.lookup(indices)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Images, not clamped, from ``indices`` ``[B, *index_shape]``.

        Raises:
            MmpostError: MMP-C075 when the indices do not belong to this codebook or grid.
        """
        self._check_indices(indices)
        return self.decode(self.lookup(indices))

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Indices of images, in eval mode and without gradient; the mode is put back."""
        with _evaluating(self):
            return self.quantize(self.encode(images)).indices

    @torch.no_grad()
    def detokenize(self, indices: Tensor) -> Tensor:
        """Images of indices, clamped to [-1, 1], in eval mode and without gradient."""
        with _evaluating(self):
            return self.decode_indices(indices).clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(
        self,
        images: Tensor,
        perturb: LatentPerturbation | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Images after a round trip through the tokens, clamped to [-1, 1], in eval mode and without gradient.

        Args:
            images: ``[B, 3, S, S]`` in [-1, 1].
            perturb: Perturbs the indices first, unless it is in eval mode itself.
            generator: Needed with ``perturb``.
        """
        with _evaluating(self):
            z = self.encode(images)
            clean = self.quantize(z)
            latents = clean.latents
            if perturb is not None:
                moved = perturb(self, clean.indices, z=z, generator=generator)
                latents = self.quantizer.straight_through(clean, moved.indices)
            return self.decode(latents).clamp(-1, 1)

    def _check_indices(self, indices: Tensor) -> None:
        fix = "Check that the indices were made by a tokenizer with the same codebook and grid."
        if tuple(indices.shape[1:]) != self.index_shape:
            what = (
                f"indices of shape {tuple(indices.shape)}, but this tokenizer has {list(self.index_shape)} per image."
            )
            raise MmpostError("MMP-C075", what, fix)
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.codebook_size:
            what = (
                f"indices from {int(indices.min())} to {int(indices.max())}, but codes are 0..{self.codebook_size - 1}."
            )
            raise MmpostError("MMP-C075", what, fix)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``, which is made if it is missing."""
        files.save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, revision: str | None = None) -> Self:
        """Open what ``save_pretrained`` wrote: a folder, or the id of a repository on the hub.

        Args:
            name_or_path: A folder; if there is none of that name, a hub id, which is looked for in the local cache
                first and obeys ``HF_HUB_OFFLINE``.
            revision: Branch, tag or commit on the hub.

        Returns:
            The tokenizer, in eval mode, on the CPU.

        Raises:
            MmpostError: MMP-E070 nothing there, MMP-E071 keys or shapes differ, MMP-E072 no usable configuration or a
                tokenizer of another kind, MMP-E073 a file that is damaged.
        """
        return files.open_as(cls, str(name_or_path), revision=revision)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
