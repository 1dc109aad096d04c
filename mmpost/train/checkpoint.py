"""Checkpoints: a folder that plain transformers opens, plus what an exact continuation needs.

A checkpoint is written beside its final name and moved there last, so that a kill at any moment leaves whole
checkpoints only. Nothing in it is a pickle: weights are safetensors and ``torch.load`` runs with ``weights_only``.

Weights and moments that are spread over processes are gathered by the first, tensor after tensor, and lie in the
checkpoint as they would without spreading: a run may go on with another strategy or number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from mmpost.models.load import LoadedModel
from mmpost.train import shard
from mmpost.train.distributed import Processes
from mmpost.train.zero import ZeroOptimizer

PARTIAL = "partial-"


def save(
    folder: Path,
    model: LoadedModel,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    processes: Processes,
) -> None:
    """Write a checkpoint; every process must call this.

    Args:
        folder: Final place.
        model: Weights, processor.
        optimizer: Its moments are saved.
        state: Plain JSON: step, data position, log offsets.
        processes: Random states are gathered from all of them.
    """
    streams = processes.gather(_streams())
    weights = processes.full_weights(model.policy)
    moments = optimizer_state(optimizer, keep=processes.is_main)
    if processes.is_main:
        # The name does not match ``step-*``: a kill before the rename must not leave what looks like a checkpoint.
        scratch = folder.with_name(PARTIAL + folder.name)
        shutil.rmtree(scratch, ignore_errors=True)
        model.save(scratch, weights)
        inside = scratch / "trainer_state"
        inside.mkdir()
        torch.save(moments, inside / "optimizer.pt")
        torch.save(streams, inside / "random.pt")
        (inside / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        move_into_place(scratch, folder)
    processes.barrier()


def move_into_place(scratch: Path, folder: Path) -> None:
    """Flush every file to disk, then rename; an older folder of that name goes."""
    for file in scratch.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def restore(folder: Path, optimizer: torch.optim.Optimizer, processes: Processes) -> dict[str, Any]:
    """Load optimiser and random state; the weights were opened from ``folder`` already.

    Returns:
        The state that was saved.
    """
    inside = folder / "trainer_state"
    # Mapped, not read: each process takes only its part of the moments.
    moments = torch.load(inside / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True)
    load_optimizer_state(optimizer, moments)
    streams = torch.load(inside / "random.pt", weights_only=True, map_location="cpu")
    if len(streams) == processes.world:
        mine = streams[processes.rank]
        torch.set_rng_state(mine["cpu"])
        if "cuda" in mine and torch.cuda.is_available():
            torch.cuda.set_rng_state(mine["cuda"])
    state: dict[str, Any] = json.loads((inside / "state.json").read_text())
    return state


def save_final(folder: Path, model: LoadedModel, processes: Processes) -> None:
    """Write the weights without what a continuation needs; every process must call this."""
    weights = processes.full_weights(model.policy)
    if processes.is_main:
        scratch = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        model.save(scratch, weights)
        move_into_place(scratch, folder)
    processes.barrier()


def optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """State of an optimiser with every tensor in one piece; every process must call this.

    Args:
        optimizer: Its weights may be spread over processes.
        keep: Whether this process wants it; the others get an empty dict.
    """

    def gather(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        gathered = shard.full(value)
        return gathered.cpu() if keep else None

    if isinstance(optimizer, ZeroOptimizer):
        return optimizer.full_state(keep=keep)
    state = optimizer.state_dict()
    # New dicts: those of ``state_dict`` are the optimiser's own.
    moments = {
        number: {name: gather(value) for name, value in entry.items()} for number, entry in state["state"].items()
    }
    return {**state, "state": moments} if keep else {}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up what ``optimizer_state`` gave, spread as the weights are now."""
    if isinstance(optimizer, ZeroOptimizer):
        optimizer.load_state_dict(state)
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, entry in state["state"].items():
        for name, value in entry.items():
            if isinstance(value, torch.Tensor):
                entry[name] = shard.spread_like(value, weights[number])
    optimizer.load_state_dict(state)


def _streams() -> dict[str, torch.Tensor]:
    """Random states of this process; dropout on CUDA draws from the device's own."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and what a kill left half written."""
    for torn in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(torn)
    complete = sorted(place.parent.parent for place in folder.glob("step-*/trainer_state/state.json"))
    for old in complete[:-keep]:
        shutil.rmtree(old)
