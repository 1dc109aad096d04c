"""The pictures of a tokenizer: reconstructions, the same under perturbation, use of codes, curves; one page of them."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmpost.runs import svg
from mmpost.runs.page import Block, Drawing, Paragraph, Pictures, Section, Table, Tiles, write_page
from mmpost.runs.records import flatten, is_number
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.health import Health, count, health_of, hits_of, merged
from mmpost_tokenizers.images import to_uint8
from mmpost_tokenizers.perturbation import LatentPerturbation, scaled_delta

# Shares of perturbed tokens of the picture grids; every image is perturbed.
STRENGTHS = (0.3, 0.6, 0.9)
COLUMNS = 8
_SMALLEST_TILE = 48  # px; small images are drawn larger, pixels kept
# Curves of a training report, in this order: a chart per group of metrics.
CURVES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss",)),
    ("reconstruction", ("rec", "features", "lpips")),
    ("quantizer", ("vq", "commit", "entropy", "semantic")),
    ("use of codes", ("codebook.usage",)),
    ("perplexity", ("codebook.perplexity",)),
    ("dead codes", ("codebook.dead",)),
    ("discriminator", ("discriminator", "adversarial", "lecam")),
    ("logits", ("real_logits", "fake_logits")),
    ("changed tokens", ("changed",)),
    ("gradient norm", ("grad_norm",)),
    ("share of time waiting for data", ("wait_share",)),
)


def grid_png(images: Tensor, columns: int = COLUMNS) -> bytes:
    """PNG of images side by side.

    Args:
        images: float ``[N, 3, S, S]`` in [-1, 1], N >= 1.
        columns: Images per row.
    """
    pixels = to_uint8(images).cpu()
    factor = max(1, math.ceil(_SMALLEST_TILE / pixels.shape[-1]))
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    count_, _, height, width = pixels.shape
    columns = min(columns, count_)
    rows = math.ceil(count_ / columns)
    sheet = torch.full((rows * (height + 2) - 2, columns * (width + 2) - 2, 3), 255, dtype=torch.uint8)
    for number, tile in enumerate(pixels):
        top, left = number // columns * (height + 2), number % columns * (width + 2)
        sheet[top : top + height, left : left + width] = tile.permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(sheet.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def picture_grids(tokenizer: DiscreteTokenizer, images: Tensor, *, seed: int = 0) -> Pictures:
    """Originals, reconstructions, and reconstructions of latents perturbed at three strengths.

    Args:
        tokenizer: Any; one whose codes have no neighbours shows no perturbed grids.
        images: ``[N, 3, S, S]`` in [-1, 1].
        seed: Of the perturbation.
    """
    device = next(tokenizer.parameters()).device
    images = images.to(device)
    items = [("original", grid_png(images)), ("reconstruction", grid_png(tokenizer.reconstruct(images)))]
    if has_neighbours(tokenizer):
        delta = scaled_delta(tokenizer.codebook_size)
        for alpha in STRENGTHS:
            perturb = LatentPerturbation(alpha=alpha, beta=1.0, delta=delta)
            generator = torch.Generator().manual_seed(seed)
            moved = tokenizer.reconstruct(images, perturb=perturb, generator=generator)
            items.append((f"perturbed: {alpha:.0%} of tokens, {delta} neighbours", grid_png(moved)))
    return Pictures(items, title="Reconstructions")


def has_neighbours(tokenizer: DiscreteTokenizer) -> bool:
    """Whether the codes of a tokenizer can be perturbed."""
    return tokenizer.quantizer.has_neighbours


def token_counts(tokenizer: DiscreteTokenizer, batches: Sequence[Tensor]) -> Tensor:
    """Hits ``[groups, codebook_size]`` over batches of images."""
    device = next(tokenizer.parameters()).device
    parts = [count(tokenizer.tokenize(b.to(device)), tokenizer.codebook_size, tokenizer.groups) for b in batches]
    return merged(parts).cpu()


def usage_blocks(counts: Tensor) -> list[Block]:
    """Tiles and drawings of how codes are used, from ``counts`` ``[groups, codebook_size]``."""
    health: Health = health_of(counts)
    hit = hits_of(counts)
    ranked = [(row.double() / row.sum().clamp_min(1)).tolist() for row in hit]
    size = counts.shape[1]
    lines = [
        svg.Series(f"group {n}" if len(ranked) > 1 else "share", range(len(row)), row) for n, row in enumerate(ranked)
    ]
    uniform = svg.Series("uniform", [0, size - 1], [1 / size, 1 / size])
    chart = svg.line_chart([*lines, uniform], title="share of tokens by code", x_label="codes by rank", smooth=False)
    # Codes that were never hit cannot be listed where there are millions; the tile counts them.
    numbers = torch.cat(hit) if counts.is_sparse else counts.flatten()
    hits = svg.histogram([float(value) for value in numbers.tolist()], title="hits per code")
    return [
        Tiles(
            [
                ("codes used", f"{health.usage:.1%}"),
                ("dead codes", str(health.dead)),
                ("perplexity", f"{health.perplexity:.1f} of {size}"),
                ("tokens counted", f"{health.tokens:,}"),
            ]
        ),
        Drawing(chart, title="Share of tokens by code"),
        Drawing(hits, title="Hits per code"),
    ]


def neighbour_table(tokenizer: DiscreteTokenizer, counts: Tensor, rows: int = 10) -> Table | None:
    """The most used codes with their nearest neighbours; None where codes have none, or are too many to list."""
    if not has_neighbours(tokenizer) or counts.is_sparse:
        return None
    vectors = tokenizer.quantizer.code_vectors(0).float().cpu()
    top = counts[0].argsort(descending=True)[:rows]
    distances = torch.cdist(vectors[top], vectors)
    order = distances.argsort(1)[:, 1:6]
    cells = []
    for code, near, row in zip(top.tolist(), order, distances, strict=True):
        listed = "  ".join(f"{index} ({row[index]:.3f})" for index in near.tolist())
        cells.append([str(code), str(int(counts[0, code])), listed])
    return Table(["code", "hits", "nearest codes (distance)"], cells, title="Neighbours of the most used codes")


def perturbation_curve(results: Mapping[str, Any], name: str) -> Drawing | None:
    """The score against the share of perturbed tokens, a line per number of neighbours.

    Args:
        results: From ``evaluate_tokenizer``; its ``grid`` and ``curve``.
        name: Of the score, such as ``pFD[digits-cnn32-seed0]``.

    Returns:
        None for codes without neighbours.
    """
    rows = [*results.get("curve", []), *results.get("grid", [])]
    lines = []
    for delta in sorted({row["delta"] for row in rows}):
        here = sorted({row["alpha"]: row["distance"] for row in rows if row["delta"] == delta}.items())
        lines.append(svg.Series(f"{delta} neighbours", [alpha for alpha, _ in here], [value for _, value in here]))
    if not lines:
        return None
    chart = svg.line_chart(lines, title=name, x_label="share of perturbed tokens", smooth=False)
    return Drawing(chart, title=f"{name} by share of perturbed tokens")


def training_blocks(metrics: Sequence[Mapping[str, Any]]) -> list[Block]:
    """A chart per group of metrics, from the lines of metrics.jsonl."""
    rows = [(row.get("step"), flatten(row)) for row in metrics if row.get("step") is not None]
    drawings: list[Block] = []
    for title, names in CURVES:
        lines = []
        for name in names:
            points = [(float(step), float(row[name])) for step, row in rows if is_number(row.get(name))]  # type: ignore[arg-type]
            if points:
                lines.append(svg.Series(name, [x for x, _ in points], [y for _, y in points]))
        if lines:
            drawings.append(Drawing(svg.line_chart(lines, title=title), title=title))
    return drawings


def score_table(results: Mapping[str, Any], title: str = "Held-out scores") -> Table:
    """Numbers of an evaluation by name."""
    rows = [[name, f"{value:.5g}"] for name, value in results.items() if is_number(value)]
    return Table(["score", "value"], rows, title=title)


def write_report(
    out: Path,
    *,
    title: str,
    tokenizer: DiscreteTokenizer,
    images: Tensor,
    batches: Sequence[Tensor] = (),
    metrics: Sequence[Mapping[str, Any]] = (),
    results: Mapping[str, Any] | None = None,
    score: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """Write the page of one tokenizer.

    Args:
        out: File.
        title: Heading.
        tokenizer: What is shown.
        images: For the grids, a few.
        batches: For the counts of codes; ``images`` when empty.
        metrics: Lines of metrics.jsonl.
        results: An evaluation.
        score: Name of its perturbed score, for the curve.
        notes: Sentences under the scores.
    """
    counts = token_counts(tokenizer, list(batches) or [images])
    scores: list[Block] = [score_table(results)] if results else []
    curve = perturbation_curve(results or {}, score)
    scores += [curve] if curve is not None else []
    scores += [Paragraph(text, note=True) for text in notes]
    table = neighbour_table(tokenizer, counts)
    sections = [
        Section("Scores", scores),
        Section("Reconstruction", [picture_grids(tokenizer, images)]),
        Section("Codebook", [*usage_blocks(counts), *([table] if table is not None else [])]),
        Section("Training", training_blocks(metrics)),
    ]
    return write_page(out, title=title, sections=sections, subtitle="mmpost tokenizer")
