"""What ``mmpost generator`` does: a training run, sheets of samples, scores of samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmpost.core.errors import MmpostError
from mmpost.runs import svg
from mmpost.runs.folder import RunFolder, Status
from mmpost.runs.live import Progress
from mmpost.runs.page import Drawing, Pictures, Section, write_page
from mmpost.runs.records import read_json, read_jsonl
from mmpost.train.loop import Interrupted
from mmpost_tokenizers import opening
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.features import on_device
from mmpost_tokenizers.generator.evaluate import evaluate_generator
from mmpost_tokenizers.generator.identity import layout_of, require_same
from mmpost_tokenizers.generator.model import ClassConditionalGenerator, check_classes
from mmpost_tokenizers.generator.pretokenize import CODES_FILE, Codes
from mmpost_tokenizers.generator.sample import Sampling, generate
from mmpost_tokenizers.generator.train import GeneratorTrainer, new_generator
from mmpost_tokenizers.images import ImageSet, to_uint8
from mmpost_tokenizers.options import GeneratorRunConfig
from mmpost_tokenizers.report import grid_png, score_table
from mmpost_tokenizers.session import final_of, open_tokenizer
from mmpost_tokenizers.statistics import reference_of
from mmpost_tokenizers.stopping import StopRequest
from mmpost_tokenizers.using import scoring_features

SUMMARY = "summary.json"
Say = Callable[[int, int], None]


def train_generator(
    config: GeneratorRunConfig, codes: str, held_out: str | None, out: Path, *, config_yaml: str
) -> dict[str, Any]:
    """Train, or go on, or find it done; returns the summary, which is also in ``summary.json``.

    Raises:
        MmpostError: As ``GeneratorTrainer``.
        Interrupted: After Ctrl-C, with a checkpoint written.
    """
    train, other = Codes.open(codes), Codes.open(held_out) if held_out is not None else None
    words = ["mmpost", "generator", "train", codes, "--out", str(out)]
    folder = RunFolder.open(out, command=words, config_yaml=config_yaml, overwrite=False)
    if folder.finished:
        return read_json(out / SUMMARY)
    if not folder.checkpoints():
        folder.truncate({"metrics.jsonl": 0, "events.jsonl": 0}, 0)
    progress = Progress(config.log.progress)
    model = new_generator(config.model, train, seed=config.train.seed).to(opening.device())

    def report(seen: dict[str, float]) -> None:
        record = {**seen, "step": int(seen["step"]), "loss": seen["nll"]}
        folder.log(record)
        progress.update(int(seen["step"]), record)

    status: Status = "failed"
    trainer: GeneratorTrainer | None = None
    try:
        with StopRequest(progress) as stop:
            trainer = GeneratorTrainer(model, train, other, config.train, folder=out, report=report, stop=stop)
            progress.start(trainer.total, f"{out.name}: {config.model.size} generator", first_step=trainer.step)
            summary = trainer.run()
        if not summary["finished"]:
            status = "interrupted"
            raise Interrupted
        (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
        _write_page(out, summary)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        progress.stop()
        folder.finish(status, trainer.step if trainer is not None else 0)
    return summary


def _write_page(out: Path, summary: dict[str, Any]) -> None:
    rows, _ = read_jsonl(out / "metrics.jsonl")
    lines = []
    for name in ("nll", "held_out_nll"):
        points = [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
        if points:
            lines.append(svg.Series(name, [x for x, _ in points], [y for _, y in points]))
    chart = svg.line_chart(lines, title="nats per code")
    sections = [
        Section("Likelihood", [score_table(summary, title="Nats per code")]),
        Section("Training", [Drawing(chart, title="Nats per code")] if chart else []),
    ]
    write_page(out / "report.html", title=out.name, sections=sections, subtitle="mmpost generator")


def open_generator(path: str, tokenizer: DiscreteTokenizer) -> ClassConditionalGenerator:
    """A generator that belongs to a tokenizer, on the device.

    Raises:
        MmpostError: MMP-C109 no generator, MMP-C102 codes of another tokenizer.
    """
    model = ClassConditionalGenerator.from_pretrained(final_of(path)).to(opening.device())
    require_same(layout_of(tokenizer), model.config.layout, owner="the tokenizer", other="the generator")
    return model


def sample_images(
    generator: str,
    tokenizer: str,
    out: Path,
    *,
    classes: str,
    per_class: int,
    sampling: Sampling,
    progress: Say | None = None,
) -> int:
    """Draw images into a folder: ``NUMBER-CLASS.png``, ``codes.safetensors`` and ``sheet.png``; returns their number.

    Raises:
        MmpostError: MMP-C117 for classes that are no numbers, MMP-C105 for numbers that are no classes.
    """
    opened = open_tokenizer(tokenizer)
    model = open_generator(generator, opened)
    chosen = _classes(classes, model.config.num_classes)
    labels = torch.tensor([number for number in chosen for _ in range(per_class)])
    check_classes(labels, model.config.num_classes)
    codes = generate(model, labels, sampling=sampling, progress=progress)
    images = decode(opened, codes, sampling.batch_size)
    out.mkdir(parents=True, exist_ok=True)
    keys = [f"{number:06d}-{label}" for number, label in enumerate(labels.tolist())]
    for key, image in zip(keys, to_uint8(images), strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / f"{key}.png")
    Codes(model.config.layout, codes[:, None].to(torch.int32), labels, keys).save(out / CODES_FILE)
    (out / "sheet.png").write_bytes(grid_png(images[: per_class * 50], columns=per_class))
    return len(keys)


def evaluate_samples(
    generator: str,
    tokenizer: str,
    images: ImageSet,
    *,
    samples: int,
    features: str,
    sampling: Sampling,
    progress: Say | None = None,
) -> dict[str, Any]:
    """Scores of drawn images against real ones, classes in turn; names follow the honesty rule.

    Raises:
        MmpostError: What ``evaluate_generator`` raises.
    """
    opened = open_tokenizer(tokenizer)
    model = open_generator(generator, opened)
    extractor = on_device(scoring_features(tokenizer, features), opening.device())
    reference = reference_of(images, extractor, batch_size=sampling.batch_size, device=opening.device())
    return evaluate_generator(
        model,
        opened,
        reference,
        extractor,
        samples=samples,
        sampling=sampling,
        # A classifier's features come with its classes; whether a sample shows its class is then known.
        classify=getattr(extractor, "classify", None),
        progress=progress,
    )


@torch.no_grad()
def decode(tokenizer: DiscreteTokenizer, codes: Tensor, batch_size: int = 64) -> Tensor:
    """Images ``[N, 3, S, S]`` in [-1, 1], on the CPU."""
    device = next(tokenizer.parameters()).device
    return torch.cat([tokenizer.detokenize(part.long().to(device)).cpu() for part in codes.split(batch_size)])


def samples_block(tokenizer: DiscreteTokenizer, codes: Tensor, title: str, columns: int) -> Pictures:
    """Generated images for a page."""
    return Pictures([(title, grid_png(decode(tokenizer, codes), columns=columns))], title=title)


def _classes(text: str, count: int) -> list[int]:
    if text == "all":
        return list(range(count))
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise MmpostError("MMP-C117", f"--classes {text} is no list of numbers.", "Write 3,7 or all.") from error
