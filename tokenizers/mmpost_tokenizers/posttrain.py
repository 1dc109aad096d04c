"""Post-train a decoder on codes that look generated, with encoder and quantizer frozen to the last bit.

The codes of an image stay what they were, so a generator trained before goes on working with the new decoder.

Source: arXiv 2509.12474, section 4.3. Differs: the released code freezes only the trunk of the encoder and starts with
a fresh discriminator; here everything but the decoder is frozen, and the discriminator is reused unless told otherwise.
With micro batches the adaptive weight of the adversary, batch norms of the discriminator and LeCam's running means see
one micro batch at a time; without an adversary a step is the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpost.core import seeding
from mmpost.core.errors import MmpostError
from mmpost.train import checkpoint
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.batches import ImageBatches, evaluation_batches
from mmpost_tokenizers.ema import RunningMean
from mmpost_tokenizers.generator.identity import frozen_state, layout_of, require_same, token_hash
from mmpost_tokenizers.generator.options import PosttrainSection
from mmpost_tokenizers.held_out import HeldOut
from mmpost_tokenizers.pairs import Pairs, check_sigma
from mmpost_tokenizers.posttrain_losses import Adversary, PairLoss, pixel_loss

SILENT = {"logging_steps", "save_steps", "save_total_limit"}


class DecoderPostTrainer:
    """One post-training run.

    Args:
        tokenizer: The main-trained one, on the device to use; its decoder is trained in place.
        pairs: Training pairs.
        held_out: Pairs of other images; half of them decides when to stop and which weights are kept, the other half
            is what the summary reports (``held_out``).
        options: Rate, steps, patience.
        loss: Scalar distance of decoded ``[B, 3, S, S]`` and real images, not clamped.
        adversary: Discriminator for ``options.discriminator`` other than ``none``; ``posttrain_losses.adversary_of``.
        folder: Where checkpoints and ``final`` go; None writes nothing. A run found there is continued.
        workers: Processes that decode images.
        report: Called with ``step, total, loss, learning_rate`` and, after a measurement, ``pair_loss`` and
            ``pair_loss_select``.
        stop: Asked after every step; True saves and ends early.

    Raises:
        MmpostError: MMP-C102 when pairs and tokenizer do not belong together, MMP-C104 for sigma outside (0, 1],
            MMP-C108 when a discriminator is asked for and none is given, MMP-T070 when the folder holds another run,
            MMP-T073 for sigma or mode other than those of the pairs, MMP-T078 for fewer than two held-out pairs.
    """

    def __init__(
        self,
        tokenizer: DiscreteTokenizer,
        pairs: Pairs,
        held_out: Pairs,
        options: PosttrainSection,
        *,
        loss: PairLoss | None = None,
        adversary: Adversary | None = None,
        folder: Path | None = None,
        workers: int = 0,
        report: Callable[[dict[str, float]], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        self.tokenizer, self.pairs, self.options = tokenizer, pairs, options
        self._loss, self._adversary = loss or pixel_loss(), adversary
        self._folder, self._report, self._stop = folder, report, stop
        self._check(held_out)
        self.held_out = HeldOut.of(held_out, options.seed)
        self._held_out_codes = held_out.inputs
        self._workers = workers
        self._device = next(tokenizer.parameters()).device
        self._half = self._device.type == "cuda" if options.bf16 == "auto" else options.bf16
        self.frozen_sha256 = token_hash(tokenizer)
        # Batches name their images by key, and only numbers are sure to name one image each.
        numbered = dataclasses.replace(pairs.images, keys=tuple(map(str, range(len(pairs)))))
        self._batches = ImageBatches(numbered, batch_size=options.batch_size, seed=options.seed, workers=workers)
        # Frozen before the optimiser exists, so that neither decay nor momentum can reach what is frozen.
        weights = freeze(tokenizer)
        self._optimizer = _adamw(weights, options)
        self._judge = _adamw(adversary.parameters(), options) if adversary is not None else None
        self._mean = RunningMean(tokenizer, options.ema_decay)
        self.step = 0
        if folder is not None:
            self._resume(folder)

    def _check(self, held_out: Pairs) -> None:
        options = self.options
        check_sigma(options.sigma)
        for pairs, name in ((self.pairs, "the pairs"), (held_out, "the held-out pairs")):
            require_same(layout_of(self.tokenizer), pairs.layout, owner="the tokenizer", other=name)
            if (pairs.sigma, pairs.pair_mode) != (options.sigma, options.pair_mode):
                raise MmpostError(
                    "MMP-T073",
                    f"{name} were made with sigma={pairs.sigma:g} and pair_mode={pairs.pair_mode}; the options say "
                    f"{options.sigma:g} and {options.pair_mode}.",
                    "Make the pairs again",
                )
        if options.discriminator != "none" and self._adversary is None:
            raise MmpostError(
                "MMP-C108",
                f"discriminator={options.discriminator}, but no discriminator is given.",
                "Give the one of the main training, or set discriminator=none",
            )

    def run(self) -> dict[str, Any]:
        """Train until the pair loss of the choosing half has not improved for ``patience`` measurements, or to the end.

        The best weights are loaded into the tokenizer and saved.

        Returns:
            ``HeldOut.summary`` and ``steps, finished, stopped_early, sigma, pair_mode, kept, drift,
            tokenizer_sha256``.

        Raises:
            MmpostError: MMP-T071 when something frozen has changed, MMP-T072 when the loss is not finite.
        """
        options = self.options
        if self.held_out.before is None:
            first = self._measure()
            if self._report is not None:
                self._report({"step": 0, "total": options.max_steps, **first})
        stream, stopping = iter(self._batches), False
        while self.step < options.max_steps and not self._patience_is_over() and not stopping:
            images, _, keys = next(stream)
            rate = learning_rate(options, self.step)
            value = self._update(images, torch.tensor([int(key) for key in keys]), rate)
            self.step += 1
            seen = {"step": self.step, "total": options.max_steps, "loss": value, "learning_rate": rate}
            if self.step % options.eval_steps == 0 or self.step == options.max_steps:
                seen |= self._measure()
            if self._report is not None and ("pair_loss" in seen or self.step % options.logging_steps == 0):
                self._report(seen)
            stopping = self._stop is not None and self._stop()
            if self._folder is not None and (self.step % options.save_steps == 0 or stopping or self._is_over()):
                self._save(self._folder)
        return self._finish()

    def _is_over(self) -> bool:
        return self.step >= self.options.max_steps or self._patience_is_over()

    def _patience_is_over(self) -> bool:
        return self.step - self.held_out.best_step >= self.options.patience * self.options.eval_steps

    def _finish(self) -> dict[str, Any]:
        finished = self._is_over()
        if finished:
            self.tokenizer.load_state_dict(self.held_out.best_weights, strict=False)
        self.tokenizer.eval()
        if token_hash(self.tokenizer) != self.frozen_sha256:
            raise MmpostError(
                "MMP-T071",
                "encoder or quantizer changed during post-training; the generator's codes would mean something else.",
                "Report it with the tokenizer's config.json",
            )
        if finished and self._folder is not None:
            scratch = self._folder / "final.partial"
            shutil.rmtree(scratch, ignore_errors=True)
            self.tokenizer.save_pretrained(scratch)
            checkpoint.move_into_place(scratch, self._folder / "final")
        return {
            **self.held_out.summary(),
            "steps": self.step,
            "finished": finished,
            "stopped_early": finished and self.step < self.options.max_steps,
            "sigma": self.pairs.sigma,
            "pair_mode": self.pairs.pair_mode,
            "kept": self.pairs.kept,
            "drift": self.pairs.drift,
            "tokenizer_sha256": self.frozen_sha256,
        }

    @torch.no_grad()
    def pair_loss(self, pairs: Pairs) -> float:
        """Mean loss, without the adversary, of the weights that would be saved now."""
        model, total, done = self._mean.model.eval(), 0.0, 0
        size = self.options.micro_batch_size or self.options.batch_size
        for images, _, _ in evaluation_batches(pairs.images, batch_size=size, workers=self._workers):
            rows = torch.arange(done, done + len(images))
            done += len(images)
            total += float(self._loss(self._decode(model, pairs, rows), images.to(self._device))) * len(rows)
        return total / len(pairs)

    def _decode(self, model: DiscreteTokenizer, pairs: Pairs, rows: Tensor) -> Tensor:
        with torch.no_grad():
            latents = model.lookup(pairs.inputs[rows].long().to(self._device))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            return model.decode(latents).float()

    def _update(self, images: Tensor, rows: Tensor, rate: float) -> float:
        """One step of the decoder, then of the discriminator; the decoder's loss."""
        self.tokenizer.eval()
        for module in self.tokenizer.decoder_modules():
            module.train()
        parts = torch.arange(len(rows)).split(self.options.micro_batch_size or len(rows))
        self._optimizer.zero_grad(set_to_none=True)
        total, outputs = 0.0, []
        source = torch.Generator().manual_seed(self._word("augment"))
        # Dropout draws from torch's streams; seeded by the step, they need not be saved.
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(self._word("dropout"))
            for part in parts:
                output = self._decode(self.tokenizer, self.pairs, rows[part])
                loss = self._loss(output, images[part].to(self._device))
                if self._adversary is not None:
                    loss = loss + self._adversary.generator_loss(output, loss, self.tokenizer.last_layer, source)
                loss = loss * (len(part) / len(rows))
                loss.backward()
                total += float(loss.detach())
                outputs.append(output.detach())
        self._apply(total, self._optimizer, rate)
        self._mean.update(self.step)
        if self._adversary is not None and self._judge is not None:
            self._update_judge(self._adversary, self._judge, images, parts, outputs, rate)
        return total

    def _update_judge(
        self,
        adversary: Adversary,
        judge: torch.optim.Optimizer,
        images: Tensor,
        parts: Sequence[Tensor],
        outputs: list[Tensor],
        rate: float,
    ) -> None:
        # Set to none: the decoder's loss leaves gradients in the discriminator.
        judge.zero_grad(set_to_none=True)
        total, source = 0.0, torch.Generator().manual_seed(self._word("augment judge"))
        for part, output in zip(parts, outputs, strict=True):
            loss = adversary.discriminator_loss(images[part].to(self._device), output, source)
            loss = loss * (len(part) / len(images))
            loss.backward()
            total += float(loss.detach())
        self._apply(total, judge, rate)

    def _apply(self, value: float, optimizer: torch.optim.Optimizer, rate: float) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(weights, self.options.max_grad_norm or math.inf)
        if not math.isfinite(value + float(norm)):
            raise MmpostError(
                "MMP-T072",
                f"the loss is not finite at step {self.step + 1}.",
                "Lower the learning rate; the last checkpoint is whole",
            )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

    def _measure(self) -> dict[str, float]:
        return self.held_out.measure(self.step, self.pair_loss, lambda: _decoder_state(self._mean.model))

    def _word(self, purpose: str) -> int:
        return int(seeding.generator(self.options.seed, f"posttrain.{purpose}", self.step).integers(2**63))

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        options = {name: value for name, value in self.options.model_dump().items() if name not in SILENT}
        codes = hashlib.sha256(self.pairs.inputs.numpy().tobytes() + self._held_out_codes.numpy().tobytes())
        return {"options": options, "codes": codes.hexdigest(), "tokenizer": self.frozen_sha256}

    def _save(self, folder: Path) -> None:
        place = folder / "checkpoints"
        scratch = place / f"{checkpoint.PARTIAL}step-{self.step:08d}"
        shutil.rmtree(scratch, ignore_errors=True)
        inside = scratch / "trainer_state"
        inside.mkdir(parents=True)
        self._mean.model.save_pretrained(scratch)
        tensors = {
            "decoder": _decoder_state(self.tokenizer),
            "mean": _decoder_state(self._mean.model),
            "best": self.held_out.best_weights,
            "optimizer": self._optimizer.state_dict(),
            "adversary": self._adversary.state_dict() if self._adversary is not None else {},
            "judge": self._judge.state_dict() if self._judge is not None else {},
        }
        torch.save(tensors, inside / "weights.pt")
        state = {"step": self.step, **self.held_out.state(), "identity": self._identity()}
        (inside / "state.json").write_text(json.dumps(state))
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
        tensors = torch.load(saved[-1].with_name("weights.pt"), weights_only=True, map_location=self._device)
        self.tokenizer.load_state_dict(tensors["decoder"], strict=False)
        self._mean.model.load_state_dict(tensors["mean"], strict=False)
        self.held_out.restore(state, {name: value.cpu() for name, value in tensors["best"].items()})
        self._optimizer.load_state_dict(tensors["optimizer"])
        if self._adversary is not None and self._judge is not None:
            self._adversary.load_state_dict(tensors["adversary"])
            self._judge.load_state_dict(tensors["judge"])
        self.step = self._batches.given = state["step"]


def freeze(tokenizer: DiscreteTokenizer) -> list[nn.Parameter]:
    """Let only the decoder train; returns its parameters."""
    tokenizer.requires_grad_(False)
    weights = tokenizer.decoder_parameters()
    for weight in weights:
        weight.requires_grad_(True)
    frozen = frozen_state(tokenizer)
    assert not any(value.requires_grad for value in frozen.values())
    return weights


def learning_rate(options: PosttrainSection, step: int) -> float:
    """Rate of the 0-based ``step``: a cosine from ``learning_rate_share`` of the main rate down, without warm-up."""
    peak = options.main_learning_rate * options.learning_rate_share
    low = peak * options.min_learning_rate_share
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * step / options.max_steps))


def _decoder_state(tokenizer: DiscreteTokenizer) -> dict[str, Tensor]:
    """Copies on the CPU of everything that post-training may change, buffers included."""
    frozen = frozen_state(tokenizer)
    return {name: value.detach().cpu().clone() for name, value in tokenizer.state_dict().items() if name not in frozen}


def _adamw(weights: Any, options: PosttrainSection) -> torch.optim.AdamW:
    betas = (options.adam_beta1, options.adam_beta2)
    trained = [weight for weight in weights if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=0.0, betas=betas, weight_decay=options.weight_decay)
