"""A training run from a configuration: what the commands and the trainer classes both start."""

from __future__ import annotations

import functools
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmpost.api import data as api_data
from mmpost.api.data import Data
from mmpost.api.evaluate import evaluate
from mmpost.api.method import open_method, open_reference, open_teacher
from mmpost.config.run import GRPOConfig, SFTConfig, check_batch
from mmpost.config.schema import RewardSpec
from mmpost.config.upt import UPTConfig
from mmpost.core.batch import Encoded
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Sample
from mmpost.models.load import LoadedModel, load
from mmpost.models.policy import Policy
from mmpost.rewards.score import check_columns, check_sources, refuse_labels, resolve
from mmpost.rollout.engine import Engine, Setup, open_engine
from mmpost.runs.folder import WRITTEN, RunFolder, Status
from mmpost.runs.live import Progress
from mmpost.runs.report import write_report
from mmpost.train import checkpoint, demos
from mmpost.train.completions import LABEL, Completions
from mmpost.train.distributed import Processes
from mmpost.train.learner import Learner
from mmpost.train.loop import Interrupted, Loop
from mmpost.train.method import Method
from mmpost.train.rows import RowStream
from mmpost.train.sources import Demonstrations, Source
from mmpost_tasks import TASKS

# Rows are all encoded before the first step up to this number, so that rows that do not fit are named at once.
ENCODE_ALL_UP_TO = 1000


class Training:
    """One run.

    Args:
        config: All options.
        command: Command line in words, for the run folder.
        config_yaml: Resolved configuration with sources; default the configuration itself.
        sources: Where options were written, for messages.
        model: An open model instead of ``config.model``.
        data: Open sources instead of ``config.data.train``.
        rewards: Reward functions or names instead of ``config.rewards``.

    Attributes:
        output: Run folder.
        was_finished: True after ``run`` found nothing left to do.
    """

    def __init__(
        self,
        config: SFTConfig | GRPOConfig,
        *,
        command: Sequence[str] = (),
        config_yaml: str | None = None,
        sources: Mapping[str, str] | None = None,
        model: LoadedModel | None = None,
        data: Sequence[Data] | None = None,
        rewards: Sequence[str | Callable[..., Any]] | None = None,
    ) -> None:
        self.config, self.command, self.origins = config, command, sources
        self.config_yaml = config_yaml or config.to_yaml()
        self.model, self.data, self.reward_choice = model, data, rewards
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.output = Path(config.train.output_dir or f"runs/{config.command}-{stamp}")
        self.processes = Processes(bf16=config.train.bf16, strategy=config.train.strategy)
        self.was_finished = False
        self._engine: Engine | None = None

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train, evaluate, write the final weights and the report.

        Returns:
            The run folder; ``final/`` in it opens with plain transformers.

        Raises:
            MmpostError: Everything that a user can mend.
            Interrupted: After Ctrl-C, with a checkpoint written.
        """
        config, processes = self.config, self.processes
        check_batch(config, processes.world, self.origins)
        method = open_method(config)
        for name in config.eval.tasks:
            # A misspelt task must not be found only after the training.
            Catalog("tasks", TASKS).get(name)
        rewards = resolve(self._reward_specs())
        if isinstance(config, UPTConfig):
            refuse_labels(rewards, config.vote.labels)
        data = self._open_data(method)
        check_sources(rewards, {source.name: source.weight for source in data})
        for source in data:
            check_columns(rewards, source.samples)
        folder = self._open_folder(data)
        if self.was_finished:
            return self.output
        torch.manual_seed(config.train.seed)
        try:
            loop, progress = self._build(self._load_model(), data, rewards, method, folder)
        except BaseException:
            _withdraw(folder)
            raise
        status: Status = "failed"
        try:
            loop.run()
            self._finish(loop, folder)
            status = "finished"
            # Only here: after an error the other processes may be waiting for something else.
            processes.close()
        except (Interrupted, KeyboardInterrupt):
            status = "interrupted"
            raise
        finally:
            if self._engine is not None:
                self._engine.close()
            if progress is not None:
                progress.stop()
            if loop.state.step:
                _conclude(folder, status, loop.state.step)
            else:
                _withdraw(folder)
        return self.output

    def _reward_specs(self) -> list[Any]:
        """Rewards of the run; none without completions."""
        if not isinstance(self.config, GRPOConfig):
            return []
        specs = list(self.reward_choice) if self.reward_choice is not None else list(self.config.rewards)
        if isinstance(self.config, UPTConfig):
            specs = [self.config.vote.reward(self.config.train.seed), *specs]
        if not specs:
            raise MmpostError("MMP-C032", "no rewards: rewards is empty.", "Set rewards=[answer, format].")
        return [RewardSpec(name=item) if isinstance(item, str) else item for item in specs]

    def _open_data(self, method: Method) -> list[Data]:
        """Sources of the run, made to fit the command and looked through for faults."""
        config = self.config
        if self.data is not None:
            data = [item if isinstance(item, Data) else api_data.load_data(item) for item in self.data]
        else:
            data = api_data.open_all(config.data, seed=config.train.seed)
        if isinstance(config, GRPOConfig) and method.demo is not None:
            # A prompt keeps its answer as a column, for a method that also trains on demonstrations.
            for source in data:
                source.samples = [demos.set_aside(sample) for sample in source.samples]
            name = config.loss.preset or config.command
            demos.check_some([sample for source in data for sample in source.samples], name)
        api_data.prepare(data, config.data, command=config.command)
        return data

    def _open_folder(self, data: Sequence[Data]) -> RunFolder | None:
        """Open on the first process; all processes see the same outcome."""
        folder: RunFolder | None = None
        outcome: Any = None
        if self.processes.is_main:
            try:
                folder = RunFolder.open(
                    self.output,
                    command=list(self.command),
                    config_yaml=self.config_yaml,
                    overwrite=self.config.train.overwrite,
                )
                api_data.check_same(folder.path, data)
                outcome = (folder.finished, [str(place) for place in folder.checkpoints()])
            except MmpostError as error:
                outcome = error
        outcome = self.processes.gather(outcome)[0]
        if isinstance(outcome, MmpostError):
            raise outcome
        self.was_finished, places = outcome
        self._resume_from = Path(places[-1]) if places else None
        if folder is not None and not self.was_finished and self._resume_from is None:
            folder.truncate({"metrics.jsonl": 0, "events.jsonl": 0}, 0)
        return folder

    def _load_model(self) -> LoadedModel:
        config = self.config
        if self.model is None:
            self.model = load(
                config.model,
                peft=config.peft,
                media=config.data.media,
                max_length=config.data.max_length,
                seed=config.train.seed,
                device=self.processes.device,
            )
        self.model.adapter.max_length = config.data.max_length
        if not self.model.policy.num_parameters(trainable=True):
            raise MmpostError(
                "MMP-C034",
                "no weights to train: every part of the model is frozen.",
                "Shorten model.freeze, or load the model with peft='lora' or 'full'.",
            )
        return self.model

    def _build(
        self, model: LoadedModel, data: list[Data], rewards: list[Any], method: Method, folder: RunFolder | None
    ) -> tuple[Loop, Progress | None]:
        config, processes, train = self.config, self.processes, self.config.train
        reference = open_reference(model, method, self._policy)
        teacher = open_teacher(config, model, method)
        if self._resume_from is not None:
            # Weights of the checkpoint; the reference above keeps those of the start.
            section = config.model.model_copy(update={"model_name_or_path": str(self._resume_from)})
            resumed = load(
                section,
                peft=model.peft or config.peft,
                media=config.data.media,
                max_length=config.data.max_length,
                device=processes.device,
            )
            model = replace(resumed, base=model.base)
            self.model = model
        stream = self._stream(model, data)
        total_steps = self._steps(data)
        adamw = functools.partial(
            torch.optim.AdamW,
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            weight_decay=train.weight_decay,
        )
        spread = processes.strategy == "zero3" and processes.world > 1
        if spread and isinstance(config, GRPOConfig) and config.rollout.engine == "vllm":
            raise MmpostError(
                "MMP-C061",
                "rollout.engine is vllm, which cannot take the weights of train.strategy=zero3.",
                "Set train.strategy=fsdp2 or zero2, or rollout.engine=native.",
            )
        policy, optimizer = processes.prepare_training(model.policy, model.adapter, adamw, clip=train.max_grad_norm)
        grpo = config.grpo if isinstance(config, GRPOConfig) else None
        learner = Learner(
            policy,
            model.adapter,
            optimizer,
            processes,
            method,
            micro_batch=train.per_device_train_batch_size,
            tokens=train.tokens_per_pass,
            temperature=grpo.temperature if grpo else 1.0,
            max_grad_norm=train.max_grad_norm,
            max_length=grpo.max_completion_length if grpo else 1,
            others={name: other for name, other in (("reference", reference), ("teacher", teacher)) if other},
        )
        source: Source
        if grpo is None:
            source = Demonstrations(
                stream,
                num_samples=config.log.samples,
                method=method,
                adapter=model.adapter,
                processes=processes,
                measure=learner.measure,
            )
        else:
            assert isinstance(config, GRPOConfig)
            self._engine = open_engine(
                Setup(
                    config.rollout,
                    model.policy,
                    model.adapter,
                    model.base,
                    batch_size=grpo.rollout_batch_size,
                    rank=processes.rank,
                    barrier=processes.barrier,
                )
            )
            source = Completions(
                stream,
                policy=model.policy,
                adapter=model.adapter,
                rewards=rewards,
                section=grpo,
                method=method,
                processes=processes,
                log_probs=learner.log_probs,
                reference=functools.partial(reference, learner) if reference and method.asks("reference") else None,
                teacher=functools.partial(teacher, learner) if teacher and method.asks("teacher") else None,
                seed=train.seed,
                num_samples=config.log.samples,
                engine=self._engine,
                labels=config.vote.labels if isinstance(config, UPTConfig) else (LABEL,),
                blind=isinstance(config, UPTConfig),
            )
        progress = self._progress(model, total_steps, data, folder)
        loop = Loop(
            model=model,
            learner=learner,
            source=source,
            processes=processes,
            train=train,
            total_steps=total_steps,
            folder=folder,
            progress=progress,
            output=self.output,
            likelihood=grpo is None,
            evaluate=self._evaluate if config.eval.tasks else None,
            eval_steps=config.eval.eval_steps,
        )
        if self._resume_from is not None:
            loop.resume(self._resume_from)
        return loop, progress

    def _policy(self) -> Policy:
        """The policy that trains; a continued run opens it again."""
        assert self.model is not None
        return self.model.policy

    def _stream(self, model: LoadedModel, data: list[Data]) -> RowStream:
        config = self.config
        grpo = config.grpo if isinstance(config, GRPOConfig) else None
        if grpo is not None and grpo.prompts_per_step % grpo.mini_batches:
            raise MmpostError(
                "MMP-C021",
                f"grpo.prompts_per_step {grpo.prompts_per_step} is not a multiple of grpo.mini_batches "
                f"{grpo.mini_batches}.",
                "Change one of them.",
            )
        count = self._rows_per_step() if grpo is None else grpo.prompts_per_step // grpo.mini_batches
        if count < self.processes.world:
            raise MmpostError(
                "MMP-C022",
                f"{count} rows per step cannot be shared by {self.processes.world} processes.",
                "Raise train.batch_size or grpo.prompts_per_step.",
            )
        stream = RowStream(
            [source.samples for source in data],
            [source.weight for source in data],
            _Encode(model.adapter, config.train.loss_on if grpo is None else None),
            count=count,
            rank=self.processes.rank,
            world=self.processes.world,
            seed=config.train.seed,
            workers=config.data.workers,
            on_bad_row=config.data.on_bad_row,
            on_long=config.data.on_long,
            # In one pass no row is drawn twice, and remembering them would only take memory.
            reuse=self._passes(data) > 1,
        )
        if config.data.verify == "auto" and sum(len(source) for source in data) <= ENCODE_ALL_UP_TO:
            stream.check_all()
        return stream

    def _rows_per_step(self) -> int:
        train = self.config.train
        return train.batch_size or (
            self.processes.world * train.per_device_train_batch_size * (train.gradient_accumulation_steps or 1)
        )

    def _steps(self, data: list[Data]) -> int:
        """Optimiser steps of the run."""
        config = self.config
        rows = sum(len(source) for source in data)
        if isinstance(config, GRPOConfig):
            updates = config.grpo.mini_batches * config.grpo.num_iterations
            batches = math.ceil(config.train.num_train_epochs * rows / config.grpo.prompts_per_step)
            return config.train.max_steps or max(1, batches * updates)
        return config.train.max_steps or max(1, math.ceil(config.train.num_train_epochs * rows / self._rows_per_step()))

    def _passes(self, data: list[Data]) -> float:
        """How often the run draws each row, on average."""
        config, steps = self.config, self._steps(data)
        drawn = float(steps * self._rows_per_step())
        if isinstance(config, GRPOConfig):
            drawn = steps * config.grpo.prompts_per_step / (config.grpo.mini_batches * config.grpo.num_iterations)
        return drawn / max(sum(len(source) for source in data), 1)

    def _progress(self, model: LoadedModel, total: int, data: list[Data], folder: RunFolder | None) -> Progress | None:
        if folder is None:
            return None
        left_out = api_data.write_bad_rows(folder.path / "bad_rows.jsonl", data)
        api_data.write_manifest(folder.path, data)
        millions = model.policy.num_parameters() / 1e6
        trained = model.policy.num_parameters(trainable=True) / 1e6
        folder.add_environment(
            {
                "device": str(self.processes.device),
                "processes": self.processes.world,
                "params": model.policy.num_parameters(),
                "trainable_params": model.policy.num_parameters(trainable=True),
            }
        )
        progress = Progress(mode=self.config.log.progress, report=str(folder.path / "report.html"))
        title = (
            f"{self.config.command} {self.config.log.run_name or folder.path.name}: {model.name} "
            f"({millions:.1f} M weights, {trained:.1f} M train) on {self.processes.world} x {self.processes.device}"
        )
        first = int(self._resume_from.name.removeprefix("step-")) if self._resume_from is not None else 0
        progress.start(total, title, first_step=first)
        if self.processes.device.type == "cpu" and torch.version.cuda:
            progress.event("no CUDA device found; running on the CPU")
        if not model.policy.packs:
            progress.event("this model takes no packed batches: rows are padded, and every completion has its prompt")
        if left_out:
            progress.event(f"{left_out} faulty rows left out; see bad_rows.jsonl")
        if folder.resuming and self._resume_from is not None:
            progress.event(f"continuing from {self._resume_from.name}")
        return progress

    def _evaluate(self, step: int) -> dict[str, Any]:
        """Held-out accuracy; computed on the first process, known to all."""
        section, out = self.config.eval, {}
        assert self.model is not None
        with self.processes.whole(self.model.policy):
            if self.processes.is_main:
                results = evaluate(
                    self.model,
                    section.tasks,
                    limit=section.limit,
                    batch_size=section.per_device_eval_batch_size,
                    max_new_tokens=section.max_new_tokens,
                )
                for task, result in results.results.items():
                    accuracy = result["metrics"]["accuracy"]
                    out[task] = {"accuracy": accuracy["value"], "ci": accuracy["ci"], "n": accuracy["n"]}
                results.save_samples(self.output)
            self.processes.barrier()
        shared: dict[str, Any] = self.processes.gather(out)[0]
        return shared

    def _finish(self, loop: Loop, folder: RunFolder | None) -> None:
        """Final weights, final evaluation."""
        checkpoint.save_final(self.output / "final", loop.model, self.processes)
        if loop.evaluate is not None:
            loop._evaluate()
        if folder is not None and loop.progress is not None:
            loop.progress.event(f"final weights: {self.output / 'final'}")


class _Encode:
    """Encodes a sample for the command; picklable, so that worker processes can have it."""

    def __init__(self, adapter: Any, loss_on: str | None) -> None:
        self.adapter, self.loss_on = adapter, loss_on

    def __call__(self, sample: Sample) -> Encoded:
        if self.loss_on is None:
            return self.adapter.encode_prompt(sample.prompt())
        return self.adapter.encode(sample, loss_on=self.loss_on)


def _withdraw(folder: RunFolder | None) -> None:
    """Remove what a run that could not start has written, so that it does not stand in the way of the next try."""
    if folder is None or folder.resuming:
        return
    for name in WRITTEN:
        place = folder.path / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    if not any(folder.path.iterdir()):
        folder.path.rmdir()


def _conclude(folder: RunFolder | None, status: Status, step: int) -> None:
    """Write status and report; a run that trained must not fail because its report does."""
    if folder is None:
        return
    folder.finish(status, step)
    try:
        write_report(folder.path)
    except Exception as error:
        folder.event("report", f"the report could not be written: {type(error).__name__}: {error}")
