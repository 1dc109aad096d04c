"""Scores of a set of generated images against a set of real ones, from features that were computed before.

Inception Score and KID are defined by Inception's logits and features; ``generation_scores`` leaves them out with any
other extractor instead of giving them a stand-in.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmpost.core.errors import MmpostError
from mmpost.core.seeding import generator
from mmpost_tokenizers.features import FeatureExtractor, describe, key_for
from mmpost_tokenizers.frechet import Moments, frechet_distance, too_few

_CHUNK = 1024


def _kth_distance(features: Tensor, k: int) -> Tensor:
    """Distance ``[N]`` of each vector to its k-th nearest other one."""
    # The nearest of all is the vector itself.
    return torch.cat(
        [torch.cdist(part, features).topk(k + 1, largest=False).values[:, k] for part in features.split(_CHUNK)]
    )


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of points that lie in at least one ball."""
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(_CHUNK)]
    return float(torch.cat(inside).double().mean())


def precision_recall(real_features: Tensor, fake_features: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fake images near the real ones, and of real images near the fake ones.

    Near means inside the ball around an image of the other set that reaches to its k-th nearest neighbour there. Both
    sets should have the same size.

    Args:
        real_features: ``[N, D]``.
        fake_features: ``[M, D]``.
        k: Neighbours; 3 is published.

    Returns:
        Precision and recall, each 0 to 1.

    Raises:
        MmpostError: MMP-V070 when a set has no k-th neighbour.

    Source: Kynkäänniemi et al., arXiv 1904.06991.
    """
    # float64: the shortcut by squares that cdist takes loses small distances in float32.
    real, fake = real_features.double(), fake_features.double()
    if min(len(real), len(fake)) <= k:
        raise MmpostError(
            "MMP-V070",
            f"precision and recall with k={k} need more than {k} images on each side; there are {len(real)} and "
            f"{len(fake)}.",
            "Evaluate more images",
        )
    precision = _share_inside(fake, real, _kth_distance(real, k))
    recall = _share_inside(real, fake, _kth_distance(fake, k))
    return precision, recall


def inception_score(logits: Tensor, splits: int = 10, *, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean KL(p(y|x) | p(y))).

    Args:
        logits: ``[N, classes]`` of the standard Inception network without bias; see ``InceptionFeatures.logits``.
        splits: Parts of the set, 10 is published.
        seed: Seed of the order: the parts must not be sorted by class.

    Raises:
        MmpostError: MMP-V070 with fewer images than splits.

    Source: Salimans et al., arXiv 1606.03498.
    """
    if len(logits) < splits:
        what = f"an Inception Score of {splits} splits needs at least {splits} images; there are {len(logits)}."
        raise MmpostError("MMP-V070", what, "Evaluate more images")
    order = torch.from_numpy(generator(seed, "inception-score").permutation(len(logits)))
    logp = logits[order].double().log_softmax(1)
    scores = []
    for part in logp.tensor_split(splits):
        marginal = part.exp().mean(0)
        scores.append(float((part.exp() * (part - marginal.log())).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def kid(
    real_features: Tensor, fake_features: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the unbiased MMD with the kernel (x·y / D + 1)³.

    Args:
        real_features: ``[N, D]`` of the standard Inception network.
        fake_features: ``[M, D]``.
        subsets: Random subsets to average over.
        subset_size: Images per subset; cut to the smaller set.
        seed: Seed of the subsets.

    Raises:
        MmpostError: MMP-V070 for fewer than two images.

    Source: Bińkowski et al., arXiv 1801.01401.
    """
    size = min(subset_size, len(real_features), len(fake_features))
    if size < 2:
        raise MmpostError("MMP-V070", f"KID needs at least 2 images on each side; there are {size}.", "Evaluate more")
    values = []
    for subset in range(subsets):
        draw = generator(seed, "kid", subset)
        real, fake = (
            rows[torch.from_numpy(draw.choice(len(rows), size, replace=False))].double()
            for rows in (real_features, fake_features)
        )
        values.append(float(_mmd(real, fake)))
    return float(np.mean(values)), float(np.std(values))


def _mmd(real: Tensor, fake: Tensor) -> Tensor:
    size, dim = real.shape

    def kernel(left: Tensor, right: Tensor) -> Tensor:
        return (left @ right.T / dim + 1) ** 3

    def others(square: Tensor) -> Tensor:
        return (square.sum() - square.diagonal().sum()) / (size * (size - 1))

    return others(kernel(real, real)) + others(kernel(fake, fake)) - 2 * kernel(real, fake).mean()


def generation_scores(
    real_features: Tensor,
    fake_features: Tensor,
    extractor: FeatureExtractor,
    *,
    fake_logits: Tensor | None = None,
    prefix: str = "g",
    seed: int = 0,
) -> dict[str, object]:
    """Scores of generated images under names that fit the extractor.

    Args:
        real_features: ``[N, dim]``.
        fake_features: ``[M, dim]``.
        extractor: What made them.
        fake_logits: Of Inception, for its score.
        prefix: See ``key_for``.
        seed: Seed of subsets and splits.

    Returns:
        ``gfid`` or ``gfd``, ``precision``, ``recall``, ``extractor``, ``images``, ``real_images``, ``notes``; with
        Inception also ``kid`` and, given logits, ``inception_score`` with their ``_std``.

    Raises:
        MmpostError: MMP-V070 or MMP-V071 as the single scores say.
    """
    precision, recall = precision_recall(real_features, fake_features)
    distance = frechet_distance(Moments.of(real_features), Moments.of(fake_features))
    remark = too_few(min(len(real_features), len(fake_features)), extractor.dim)
    result: dict[str, object] = {
        key_for(prefix, extractor): distance,
        "precision": precision,
        "recall": recall,
        "images": len(fake_features),
        "real_images": len(real_features),
        "extractor": describe(extractor),
        "notes": [remark] if remark else [],
    }
    if extractor.is_inception:
        result["kid"], result["kid_std"] = kid(real_features, fake_features, seed=seed)
        if fake_logits is not None:
            result["inception_score"], result["inception_score_std"] = inception_score(fake_logits, seed=seed)
    return result
