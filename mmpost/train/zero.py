"""DeepSpeed ZeRO stages 2 and 3 behind the interface of an ordinary module and optimiser.

Sources: ZeRO, arXiv 1910.02054. DeepSpeed clips and steps in one act, so that ``ZeroOptimizer.clip`` does both and
``step`` has nothing left to do; like the other strategies it leaves the weights alone when the norm is not finite.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmpost.core.errors import MmpostError
from mmpost.models.policy import Policy
from mmpost.train.shard import InStep

# What AdamW keeps of each weight besides its number of steps.
MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed() -> Any:
    """The library.

    Raises:
        MmpostError: MMP-E010 when it is not installed.
    """
    try:
        return importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        raise MmpostError(
            "MMP-E010",
            "train.strategy zero2 and zero3 need deepspeed, which is not installed.",
            'Run: pip install "mmpost-toolkit[deepspeed]", or set train.strategy=fsdp2.',
        ) from error


class Zero(nn.Module):
    """The policy inside a DeepSpeed engine.

    Attributes:
        policy: The policy; under stage 3 its weights are spread.
        engine: DeepSpeed's engine.
    """

    engine: Any
    policy: Policy

    def __init__(self, engine: Any, policy: Policy) -> None:
        super().__init__()
        # Past nn.Module: their weights are not to be listed a second time.
        object.__setattr__(self, "engine", engine)
        object.__setattr__(self, "policy", policy)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the policy says; every process must call this at the same time."""
        return self.engine(*args, **kwargs)

    def train(self, mode: bool = True) -> Zero:
        """Pass the mode on."""
        self.engine.train(mode)
        return self


class ZeroOptimizer(torch.optim.Optimizer):
    """DeepSpeed's optimiser, as far as the learner and checkpoints ask one.

    A step without any row (all advantages zero) changes nothing here, while AdamW alone would go on along its averages.
    """

    def __init__(self, library: Any, engine: Any, weights: list[nn.Parameter], groups: list[dict[str, Any]]) -> None:
        self.library, self.engine, self.weights, self.groups = library, engine, weights, groups
        # The learner sets the rate here; gradients are DeepSpeed's own affair, so it sees no weights.
        self.param_groups = [{"params": [], "lr": 0.0}]
        self._has_gradients = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients."""
        self.engine.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Backpropagate."""
        self._has_gradients = True
        self.engine.backward(loss, scale_wrt_gas=False)

    def clip(self) -> float:
        """Clip, step, and return the norm before; nothing is changed when it is not finite."""
        if not self._has_gradients:
            return 0.0
        self._has_gradients = False
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: ``clip`` has stepped."""

    def full_state(self, *, keep: bool) -> dict[str, Any]:
        """State in torch's own form, gathered tensor after tensor; every process must call this.

        Args:
            keep: Whether this process wants it; the others get an empty dict.
        """
        get = self.library.utils.safe_get_full_optimizer_state
        inner = self.engine.optimizer.optimizer
        step = next((entry["step"] for entry in inner.state.values() if "step" in entry), None)
        state: dict[int, dict[str, Tensor]] = {}
        for number, weight in enumerate(self.weights):
            gathered = {name: get(weight, name) for name in MOMENTS} if step is not None else {}
            if keep and step is not None:
                shape = getattr(weight, "ds_shape", weight.shape)
                moments = {name: value.detach().reshape(shape).cpu() for name, value in gathered.items()}
                state[number] = {"step": torch.as_tensor(step).detach().float().cpu().clone(), **moments}
        return {"state": state, "param_groups": self.groups} if keep else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``full_state`` or any AdamW gave."""
        if not state["state"]:
            return
        zero, put = self.engine.optimizer, self.library.utils.safe_set_full_optimizer_state
        step = next(iter(state["state"].values()))["step"]
        parts = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
        for part in parts:
            empty = {name: torch.zeros_like(part) for name in MOMENTS}
            zero.optimizer.state[part] = {"step": torch.as_tensor(step).float().clone(), **empty}
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._lazy_init_hp_params_optimizer_state()
        for number, entry in state["state"].items():
            for name in MOMENTS:
                put(self.weights[number], entry[name].to(parts[0].device), name)


def start(
    policy: Policy,
    dummy: dict[str, Tensor],
    largest: Callable[[int], int],
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    stage: Literal[2, 3],
    limit: float,
    bf16: bool,
) -> tuple[Zero, ZeroOptimizer]:
    """Hand policy and optimiser over to DeepSpeed.

    Args:
        policy: All processes hold the same weights.
        dummy: See ``InStep``.
        largest: See ``InStep``.
        make: An optimiser of the weights that train.
        stage: 2 spreads gradients and moments, 3 also weights.
        limit: Largest gradient norm; 0 for none.
        bf16: Forward passes in bfloat16; weights keep their type.

    Raises:
        MmpostError: MMP-E010 when DeepSpeed is not installed.
    """
    library = deepspeed()
    # Stage 3 keeps the gradient of an earlier step for a weight that has none in this one, so that the tower runs in
    # every pass, whether or not any process has media.
    wrapped = InStep(policy, dummy, largest if stage == 2 else lambda _: 1, lambda _: contextlib.nullcontext())
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    # Sizes are the learner's affair; DeepSpeed must not divide by any.
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": limit,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_scatter": weights[0].is_cuda},
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
    }
    optimizer = make(weights)
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    engine, *_ = library.initialize(model=wrapped, optimizer=optimizer, config=settings, dist_init_required=False)
    if stage == 3:
        wrapped.gather = functools.partial(_gathered, library, engine)
    return Zero(engine, policy), ZeroOptimizer(library, engine, weights, groups)


@contextlib.contextmanager
def _gathered(library: Any, engine: Any, wrapped: nn.Module) -> Iterator[None]:
    """All weights on every process, with the hooks that gather and free them put aside."""
    offload = engine.optimizer.parameter_offload
    with library.zero.GatheredParameters(list(wrapped.parameters())):
        spread: list[Any] = list(wrapped.parameters())
        for parameter in spread:
            parameter.ds_active_sub_modules.clear()
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            # The order of the passes inside is not that of training.
            coordinator = offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()
            offload._register_deepspeed_module(offload.module)
