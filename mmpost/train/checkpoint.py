"""Checkpoints: a folder that plain transformers opens, plus what an exact continuation needs.

A checkpoint is written beside its final name and moved there last, so that a kill at any moment leaves whole
checkpoints only. Nothing in it is a pickle: weights are safetensors and ``torch.load`` runs with ``weights_only``.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from mmpost.models.load import LoadedModel
from mmpost.train.distributed import Processes

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
    if processes.is_main:
        # The name does not match ``step-*``: a kill before the rename must not leave what looks like a checkpoint.
        scratch = folder.with_name(PARTIAL + folder.name)
        shutil.rmtree(scratch, ignore_errors=True)
        model.save(scratch)
        inside = scratch / "trainer_state"
        inside.mkdir()
        torch.save(optimizer.state_dict(), inside / "optimizer.pt")
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
    optimizer.load_state_dict(torch.load(inside / "optimizer.pt", weights_only=True, map_location="cpu"))
    streams = torch.load(inside / "random.pt", weights_only=True, map_location="cpu")
    if len(streams) == processes.world:
        mine = streams[processes.rank]
        torch.set_rng_state(mine["cpu"])
        if "cuda" in mine and torch.cuda.is_available():
            torch.cuda.set_rng_state(mine["cuda"])
    state: dict[str, Any] = json.loads((inside / "state.json").read_text())
    return state


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
