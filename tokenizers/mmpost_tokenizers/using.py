"""What the commands do with a trained tokenizer: measure, look, encode, decode."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmpost.config.load import load
from mmpost.core.errors import MmpostError
from mmpost.runs.records import is_run
from mmpost_tokenizers import opening, report
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.batches import evaluation_batches
from mmpost_tokenizers.decoded import cache_folder
from mmpost_tokenizers.evaluate import evaluate_tokenizer
from mmpost_tokenizers.features import WEIGHTS_VARIABLE, FeatureExtractor, title_for
from mmpost_tokenizers.generator.identity import layout_of, require_same
from mmpost_tokenizers.generator.pretokenize import Codes
from mmpost_tokenizers.health import health_of
from mmpost_tokenizers.images import ImageSet, from_uint8, to_uint8
from mmpost_tokenizers.options import ImagesSection, TokenizerConfig
from mmpost_tokenizers.scores import perceptual_distance
from mmpost_tokenizers.session import COUNTED, FEATURES_FILE, SHOWN, final_of, open_tokenizer
from mmpost_tokenizers.statistics import Reference, reference_of


def scoring_features(checkpoint: str, which: str) -> FeatureExtractor:
    """The extractor for a checkpoint: ``auto`` is the user's own weights, else what its training scored with."""
    beside = Path(final_of(checkpoint)) / FEATURES_FILE
    if which == "auto" and not os.environ.get(WEIGHTS_VARIABLE) and beside.is_file():
        which = str(beside)
    return opening.choose_extractor(which, None)


def reference_cache() -> Path:
    """Where features of real images are kept between commands, under a hash of what they depend on."""
    return cache_folder().parent / "reference"


def reference_for(images: ImageSet, extractor: FeatureExtractor, *, batch_size: int = 64) -> Reference:
    """Features of real images on the device, read from ``reference_cache`` where they were computed before."""
    return reference_of(images, extractor, batch_size=batch_size, cache=reference_cache(), device=opening.device())


def evaluate_checkpoint(
    checkpoint: str,
    images: ImageSet,
    *,
    features: str,
    batch_size: int,
    out: Path | None,
    curves: bool,
    perceptual: str = "auto",
) -> dict[str, Any]:
    """Scores of a checkpoint; with ``out`` also ``results.json`` and ``report.html`` in that folder."""
    tokenizer = open_tokenizer(checkpoint)
    extractor = scoring_features(checkpoint, features)
    results = evaluate_tokenizer(
        tokenizer,
        images,
        extractor,
        batch_size=batch_size,
        curves={"perturb"} if curves else (),
        perceptual=perceptual_distance(perceptual, extractor),
        cache=reference_cache(),
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        write_page(out / "report.html", checkpoint, tokenizer, images, results, title_for("p", extractor))
    return results


def data_of_run(checkpoint: str) -> tuple[ImagesSection, str] | None:
    """The images that the run of a checkpoint named, and which of its options named them.

    Args:
        checkpoint: Run folder, its ``final``, or a checkpoint in it.

    Returns:
        The section with the sources under ``eval`` (held-out images where the run had some, else its training images),
        and ``data.eval`` or ``data.train``; None where no run folder is around.
    """
    place = Path(checkpoint).resolve()
    for folder in (place, *list(place.parents)[:2]):
        if not is_run(folder):
            continue
        try:
            found = load(TokenizerConfig, [folder / "config.yaml"], []).config.data
        except MmpostError:
            continue  # of another command, or of an older version
        name = "data.eval" if found.eval else "data.train"
        if sources := found.eval or found.train:
            return found.model_copy(update={"eval": sources}), name
    return None


def inspect_checkpoint(checkpoint: str, images: ImageSet, out: Path) -> dict[str, Any]:
    """Write the page of a checkpoint; returns the figures that belong on a terminal."""
    tokenizer = open_tokenizer(checkpoint)
    extractor = scoring_features(checkpoint, "auto")
    results = evaluate_tokenizer(tokenizer, images, extractor, curves={"perturb"}, cache=reference_cache())
    counts = write_page(out, checkpoint, tokenizer, images, results, title_for("p", extractor))
    health = health_of(counts)
    facts: dict[str, Any] = {
        "kind": tokenizer.config.kind,
        "parameters": sum(weight.numel() for weight in tokenizer.parameters()),
        "image_size": tokenizer.config.image_size,
        "token_grid": list(tokenizer.grid),
        "codebook_size": tokenizer.codebook_size,
        "groups": tokenizer.groups,
        "usage": health.usage,
        "perplexity": health.perplexity,
        "dead_codes": health.dead,
    }
    table = report.neighbour_table(tokenizer, counts, rows=5)
    if table is not None:
        facts["neighbours"] = {f"code {code}": near for code, _, near in table.rows}
    return facts


def write_page(
    out: Path, title: str, tokenizer: DiscreteTokenizer, images: ImageSet, results: dict[str, Any], score: str
) -> Tensor:
    """The page of one tokenizer; returns the counts of its codes."""
    pixels, _ = opening.pick(images, COUNTED).stacked()
    shown, _ = opening.pick(images, SHOWN).stacked()
    batches = [from_uint8(part) for part in pixels.split(64)]
    report.write_report(
        out,
        title=title,
        tokenizer=tokenizer,
        images=from_uint8(shown),
        batches=batches,
        results=results,
        score=score,
        notes=results["notes"],
    )
    return report.token_counts(tokenizer, batches)


def encode_images(checkpoint: str, images: ImageSet, out: Path, *, batch_size: int = 64) -> tuple[int, tuple[int, ...]]:
    """Write the codes of images to a ``.npz`` or ``.safetensors`` file; returns number and shape per image.

    Raises:
        MmpostError: MMP-C117 for another ending.
    """
    if out.suffix not in (".npz", ".safetensors"):
        raise MmpostError("MMP-C117", f"--out {out} ends in neither .npz nor .safetensors.", "Choose one of them.")
    tokenizer = open_tokenizer(checkpoint)
    device = next(tokenizer.parameters()).device
    parts, labels, keys = [], [], []
    for pictures, numbers, names in evaluation_batches(images, batch_size=batch_size):
        parts.append(tokenizer.tokenize(pictures.to(device)).cpu())
        labels.append(numbers)
        keys += names
    codes, label = torch.cat(parts), torch.cat(labels)
    out.parent.mkdir(parents=True, exist_ok=True)
    layout = layout_of(tokenizer)
    if out.suffix == ".npz":
        arrays: dict[str, Any] = {"codes": codes.numpy(), "labels": label.numpy(), "keys": np.array(keys)}
        np.savez_compressed(out, tokenizer_sha256=np.array(layout.tokenizer_sha256), **arrays)
    else:
        Codes(layout, codes[:, None].to(torch.int32), label, keys, images.classes).save(out)
    return len(codes), layout.shape


def decode_codes(checkpoint: str, codes: Path, out: Path, *, batch_size: int = 64) -> int:
    """Write a PNG file per image of a file of codes; returns their number.

    Raises:
        MmpostError: MMP-T076 for a file without codes, MMP-C102 for codes of another tokenizer.
    """
    tokenizer = open_tokenizer(checkpoint)
    indices, keys, sha256 = _read_codes(codes)
    layout = layout_of(tokenizer)
    if sha256 is not None:
        theirs = type(layout)(layout.codebook_size, layout.groups, layout.grid, sha256)
        require_same(layout, theirs, owner="the tokenizer", other=f"'{codes}'")
    out.mkdir(parents=True, exist_ok=True)
    device = next(tokenizer.parameters()).device
    for start in range(0, len(indices), batch_size):
        images = to_uint8(tokenizer.detokenize(indices[start : start + batch_size].long().to(device))).cpu()
        for image, key in zip(images, keys[start : start + batch_size], strict=True):
            name = "".join(char if char.isalnum() or char in "-_." else "_" for char in key)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / f"{name}.png")
    return len(indices)


def _read_codes(path: Path) -> tuple[Tensor, list[str], str | None]:
    if path.suffix != ".npz":
        found = Codes.open(path)
        return found.codes[:, 0].to(torch.int64), found.keys, found.layout.tokenizer_sha256
    try:
        with np.load(path) as arrays:
            codes = torch.from_numpy(arrays["codes"].astype(np.int64))
            keys = [str(key) for key in arrays["keys"]] if "keys" in arrays else list(map(str, range(len(codes))))
            return codes, keys, str(arrays["tokenizer_sha256"]) if "tokenizer_sha256" in arrays else None
    except (OSError, KeyError, ValueError) as error:
        raise MmpostError("MMP-T076", f"'{path}' holds no codes.", "Write it with `mmpost tokenizer encode`") from error
