"""What ``mmpost generator`` does: a training run, sheets of samples, scores of samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmpost.runs.folder import Status
from mmpost.runs.live import Progress
from mmpost.runs.page import Pictures
from mmpost.runs.records import read_json
from mmpost.train.loop import Interrupted
from mmpost_tokenizers import opening
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.features import on_device
from mmpost_tokenizers.generator.classes import numbers_of, require_same_names
from mmpost_tokenizers.generator.evaluate import evaluate_generator
from mmpost_tokenizers.generator.identity import layout_of, require_same
from mmpost_tokenizers.generator.model import ClassConditionalGenerator
from mmpost_tokenizers.generator.pretokenize import CODES_FILE, Codes
from mmpost_tokenizers.generator.sample import Sampling, generate
from mmpost_tokenizers.generator.train import GeneratorTrainer, new_generator
from mmpost_tokenizers.images import ImageSet, to_uint8
from mmpost_tokenizers.inputs import Inputs, forget_after, labelled, open_run, place_of
from mmpost_tokenizers.options import GeneratorRunConfig
from mmpost_tokenizers.report import grid_png
from mmpost_tokenizers.run_pages import decode, sample_blocks, write_generator_page
from mmpost_tokenizers.session import final_of, open_tokenizer
from mmpost_tokenizers.stopping import StopRequest
from mmpost_tokenizers.using import reference_for, scoring_features

SUMMARY = "summary.json"
Say = Callable[[int, int], None]


def train_generator(
    config: GeneratorRunConfig,
    codes: str,
    held_out: str | None,
    out: Path,
    *,
    config_yaml: str,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Train, or go on, or find it done; returns the summary, which is also in ``summary.json``.

    Args:
        config: All options.
        codes: Training codes.
        held_out: Codes of other images.
        out: Run folder.
        config_yaml: Resolved configuration.
        tokenizer: The tokenizer of the codes, for samples in the report; it does not change the training.

    Raises:
        MmpostError: MMP-T070 when the folder holds a run on other codes, and as ``GeneratorTrainer``.
        Interrupted: After Ctrl-C, with a checkpoint written.
    """
    train, other = Codes.open(codes), Codes.open(held_out) if held_out is not None else None
    shower = open_tokenizer(tokenizer) if tokenizer is not None else None
    if shower is not None:
        require_same(layout_of(shower), train.layout, owner="the tokenizer", other="the training codes")
    words = ["mmpost", "generator", "train", codes, "--out", str(out)]
    folder = open_run(out, _inputs(codes, held_out, tokenizer, train, other), words=words, config_yaml=config_yaml)
    if folder.finished:
        return read_json(out / SUMMARY)
    progress = Progress(config.log.progress, report=out / "report.html")
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
            forget_after(folder, trainer.step)
            progress.start(trainer.total, f"{out.name}: {config.model.size} generator", first_step=trainer.step)
            summary = trainer.run()
        if not summary["finished"]:
            status = "interrupted"
            raise Interrupted
        (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
        samples = sample_blocks(model, shower, config.train.seed) if shower is not None else []
        write_generator_page(out, summary, samples)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        progress.stop()
        folder.finish(status, trainer.step if trainer is not None else 0)
    return summary


def _inputs(codes: str, held_out: str | None, tokenizer: str | None, train: Codes, other: Codes | None) -> Inputs:
    paths = {"codes": codes, "held_out": held_out, "tokenizer": tokenizer}
    marks = labelled(train.marks(), "the training codes")
    if other is not None:
        marks |= labelled(other.marks(), "the held-out codes")
    found = {name: place_of(path) for name, path in paths.items() if path is not None}
    return Inputs("generator train", found, marks)


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
        MmpostError: MMP-C117 for words that are neither names nor numbers, MMP-C105 for numbers that are no classes.
    """
    opened = open_tokenizer(tokenizer)
    model = open_generator(generator, opened)
    chosen = numbers_of(classes, model.config.class_names, model.config.num_classes)
    labels = torch.tensor([number for number in chosen for _ in range(per_class)])
    codes = generate(model, labels, sampling=sampling, progress=progress)
    images = decode(opened, codes, sampling.batch_size)
    out.mkdir(parents=True, exist_ok=True)
    keys = [f"{number:06d}-{label}" for number, label in enumerate(labels.tolist())]
    for key, image in zip(keys, to_uint8(images), strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / f"{key}.png")
    Codes(model.config.layout, codes[:, None].to(torch.int32), labels, keys, model.config.class_names).save(
        out / CODES_FILE
    )
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
        MmpostError: MMP-C119 for images with classes of other names; what ``evaluate_generator`` raises.
    """
    opened = open_tokenizer(tokenizer)
    model = open_generator(generator, opened)
    require_same_names(model.config.class_names, images.classes, owner="the generator", other="the images")
    extractor = on_device(scoring_features(tokenizer, features), opening.device())
    reference = reference_for(images, extractor, batch_size=sampling.batch_size)
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


def samples_block(tokenizer: DiscreteTokenizer, codes: Tensor, title: str, columns: int) -> Pictures:
    """Generated images for a page."""
    return Pictures([(title, grid_png(decode(tokenizer, codes), columns=columns))], title=title)
