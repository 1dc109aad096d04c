"""A run of ``mmpost tokenizer posttrain`` from a configuration: pairs of both image sets, the trainer, its records."""

from __future__ import annotations

import json
import shutil
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
from mmpost_tokenizers.generator.identity import layout_of, require_same
from mmpost_tokenizers.generator.model import ClassConditionalGenerator
from mmpost_tokenizers.generator.sample import Sampling
from mmpost_tokenizers.images import ImageSet
from mmpost_tokenizers.objective import Objective
from mmpost_tokenizers.options import ImageSource, PosttrainConfig
from mmpost_tokenizers.pairs import Pairs, check_sigma, make_pairs
from mmpost_tokenizers.posttrain import DecoderPostTrainer
from mmpost_tokenizers.posttrain_losses import adversary_of, objective_loss
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
        MmpostError: MMP-C104 sigma outside (0, 1], MMP-C102 a generator of other codes, and all that a user can mend.
        Interrupted: After Ctrl-C, with a checkpoint written.
    """
    check_sigma(config.posttrain.sigma)
    tokenizer = open_tokenizer(checkpoint)
    maker = ClassConditionalGenerator.from_pretrained(final_of(generator)).to(opening.device())
    require_same(layout_of(tokenizer), maker.config.layout, owner="the tokenizer", other="the generator")
    words = ["mmpost", "tokenizer", "posttrain", checkpoint, "--generator", generator]
    folder = RunFolder.open(out, command=words, config_yaml=config_yaml, overwrite=False)
    if folder.finished:
        summary = read_json(out / SUMMARY)
        if summary.get("tokenizer_sha256") != layout_of(tokenizer).tokenizer_sha256:
            what = f"{out} holds the finished post-training of another tokenizer."
            raise MmpostError("MMP-T070", what, "Choose another --out.")
        return summary
    folder.truncate({"metrics.jsonl": 0, "events.jsonl": 0} if not folder.checkpoints() else {}, None)
    progress = Progress(config.log.progress)
    objective = _objective(config, tokenizer)
    adversary = adversary_of(objective, how=config.posttrain.discriminator, tokenizer_folder=final_of(checkpoint))

    def report(seen: dict[str, float]) -> None:
        folder.log({**seen, "step": int(seen["step"])})
        progress.update(int(seen["step"]), seen)

    status: Status = "failed"
    trainer: DecoderPostTrainer | None = None
    try:
        train, held_out = (_pairs(config, tokenizer, maker, training=side, resolve=resolve) for side in (True, False))
        progress.start(config.posttrain.max_steps, f"{out.name}: post-training of the decoder")
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
            summary = trainer.run()
        if not summary["finished"]:
            status = "interrupted"
            raise Interrupted
        _keep_features(final_of(checkpoint), out / "final")
        (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        progress.stop()
        folder.finish(status, trainer.step if trainer is not None else 0)
    return summary


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


def _pairs(
    config: PosttrainConfig,
    tokenizer: DiscreteTokenizer,
    maker: ClassConditionalGenerator,
    *,
    training: bool,
    resolve: opening.Resolve,
) -> Pairs:
    sources: list[ImageSource] = config.data.train if training else config.data.eval
    # Pairs need the same crop as the codes, so even training images are cut without chance.
    images: ImageSet = opening.open_images(
        sources,
        config.data,
        size=tokenizer.config.image_size,
        seed=config.posttrain.seed,
        training=False,
        resolve=resolve,
        name="data.train" if training else "data.eval",
    )
    if any(label < 0 for label in images.labels):
        raise MmpostError(
            "MMP-C118",
            "post-training needs labelled images, because the generator needs their classes.",
            "Sort the images into a folder per class.",
        )
    return make_pairs(
        images,
        tokenizer,
        maker,
        sigma=config.posttrain.sigma,
        pair_mode=config.posttrain.pair_mode,
        sampling=Sampling.of(config.sampling),
        batch_size=config.sampling.batch_size,
        workers=config.data.workers,
    )
