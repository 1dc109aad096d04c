"""The report pages of generator training and of decoder post-training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpost.runs import svg
from mmpost.runs.page import Block, Drawing, Paragraph, Pictures, Section, Tiles, write_page
from mmpost.runs.records import is_number, read_jsonl
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.generator.model import ClassConditionalGenerator
from mmpost_tokenizers.generator.sample import Guidance, Sampling, generate
from mmpost_tokenizers.pairs import Pairs
from mmpost_tokenizers.report import grid_png, score_table

SHOWN = 16
SHOWN_CLASSES, PER_CLASS = 10, 8
GUIDANCE = 2.0


def curves(folder: Path, groups: Mapping[str, Mapping[str, str]]) -> list[Block]:
    """A chart per group of metrics of metrics.jsonl that are there; steps are the x axis.

    Args:
        folder: Run folder.
        groups: Title of a chart to its metrics, and what each is called there.
    """
    rows, _ = read_jsonl(folder / "metrics.jsonl")
    drawings: list[Block] = []
    for title, names in groups.items():
        lines = []
        for name, label in names.items():
            points = [(float(row["step"]), float(row[name])) for row in rows if is_number(row.get(name))]
            if points:
                lines.append(svg.Series(label, [x for x, _ in points], [y for _, y in points]))
        if lines:
            drawings.append(Drawing(svg.line_chart(lines, title=title), title=title))
    return drawings


@torch.no_grad()
def decode(tokenizer: DiscreteTokenizer, codes: Tensor, batch_size: int = 64) -> Tensor:
    """Images ``[N, 3, S, S]`` in [-1, 1], on the CPU."""
    device = next(tokenizer.parameters()).device
    return torch.cat([tokenizer.detokenize(part.long().to(device)).cpu() for part in codes.split(batch_size)])


def sample_blocks(model: ClassConditionalGenerator, tokenizer: DiscreteTokenizer, seed: int) -> list[Block]:
    """A sheet with a row per class: all classes up to ten, else ten spread over them."""
    count = model.config.num_classes
    rows = min(count, SHOWN_CLASSES)
    classes = torch.arange(rows) * count // rows
    sampling = Sampling(Guidance(GUIDANCE), seed=seed)
    images = decode(tokenizer, generate(model, classes.repeat_interleave(PER_CLASS), sampling=sampling))
    names = model.config.class_names
    shown = [names[number] if number < len(names) else str(number) for number in classes.tolist()]
    caption = f"a row per class: {', '.join(shown)}; guidance {GUIDANCE:g}"
    return [Pictures([(caption, grid_png(images, columns=PER_CLASS))], title="Samples")]


def write_generator_page(out: Path, summary: Mapping[str, Any], samples: Sequence[Block]) -> None:
    """``report.html`` of a generator's run folder; ``samples`` may be empty."""
    charts = {
        "nats per code": {"nll": "training codes", "held_out_nll": "held-out codes"},
        "learning rate": {"learning_rate": "learning rate"},
        "gradient norm": {"grad_norm": "gradient norm"},
    }
    shown = list(samples) or [Paragraph("Codes alone show no images. With --tokenizer samples stand here.", note=True)]
    sections = [
        Section("Likelihood", [score_table(summary, title="Nats per code")]),
        Section("Samples", shown),
        Section("Training", curves(out, charts)),
    ]
    write_page(out / "report.html", title=out.name, sections=sections, subtitle="mmpost generator")


def write_posttrain_page(
    out: Path, summary: Mapping[str, Any], pairs: Pairs, *, before: DiscreteTokenizer, after: DiscreteTokenizer
) -> None:
    """``report.html`` of a post-training.

    Args:
        out: Run folder.
        summary: What ``DecoderPostTrainer.run`` gave.
        pairs: The half of the held-out pairs that chose nothing.
        before: The main-trained tokenizer.
        after: The same with the post-trained decoder.
    """
    count = min(SHOWN, len(pairs))
    some = pairs.subset([at * len(pairs) // count for at in range(count)])
    images = torch.stack([some.images[row][0] for row in range(count)])
    grids = [
        ("original", grid_png(images)),
        ("generated-looking codes, main decoder", grid_png(decode(before, some.inputs))),
        ("the same codes, post-trained decoder", grid_png(decode(after, some.inputs))),
    ]
    tiles = [(f"pair loss {when}", f"{summary[f'pair_loss_{when}']:.5g}") for when in ("before", "after", "last")]
    told = (
        f"Of the held-out images {summary['held_out_select']} chose the step ({summary['best_step']} of "
        f"{summary['steps']}); the pair losses before, after and last are those of the other "
        f"{summary['held_out_report']}."
    )
    charts = {
        "held-out pair loss": {"pair_loss": "half that reports", "pair_loss_select": "half that chooses"},
        "training loss": {"loss": "training pairs"},
        "learning rate": {"learning_rate": "learning rate"},
    }
    sections = [
        Section("Result", [Tiles(tiles), Paragraph(told, note=True), score_table(summary, title="Figures")]),
        Section("Held-out images", [Pictures(grids, title="Codes that keep a share of the real ones")]),
        Section("Training", curves(out, charts)),
    ]
    write_page(out / "report.html", title=out.name, sections=sections, subtitle="mmpost decoder post-training")
