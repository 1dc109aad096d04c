"""Training a discrete tokenizer: steps, discriminator, running means, codebook health, checkpoints.

Every random draw is a function of (seed, purpose, step, process): a run that was killed and continued ends with the
same bits as one that was not.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpost.core import seeding
from mmpost.core.errors import MmpostError
from mmpost.runs.folder import RunFolder
from mmpost.runs.live import Progress
from mmpost.train.distributed import Processes
from mmpost.train.loop import MAX_NONFINITE, Interrupted
from mmpost_tokenizers import saving
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.batches import ImageBatches
from mmpost_tokenizers.ema import RunningMean
from mmpost_tokenizers.health import CodebookMeter, health_of, merged
from mmpost_tokenizers.objective import Objective, Pass, TrainingPass
from mmpost_tokenizers.options import TokenizerConfig, TokenizerTrainSection
from mmpost_tokenizers.perturbation import LatentPerturbation, PerturbationSchedule, scaled_delta
from mmpost_tokenizers.stopping import StopRequest


@dataclass(slots=True)
class State:
    """What a continuation needs besides weights and moments; plain JSON.

    Attributes:
        step: Optimiser steps done.
        images: Images seen by all processes.
        seconds: Of training, over all starts.
        waited: Of those, seconds in which the step waited for data.
        nonfinite: Steps in a row without a finite gradient.
        window: Sums and counts since the last log line.
        batches: Where the order of the images stands.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    nonfinite: int = 0
    window: dict[str, list[float]] = field(default_factory=dict)
    batches: dict[str, Any] = field(default_factory=dict)


def learning_rate(train: TokenizerTrainSection, peak: float, step: int, total: int) -> float:
    """Rate of the 0-based ``step``: linear warm-up, then a cosine from ``peak`` to ``min_learning_rate``."""
    warmup = train.warmup_steps if train.warmup_steps >= 1 else round(train.warmup_steps * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(total - warmup, 1)
    floor = min(train.min_learning_rate, peak)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * share))


class TokenizerTrainer:
    """One training run.

    Args:
        tokenizer: Random or opened weights; trained in place.
        batches: Images, shared out among the processes.
        config: All options.
        processes: Devices; its batches are shares of ``train.batch_size``.
        output: Run folder; checkpoints go below it.
        folder: The same as an object on the first process, else None.
        progress: Live display, likewise.
        evaluate: Measures a tokenizer at a step; its numbers are logged under ``eval``.

    Attributes:
        state: Progress so far.
        mean: Running means of the weights.
    """

    def __init__(
        self,
        tokenizer: DiscreteTokenizer,
        batches: ImageBatches,
        config: TokenizerConfig,
        *,
        processes: Processes,
        output: Path,
        folder: RunFolder | None = None,
        progress: Progress | None = None,
        evaluate: Callable[[DiscreteTokenizer, int], dict[str, Any]] | None = None,
    ) -> None:
        train, device = config.train, processes.device
        self.config, self.train, self.processes = config, train, processes
        self.batches, self.output, self.folder, self.progress = batches, output, folder, progress
        self.evaluate = evaluate
        epoch = batches.state_dict()["size"] / train.batch_size
        self.total = train.max_steps or max(1, round(epoch * train.num_train_epochs))
        self.tokenizer = tokenizer.to(device).train()
        self.objective = Objective(
            config.losses, image_size=config.tokenizer.image_size, dim=tokenizer.quantizer.dim, seed=train.seed
        ).to(device)
        self.mean = RunningMean(self.tokenizer, train.ema_decay)
        self.meter = CodebookMeter(tokenizer.codebook_size, tokenizer.groups, train.health_window)
        self.state = State()
        # Wrapped after the copy for the means: DDP broadcasts the weights of the first process.
        self.module: nn.Module = processes.prepare(TrainingPass(self.tokenizer))  # type: ignore[arg-type]
        trained = [weight for weight in self.tokenizer.parameters() if weight.requires_grad] + self.objective.trained()
        self.trained = trained
        self.optimizer = _adamw(trained, train, train.weight_decay)
        self.judge: nn.Module | None = None
        self.judge_optimizer: torch.optim.Optimizer | None = None
        if self.objective.discriminator is not None:
            self.judge = processes.prepare(self.objective.discriminator)  # type: ignore[arg-type]
            weights = [weight for weight in self.objective.discriminator.parameters() if weight.requires_grad]
            self.judge_optimizer = _adamw(weights, train, train.discriminator_weight_decay)
        self._set_up_perturbation()
        if train.revive_steps and tokenizer.quantizer.lattice() is not None:
            raise tokenizer.quantizer.no_revival()
        self._saved: int | None = None

    def _set_up_perturbation(self) -> None:
        section = self.config.tokenizer.perturb
        self.schedule = PerturbationSchedule(
            section.anneal_start, section.anneal_end, section.end_ratio, section.variant
        )
        self.perturbation: LatentPerturbation | None = None
        if not section.alpha * section.beta:
            return
        self.perturbation = LatentPerturbation(
            section.alpha,
            section.beta,
            section.delta or scaled_delta(self.tokenizer.codebook_size),
            variant=section.variant,
            neighbour_of=section.neighbour_of,
            exclude_self=section.exclude_self,
            exact=section.exact,
            refresh_every=section.refresh_every,
        )
        # What cannot be perturbed is refused before the first step.
        self.perturbation.check(self.tokenizer.quantizer)

    # -- the run -----------------------------------------------------------------------------------------------------

    def resume(self, place: Path) -> None:
        """Go on from a checkpoint of ``save``."""
        saved = saving.restore(place, self)
        offsets = saved.pop("offsets")
        self.state = State(**saved)
        self.batches.load_state_dict(self.state.batches)
        if self.folder is not None:
            self.folder.truncate(offsets, self.state.step)
            self.folder.event("resume", f"continued from {place.name}")

    def run(self) -> DiscreteTokenizer:
        """Train to the last step.

        Returns:
            The tokenizer with the running means of the weights.

        Raises:
            Interrupted: After the first Ctrl-C or SIGTERM, once a checkpoint is written.
            MmpostError: MMP-T081 when the gradient is not finite three times in a row.
        """
        stream = iter(self.batches)
        first = True
        with StopRequest(self.progress) as stop:
            while self.state.step < self.total:
                clock = time.perf_counter()
                images, _, _ = next(stream)
                # Workers start in the first call, which says nothing about the later ones.
                waited, first = 0.0 if first else time.perf_counter() - clock, False
                self._step(images.to(self.processes.device, non_blocking=True), waited)
                self._after_step()
                if self.processes.max(int(stop())):
                    self.save()
                    raise Interrupted
        return self.mean.model

    def _step(self, images: Tensor, waited: float) -> None:
        clock = time.perf_counter()
        state, options = self.state, self.config.losses
        rate = learning_rate(self.train, self.train.learning_rate, state.step, self.total)
        progress = state.step / max(self.total, 1)
        adversarial = self.judge is not None and progress >= options.adversarial_start
        # Quantizer dropout and stochastic depth draw from torch's own stream, which is set anew in every step.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed("layers"))
            with self.processes.autocast():
                done: Pass = self.module(
                    images, self.perturbation, self._generator("perturbation"), self.schedule.ratio(progress)
                )
        loss, parts = self.objective.generator_loss(
            done,
            images,
            self.tokenizer.last_layer,
            adversarial=adversarial,
            generator=self._generator("augment generator"),
            project=getattr(self.tokenizer, "quant_conv", None),
        )
        norm = self._update(loss, self.optimizer, self.trained, rate, alone=self.objective.trained())
        if math.isfinite(norm):
            self.mean.update(state.step)
            if adversarial:
                parts |= self._judge(images, done.images)
        self.meter.add(done.indices)
        if self.train.revive_steps and (state.step + 1) % self.train.revive_steps == 0:
            parts["revived"] = loss.new_tensor(float(self._revive(done.z)))
        parts |= {"loss": loss.detach(), "changed": done.changed}
        # One transfer from the device per step.
        numbers = torch.stack([value.float() for value in parts.values()]).tolist()
        # Every process has an equal share of the batch, so the mean over processes is that of the batch.
        numbers = [number / self.processes.world for number in self.processes.sum(numbers)]
        values = {**dict(zip(parts, numbers, strict=True)), "grad_norm": norm}
        state.step += 1
        state.images += self.train.batch_size
        self._watch(norm)
        spent = time.perf_counter() - clock
        state.seconds += spent + waited
        state.waited += waited
        self._collect({**values, "lr": rate, "phase_s/data": waited, "phase_s/train": spent})

    def _update(
        self,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        weights: list[nn.Parameter],
        rate: float,
        *,
        alone: Sequence[nn.Parameter] = (),
    ) -> float:
        """One optimiser step; returns the gradient norm. A gradient that is not finite changes nothing.

        ``alone`` are weights outside of the wrapped modules: DDP leaves their gradients as each process has them.
        """
        optimizer.zero_grad(set_to_none=True)
        self.processes.backward(loss)
        if self.processes.world > 1:
            for weight in alone:
                if weight.grad is not None:
                    torch.distributed.all_reduce(weight.grad)
                    weight.grad /= self.processes.world
        norm = self.processes.clip(weights, self.train.max_grad_norm or math.inf)
        if math.isfinite(norm):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        return norm

    def _judge(self, images: Tensor, output: Tensor) -> dict[str, Tensor]:
        """One step of the discriminator on the images of this pass."""
        assert self.judge is not None
        assert self.judge_optimizer is not None
        peak = self.train.discriminator_learning_rate or self.train.learning_rate
        rate = learning_rate(self.train, peak, self.state.step, self.total)
        loss, parts = self.objective.discriminator_loss(self.judge, images, output, self._generator("augment judge"))
        weights = [weight for weight in self.judge.parameters() if weight.requires_grad]
        self._update(loss, self.judge_optimizer, weights, rate)
        return parts

    def _seed(self, purpose: str) -> int:
        draw = seeding.uniform(self.train.seed, f"tokenizer {purpose}", self.state.step, self.processes.rank)
        return int(float(draw) * 2**53)

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(purpose))

    def _revive(self, z: Tensor) -> int:
        """Move codes without a hit in the window onto latents of this batch; the same ones in every process."""
        counts = self.meter.total()
        if self.processes.world > 1:
            counts, z = counts.to(z.device), z.contiguous()
            torch.distributed.all_reduce(counts)
            torch.distributed.broadcast(z, 0)
        dead = (counts == 0).to(z.device)
        # Not by rank: all processes must choose alike.
        draw = seeding.uniform(self.train.seed, "tokenizer revive", self.state.step)
        made = torch.Generator().manual_seed(int(float(draw) * 2**53))
        return self.tokenizer.quantizer.revive(dead if self.tokenizer.groups > 1 else dead[0], z, generator=made)

    # -- around the step ---------------------------------------------------------------------------------------------

    def _watch(self, norm: float) -> None:
        state = self.state
        state.nonfinite = 0 if math.isfinite(norm) else state.nonfinite + 1
        if not state.nonfinite:
            return
        self._event("nonfinite", f"gradient norm is {norm} at step {state.step}; the step was skipped")
        if state.nonfinite >= MAX_NONFINITE:
            raise MmpostError(
                "MMP-T081",
                f"the gradient was not finite in {MAX_NONFINITE} steps in a row (last: step {state.step}).",
                "Lower train.learning_rate, or set train.bf16=false.",
            )

    def _collect(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            entry = self.state.window.setdefault(name, [0.0, 0.0])
            entry[0] += value
            entry[1] += 1

    def _after_step(self) -> None:
        step, train = self.state.step, self.train
        if step % train.logging_steps == 0 or step in (1, self.total):
            self._log()
        if step >= self.total:
            return
        if self.evaluate is not None and self.config.eval.eval_steps and step % self.config.eval.eval_steps == 0:
            self.measure()
        if step % train.save_steps == 0:
            self.save()

    def _log(self) -> None:
        state = self.state
        hits = merged(self.processes.gather(self.meter.total()))
        means = {name: total / count for name, (total, count) in state.window.items()}
        state.window = {}
        phases = {name.removeprefix("phase_s/"): means.pop(name) for name in list(means) if name.startswith("phase_s/")}
        record: dict[str, Any] = {
            "step": state.step,
            "epoch": round(self.batches.epoch, 4),
            "time": round(state.seconds, 3),
            "images_total": state.images,
            **means,
            "codebook": health_of(hits).as_metrics(),
            "wait_share": state.waited / max(state.seconds, 1e-9),
            "phase_s": phases,
        }
        if self.folder is not None:
            self.folder.log(record)
        if self.progress is not None:
            self.progress.update(state.step, record)

    def measure(self) -> dict[str, Any]:
        """Evaluate the running means and log the result, on the first process."""
        if self.evaluate is None or not self.processes.is_main:
            self.processes.barrier()
            return {}
        results = self.evaluate(self.mean.model, self.state.step)
        if self.folder is not None:
            self.folder.log({"step": self.state.step, "eval": results})
        said = ", ".join(f"{name} {value:.4g}" for name, value in results.items() if isinstance(value, float))
        self._event("eval", said)
        self.processes.barrier()
        return results

    def _event(self, kind: str, text: str) -> None:
        if self.folder is not None:
            self.folder.event(kind, text, step=self.state.step)
        if self.progress is not None:
            self.progress.event(text)

    def save(self) -> None:
        """Write a checkpoint of this moment, unless it is written already; every process must call this."""
        if self._saved == self.state.step:
            return
        place = self.output / "checkpoints" / f"step-{self.state.step:06d}"
        offsets = self.folder.offsets() if self.folder is not None else {}
        self.state.batches = self.batches.state_dict()
        saving.save(place, self, {**dataclasses.asdict(self.state), "offsets": offsets})
        self._saved = self.state.step
        if self.progress is not None:
            self.progress.checkpoint(place)


def _adamw(weights: list[nn.Parameter], train: TokenizerTrainSection, decay: float) -> torch.optim.Optimizer:
    betas = (train.adam_beta1, train.adam_beta2)
    # Fused: on small models the many small updates would take longer than the arithmetic.
    return torch.optim.AdamW(weights, lr=train.learning_rate, betas=betas, weight_decay=decay, fused=True)
