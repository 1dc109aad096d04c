"""Checkpoints of a tokenizer's training: a folder that ``from_pretrained`` opens, and what a continuation needs.

The folder holds the running means, which is what one evaluates; ``trainer_state/`` holds raw weights and moments.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmpost.train import checkpoint

if TYPE_CHECKING:
    from mmpost_tokenizers.training import TokenizerTrainer


def save(folder: Path, trainer: TokenizerTrainer, state: dict[str, Any]) -> None:
    """Write a checkpoint on the first process; a kill at any moment leaves whole checkpoints only.

    Args:
        folder: Final place.
        trainer: Weights, moments and the counts of codes. Processes hold the same weights.
        state: Plain JSON.
    """
    # Each process has counted its own codes.
    meters = trainer.processes.gather(trainer.meter.state_dict())
    if trainer.processes.is_main:
        # The name does not match ``step-*``: a kill before the rename must not leave what looks like a checkpoint.
        scratch = folder.with_name(checkpoint.PARTIAL + folder.name)
        shutil.rmtree(scratch, ignore_errors=True)
        inside = scratch / "trainer_state"
        inside.mkdir(parents=True)
        trainer.mean.model.save_pretrained(scratch)
        torch.save(_tensors(trainer), inside / "weights.pt")
        torch.save(meters, inside / "meters.pt")
        (inside / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        checkpoint.move_into_place(scratch, folder)
        checkpoint.prune(folder.parent, trainer.train.save_total_limit)
    trainer.processes.barrier()


def restore(folder: Path, trainer: TokenizerTrainer) -> dict[str, Any]:
    """Load into a trainer of the same configuration; returns the state that was saved."""
    inside = folder / "trainer_state"
    tensors = torch.load(inside / "weights.pt", weights_only=True, map_location=trainer.processes.device)
    trainer.tokenizer.load_state_dict(tensors["tokenizer"])
    trainer.objective.load_state_dict(tensors["objective"], strict=False)
    trainer.optimizer.load_state_dict(tensors["optimizer"])
    if trainer.mean.decay:
        trainer.mean.model.load_state_dict(tensors["mean"])
    if trainer.judge_optimizer is not None:
        trainer.judge_optimizer.load_state_dict(tensors["judge_optimizer"])
    meters = torch.load(inside / "meters.pt", weights_only=True)
    if len(meters) == trainer.processes.world:
        trainer.meter.load_state_dict(meters[trainer.processes.rank])
    state: dict[str, Any] = json.loads((inside / "state.json").read_text())
    return state


def save_final(folder: Path, trainer: TokenizerTrainer) -> None:
    """Write the running means alone; every process must call this."""
    if trainer.processes.is_main:
        scratch = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        trainer.mean.model.save_pretrained(scratch)
        if trainer.objective.discriminator is not None:
            # Decoder post-training goes on with it.
            torch.save(_trained(trainer.objective.discriminator), scratch / "discriminator.pt")
        checkpoint.move_into_place(scratch, folder)
    trainer.processes.barrier()


def _tensors(trainer: TokenizerTrainer) -> dict[str, Any]:
    objective = trainer.objective
    frozen = {id(weight) for weight in objective.parameters() if not weight.requires_grad}
    own = {name: value for name, value in objective.state_dict(keep_vars=True).items() if id(value) not in frozen}
    found = {
        "tokenizer": trainer.tokenizer.state_dict(),
        "objective": {name: value.detach() for name, value in own.items()},
        "optimizer": trainer.optimizer.state_dict(),
        "mean": trainer.mean.model.state_dict() if trainer.mean.decay else {},
    }
    if trainer.judge_optimizer is not None:
        found["judge_optimizer"] = trainer.judge_optimizer.state_dict()
    return found


def _trained(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    frozen = {id(weight) for weight in module.parameters() if not weight.requires_grad}
    kept = module.state_dict(keep_vars=True)
    return {name: value.detach() for name, value in kept.items() if id(value) not in frozen}
