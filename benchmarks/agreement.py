"""Both trainers take one GRPO step on the same rollouts: loss and gradient must be the same.

mmpost rolls out and trains; its completions are handed to TRL, which scores them itself, computes its own advantages
and takes its own step. Gradients are read by a hook that torch runs before any optimiser steps, so neither trainer is
changed. Completions have different lengths, or the aggregation over tokens could not be told apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.model import image_edge
from benchmarks.trainers import Job, mmpost_trainer, reward, trl_trainer

# TRL's loss_type to the name of our aggregation over tokens.
PAIRS = {"grpo": "seq_mean", "dapo": "token"}
# One id in this many ends a completion of mmpost here, so that lengths differ.
ENDS_EVERY = 16


@dataclass(frozen=True, slots=True)
class Agreement:
    """What one step of both trainers says.

    Attributes:
        loss_type: TRL's.
        lengths: Tokens of each completion.
        mmpost_loss: Value of our objective, negated.
        trl_loss: TRL's loss.
        gradient_relative: Norm of the difference of all gradients over the norm of TRL's.
        gradient_max: Largest difference of one entry.
        parameters: Tensors compared.
        same_parameters: Both trained the same tensors.
    """

    loss_type: str
    lengths: tuple[int, ...]
    mmpost_loss: float
    trl_loss: float
    gradient_relative: float
    gradient_max: float
    parameters: int
    same_parameters: bool

    def line(self) -> str:
        """The figures in words."""
        return (
            f"loss_type={self.loss_type}: loss {self.mmpost_loss:.8f} and {self.trl_loss:.8f} "
            f"(difference {abs(self.mmpost_loss - self.trl_loss):.1e}); gradient of {self.parameters} tensors: "
            f"relative difference {self.gradient_relative:.1e}, largest {self.gradient_max:.1e}"
        )


def compare(
    folder: Path,
    weights: Path,
    loss_type: str,
    aggregate: str,
    *,
    generations: int = 8,
    completion: int = 24,
    device: str = "cpu",
) -> Agreement:
    """One step of mmpost, then the same step of TRL.

    Args:
        folder: For runs and pictures.
        weights: Folder of ``model.build``, float32.
        loss_type: TRL's ``loss_type``.
        aggregate: Our ``loss.aggregate``.
        generations: Completions per prompt; there are two prompts.
        completion: Most tokens of a completion.
        device: ``cpu`` or ``cuda``.
    """
    drawn = rows.write(folder / "pictures", [image_edge(16), image_edge(64)])
    job = Job(
        folder=str(folder),
        model=str(weights),
        rows=tuple(drawn),
        steps=1,
        micro_batch=generations,
        generations=generations,
        completion=completion,
        device=device,
        mmpost={"aggregate": aggregate, "max_grad_norm": 0.0},
        trl={"loss_type": loss_type, "max_grad_norm": 0.0},
    )
    completions: list[list[int]] = []
    ours, our_loss = _mmpost_step(job, completions)
    theirs, their_loss = _trl_step(job, completions)
    relative, largest = _difference(ours, theirs)
    return Agreement(
        loss_type=loss_type,
        lengths=tuple(len(ids) for ids in completions),
        mmpost_loss=our_loss,
        trl_loss=their_loss,
        gradient_relative=relative,
        gradient_max=largest,
        parameters=len(theirs),
        same_parameters=set(ours) == set(theirs),
    )


def _mmpost_step(job: Job, completions: list[list[int]]) -> tuple[dict[str, Any], float]:
    def noting(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        completions.extend(list(ids) for ids in completion_ids)
        return reward(completion_ids, **columns)

    trainer = mmpost_trainer(job, noting)
    tokenizer = trainer.model.adapter.tokenizer
    # Ordinary ids: skipping special tokens must not matter.
    trainer.model.adapter.stop_token_ids = tuple(range(len(tokenizer) - 1, len(tokenizer.all_special_ids), -ENDS_EVERY))
    with _gradients(trainer.model.policy.model) as found:
        run = trainer.train()
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    return found, float(first["loss"])


def _trl_step(job: Job, completions: Sequence[Sequence[int]]) -> tuple[dict[str, Any], float]:
    from transformers import PrinterCallback

    trainer = trl_trainer(job)
    trainer.remove_callback(PrinterCallback)

    def same_completions(prompt_ids: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        if len(prompt_ids) != len(completions):
            raise RuntimeError(f"{len(prompt_ids)} prompts but {len(completions)} completions")
        return [list(ids) for ids in completions], None

    trainer._generate_single_turn = same_completions
    with _gradients(trainer.model) as found:
        result = trainer.train()
    return found, float(result.training_loss)


@contextmanager
def _gradients(model: Any) -> Iterator[dict[str, Any]]:
    """Gradients by parameter name as the first optimiser step finds them."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    found: dict[str, Any] = {}

    def read(*args: Any) -> None:
        if not found:
            found.update(
                {n: p.grad.detach().double().clone() for n, p in model.named_parameters() if p.grad is not None}
            )

    handle = register_optimizer_step_pre_hook(read)
    try:
        yield found
    finally:
        handle.remove()


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[float, float]:
    both = sorted(set(ours) & set(theirs))
    squares = sum(float(((ours[name] - theirs[name]) ** 2).sum()) for name in both)
    norm = sum(float((theirs[name] ** 2).sum()) for name in both)
    largest = max(float((ours[name] - theirs[name]).abs().max()) for name in both)
    return (squares / norm) ** 0.5, largest
