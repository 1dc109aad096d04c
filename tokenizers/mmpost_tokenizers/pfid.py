"""pFID: how far reconstructions move from the images when their tokens are perturbed on purpose.

For each of five shares alpha of tokens and three sizes delta of neighbourhoods, every image is perturbed (beta 1) and
decoded, and one Fréchet distance to the *input* images is computed; the score is the mean of the fifteen. Images of
different settings are never pooled. With any extractor but the standard Inception weights the score is called pFD.

Values are comparable only at equal codebook size. Neighbours of live codes may be codes that are never used, whose
decoding means nothing; read usage next to the score.

Source: arXiv 2509.12474, section 3 and appendix. No script was released, so this follows the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpost.core.errors import MmpostError
from mmpost.core.seeding import uniform
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.batches import evaluation_batches
from mmpost_tokenizers.features import FeatureExtractor, key_for, on_device
from mmpost_tokenizers.frechet import Moments, frechet_distance
from mmpost_tokenizers.images import ImageSet, to_uint8
from mmpost_tokenizers.perturbation import LatentPerturbation
from mmpost_tokenizers.statistics import Reference, reference_of

ALPHAS = (0.9, 0.8, 0.7, 0.6, 0.5)
# Published neighbourhoods by codebook size; those of 1024 are not the linear ones.
DELTAS = {16384: (200, 280, 360), 8192: (100, 140, 180), 4096: (50, 70, 90), 1024: (10, 15, 20)}
Setting = tuple[float, int]
Progress = Callable[[int, int], None]


def deltas_for(codebook_size: int) -> tuple[int, int, int]:
    """The three sizes of neighbourhoods for a codebook: published where they are, else scaled from 16384.

    Below 256 codes scaled sizes fall together; they are then made one apart, so that there are fifteen settings.

    Raises:
        MmpostError: MMP-V077 below four codes.
    """
    if codebook_size in DELTAS:
        return DELTAS[codebook_size]
    if codebook_size < 4:
        raise MmpostError(
            "MMP-V077", f"a codebook of {codebook_size} codes has no three neighbourhoods.", "Use at least 4 codes"
        )
    sizes: list[int] = []
    for published in DELTAS[16384]:
        scaled = max(2, round(codebook_size * published / 16384))
        sizes.append(max(scaled, sizes[-1] + 1) if sizes else scaled)
    return sizes[0], sizes[1], sizes[2]


@dataclass(frozen=True, slots=True)
class PFIDResult:
    """Perturbed distances and what they were computed with.

    Attributes:
        mean: Mean of ``grid``; the score.
        grid: Distance of each (alpha, delta).
        mse: Mean squared error in [-1, 1] space of each (alpha, delta).
        clean: Distance without perturbation, the r-score of the same images.
        clean_mse: Mean squared error without perturbation.
        key: ``pfid`` or ``pfd``.
        feature_extractor: Name.
        feature_sha256: Hash of its weights.
        num_images: Images.
        codebook_size: Codes per group; scores of other sizes are not comparable.
        deltas: Sizes of neighbourhoods.
        seed: Of positions and ranks.
    """

    mean: float
    grid: dict[Setting, float]
    mse: dict[Setting, float]
    clean: float
    clean_mse: float
    key: str
    feature_extractor: str
    feature_sha256: str
    num_images: int
    codebook_size: int
    deltas: tuple[int, ...]
    seed: int

    @property
    def pmse(self) -> float:
        """Mean over settings of the mean squared error in [-1, 1] space: cheap and with little noise."""
        return float(np.mean(list(self.mse.values())))

    @property
    def degradation(self) -> float:
        """The score as a multiple of the distance without perturbation; infinite when that is 0."""
        return self.mean / self.clean if self.clean > 0 else float("inf")

    def rows(self) -> list[dict[str, float]]:
        """One table row per setting, ready for JSON."""
        return [
            {"alpha": alpha, "delta": delta, "distance": distance, "mse": self.mse[alpha, delta]}
            for (alpha, delta), distance in self.grid.items()
        ]


class Sweep:
    """Perturbs, decodes and measures batch by batch; indices are computed once and decoded once per setting."""

    def __init__(
        self, tokenizer: DiscreteTokenizer, extractor: FeatureExtractor, settings: Sequence[Setting], *, seed: int
    ) -> None:
        """Prepare.

        Args:
            tokenizer: Whose codes are perturbed.
            extractor: On the tokenizer's device.
            settings: Pairs of alpha and delta.
            seed: Of positions and ranks.

        Raises:
            MmpostError: MMP-C072 when delta does not fit the codebook.
        """
        self.tokenizer, self.extractor, self.seed = tokenizer, extractor, seed
        # The widest neighbourhood first: its table of neighbours serves all others.
        self.settings = sorted(settings, key=lambda setting: -setting[1])
        # Ranks instead of sizes are part of the random key, so that codebooks of two sizes are perturbed alike.
        ranks = {delta: rank for rank, delta in enumerate(sorted({delta for _, delta in settings}))}
        self._keys = {setting: (round(setting[0] * 1_000_000), ranks[setting[1]]) for setting in settings}
        self.perturb = LatentPerturbation(1.0, 1.0, max(ranks, default=1), neighbour_of="code").train()
        self.clean = Moments.empty(extractor.dim)
        self.moments = {setting: Moments.empty(extractor.dim) for setting in settings}
        self.clean_error = 0.0
        self.errors = dict.fromkeys(settings, 0.0)
        self.seen = 0

    @torch.no_grad()
    def update(self, images: Tensor, indices: Tensor) -> Tensor:
        """Measure the next images ``[B, 3, S, S]`` in [-1, 1] with their clean indices.

        Returns:
            Clean reconstructions, uint8.
        """
        clean = self.tokenizer.detokenize(indices)
        eight = to_uint8(clean)
        self.clean.update(self.extractor(eight))
        self.clean_error += _error(clean, images)
        numbers = np.arange(self.seen, self.seen + len(images))
        for setting in self.settings:
            decoded = self.tokenizer.detokenize(self._perturbed(indices, setting, numbers))
            self.moments[setting].update(self.extractor(to_uint8(decoded)))
            self.errors[setting] += _error(decoded, images)
        self.seen += len(images)
        return eight

    def _perturbed(self, indices: Tensor, setting: Setting, numbers: np.ndarray) -> Tensor:
        """Indices of one setting: positions and ranks depend on seed, setting and the image's number alone."""
        draws = uniform(self.seed, "pfid", *self._keys[setting], numbers)
        generators = [torch.Generator().manual_seed(int(draw * 2**53)) for draw in draws]
        self.perturb.alpha, self.perturb.delta = setting
        return self.perturb(self.tokenizer, indices, generator=generators).indices

    def distances(self, reference: Moments) -> dict[Setting, float]:
        """Distance of each setting, largest alpha and smallest delta first."""
        order = sorted(self.moments, key=lambda setting: (setting[1], -setting[0]))
        return {setting: frechet_distance(self.moments[setting], reference) for setting in order}

    def result(self, reference: Moments, chosen: Iterable[Setting]) -> PFIDResult:
        """The score over the ``chosen`` settings."""
        wanted = set(chosen)
        grid = {setting: distance for setting, distance in self.distances(reference).items() if setting in wanted}
        return PFIDResult(
            mean=float(np.mean(list(grid.values()))),
            grid=grid,
            mse={setting: self.errors[setting] / self.seen for setting in grid},
            clean=frechet_distance(self.clean, reference),
            clean_mse=self.clean_error / self.seen,
            key=key_for("p", self.extractor),
            feature_extractor=self.extractor.name,
            feature_sha256=self.extractor.sha256,
            num_images=self.seen,
            codebook_size=self.tokenizer.codebook_size,
            deltas=tuple(sorted({delta for _, delta in grid})),
            seed=self.seed,
        )


def _error(images: Tensor, target: Tensor) -> float:
    """Sum over images of the mean squared error in [-1, 1] space."""
    return float((images.double() - target.double()).square().mean((1, 2, 3)).sum())


def device_of(tokenizer: torch.nn.Module) -> torch.device:
    """Where a tokenizer's weights are."""
    return next(tokenizer.parameters()).device


def pfid(
    tokenizer: DiscreteTokenizer,
    images: ImageSet,
    extractor: FeatureExtractor,
    *,
    alphas: Sequence[float] = ALPHAS,
    deltas: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> PFIDResult:
    """The perturbed distance of a tokenizer on images; see the module.

    Args:
        tokenizer: Evaluated where its weights are, in evaluation mode.
        images: Also the reference; without random crops or flips.
        extractor: What makes features; decides on the score's name.
        alphas: Shares of perturbed tokens.
        deltas: Sizes of neighbourhoods; by the codebook when None.
        seed: Of positions and ranks; two tokenizers with the same grid are perturbed alike.
        batch_size: Images per pass. It does not change the result.
        workers: See ``ImageBatches``.
        cache: Folder of reference features; see ``reference_of``.
        progress: Called with images done and images in all.

    Raises:
        MmpostError: MMP-C070 for codes without neighbours, MMP-C072 for a delta larger than the codebook, MMP-V070,
            MMP-V071, MMP-V076 and MMP-V077.
    """
    chosen = deltas_for(tokenizer.codebook_size) if deltas is None else tuple(deltas)
    settings = [(alpha, delta) for delta in chosen for alpha in alphas]
    device = device_of(tokenizer)
    reference: Reference = reference_of(
        images, extractor, batch_size=batch_size, workers=workers, cache=cache, device=device
    )
    sweep = Sweep(tokenizer, on_device(extractor, device), settings, seed=seed)
    batches: Any = evaluation_batches(images, batch_size=batch_size, workers=workers)
    for pictures, _, _ in batches:
        here = pictures.to(device)
        sweep.update(here, tokenizer.tokenize(here))
        if progress is not None:
            progress(sweep.seen, len(images))
    return sweep.result(reference.moments, settings)
