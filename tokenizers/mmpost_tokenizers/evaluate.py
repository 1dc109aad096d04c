"""All scores of a tokenizer in one pass over a set of images, and the comparison of two such results.

Names follow the honesty rule of ``features``: ``rfid`` and ``pfid`` with the standard Inception weights, ``rfd`` and
``pfd`` with anything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmpost.core.errors import MmpostError
from mmpost_tokenizers import scores
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.batches import evaluation_batches
from mmpost_tokenizers.features import FeatureExtractor, describe, key_for, on_device
from mmpost_tokenizers.frechet import frechet_distance, too_few
from mmpost_tokenizers.images import ImageSet, to_uint8
from mmpost_tokenizers.pfid import ALPHAS, PFIDResult, Setting, Sweep, deltas_for, device_of
from mmpost_tokenizers.statistics import Reference, reference_of

# Shares of tokens that the curve adds to those of the score, at the middle neighbourhood.
CURVE_ALPHAS = (0.1, 0.2, 0.3, 0.4, 1.0)
# Codes without neighbours, or fewer than four: pFID does not exist for them.
_NO_NEIGHBOURS = ("MMP-C070", "MMP-V077")
_ROUNDING = "round((x + 1) * 127.5), clamped"


@dataclass(slots=True)
class _Pairs:
    """Sums over images of the scores of pairs."""

    perceptual: scores.Perceptual | None
    usage: scores.UsageMeter
    psnr: float = 0.0
    flat: float = 0.0
    ssim: float = 0.0
    distance: float = 0.0

    def update(self, made: torch.Tensor, target: torch.Tensor, indices: torch.Tensor) -> None:
        self.usage.update(indices)
        self.psnr += float(scores.psnr(made, target).sum())
        self.flat += float(scores.psnr_of_mean_colour(target).sum())
        if min(target.shape[2:]) >= scores.SSIM_MIN_SIDE:
            self.ssim += float(scores.ssim(made, target).double().sum())
        if self.perceptual is not None:
            self.distance += float(self.perceptual(made, target).sum())

    def result(self, images: int, side: int) -> dict[str, float]:
        made = {"psnr": self.psnr / images, "psnr_mean_colour": self.flat / images}
        if side >= scores.SSIM_MIN_SIDE:
            made["ssim"] = self.ssim / images
        if self.perceptual is not None:
            made[self.perceptual.key] = self.distance / images
        return made | self.usage.result()


def evaluate_tokenizer(
    tokenizer: DiscreteTokenizer,
    images: ImageSet,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 64,
    curves: Collection[str] = (),
    perceptual: scores.Perceptual | None = None,
    seed: int = 0,
    workers: int = 0,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Reconstruction, robustness and usage of a tokenizer.

    Args:
        tokenizer: Evaluated where its weights are, in evaluation mode; perturbed for its p-score alone.
        images: Also the reference; without random crops or flips, at the tokenizer's size.
        extractor: What makes features; decides on the names of distances.
        batch_size: Images per pass; it does not change the results except ``usage_xqgan``, which is a mean over steps.
        curves: ``{"perturb"}`` adds shares alpha below 0.5 and 1.0 to the curve.
        perceptual: LPIPS or a distance of deep features; None leaves it out.
        seed: Of perturbed positions and ranks.
        workers: See ``ImageBatches``.
        cache: Folder of reference features; see ``reference_of``.
        progress: Called with images done and images in all.

    Returns:
        Ready for JSON: ``rfid|rfd``, ``pfid|pfd``, ``pmse``, ``mse``, ``degradation``, ``grid`` (one row per setting),
        ``curve`` (rows with alpha 0 first), ``psnr``, ``psnr_mean_colour``, ``ssim`` (from 11 pixels), ``lpips`` or
        ``dfd[...]``, the keys of ``UsageMeter.result``, ``noise_floor``, ``extractor``, ``images``, ``data``,
        ``codebook_size``, ``groups``, ``token_grid``, ``alphas``, ``deltas``, ``seed``, ``uint8``, ``notes``. The
        p-score, its companions and the curve are missing, with a note, for codes without neighbours.

    Raises:
        MmpostError: MMP-C074 for images of another size, MMP-V070, MMP-V071, MMP-V076.
    """
    device = device_of(tokenizer)
    reference = reference_of(images, extractor, batch_size=batch_size, workers=workers, cache=cache, device=device)
    extractor = on_device(extractor, device)
    chosen, extra, notes = _settings(tokenizer, "perturb" in curves)
    sweep = Sweep(tokenizer, extractor, [*chosen, *extra], seed=seed)
    pairs = _Pairs(perceptual, scores.UsageMeter(tokenizer.codebook_size, tokenizer.groups))
    for pictures, _, _ in evaluation_batches(images, batch_size=batch_size, workers=workers):
        here = pictures.to(device)
        indices = tokenizer.tokenize(here)
        pairs.update(sweep.update(here, indices), to_uint8(here), indices)
        if progress is not None:
            progress(sweep.seen, len(images))
    side = images.cutting.size
    if side < scores.SSIM_MIN_SIDE:
        notes.append(f"no SSIM: its window needs {scores.SSIM_MIN_SIDE} pixels, images have {side}")
    remark = too_few(len(images), extractor.dim)
    result = {
        key_for("r", extractor): frechet_distance(sweep.clean, reference.moments),
        **(_perturbed(sweep, reference, chosen) if chosen else {"mse": sweep.clean_error / sweep.seen}),
        **pairs.result(len(images), side),
        **_facts(tokenizer, images, extractor, reference, seed),
    }
    return {**result, "notes": [*images.notes, *notes, *([remark] if remark else [])]}


def _settings(tokenizer: DiscreteTokenizer, with_curve: bool) -> tuple[list[Setting], list[Setting], list[str]]:
    """Settings of the score, more for the curve, and a note when there are none."""
    try:
        if not tokenizer.quantizer.has_neighbours:
            raise tokenizer.quantizer.no_neighbours()
        deltas = deltas_for(tokenizer.codebook_size)
    except MmpostError as error:
        if error.code not in _NO_NEIGHBOURS:
            raise
        return [], [], [f"no score of perturbed latents: {error.what}"]
    chosen = [(alpha, delta) for delta in deltas for alpha in ALPHAS]
    return chosen, [(alpha, deltas[1]) for alpha in CURVE_ALPHAS] if with_curve else [], []


def _perturbed(sweep: Sweep, reference: Reference, chosen: list[Setting]) -> dict[str, Any]:
    score: PFIDResult = sweep.result(reference.moments, chosen)
    middle = score.deltas[1]
    every = sweep.distances(reference.moments)
    curve = [{"alpha": 0.0, "delta": middle, "distance": score.clean, "mse": score.clean_mse}]
    for alpha, delta in sorted(every):
        if delta == middle:
            mse = sweep.errors[alpha, delta] / sweep.seen
            curve.append({"alpha": alpha, "delta": delta, "distance": every[alpha, delta], "mse": mse})
    return {
        score.key: score.mean,
        "pmse": score.pmse,
        "mse": score.clean_mse,
        # JSON has no infinity.
        "degradation": score.degradation if math.isfinite(score.degradation) else None,
        "grid": score.rows(),
        "curve": curve,
        "alphas": list(ALPHAS),
        "deltas": list(score.deltas),
    }


def _facts(
    tokenizer: DiscreteTokenizer, images: ImageSet, extractor: FeatureExtractor, reference: Reference, seed: int
) -> dict[str, Any]:
    return {
        "noise_floor": None if np.isnan(reference.noise_floor) else reference.noise_floor,
        "extractor": describe(extractor),
        "images": len(images),
        "data": reference.data,
        "codebook_size": tokenizer.codebook_size,
        "groups": tokenizer.groups,
        "token_grid": list(tokenizer.grid),
        "seed": seed,
        "uint8": _ROUNDING,
    }


# Higher is better; of all other scores less is.
_HIGHER = ("psnr", "ssim", "usage", "perplexity", "entropy_bits")
_FRECHET = ("rfid", "rfd", "pfid", "pfd")


def compare_results(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Scores of two tokenizers on the same images, side by side.

    Args:
        first: From ``evaluate_tokenizer``.
        second: From ``evaluate_tokenizer``.

    Returns:
        Per score: ``first``, ``second``, ``difference`` (second minus first), ``ratio`` and ``better`` (``first``,
        ``second`` or ``equal``). The p-score is left out when the codebooks have different sizes or the settings
        differ, since it is not comparable then.

    Raises:
        MmpostError: MMP-V078 for two feature extractors, MMP-V079 for two sets of images.
    """
    one, other = first["extractor"], second["extractor"]
    if (one["name"], one["sha256"]) != (other["name"], other["sha256"]):
        raise MmpostError(
            "MMP-V078",
            f"scores of two feature extractors cannot be compared: {_short(one)} and {_short(other)}.",
            "Evaluate both with the same extractor",
        )
    if (first["data"], first["images"]) != (second["data"], second["images"]):
        raise MmpostError(
            "MMP-V079",
            f"scores of two sets of images cannot be compared: {first['images']} images {first['data'][:8]} and "
            f"{second['images']} images {second['data'][:8]}.",
            "Evaluate both on the same images, at the same size",
        )
    alike = all(first.get(name) == second.get(name) for name in ("codebook_size", "alphas", "deltas", "seed"))
    perturbed = ("pfid", "pfd", "pmse", "degradation")
    names = [*_FRECHET, "pmse", "mse", "degradation", *_HIGHER, "lpips", *sorted(_deep(first))]
    shared = [name for name in names if first.get(name) is not None and second.get(name) is not None]
    return {
        name: _side_by_side(name, float(first[name]), float(second[name]))
        for name in shared
        if alike or name not in perturbed
    }


def _deep(result: Mapping[str, Any]) -> list[str]:
    return [name for name in result if name.startswith("dfd[")]


def _side_by_side(name: str, one: float, other: float) -> dict[str, Any]:
    gain = other - one if name in _HIGHER else one - other
    better = "equal" if gain == 0 else "second" if gain > 0 else "first"
    return {
        "first": one,
        "second": other,
        "difference": other - one,
        "ratio": other / one if one else None,
        "better": better,
    }


def _short(extractor: Mapping[str, Any]) -> str:
    return f"{extractor['name']} ({extractor['sha256'][:8]})"
