"""Devices and processes; everything else asks this object.

accelerate sets the processes up and wraps for DDP; ``shard`` spreads weights (FSDP2) and ``zero`` does so through
DeepSpeed. The step is the same everywhere: local losses are sums over global counts, and the average that all of them
take over processes is undone by the learner.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmpost.models.policy import Policy
from mmpost.train import shard, zero

Strategy = Literal["auto", "ddp", "fsdp2", "zero2", "zero3"]
# Bytes that AdamW adds to a trained float32 weight: gradient and two moments.
TRAINED_BYTES = 12
# "auto" spreads the weights when they, their gradients and moments would take more of a device than this.
FULL_SHARE = 0.7
# Others wait at most this long while the first process evaluates or saves.
PATIENCE = timedelta(hours=2)


class Processes:
    """The processes of a run.

    Attributes:
        rank: Number of this process.
        world: Number of processes.
        device: Device of this process.
        is_main: True on rank 0.
        strategy: How the model is spread; ``auto`` becomes what it chose once a model is prepared.
    """

    def __init__(self, *, bf16: bool | str = "auto", cpu: bool = False, strategy: Strategy = "auto") -> None:
        on_cpu = cpu or not torch.cuda.is_available()
        use_bf16 = (not on_cpu) if bf16 == "auto" else bool(bf16)
        # A rank whose rows hold no image does not touch the vision tower; DDP must not wait for its gradients.
        handlers = [
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ]
        # Precision is ours: accelerate keeps its own for the whole program, so a second run could not choose another.
        self._accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
        self._bf16 = use_bf16
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        self.is_main: bool = self._accelerator.is_main_process
        self.strategy: Strategy = strategy
        self._zero: zero.ZeroOptimizer | None = None

    # -- the model -----------------------------------------------------------------------------------------------

    def prepare(self, policy: Policy, adapter: Any = None) -> Any:
        """Wrap a policy for the processes.

        Args:
            policy: The policy; FSDP2 spreads its weights in place, so that optimisers must be made afterwards.
            adapter: Makes the medium that a process without media runs; DDP needs none.
        """
        if self.strategy == "auto":
            self.strategy = self._choose(policy)
        if self.strategy != "fsdp2" or self.world == 1:
            return self._accelerator.prepare_model(policy)
        earlier: shard.InStep | None = getattr(policy, "_in_step", None)
        if earlier is not None:
            # A second run with the same model object.
            return earlier
        dummy = adapter.dummy_media() if adapter is not None else {}
        return shard.shard(policy, dummy, self.max, device=self.device, world=self.world, bf16=self._bf16)

    def prepare_training(
        self, policy: Policy, adapter: Any, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], *, clip: float
    ) -> tuple[Any, torch.optim.Optimizer]:
        """Wrap a policy and make its optimiser.

        Args:
            policy: The policy.
            adapter: See ``prepare``.
            make: An optimiser of the weights that train.
            clip: Largest gradient norm, which DeepSpeed wants to know beforehand; 0 for none.
        """
        if self.strategy in ("zero2", "zero3") and self.world > 1:
            stage: Literal[2, 3] = 2 if self.strategy == "zero2" else 3
            dummy = adapter.dummy_media()
            wrapped, self._zero = zero.start(policy, dummy, self.max, make, stage=stage, limit=clip, bf16=self._bf16)
            return wrapped, self._zero
        module = self.prepare(policy, adapter)
        return module, make([weight for weight in policy.parameters() if weight.requires_grad])

    def _choose(self, policy: Policy) -> Strategy:
        """DDP while everything fits a device."""
        if self.world == 1 or self.device.type != "cuda":
            return "ddp"
        weights = sum(weight.numel() * weight.element_size() for weight in policy.parameters())
        need = weights + TRAINED_BYTES * policy.num_parameters(trainable=True)
        room = torch.cuda.get_device_properties(self.device).total_memory
        return "fsdp2" if self.max(int(need > FULL_SHARE * room)) else "ddp"

    def unwrap(self, module: Any) -> Any:
        """The module itself."""
        if isinstance(module, shard.InStep | zero.Zero):
            return module.policy
        return self._accelerator.unwrap_model(module, keep_fp32_wrapper=False)

    def whole(self, policy: Policy) -> contextlib.AbstractContextManager[None]:
        """Inside, this process has all weights of ``policy`` and may run it at its own pace; all processes enter."""
        return shard.whole(policy)

    def full_weights(self, policy: Policy) -> dict[str, Tensor] | None:
        """Weights to save, on the first process; None when they are not spread. Every process must call this."""
        if self.world == 1 or self.strategy not in ("fsdp2", "zero3"):
            return None
        # Of a PEFT model only what trains is saved.
        trained_only = hasattr(policy.model, "peft_config")
        # FSDP2 gathers by tensor: its whole weights may be in lower precision.
        with self.whole(policy) if self.strategy == "zero3" else contextlib.nullcontext():
            return shard.full_weights(policy.model, keep=self.is_main, trained_only=trained_only)

    # -- the step ------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Backpropagate."""
        if self._zero is not None:
            self._zero.backward(loss)
        else:
            self._accelerator.backward(loss)

    def autocast(self) -> Any:
        """Context in which the forward pass runs in the run's precision."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16)

    @contextlib.contextmanager
    def accumulate(self, module: Any, *, last: bool) -> Iterator[None]:
        """Exchange gradients only in the last pass of a step; spread ones in each, because nobody holds them whole."""
        if isinstance(module, zero.Zero):
            module.engine.set_gradient_accumulation_boundary(last)
        ddp = isinstance(module, torch.nn.parallel.DistributedDataParallel)
        with contextlib.nullcontext() if last or not ddp else module.no_sync():
            yield

    def clip(self, parameters: Sequence[Tensor], limit: float) -> float:
        """Scale gradients so that their norm is at most ``limit``; returns the norm before."""
        if self._zero is not None:
            return self._zero.clip()
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    # -- between processes ---------------------------------------------------------------------------------------

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
