"""Latent perturbation: replace some indices by those of neighbouring codes, so that the decoder learns to bear it.

Which tokens: each image with probability beta, each of its tokens with probability alpha. By what: a code drawn
uniformly from the delta codes nearest to the token's own, which is one of them; so a share ``alpha beta (1 - 1/delta)``
of all tokens changes. Losses of the quantizer are computed from the clean codes; only what the decoder sees is
perturbed, see ``Quantizer.straight_through``.

Source: arXiv 2509.12474, section 4.2. The released code differs: ``docs/decisions/0011-latent-perturbation.md``.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.base import DiscreteTokenizer, Quantizer
from mmpost_tokenizers.quantizers.binary import MAX_LISTED, too_many
from mmpost_tokenizers.quantizers.neighbours import lattice_neighbours, nearest_codes, nearest_to

Variant = Literal["paper", "released"]
Generators = torch.Generator | Sequence[torch.Generator]


def scaled_delta(codebook_size: int) -> int:
    """Delta for training, scaled from 100 at 4096 codes; at least 2.

    Raises nothing: with few codes the result may still be more than there are, which ``LatentPerturbation`` reports.
    """
    return max(2, round(100 * codebook_size / 4096))


@dataclass(frozen=True, slots=True)
class PerturbationOutput:
    """Perturbed indices.

    Attributes:
        indices: Same shape and type as the clean ones.
        selected: bool, same shape: tokens that drew a neighbour; it may have been their own code.
        changed: bool, same shape: tokens whose index differs from the clean one.
        image_mask: bool ``[B]``: images that were to be perturbed.
    """

    indices: Tensor
    selected: Tensor
    changed: Tensor
    image_mask: Tensor


@dataclass(frozen=True)
class PerturbationSchedule:
    """How much of alpha and delta is left at each point of training; beta is never annealed.

    Attributes:
        start: Share of training before which the ratio is 1. Published: epoch 40 of 200.
        end: Share of training after which the ratio is ``end_ratio``. Published: epoch 120 of 200.
        end_ratio: Ratio at the end, in [0, 1]; 1 means no annealing.
        variant: ``released`` uses 1 - t end_ratio between start and end, which is the same only for ``end_ratio`` 0.5.
    """

    start: float = 0.2
    end: float = 0.6
    end_ratio: float = 0.5
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        if not (0 <= self.start <= self.end <= 1 and 0 <= self.end_ratio <= 1):
            what = f"perturbation schedule start={self.start}, end={self.end}, end_ratio={self.end_ratio}."
            raise MmpostError("MMP-C072", what, "Choose 0 <= start <= end <= 1 and end_ratio between 0 and 1.")

    def ratio(self, progress: float) -> float:
        """Ratio at ``progress``, the share of training that is done, in [0, 1]; published: changed every epoch."""
        if progress <= self.start:
            return 1.0
        if progress > self.end:
            return self.end_ratio
        t = (progress - self.start) / (self.end - self.start)
        lost = self.end_ratio if self.variant == "released" else 1.0 - self.end_ratio
        return 1.0 - t * lost


class LatentPerturbation(nn.Module):
    """Draws neighbours for some of a batch's indices. It has no parameters, and in eval mode it changes nothing.

    Args:
        alpha: Share of the tokens of a chosen image, in [0, 1].
        beta: Share of the images that are chosen, in [0, 1].
        delta: Size of the set of neighbours, the code itself included unless ``exclude_self``; 1 changes nothing.
        variant: ``paper``, or ``released``: neighbours of the latent instead of its code, the first int(beta B) images
            of the batch instead of random ones (none below 10 images at beta 0.1), and a semantic loss that sees
            perturbed codes. It knows one codebook only.
        neighbour_of: ``code`` or ``latent``; by default what the variant says.
        exclude_self: Draw from the ``delta`` nearest other codes.
        exact: Choose exactly beta B images and alpha N tokens of each, instead of each on its own. What is not a whole
            number is rounded up or down at random, so that the mean is right and small batches are not left out.
        refresh_every: Search for neighbours of codes at most every this many calls while codes move; at most 10.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.1,
        delta: int = 100,
        *,
        variant: Variant = "paper",
        neighbour_of: Literal["code", "latent"] | None = None,
        exclude_self: bool = False,
        exact: bool = False,
        refresh_every: int = 1,
    ) -> None:
        super().__init__()
        _check_settings(alpha, beta, delta, variant, neighbour_of, refresh_every)
        if variant == "released" and (exact or exclude_self):
            what = "perturbation.variant=released with exact or exclude_self."
            raise MmpostError("MMP-C072", what, "Set perturbation.variant=paper; the released code has neither.")
        self.alpha, self.beta, self.delta = alpha, beta, delta
        self.variant = variant
        self.neighbour_of = neighbour_of or ("latent" if variant == "released" else "code")
        self.exclude_self, self.exact, self.refresh_every = exclude_self, exact, refresh_every
        self._tables: weakref.WeakKeyDictionary[Quantizer, dict[int, _Table]] = weakref.WeakKeyDictionary()

    @property
    def semantic_sees_perturbed(self) -> bool:
        """Whether the semantic loss is to be computed from perturbed codes: only in the released variant."""
        return self.variant == "released"

    @torch.no_grad()
    def forward(
        self,
        tokenizer: DiscreteTokenizer | Quantizer,
        indices: Tensor,
        *,
        z: Tensor | None = None,
        generator: Generators | None,
        ratio: float = 1.0,
    ) -> PerturbationOutput:
        """Perturb ``indices``.

        Args:
            tokenizer: Whose codes they are.
            indices: int64 ``[B, *index_shape]``.
            z: ``[B, *grid, C]``; needed for neighbours of latents.
            generator: One for the batch; or one per image, so that an image's draws do not depend on its batch.
                Positions and ranks are drawn first and depend on nothing but the shape, so that two tokenizers with
                the same grid are perturbed alike.
            ratio: Of a ``PerturbationSchedule``; multiplies alpha and delta, which stays at least 1.

        Raises:
            MmpostError: MMP-C070 when the codes have no neighbours, MMP-C072 when delta is larger than the codebook,
                MMP-C073 when the variant does not know the quantizer, MMP-C077 when codes are too many to list.
        """
        quantizer = tokenizer.quantizer if isinstance(tokenizer, DiscreteTokenizer) else tokenizer
        alpha, delta = ratio * self.alpha, max(1, int(ratio * self.delta))
        nothing = torch.zeros_like(indices, dtype=torch.bool)
        no_image = nothing.new_zeros(len(indices))
        if (
            not self.training
            or not indices.numel()
            or min(alpha, self.beta) == 0
            or (delta == 1 and not self.exclude_self)
        ):
            return PerturbationOutput(indices, nothing, nothing, no_image)
        self._check_codes(quantizer, delta)
        draws = _Draws(generator, len(indices), indices.device)
        image_mask = self._images(len(indices), draws, indices.device)
        positions, spots = draws(indices.shape[1:]), draws(indices.shape[1:])
        if self.exact:
            positions = _ranks(positions.flatten(1)).add(draws((1,))).view_as(positions) / indices[0].numel()
        selected = (positions < alpha) & image_mask.view(-1, *[1] * (indices.ndim - 1))
        ranks = (spots * delta).long().clamp(max=delta - 1) + int(self.exclude_self)
        replaced = indices.clone()
        for group in range(quantizer.groups):
            part = (..., group) if quantizer.groups > 1 else (...,)
            chosen = selected[part]
            found = self._neighbours(quantizer, group, indices[part], ranks[part], chosen, z, draws, delta)
            replaced[part] = replaced[part].masked_scatter(chosen, found)
        return PerturbationOutput(replaced, selected, replaced != indices, image_mask)

    def check(self, quantizer: Quantizer) -> None:
        """Refuse a quantizer that cannot be perturbed; nothing is listed or drawn.

        Neighbours of a code of LFQ, BSQ or FSQ are counted by their distance on the lattice, however many codes there
        are. Neighbours of a latent are not: their distances are real numbers without common steps, so the codes have
        to be listed.

        Raises:
            MmpostError: MMP-C070 when the codes have no neighbours, MMP-C072, MMP-C073 and MMP-C077 as ``forward``.
        """
        if not quantizer.has_neighbours:
            raise quantizer.no_neighbours()
        self._check_codes(quantizer, self.delta)

    def _check_codes(self, quantizer: Quantizer, delta: int) -> None:
        lattice = quantizer.lattice() is not None
        if self.neighbour_of == "latent" and lattice and quantizer.codebook_size > MAX_LISTED:
            raise too_many(quantizer.codebook_size)
        if self.variant == "released" and (quantizer.groups > 1 or quantizer.config.kind == "multi_scale"):
            what = f"perturbation.variant=released leaves quantizer '{quantizer.config.kind}' unperturbed."
            raise MmpostError("MMP-C073", what, "Set perturbation.variant=paper.")
        size, needed = quantizer.codebook_size, delta + int(self.exclude_self)
        if needed > size:
            what = f"perturbation.delta={delta} needs {needed} codes, but the codebook has {size}."
            raise MmpostError("MMP-C072", what, f"Lower delta; {min(scaled_delta(size), size)} is usual at this size.")

    def _images(self, batch: int, draws: _Draws, device: torch.device) -> Tensor:
        """Which images are perturbed, ``[B]``."""
        chances = draws(())
        if self.variant == "released":
            return torch.arange(batch, device=device) < int(batch * self.beta)
        if self.exact:
            return (_ranks(chances[None])[0] + draws.shared()) / batch < self.beta
        return chances < self.beta

    def _neighbours(
        self,
        quantizer: Quantizer,
        group: int,
        indices: Tensor,
        ranks: Tensor,
        chosen: Tensor,
        z: Tensor | None,
        draws: _Draws,
        delta: int,
    ) -> Tensor:
        """New indices of the chosen tokens of one group, ``[number chosen]``."""
        count = delta + int(self.exclude_self)
        if self.neighbour_of == "latent":
            if z is None:
                raise ValueError("neighbours of latents need z")
            points = quantizer.project(z, group)[chosen]
            codes = quantizer.code_vectors(group).to(points.device)
            table = nearest_to(points, indices[chosen], codes, count)
            return table.gather(1, ranks[chosen][:, None]).squeeze(1).long()
        levels = quantizer.lattice()
        if levels is not None:
            ties = draws((*indices.shape[1:], len(levels)))
            return lattice_neighbours(indices[chosen], ranks[chosen], ties[chosen], levels)
        table = self._table(quantizer, group, count)
        return table[indices[chosen], ranks[chosen]].long()

    def _table(self, quantizer: Quantizer, group: int, count: int) -> Tensor:
        """Neighbours of all codes of a group, searched again every ``refresh_every`` calls if they moved."""
        codes = quantizer.code_vectors(group)
        tables = self._tables.setdefault(quantizer, {})
        old = tables.get(group)
        if old is not None and old.neighbours.shape[1] >= count and old.codes.device == codes.device:
            old.calls += 1
            # Values are compared: an in-place change through .data leaves the version counter of a tensor as it was.
            if old.calls < self.refresh_every or torch.equal(old.codes, codes):
                return old.neighbours
        tables[group] = _Table(codes.clone(), nearest_codes(codes, count))
        return tables[group].neighbours


@dataclass(slots=True)
class _Table:
    codes: Tensor
    neighbours: Tensor
    calls: int = 0


class _Draws:
    """Uniform numbers ``[B, *shape]`` of one generator, or of one per image."""

    def __init__(self, generator: Generators | None, batch: int, device: torch.device) -> None:
        if generator is None:
            raise ValueError("perturbation draws numbers: pass generator")
        self._generator, self._batch, self._device = generator, batch, device
        if not isinstance(generator, torch.Generator) and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators for {batch} images")

    def __call__(self, shape: Sequence[int]) -> Tensor:
        if isinstance(self._generator, torch.Generator):
            return _uniform((self._batch, *shape), self._generator).to(self._device)
        return torch.stack([_uniform(tuple(shape), one) for one in self._generator]).to(self._device)

    def shared(self) -> Tensor:
        """One number for the whole batch."""
        first = self._generator if isinstance(self._generator, torch.Generator) else self._generator[0]
        return _uniform((), first).to(self._device)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)


def _ranks(rows: Tensor) -> Tensor:
    """Place of each number of a row when the row is sorted, as float, ``[B, n]``."""
    return rows.argsort(dim=1).argsort(dim=1).to(rows.dtype)


def _check_settings(
    alpha: float, beta: float, delta: int, variant: str, neighbour_of: str | None, refresh_every: int
) -> None:
    for name, value, good, expected in (
        ("alpha", alpha, 0 <= alpha <= 1, "between 0 and 1"),
        ("beta", beta, 0 <= beta <= 1, "between 0 and 1"),
        ("delta", delta, isinstance(delta, int) and delta >= 1, "a whole number, 1 or more"),
        ("variant", variant, variant in ("paper", "released"), "paper or released"),
        ("neighbour_of", neighbour_of, neighbour_of in (None, "code", "latent"), "code or latent"),
        ("refresh_every", refresh_every, 1 <= refresh_every <= 10, "between 1 and 10"),
    ):
        if not good:
            raise MmpostError("MMP-C072", f"perturbation.{name}={value!r} is not {expected}.", f"Correct {name}.")
