"""Devices and processes through accelerate; everything else asks this object."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor


class Processes:
    """The processes of a run.

    Attributes:
        rank: Number of this process.
        world: Number of processes.
        device: Device of this process.
        is_main: True on rank 0.
    """

    def __init__(self, *, bf16: bool | str = "auto", cpu: bool = False) -> None:
        on_cpu = cpu or not torch.cuda.is_available()
        use_bf16 = (not on_cpu) if bf16 == "auto" else bool(bf16)
        # A rank whose rows hold no image does not touch the vision tower; DDP must not wait for its gradients.
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
        # Precision is ours: accelerate keeps its own for the whole program, so a second run could not choose another.
        self._accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
        self._bf16 = use_bf16
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        self.is_main: bool = self._accelerator.is_main_process

    def prepare(self, module: Any) -> Any:
        """Wrap a module for the processes."""
        return self._accelerator.prepare_model(module)

    def unwrap(self, module: Any) -> Any:
        """The module itself."""
        return self._accelerator.unwrap_model(module, keep_fp32_wrapper=False)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate."""
        self._accelerator.backward(loss)

    def autocast(self) -> Any:
        """Context in which the forward pass runs in the run's precision."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16)

    @contextlib.contextmanager
    def accumulate(self, module: Any, *, last: bool) -> Iterator[None]:
        """Exchange gradients only in the last pass of a step."""
        with contextlib.nullcontext() if last else self._accelerator.no_sync(module):
            yield

    def clip(self, parameters: Sequence[Tensor], limit: float) -> float:
        """Scale gradients so that their norm is at most ``limit``; returns the norm before."""
        return float(self._accelerator.clip_grad_norm_(parameters, limit))

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over processes, in float64."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def max(self, value: int) -> int:
        """Largest value over processes."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, value: Any) -> list[Any]:
        """Small Python values of all processes, by rank."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def barrier(self) -> None:
        """Wait for all processes."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group, so that the next run in this program starts clean."""
        if self.world > 1 and dist.is_initialized():
            dist.barrier()
