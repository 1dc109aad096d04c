"""A run of ``mmpost tokenizer train`` from a configuration: data, weights, run folder, evaluation, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpost.core.errors import MmpostError
from mmpost.runs.folder import RunFolder, Status
from mmpost.runs.live import Progress
from mmpost.runs.records import read_jsonl
from mmpost.train.distributed import Processes
from mmpost.train.loop import Interrupted
from mmpost_tokenizers import opening, report, saving
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.batches import ImageBatches
from mmpost_tokenizers.evaluate import evaluate_tokenizer
from mmpost_tokenizers.features import FeatureExtractor, title_for
from mmpost_tokenizers.images import ImageSet, from_uint8
from mmpost_tokenizers.options import TokenizerConfig
from mmpost_tokenizers.scores import perceptual_distance
from mmpost_tokenizers.toy_features import ClassifierFeatures
from mmpost_tokenizers.training import TokenizerTrainer

# Images of the report's grids, and of its counts of codes.
SHOWN, COUNTED = 16, 512
FEATURES_FILE = "features.safetensors"


class TokenizerSession:
    """One run.

    Args:
        config: All options.
        command: Command line in words, for the run folder.
        config_yaml: Resolved configuration with sources; default the configuration itself.
        resolve: Turns ``task:NAME`` into a path.

    Attributes:
        output: Run folder; ``final/`` in it opens with ``from_pretrained``.
        was_finished: True after ``run`` found nothing left to do.
    """

    def __init__(
        self,
        config: TokenizerConfig,
        *,
        command: Sequence[str] = (),
        config_yaml: str | None = None,
        resolve: opening.Resolve = str,
    ) -> None:
        self.config, self.command, self.resolve = config, list(command), resolve
        self.config_yaml = config_yaml or config.to_yaml()
        self.output = Path(config.train.output_dir or f"runs/tokenizer-{time.strftime('%Y%m%d-%H%M%S')}")
        self.processes = Processes(bf16=config.train.bf16, strategy="ddp")
        self.was_finished = False
        self._extractor: FeatureExtractor | None = None

    def run(self) -> Path:
        """Train, evaluate, write the final weights and the report.

        Raises:
            MmpostError: Everything that a user can mend.
            Interrupted: After Ctrl-C, with a checkpoint written.
        """
        config, processes = self.config, self.processes
        share, rest = divmod(config.train.batch_size, processes.world)
        if rest:
            raise MmpostError(
                "MMP-C115",
                f"train.batch_size={config.train.batch_size} cannot be shared among {processes.world} processes.",
                f"Make it a multiple of {processes.world}.",
            )
        # Weights first: numbers that do not fit together are told before any file is opened.
        tokenizer = opening.new_tokenizer(config.tokenizer, seed=config.train.seed)
        folder, place = self._open_folder()
        if self.was_finished:
            return self.output
        self.train_images = self._images(training=True)
        fed = self.train_images if config.data.workers else opening.resident(self.train_images)
        self.eval_images = self._images(training=False) if config.data.eval else None
        batches = ImageBatches(
            fed,
            batch_size=share,
            seed=config.train.seed,
            workers=config.data.workers,
            rank=processes.rank,
            world=processes.world,
        )
        progress = Progress(config.log.progress, report=self.output / "report.html") if folder is not None else None
        trainer = TokenizerTrainer(
            tokenizer,
            batches,
            config,
            processes=processes,
            output=self.output,
            folder=folder,
            progress=progress,
            evaluate=self._evaluate if self.eval_images is not None else None,
        )
        if place is not None:
            trainer.resume(place)
        if progress is not None:
            name = config.log.run_name or self.output.name
            title = f"{name}: {config.tokenizer.kind} tokenizer on {processes.device}"
            progress.start(trainer.total, title, first_step=trainer.state.step)
        self._say_notes(folder, progress)
        self._train(trainer, folder, progress)
        return self.output

    def _train(self, trainer: TokenizerTrainer, folder: RunFolder | None, progress: Progress | None) -> None:
        status: Status = "failed"
        try:
            trainer.run()
            saving.save_final(self.output / "final", trainer)
            results = trainer.measure()
            if folder is not None:
                if isinstance(self._extractor, ClassifierFeatures):
                    # Later evaluations of this tokenizer score with the same features.
                    self._extractor.save(self.output / "final" / FEATURES_FILE)
                if results:
                    folder.write_eval("tokenizer", results, [])
                self._report(trainer.mean.model, results)
            status = "finished"
            self.processes.close()
        except (Interrupted, KeyboardInterrupt):
            status = "interrupted"
            raise
        finally:
            if progress is not None:
                progress.stop()
            if folder is not None:
                folder.finish(status, trainer.state.step)

    def _open_folder(self) -> tuple[RunFolder | None, Path | None]:
        """Open on the first process; all processes see the same outcome."""
        folder: RunFolder | None = None
        outcome: Any = None
        if self.processes.is_main:
            try:
                folder = RunFolder.open(
                    self.output,
                    command=self.command,
                    config_yaml=self.config_yaml,
                    overwrite=self.config.train.overwrite,
                )
                places = folder.checkpoints()
                outcome = (folder.finished, str(places[-1]) if places else None)
                if not places and not folder.finished:
                    folder.truncate({"metrics.jsonl": 0, "events.jsonl": 0}, 0)
            except MmpostError as error:
                outcome = error
        outcome = self.processes.gather(outcome)[0]
        if isinstance(outcome, MmpostError):
            raise outcome
        self.was_finished, place = outcome
        return folder, Path(place) if place else None

    def _images(self, *, training: bool) -> ImageSet:
        data = self.config.data
        return opening.open_images(
            data.train if training else data.eval,
            data,
            size=self.config.tokenizer.image_size,
            seed=self.config.train.seed,
            training=training,
            resolve=self.resolve,
            quarantine_file=self.output / ("bad_rows.jsonl" if training else "bad_eval_rows.jsonl"),
        )

    def _say_notes(self, folder: RunFolder | None, progress: Progress | None) -> None:
        for images in (self.train_images, self.eval_images):
            if images is None or folder is None or progress is None:
                continue
            texts = list(images.notes)
            if images.bad:
                texts.append(f"{len(images.bad)} images are left out; the first: {images.bad[0][1]}")
            for text in texts:
                folder.event("data", text)
                progress.event(text)

    def extractor(self) -> FeatureExtractor:
        """What compares images; made once, from training images only."""
        if self._extractor is None:
            source = Path(self.config.data.train[0].path).stem.replace("task:", "") or "images"
            self._extractor = opening.choose_extractor(
                self.config.eval.features, self.train_images, seed=0, source=source
            )
        return self._extractor

    def _evaluate(self, tokenizer: DiscreteTokenizer, step: int) -> dict[str, Any]:
        assert self.eval_images is not None
        section = self.config.eval
        extractor = self.extractor()
        return evaluate_tokenizer(
            tokenizer,
            opening.pick(self.eval_images, section.limit),
            extractor,
            batch_size=section.batch_size,
            workers=self.config.data.workers,
            curves={"perturb"} if section.curves else (),
            perceptual=perceptual_distance(section.perceptual, extractor),
            cache=self.output / "cache",
        )

    def _report(self, tokenizer: DiscreteTokenizer, results: dict[str, Any]) -> Path:
        images = self.eval_images if self.eval_images is not None else self.train_images
        pixels, _ = opening.pick(images, COUNTED).stacked()
        shown, _ = opening.pick(images, SHOWN).stacked()
        rows, _ = read_jsonl(self.output / "metrics.jsonl")
        notes = [] if self.eval_images is not None else ["No data.eval was given: pictures are training images."]
        return report.write_report(
            self.output / "report.html",
            title=self.config.log.run_name or self.output.name,
            tokenizer=tokenizer,
            images=from_uint8(shown),
            batches=[from_uint8(part) for part in pixels.split(64)],
            metrics=rows,
            results=results,
            score=title_for("p", self._extractor) if self._extractor is not None else "",
            notes=[*notes, *results.get("notes", [])],
        )


def final_of(path: str | Path) -> str:
    """The folder of the weights: ``final`` of a run folder, anything else as it is."""
    place = Path(path)
    return str(place / "final") if (place / "final").is_dir() else str(path)


def open_tokenizer(path: str | Path) -> DiscreteTokenizer:
    """A tokenizer of a run folder, a checkpoint or the hub, on the device.

    Raises:
        MmpostError: As ``DiscreteTokenizer.from_pretrained``.
    """
    return DiscreteTokenizer.from_pretrained(final_of(path)).to(opening.device())
