"""Fréchet distance between two sets of features, and the moments that it needs.

Moments are kept in float64 and can be filled batch by batch and merged across processes. What a feature is, and what
a distance may be called, is decided in ``features``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmpost.core.errors import MmpostError
from mmpost.core.seeding import generator


@dataclass(slots=True)
class Moments:
    """Count, mean and scatter of feature vectors; float64 on the CPU.

    Attributes:
        count: Vectors seen.
        mean: ``[D]``.
        scatter: ``[D, D]`` sum of outer products of the deviations from the mean.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """Moments of no vectors of length ``dim``."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of ``[N, D]`` features."""
        rows = features.detach().to("cpu", torch.float64)
        mean = rows.mean(0) if len(rows) else torch.zeros(rows.shape[1], dtype=torch.float64)
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    def update(self, features: Tensor) -> None:
        """Add ``[N, D]`` features.

        Raises:
            MmpostError: MMP-V071 when a feature is not finite.
        """
        if not bool(torch.isfinite(features).all()):
            raise MmpostError(
                "MMP-V071",
                "a feature of an image is not finite, so no distance can be computed.",
                "Check that the tokenizer's images and the extractor's weights are finite",
            )
        self._add(Moments.of(features))

    def _add(self, other: Moments) -> None:
        # Pairwise update of Chan, Golub and LeVeque: no cancellation of large sums of squares.
        total = self.count + other.count
        if other.count == 0:
            return
        shift = other.mean - self.mean
        self.scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.count * other.count / total)
        self.mean = self.mean + shift * (other.count / total)
        self.count = total

    @classmethod
    def merged(cls, parts: Iterable[Moments]) -> Moments:
        """Moments of all vectors of several parts, for example of the processes of a run."""
        listed = list(parts)
        total = cls.empty(len(listed[0].mean))
        for part in listed:
            total._add(part)
        return total

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance ``[D, D]``.

        Raises:
            MmpostError: MMP-V070 for fewer than two vectors.
        """
        if self.count < 2:
            raise MmpostError(
                "MMP-V070",
                f"a Fréchet distance needs at least 2 images on each side; there are {self.count}.",
                "Evaluate more images",
            )
        return self.scatter / (self.count - 1)


def _root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a covariance; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared Fréchet distance of the Gaussians with these moments: symmetric, 0 on itself, never negative.

    The trace of the root of Σ₁Σ₂ is the sum of the roots of its eigenvalues. They are taken as singular values of
    Σ₁^½ Σ₂^½, whose squares they are: real by construction, and with an error of 1e-16 instead of 1e-8 of the largest
    where the matrices are singular, that is whenever there are fewer images than features.

    Raises:
        MmpostError: MMP-V070 for fewer than two vectors on a side.

    Source: Heusel et al., arXiv 1706.08500, equation 6.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features of {len(first.mean)} and {len(second.mean)} numbers have no distance")
    sigma1, sigma2 = first.covariance, second.covariance
    overlap = torch.linalg.svdvals(_root(sigma1) @ _root(sigma2)).sum()
    shift = first.mean - second.mean
    distance = shift @ shift + sigma1.trace() + sigma2.trace() - 2 * overlap
    return max(0.0, float(distance))


def noise_floor(features: Tensor, *, seed: int, repeats: int = 3) -> float:
    """Mean distance between two random disjoint halves of one set of real features ``[N, D]``.

    A difference between two sets of *other* images that is smaller than this is not evidence. A reconstruction
    distance may lie below it, since it compares the same images.

    Args:
        features: Features of real images.
        seed: Seed of the halves.
        repeats: Random halvings to average over.

    Raises:
        MmpostError: MMP-V070 for fewer than four vectors.
    """
    distances = []
    for repeat in range(repeats):
        order = torch.from_numpy(generator(seed, "noise-floor", repeat).permutation(len(features)))
        half = len(features) // 2
        distances.append(frechet_distance(Moments.of(features[order[:half]]), Moments.of(features[order[half:]])))
    return float(np.mean(distances))


def too_few(count: int, dim: int) -> str:
    """A remark when the covariance of ``dim`` features cannot be trusted with ``count`` images; else empty."""
    if count >= 2 * dim:
        return ""
    return (
        f"only {count} images for {dim} features: Fréchet distances are biased upwards; "
        f"take at least {2 * dim}, better {5 * dim}"
    )
