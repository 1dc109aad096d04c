"""The loop: take updates from a source, step, log, save, evaluate, and stop cleanly.

It knows neither method nor modality; both are behind ``Source`` and ``Learner``.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mmpost.config.schema import TrainSection
from mmpost.core.errors import MmpostError
from mmpost.models.load import LoadedModel
from mmpost.runs.folder import RunFolder
from mmpost.runs.live import Progress
from mmpost.train import checkpoint
from mmpost.train.diagnose import Diagnosis
from mmpost.train.distributed import Processes
from mmpost.train.learner import Learner
from mmpost.train.rows import Update
from mmpost.train.sources import Source

MAX_NONFINITE = 3


class Interrupted(Exception):
    """The user asked to stop; a checkpoint has been written."""


@dataclass(slots=True)
class State:
    """Everything that a continuation needs besides weights and optimiser; plain JSON."""

    step: int = 0
    positions: int = 0
    seconds: float = 0.0
    nonfinite: int = 0
    window: dict[str, list[float]] = field(default_factory=dict)
    diagnosis: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Fields by name."""
        return {name: getattr(self, name) for name in self.__slots__}


def learning_rate(train: TrainSection, step: int, total: int) -> float:
    """Rate of the 0-based ``step``: linear warm-up, then cosine, linear or constant to the end."""
    warmup = train.warmup_steps if train.warmup_steps >= 1 else round(train.warmup_steps * total)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(total - warmup, 1)
    if train.lr_scheduler_type == "cosine":
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
    return train.learning_rate * (1 - share if train.lr_scheduler_type == "linear" else 1.0)


class Loop:
    """A run under way.

    Args:
        folder: Run folder; None on all processes but the first.
        progress: Live display, likewise.
        evaluate: Returns results by task and writes them; called on every process.
        eval_steps: Steps between evaluations; None for never during training.
        kind: ``sft`` or ``grpo``; only names metrics.
    """

    def __init__(
        self,
        *,
        model: LoadedModel,
        learner: Learner,
        source: Source,
        processes: Processes,
        train: TrainSection,
        total_steps: int,
        folder: RunFolder | None,
        progress: Progress | None,
        output: Path,
        likelihood: bool,
        evaluate: Callable[[int], dict[str, Any]] | None = None,
        eval_steps: int | None = None,
    ) -> None:
        self.model, self.learner, self.source, self.processes = model, learner, source, processes
        self.train, self.total, self.folder, self.progress = train, total_steps, folder, progress
        self.output, self.likelihood, self.evaluate, self.eval_steps = output, likelihood, evaluate, eval_steps
        self.state = State()
        half = _runs_in_half(model, processes)
        exact = getattr(getattr(source, "engine", None), "exact", True)
        self.diagnosis = Diagnosis(self.state.diagnosis, half=half, max_grad_norm=train.max_grad_norm, exact=exact)
        self._stop = False
        self._dropped = 0
        self._saved: int | None = None

    def resume(self, place: Path) -> None:
        """Go on from a checkpoint."""
        saved = checkpoint.restore(place, self.learner.optimizer, self.processes)
        self.source.load_state_dict(saved.pop("source"))
        offsets = saved.pop("offsets")
        self.state = State(**saved)
        self.diagnosis.memory = self.state.diagnosis
        if self.folder is not None:
            self.folder.truncate(offsets, self.state.step)
            self.folder.event("resume", f"continued from {place.name}")

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Interrupted: After the first Ctrl-C or SIGTERM, once a checkpoint is written.
        """
        before = self._catch_signals()
        try:
            while self.state.step < self.total:
                self._batch()
                if self.processes.max(int(self._stop)):
                    self.save()
                    raise Interrupted
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _batch(self) -> None:
        """All updates of one rollout batch; checkpoints stand between batches only."""
        first = self.state.step
        clock = time.perf_counter()
        for number, update in enumerate(self.source.updates()):
            self._step(update, clock, is_first=number == 0)
            clock = time.perf_counter()
            if self.state.step >= self.total:
                break
        last = self.state.step
        if last >= self.total:
            return
        # Evaluation first: a checkpoint keeps the log up to itself, and what follows it is forgotten by a resumption.
        if self.evaluate is not None and self.eval_steps and _due(first, last, self.eval_steps):
            self._evaluate()
        if _due(first, last, self.train.save_steps):
            self.save()

    def _step(self, update: Update, started: float, *, is_first: bool) -> None:
        collected = time.perf_counter()
        state = self.state
        rate = learning_rate(self.train, state.step, self.total)
        metrics = self.learner.update(update, rate, progress=state.step / max(self.total - 1, 1))
        done = time.perf_counter()
        state.step += 1
        state.positions += int(metrics["positions"])
        state.seconds += done - started
        self._watch(metrics["grad_norm"])
        phases = {"data": collected - started, **update.metrics.pop("phase_s", {}), "train": done - collected}
        seen = self._collect_window(metrics, update.metrics, phases)
        self._diagnose(seen, is_first=is_first)
        self._note_dropped()
        if state.step % self.train.logging_steps == 0 or state.step in (1, self.total):
            self._log(rate)
        if self.folder is not None and (state.step % self.train.sample_steps == 0 or state.step in (1, self.total)):
            self.folder.write_samples(state.step, [{"step": state.step, **sample} for sample in update.samples])

    def _watch(self, norm: float) -> None:
        if math.isfinite(norm):
            self.state.nonfinite = 0
            return
        self.state.nonfinite += 1
        self._event("nonfinite", f"gradient norm is {norm} at step {self.state.step}; the step was skipped")
        if self.state.nonfinite >= MAX_NONFINITE:
            raise MmpostError(
                "MMP-T002",
                f"the gradient was not finite in {MAX_NONFINITE} steps in a row (last: step {self.state.step}).",
                "Lower train.learning_rate, or continue from the last checkpoint with train.bf16=false.",
            )

    def _collect_window(
        self, metrics: dict[str, float], known: dict[str, Any], phases: dict[str, float]
    ) -> dict[str, float]:
        """Add the step to the means of the next log line; returns its numbers by flat name."""
        if self.likelihood:
            values: dict[str, Any] = {"loss": metrics["nll"]}
        else:
            values = {"loss": -metrics["objective"], "surrogate": metrics["surrogate"]}
            values |= {"clip_share": metrics["removed"], "logp_gap": metrics["gap"]}
            values |= {f"logp_gap_{name}": metrics[f"gap_{name}"] for name in ("p99", "max")}
            values |= {name: metrics[name] for name in metrics if name.startswith("removed/") or name == "demo_nll"}
            if metrics["lost"]:
                values["engine_lost"] = metrics["lost"]
            if self.learner.penalises:
                values["kl"] = metrics["kl"]
        values |= {"entropy": metrics["entropy"], "grad_norm": metrics["grad_norm"], **known, "phase_s": phases}
        seen = {name: value for name, value in _flat(values) if value is not None and not math.isnan(value)}
        for name, value in seen.items():
            entry = self.state.window.setdefault(name, [0.0, 0.0])
            entry[0] += value
            entry[1] += 1
        return seen

    def _diagnose(self, seen: dict[str, float], *, is_first: bool) -> None:
        """Say in words what the numbers of the steps so far mean."""
        if self.likelihood:
            # The entropy of demonstrations is meant to fall; only the gradient can be judged.
            seen = {"grad_norm": seen["grad_norm"]} if "grad_norm" in seen else {}
        elif not is_first:
            # The policy has moved since the rollout, so that its distance from the engine is no fault.
            seen = {name: value for name, value in seen.items() if not name.startswith("logp_gap")}
        for finding in self.diagnosis.feed(seen):
            self._event("diagnosis", str(finding))

    def _log(self, rate: float) -> None:
        means = {name: total / count for name, (total, count) in self.state.window.items()}
        self.state.window = {}
        nested = _nested(means)
        record = {
            "step": self.state.step,
            "epoch": round(self.source.stream.epoch, 4),
            "time": round(self.state.seconds, 3),
            "tokens_total": self.state.positions,
            "lr": rate,
            **nested,
        }
        if self.folder is not None:
            self.folder.log(record)
        if self.progress is not None:
            self.progress.update(self.state.step, record)

    def _note_dropped(self) -> None:
        """Rows that were left out are named once, never silently."""
        new = self.source.stream.dropped[self._dropped :]
        self._dropped = len(self.source.stream.dropped)
        if self.processes.max(len(new)):
            # Each process sees its own rows only; dict.fromkeys keeps the order and names a row once.
            texts = [text for part in self.processes.gather([str(error) for error in new]) for text in part]
            for text in dict.fromkeys(texts):
                self._event("dropped", text)

    def _event(self, kind: str, text: str) -> None:
        if self.folder is not None:
            self.folder.event(kind, text, step=self.state.step)
        if self.progress is not None:
            self.progress.event(text)

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        results = self.evaluate(self.state.step)
        if self.folder is not None:
            self.folder.log({"step": self.state.step, "eval": results})
        for task, result in results.items():
            low, high = result["ci"]
            self._event("eval", f"{task}: accuracy {result['accuracy']:.3f} [{low:.3f}, {high:.3f}] on {result['n']}")

    def save(self) -> None:
        """Write a checkpoint of this moment, unless it is written already."""
        if self._saved == self.state.step:
            return
        place = self.output / "checkpoints" / f"step-{self.state.step:06d}"
        offsets = self.folder.offsets() if self.folder is not None else {}
        state = {**self.state.as_json(), "source": self.source.state_dict(), "offsets": offsets}
        checkpoint.save(place, self.model, self.learner.optimizer, state, self.processes)
        if self.processes.is_main:
            checkpoint.prune(place.parent, self.train.save_total_limit)
        self._saved = self.state.step
        if self.progress is not None:
            self.progress.checkpoint(place)

    def _catch_signals(self) -> dict[int, Any]:
        """First signal: finish the step and save. Second: stop at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True
            if self.progress is not None:
                self.progress.event("stopping after this step; press Ctrl-C again to stop at once")

        try:
            return {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            # Not the main thread (a notebook's worker, the studio): signals stay with their owner.
            return {}


def _runs_in_half(model: LoadedModel, processes: Processes) -> bool:
    """Whether forward passes run in 16 bits, by autocast or by the weights."""
    with processes.autocast():
        if torch.is_autocast_enabled(processes.device.type):
            return True
    return any(weight.dtype in (torch.bfloat16, torch.float16) for weight in model.policy.parameters())


def _due(before: int, after: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, after]."""
    return before // every != after // every


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        out.extend(_flat(value, f"{key}/") if isinstance(value, dict) else [(key, value)])
    return out


def _nested(values: dict[str, float]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        place = out
        *path, last = key.split("/")
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return out
