"""Trainer of index models (spatial model and head) on images that were encoded before.

Every random draw belongs to (seed, purpose, step), so a run that was interrupted goes on bit by bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_cosine_schedule_with_warmup

from mmpost.core import seeding
from mmpost.core.errors import MmpostError
from mmpost.train.checkpoint import prune
from mmpost_tokenizers.bridge.checkpoint import Scratch
from mmpost_tokenizers.bridge.model import IndexModel
from mmpost_tokenizers.bridge.options import BridgeTrainSection

Log = Callable[[Mapping[str, float]], None]


class BridgeTrainer:
    """One training run.

    Attributes:
        model: The weights that train.
        mean: Their running mean in eval mode, which is what to evaluate; the model itself without ``ema``.
        step: Optimiser steps done.
        total: Optimiser steps of the run.
    """

    def __init__(
        self,
        model: IndexModel,
        indices: Tensor,
        labels: Tensor,
        options: BridgeTrainSection,
        *,
        folder: str | Path | None = None,
        log: Log | None = None,
    ) -> None:
        """Prepare a run on the device of the model.

        Args:
            model: Trained in place.
            indices: Integers ``[N, H, W, C]`` on the CPU, of any integer type.
            labels: Integers ``[N]``; -1 for no class.
            options: See there.
            folder: Where checkpoints go, as ``step-NNNNNN``; the newest ``save_total_limit`` are kept.
            log: Gets ``step``, ``loss`` (mean nats per dimension since the last record), ``grad_norm``,
                ``learning_rate``.

        Raises:
            MmpostError: MMP-C095 when the data do not fit the model, MMP-C098 when there are none, labels are of
                another number, or checkpoints have no folder.
        """
        if not len(indices) or len(indices) != len(labels):
            what = f"bridge: {len(indices)} index maps and {len(labels)} labels."
            raise MmpostError("MMP-C098", what, "Give one label for each of at least one map.")
        if options.save_steps and folder is None:
            raise MmpostError("MMP-C098", "bridge: save_steps is set, but no folder.", "Give a folder.")
        model.check(indices, labels)
        self.model, self.options, self._log = model, options, log
        self._indices, self._labels = indices, labels
        self._folder = None if folder is None else Path(folder)
        self._device = next(model.parameters()).device
        self._batch = min(options.batch_size, len(indices))
        self._per_epoch = len(indices) // self._batch
        whole = max(1, round(options.epochs * self._per_epoch))
        self.total = options.max_steps or whole
        self.step = 0
        decayed = [weight for weight in model.parameters() if weight.ndim > 1]
        others = [weight for weight in model.parameters() if weight.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
        )
        warmup = round(options.warmup_epochs * self._per_epoch)
        if options.max_steps:
            warmup = round(min(1.0, options.warmup_epochs / options.epochs) * self.total)
        self._schedule = get_cosine_schedule_with_warmup(self._optimizer, warmup, self.total)
        averaging = get_ema_multi_avg_fn(options.ema)
        self._mean = AveragedModel(model, multi_avg_fn=averaging) if options.ema else None
        self._window: list[float] = []

    @property
    def mean(self) -> IndexModel:
        """See the attributes of the class."""
        return self.model if self._mean is None else cast(IndexModel, self._mean.module)

    def run(self, until: int | None = None, *, stop: Callable[[], bool] | None = None) -> IndexModel:
        """Train to the end, or until ``until`` steps are done.

        Args:
            until: Steps.
            stop: Asked after every step; True saves, where there is a folder, and ends.

        Returns:
            ``mean``, in eval mode.

        Raises:
            MmpostError: MMP-T002 when the loss is not finite.
        """
        last = self.total if until is None else min(until, self.total)
        self.model.train()
        while self.step < last:
            norm = self._one_step()
            stopping = stop is not None and stop()
            if self.step % self.options.logging_steps == 0 or self.step == self.total:
                self._record(norm)
            due = self.options.save_steps and (self.step % self.options.save_steps == 0 or self.step == self.total)
            if due or (stopping and self._folder is not None):
                self.save()
            if stopping:
                break
        return self.mean.eval()

    def _one_step(self) -> float:
        rows = self._rows()
        indices, labels = self._indices[rows].long().to(self._device), self._labels[rows].long().to(self._device)
        self._optimizer.zero_grad(set_to_none=True)
        size, total = self.options.micro_batch_size or len(rows), 0.0
        with self._draws("bridge-step", self.step) as generator:
            # Each part draws a mask rate of its own, as each process of the released trainer does.
            for part, classes in zip(indices.split(size), labels.split(size), strict=True):
                with self._autocast():
                    loss = self.model.nats(part, classes, generator).mean() * (len(part) / len(rows))
                loss.backward()
                total += float(loss.detach())
        self._window.append(total)
        if not math.isfinite(self._window[-1]):
            what = f"bridge: the loss is {self._window[-1]} at step {self.step}."
            raise MmpostError("MMP-T002", what, "Lower learning_rate, or set precision=float32.")
        limit = self.options.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self._optimizer.step()
        self._schedule.step()
        if self._mean is not None:
            self._mean.update_parameters(self.model)
        self.step += 1
        return float(norm)

    def _rows(self) -> Tensor:
        """Rows of the batch of this step: a new order every epoch, what does not fill a batch is left for the next."""
        epoch, place = divmod(self.step, self._per_epoch)
        order = seeding.generator(self.options.seed, "bridge-rows", epoch).permutation(len(self._indices))
        return torch.from_numpy(order[place * self._batch : (place + 1) * self._batch])

    def _draws(self, purpose: str, counter: int) -> _Draws:
        words = seeding.generator(self.options.seed, purpose, counter)
        return _Draws(int(words.integers(2**62)), self._device)

    def _autocast(self) -> torch.autocast:
        enabled = self.options.precision == "bfloat16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled)

    def _record(self, norm: float) -> None:
        if self._log is not None:
            loss = sum(self._window) / len(self._window)
            rate = self._schedule.get_last_lr()[0]
            self._log({"step": self.step, "loss": loss, "grad_norm": norm, "learning_rate": rate})
        self._window = []

    def evaluate(self, indices: Tensor, labels: Tensor, *, draws: int = 1) -> float:
        """Mean nats per dimension of the running mean on other data; see ``evaluate_channels``."""
        return float(self.evaluate_channels(indices, labels, draws=draws).mean())

    @torch.no_grad()
    def evaluate_channels(self, indices: Tensor, labels: Tensor, *, draws: int = 1) -> Tensor:
        """Mean nats of each channel of the running mean on other data, float64 ``[C]``.

        Args:
            indices: Integers ``[N, H, W, C]``.
            labels: Integers ``[N]``.
            draws: Passes over the data; each has the masks of its own number, the same at every call.
        """
        model, count = self.mean, 0
        total = torch.zeros(indices.shape[-1], dtype=torch.float64)
        was_training, size = model.training, self.options.micro_batch_size or self._batch
        model.eval()
        for draw in range(draws):
            for number, start in enumerate(range(0, len(indices), size)):
                part = slice(start, start + size)
                data = indices[part].long().to(self._device), labels[part].long().to(self._device)
                with self._draws(f"bridge-evaluation-{draw}", number) as generator, self._autocast():
                    nats = model.nats(*data, generator).double().cpu().flatten(0, -2)
                total, count = total + nats.sum(0), count + len(nats)
        model.train(was_training)
        return total / count

    def save(self) -> Path:
        """Write ``step-NNNNNN``: the running mean, which ``from_pretrained`` opens, and what a continuation needs."""
        if self._folder is None:
            raise MmpostError("MMP-C098", "bridge: a checkpoint is to be written, but there is no folder.", "Give one.")
        place = self._folder / f"step-{self.step:06d}"
        with Scratch(place) as scratch:
            self.mean.save_pretrained(scratch)
            (scratch / "trainer_state").mkdir()
            tensors = {
                "model": self.model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
                "mean": {} if self._mean is None else self._mean.state_dict(),
            }
            torch.save(tensors, scratch / "trainer_state" / "tensors.pt")
            (scratch / "trainer_state" / "state.json").write_text(json.dumps(self._state()) + "\n", encoding="utf-8")
        prune(self._folder, self.options.save_total_limit)
        return place

    def resume(self, place: str | Path) -> None:
        """Go on from a folder that ``save`` wrote.

        Raises:
            MmpostError: MMP-E082 no such checkpoint, MMP-C099 when the run's options or its number of images differ.
        """
        inside = Path(place) / "trainer_state"
        try:
            state: dict[str, Any] = json.loads((inside / "state.json").read_text(encoding="utf-8"))
            tensors = torch.load(inside / "tensors.pt", weights_only=True, map_location=self._device)
        except (OSError, ValueError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0]
            what = f"'{place}' is no checkpoint to go on from: {reason}."
            raise MmpostError("MMP-E082", what, "Name a step-NNNNNN folder of this run.") from error
        now = self._state()
        names = [*now["options"], "images"]
        before, after = ({**item["options"], "images": item["images"]} for item in (state, now))
        changed = [
            f"{name}: {before.get(name)} then, {after.get(name)} now"
            for name in names
            if before.get(name) != after[name]
        ]
        if changed:
            what = f"bridge: '{place}' was made with other options. {'; '.join(changed)}."
            raise MmpostError("MMP-C099", what, "Set them back, or start anew.")
        self.model.load_state_dict(tensors["model"])
        self._optimizer.load_state_dict(tensors["optimizer"])
        self._schedule.load_state_dict(tensors["schedule"])
        if self._mean is not None:
            self._mean.load_state_dict(tensors["mean"])
        self.step, self._window = state["step"], state["window"]

    def _state(self) -> dict[str, Any]:
        # How often something is written may change; the rest decides the numbers.
        options = self.options.model_dump(exclude={"save_steps", "logging_steps", "save_total_limit"})
        return {"step": self.step, "window": self._window, "images": len(self._indices), "options": options}


class _Draws:
    """Context with a CPU generator; inside, torch's global generators (dropout) are seeded too, then put back."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._fork = torch.random.fork_rng([device] if device.type == "cuda" else [])

    def __enter__(self) -> torch.Generator:
        self._fork.__enter__()
        torch.manual_seed(self._seed)
        return torch.Generator().manual_seed(self._seed + 1)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)
