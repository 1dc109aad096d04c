"""A run of ``mmpost tokenizer posttrain`` from a configuration: pairs of both image sets, the trainer, its records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmpost.core.errors import MmpostError
from mmpost.runs.folder import RunFolder, Status
from mmpost.runs.live import Progress
from mmpost.runs.records import read_json
from mmpost.train.loop import Interrupted
from mmpost_tokenizers import opening
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.features import weights_digest
from mmpost_tokenizers.generator.classes import check_classes, require_same_names
from mmpost_tokenizers.generator.identity import layout_of, require_same
from mmpost_tokenizers.generator.model import ClassConditionalGenerator
from mmpost_tokenizers.generator.sample import Sampling
from mmpost_tokenizers.image_files import write_bad
from mmpost_tokenizers.images import ImageSet
from mmpost_tokenizers.inputs import Inputs, forget_after, labelled, open_run, place_of
from mmpost_tokenizers.objective import Objective
from mmpost_tokenizers.options import PosttrainConfig
from mmpost_tokenizers.pairs import Pairs, check_sigma, make_pairs
from mmpost_tokenizers.posttrain import DecoderPostTrainer
from mmpost_tokenizers.posttrain_losses import adversary_of, objective_loss
from mmpost_tokenizers.run_pages import write_posttrain_page
from mmpost_tokenizers.session import FEATURES_FILE, final_of, open_tokenizer
from mmpost_tokenizers.stopping import StopRequest

SUMMARY = "summary.json"


def run_posttrain(
    config: PosttrainConfig,
    checkpoint: str,
    generator: str,
    out: Path,
    *,
    config_yaml: str,
    resolve: opening.Resolve = str,
) -> dict[str, Any]:
    """Post-train, or go on, or find it done.

    Args:
        config: All options.
        checkpoint: The main-trained tokenizer.
        generator: Folder of a generator of its codes.
        out: Run folder; ``final/`` in it is the tokenizer with the new decoder.
        config_yaml: Resolved configuration.
        resolve: Turns ``task:NAME`` into a path.

    Returns:
        The summary, which is also in ``summary.json``: held-out pair loss before and after among the rest.

    Raises:
        MmpostError: MMP-C104 sigma outside (0, 1], MMP-C102 a generator of other codes, MMP-C119 images with other
            classes, MMP-T070 a folder with a run that was made of something else, and all that a user can mend.
        Interrupted: After Ctrl-C, with a checkpoint written.
    """
    check_sigma(config.posttrain.sigma)
    tokenizer = open_tokenizer(checkpoint)
    maker = ClassConditionalGenerator.from_pretrained(final_of(generator)).to(opening.device())
    require_same(layout_of(tokenizer), maker.config.layout, owner="the tokenizer", other="the generator")
    sets = tuple(_images(config, tokenizer, maker, training=side, resolve=resolve) for side in (True, False))
    inputs = Inputs(
        "tokenizer posttrain",
        {"checkpoint": place_of(checkpoint), "generator": place_of(generator)},
        {
            "weights of the tokenizer": weights_digest(tokenizer.state_dict()),
            "weights of the generator": weights_digest(maker.state_dict()),
            **labelled(sets[0].marks(), "data.train"),
            **labelled(sets[1].marks(), "data.eval"),
        },
    )
    words = ["mmpost", "tokenizer", "posttrain", checkpoint, "--generator", generator]
    folder = open_run(out, inputs, words=words, config_yaml=config_yaml)
    if folder.finished:
        return read_json(out / SUMMARY)
    progress = Progress(config.log.progress, report=out / "report.html")
    _say_notes(sets, folder, progress)
    objective = _objective(config, tokenizer)
    adversary = adversary_of(objective, how=config.posttrain.discriminator, tokenizer_folder=final_of(checkpoint))

    def report(seen: dict[str, float]) -> None:
        folder.log({**seen, "step": int(seen["step"])})
        progress.update(int(seen["step"]), seen)

    status: Status = "failed"
    trainer: DecoderPostTrainer | None = None
    try:
        train, held_out = (
            _pairs(config, images, tokenizer, maker, out / "cache" / f"pairs-{name}.safetensors", name)
            for name, images in zip(("train", "held-out"), sets, strict=True)
        )
        with StopRequest(progress) as stop:
            trainer = DecoderPostTrainer(
                tokenizer,
                train,
                held_out,
                config.posttrain,
                loss=objective_loss(objective),
                adversary=adversary,
                folder=out,
                workers=config.data.workers,
                report=report,
                stop=stop,
            )
            forget_after(folder, trainer.step if folder.checkpoints() else -1)
            title = f"{out.name}: post-training of the decoder"
            progress.start(config.posttrain.max_steps, title, first_step=trainer.step)
            summary = trainer.run()
        if not summary["finished"]:
            status = "interrupted"
            raise Interrupted
        _keep_features(final_of(checkpoint), out / "final")
        (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
        main = open_tokenizer(checkpoint)
        write_posttrain_page(out, summary, trainer.held_out.report, before=main, after=tokenizer)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        progress.stop()
        folder.finish(status, trainer.step if trainer is not None else 0)
    return summary


def _say_notes(sets: Sequence[ImageSet], folder: RunFolder, progress: Progress) -> None:
    for images, name in zip(sets, ("bad_rows.jsonl", "bad_eval_rows.jsonl"), strict=True):
        texts = list(images.notes)
        if images.bad:
            write_bad(folder.path / name, images.bad)
            texts.append(f"{len(images.bad)} images are left out, listed in {name}; the first: {images.bad[0][1]}")
        for text in texts:
            folder.event("data", text)
            progress.event(text)


def _keep_features(before: str, after: Path) -> None:
    """Scores before and after are only comparable with the same features."""
    features = Path(before) / FEATURES_FILE
    if features.is_file():
        shutil.copyfile(features, after / FEATURES_FILE)


def _objective(config: PosttrainConfig, tokenizer: DiscreteTokenizer) -> Objective:
    """Losses of the images alone; what depends on frozen parts has no gradient here."""
    losses = config.losses.model_copy(update={"semantic": 0.0})
    size, dim = tokenizer.config.image_size, tokenizer.quantizer.dim
    objective: nn.Module = Objective(losses, image_size=size, dim=dim, seed=config.posttrain.seed)
    device: torch.device = next(tokenizer.parameters()).device
    made: Objective = objective.to(device)  # type: ignore[assignment]
    return made


def _images(
    config: PosttrainConfig,
    tokenizer: DiscreteTokenizer,
    maker: ClassConditionalGenerator,
    *,
    training: bool,
    resolve: opening.Resolve,
) -> ImageSet:
    """Labelled images whose classes are the generator's, checked before any of the work on them."""
    name = "data.train" if training else "data.eval"
    # Pairs need the same crop as the codes, so even training images are cut without chance.
    images = opening.open_images(
        config.data.train if training else config.data.eval,
        config.data,
        size=tokenizer.config.image_size,
        seed=config.posttrain.seed,
        training=False,
        resolve=resolve,
        name=name,
    )
    if any(label < 0 for label in images.labels):
        raise MmpostError(
            "MMP-C118",
            "post-training needs labelled images, because the generator needs their classes.",
            "Sort the images into a folder per class.",
        )
    require_same_names(maker.config.class_names, images.classes, owner="the generator", other=f"the images of {name}")
    check_classes(torch.tensor(images.labels), maker.config.num_classes)
    return images


def _pairs(
    config: PosttrainConfig,
    images: ImageSet,
    tokenizer: DiscreteTokenizer,
    maker: ClassConditionalGenerator,
    cache: Path,
    name: str,
) -> Pairs:
    progress = Progress(config.log.progress)
    progress.start(len(images), f"{name} pairs: codes that look generated, of {len(images)} images")
    shown = 0

    def advance(done: int, total: int) -> None:
        nonlocal shown
        # Not a line for every batch: twenty of them at most.
        if done * 20 // total > shown or done == total:
            shown = done * 20 // total
            progress.update(done, {})

    try:
        return make_pairs(
            images if config.data.workers else opening.resident(images),
            tokenizer,
            maker,
            sigma=config.posttrain.sigma,
            pair_mode=config.posttrain.pair_mode,
            sampling=Sampling.of(config.sampling),
            batch_size=config.sampling.batch_size,
            workers=config.data.workers,
            cache=cache,
            progress=advance,
        )
    finally:
        progress.stop()
