"""Train a generator on pretokenized codes, and say how well it predicts codes of images that it has not seen.

Every step is a function of (seed, step): rows, crops, hidden classes and dropout are drawn by key, so that a run that
was ended and continued gives the same bytes on the CPU.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpost.core import seeding
from mmpost.core.errors import MmpostError
from mmpost.train import checkpoint
from mmpost_tokenizers.generator.classes import check_classes, require_same_names
from mmpost_tokenizers.generator.identity import require_same
from mmpost_tokenizers.generator.model import ClassConditionalGenerator, GeneratorConfig
from mmpost_tokenizers.generator.options import GeneratorModelSection, GeneratorTrainSection
from mmpost_tokenizers.generator.pretokenize import Codes

EVAL_BATCH = 64
# Options that change what is written, not what is learned.
SILENT = {"logging_steps", "eval_steps", "save_steps", "save_total_limit"}


def new_generator(section: GeneratorModelSection, codes: Codes, *, seed: int) -> ClassConditionalGenerator:
    """A generator with random weights that fits ``codes``.

    Raises:
        MmpostError: MMP-C100 for an unknown size, MMP-C105 when an image has no label or a label is too high.
    """
    # A class without an image in these codes is still a class when it has a name.
    found = max(1, int(codes.labels.max()) + 1, len(codes.classes))
    classes = section.num_classes if section.num_classes is not None else found
    check_classes(codes.labels, classes)
    config = GeneratorConfig(
        codes.layout, classes, section.size, section.class_dropout, section.dropout, section.rope, codes.classes
    )
    return ClassConditionalGenerator(config, seed=seed)


class GeneratorTrainer:
    """One training run.

    Args:
        model: Trained in place, on the device it is on.
        codes: Training codes with labels.
        held_out: Codes of other images; None leaves the held-out likelihood out.
        options: Steps, optimiser, schedule.
        folder: Where checkpoints and ``final`` go; None writes nothing. A run found there is continued.
        report: Called every ``logging_steps`` and after evaluations with ``step, total, nll, learning_rate, grad_norm``
            and, after an evaluation, ``held_out_nll``.
        stop: Asked after every step; True saves and ends early.

    Raises:
        MmpostError: MMP-C102 when codes and model do not belong together, MMP-C105 for labels out of range, MMP-C119
            for classes of other names, MMP-T070 when the folder holds a run with other options or codes.
    """

    def __init__(
        self,
        model: ClassConditionalGenerator,
        codes: Codes,
        held_out: Codes | None,
        options: GeneratorTrainSection,
        *,
        folder: Path | None = None,
        report: Callable[[dict[str, float]], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        for each, name in ((codes, "the training codes"), (held_out, "the held-out codes")):
            if each is not None:
                require_same(model.config.layout, each.layout, owner="the generator", other=name)
                check_classes(each.labels, model.config.num_classes)
                require_same_names(model.config.class_names, each.classes, owner="the generator", other=name)
        self.model, self.codes, self.held_out, self.options = model, codes, held_out, options
        self._folder, self._report, self._stop = folder, report, stop
        self.total = options.max_steps or max(1, math.ceil(options.num_train_epochs * len(codes) / options.batch_size))
        self.step = 0
        self._device = model.device
        self._half = self._device.type == "cuda" if options.bf16 == "auto" else options.bf16
        self._optimizer = _optimizer(model, options)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        # Taken once: hashing the codes of a large set takes seconds.
        self._code_marks = codes.marks() if folder is not None else {}
        if folder is not None:
            self._resume(folder)

    def run(self) -> dict[str, Any]:
        """Train to the end, or until ``stop``.

        Returns:
            ``steps, finished, parameters, train_nll`` and, with held-out codes, ``held_out_nll, unigram_nll`` and
            ``uniform_nll``, all in nats per code.

        Raises:
            MmpostError: MMP-T072 when the loss is not finite.
        """
        options, nll = self.options, math.nan
        while self.step < self.total:
            rate = learning_rate(options, self.step, self.total)
            nll, norm = self._update(rate)
            self.step += 1
            seen = {"step": self.step, "total": self.total, "nll": nll, "learning_rate": rate, "grad_norm": norm}
            measured = bool(options.eval_steps and self.step % options.eval_steps == 0 and self.held_out)
            if measured:
                assert self.held_out is not None
                seen["held_out_nll"] = mean_nll(self.model, self.held_out, half=self._half)
            if self._report is not None and (measured or self.step % options.logging_steps == 0):
                self._report(seen)
            stopping = self._stop is not None and self._stop()
            if self.step % options.save_steps == 0 or self.step == self.total or stopping:
                self._save()
            if stopping:
                break
        return self._summary(nll)

    def _summary(self, nll: float) -> dict[str, Any]:
        finished = self.step == self.total
        summary: dict[str, Any] = {
            "steps": self.step,
            "finished": finished,
            "parameters": sum(weight.numel() for weight in self.model.parameters()),
            "train_nll": nll,
        }
        if self.held_out is not None:
            summary["held_out_nll"] = mean_nll(self.model, self.held_out, half=self._half)
            summary["unigram_nll"] = unigram_nll(self.codes, self.held_out)
            summary["uniform_nll"] = math.log(self.model.config.layout.codebook_size)
        self.model.eval()
        if finished and self._folder is not None:
            scratch = self._folder / "final.partial"
            shutil.rmtree(scratch, ignore_errors=True)
            self.model.save_pretrained(scratch)
            checkpoint.move_into_place(scratch, self._folder / "final")
        return summary

    def _update(self, rate: float) -> tuple[float, float]:
        """One optimiser step; mean nats per code and the gradient norm before clipping."""
        options, count = self.options, self.options.batch_size
        labels, codes, hidden = self._rows()
        self.model.train()
        total = torch.zeros((), device=self._device)
        size = options.micro_batch_size or count
        # Dropout draws from torch's streams; seeded by the step, they need not be saved.
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            word = int(seeding.generator(options.seed, "generator.dropout", self.step).integers(2**63))
            torch.manual_seed(word)
            for start in range(0, count, size):
                part = slice(start, start + size)
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
                    nll = self.model.nll(labels[part], codes[part], hidden[part])
                loss = nll.mean() * (len(nll) / count)
                loss.backward()
                total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.max_grad_norm or math.inf)
        if not math.isfinite(float(total) + float(norm)):
            raise MmpostError(
                "MMP-T072",
                f"the loss is not finite at step {self.step + 1}.",
                "Lower the learning rate; the last checkpoint is whole",
            )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(total), float(norm)

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, codes and hidden classes of this step."""
        seed, step, n = self.options.seed, self.step, len(self.codes)
        at = np.arange(step * self.options.batch_size, (step + 1) * self.options.batch_size)
        rows = np.array([self._permutation(int(epoch))[place] for epoch, place in zip(at // n, at % n, strict=True)])
        crop = (seeding.uniform(seed, "generator.crop", at) * self.codes.crops).astype(np.int64)
        hidden = seeding.uniform(seed, "generator.class_dropout", at) < self.model.config.class_dropout
        chosen = self.codes.codes.numpy()[rows, crop].astype(np.int64)
        tensors = self.codes.labels[torch.from_numpy(rows)], torch.from_numpy(chosen), torch.from_numpy(hidden)
        labels, codes, mask = (tensor.to(self._device) for tensor in tensors)
        return labels, codes, mask

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (
                epoch,
                seeding.generator(self.options.seed, "generator.order", epoch).permutation(len(self.codes)),
            )
        return self._order[1]

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a run to be continued."""
        options = {name: value for name, value in self.options.model_dump().items() if name not in SILENT}
        found = {"options": options, "total": self.total, "codes": self._code_marks}
        whole = {**found, "generator": asdict(self.model.config)}
        # As the file gives it back: tuples become lists.
        compared: dict[str, Any] = json.loads(json.dumps(whole))
        return compared

    def _save(self) -> None:
        if self._folder is None:
            return
        place = self._folder / "checkpoints"
        place.mkdir(parents=True, exist_ok=True)
        scratch = place / f"{checkpoint.PARTIAL}step-{self.step:08d}"
        shutil.rmtree(scratch, ignore_errors=True)
        self.model.save_pretrained(scratch)
        inside = scratch / "trainer_state"
        inside.mkdir()
        torch.save(self._optimizer.state_dict(), inside / "optimizer.pt")
        (inside / "state.json").write_text(json.dumps({"step": self.step, "identity": self._identity()}))
        checkpoint.move_into_place(scratch, place / f"step-{self.step:08d}")
        checkpoint.prune(place, self.options.save_total_limit)

    def _resume(self, folder: Path) -> None:
        saved = sorted((folder / "checkpoints").glob("step-*/trainer_state/state.json"))
        if not saved:
            return
        state = json.loads(saved[-1].read_text())
        if state["identity"] != self._identity():
            raise MmpostError(
                "MMP-T070",
                f"'{folder}' holds a run with other options, codes or model.",
                "Choose another folder, or the options of that run",
            )
        place = saved[-1].parent.parent
        self.model.load_state_dict(ClassConditionalGenerator.from_pretrained(place).state_dict())
        moments = torch.load(place / "trainer_state" / "optimizer.pt", weights_only=True, map_location="cpu")
        self._optimizer.load_state_dict(moments)
        self.step = state["step"]


def learning_rate(options: GeneratorTrainSection, step: int, total: int) -> float:
    """Rate of the 0-based ``step``: linear warm-up, then constant or a cosine to ``min_learning_rate``."""
    warmup = options.warmup_steps if options.warmup_steps >= 1 else round(options.warmup_steps * total)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    if options.lr_scheduler_type == "constant":
        return options.learning_rate
    share = (step - warmup) / max(total - warmup, 1)
    low = options.min_learning_rate
    return low + (options.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def mean_nll(model: ClassConditionalGenerator, codes: Codes, *, half: bool = False) -> float:
    """Mean nats per code of the first crop of every image, with its class."""
    device, total = model.device, 0.0
    was_training = model.training
    model.eval()
    for start in range(0, len(codes), EVAL_BATCH):
        rows = slice(start, start + EVAL_BATCH)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            first = codes.codes[rows, 0].long().to(device)
            total += float(model.nll(codes.labels[rows].to(device), first).double().sum())
    model.train(was_training)
    return total / (len(codes) * codes.layout.length)


def unigram_nll(codes: Codes, held_out: Codes) -> float:
    """Mean nats per held-out code under the training codes' frequencies, each count raised by one, group by group."""
    layout = codes.layout
    seen = codes.codes.long().reshape(-1, layout.groups)
    asked = held_out.codes[:, 0].long().reshape(-1, layout.groups)
    total = 0.0
    for group in range(layout.groups):
        counts = torch.bincount(seen[:, group], minlength=layout.codebook_size).double() + 1
        total -= float((counts / counts.sum()).log()[asked[:, group]].mean())
    return total / layout.groups


def _optimizer(model: ClassConditionalGenerator, options: GeneratorTrainSection) -> torch.optim.AdamW:
    """AdamW; gains of the norms are not decayed, as in LlamaGen."""
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (options.adam_beta1, options.adam_beta2)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=betas)
