"""Weights spread over the processes (FSDP2): who keeps which part, and how to see them whole.

Units are the repeated layers of decoder and towers; what is left (embeddings, head, projector, norms) is one more.
Sources: FSDP, arXiv 2304.11277; PyTorch's ``fully_shard``.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from mmpost.core.batch import Batch
from mmpost.models.policy import Policy

# Outputs of a tower that only lead to its features.
NOT_TAKEN = ("last_hidden_state", "hidden_states", "attentions")
# Inside the context, the module has all of its weights.
Gather = Callable[[nn.Module], contextlib.AbstractContextManager[None]]


def tower_features(base: Any, media: dict[str, Tensor]) -> Any:
    """What a tower and its projector make of a small medium.

    Args:
        base: The model without its head.
        media: Arguments of its forward call, of one kind.
    """
    if "pixel_values" in media:
        return base.get_image_features(**media)
    if hasattr(base, "get_audio_features"):
        return base.get_audio_features(**media)
    # Qwen2-Audio has no such method.
    return base.multi_modal_projector(base.audio_tower(media["input_features"]).last_hidden_state)


class InStep(nn.Module):
    """A policy of which every process runs the same units in every pass.

    Gathering a unit's weights is a joint act. A process whose rows hold no medium would not run the tower and leave
    the others waiting, so it runs the tower on a small medium and adds the features with factor 0. Ids are never
    touched.

    Attributes:
        policy: The policy.
        is_whole: True while this process has all weights.
        gather: See ``whole``.
    """

    def __init__(self, policy: Policy, dummy: dict[str, Tensor], largest: Callable[[int], int], gather: Gather) -> None:
        """Wrap a policy.

        Args:
            policy: The policy.
            dummy: Model arguments of a small medium; empty for a model without a tower.
            largest: Largest value over processes.
            gather: Context in which this wrapper has all weights.
        """
        super().__init__()
        self.policy = policy
        self._dummy, self._largest = dummy, largest
        self.is_whole, self.gather = False, gather
        # Past nn.Module: as a submodule of its own submodule the wrapper would contain itself.
        object.__setattr__(policy, "_in_step", self)

    def forward(self, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """What the policy says; every process must call this at the same time."""
        with self._dummy_medium(batch) if self._misses_medium(batch) else contextlib.nullcontext():
            return self.policy(batch, *args, **kwargs)

    def _misses_medium(self, batch: Batch) -> bool:
        """Whether another process has media and this one has none."""
        if not self._dummy:
            return False
        has = any(name in batch.inputs for name in self._dummy)
        return bool(self._largest(int(has))) and not has

    @contextlib.contextmanager
    def _dummy_medium(self, batch: Batch) -> Iterator[None]:
        """Inside, the tower runs where it runs for rows with media: behind the embedding of the ids.

        Units are thus used in the same order, forwards and backwards, as on a process that has media.
        """
        self._dummy = {name: tensor.to(batch.at.device) for name, tensor in self._dummy.items()}

        def add(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
            features = tower_features(self.policy.inner.base_model, self._dummy)
            # What the language model takes, no more and no less, so that gradients go the same way as elsewhere.
            taken = features
            if hasattr(features, "items"):
                taken = {name: value for name, value in features.items() if name not in NOT_TAKEN}
            leaves = tree_leaves(taken)
            sums = [leaf.float().sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            return embedded + (0.0 * torch.stack(sums).sum()).to(embedded.dtype)

        hook = self.policy.inner.get_input_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()


def shard(
    policy: Policy,
    dummy: dict[str, Tensor],
    largest: Callable[[int], int],
    *,
    device: torch.device,
    world: int,
    bf16: bool,
) -> InStep:
    """Spread the weights, in place; optimisers must be made afterwards.

    Args:
        policy: All processes hold the same weights.
        dummy: See ``InStep``.
        largest: See ``InStep``.
        device: Of this process.
        world: Number of processes.
        bf16: Gather float32 weights in bfloat16; gradients are added up in float32.
    """
    wrapped = InStep(policy, dummy, largest, _unsharded)
    mesh = init_device_mesh(device.type, (world,))
    # Inputs are left to autocast, as without sharding.
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32 if bf16 else None,
        cast_forward_inputs=False,
    )
    for unit in units(wrapped):
        fully_shard(unit, mesh=mesh, mp_policy=precision)
    fully_shard(wrapped, mesh=mesh, mp_policy=precision)
    return wrapped


def units(module: nn.Module) -> list[nn.Module]:
    """The repeated layers: decoder layers and tower blocks; transformers marks them by their base class."""
    return [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]


@contextlib.contextmanager
def whole(policy: Policy) -> Iterator[None]:
    """Inside, every process has all weights of ``policy`` and may run it at its own pace.

    Gathered once for a whole rollout: gathering per layer and token would move all weights for every token. A device
    must be able to hold the weights (not gradients nor moments) for this. Every process must enter and leave; a policy
    that is not spread, or is whole already, stays as it is.
    """
    wrapped: InStep | None = getattr(policy, "_in_step", None)
    if wrapped is None or wrapped.is_whole:
        yield
        return
    wrapped.is_whole = True
    try:
        with wrapped.gather(wrapped):
            yield
    finally:
        wrapped.is_whole = False


@contextlib.contextmanager
def _unsharded(wrapped: nn.Module) -> Iterator[None]:
    parts = [part for part in wrapped.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    # The hooks that gather and free weights around each forward call have nothing to do now.
    modules: list[Any] = [part for part in parts if isinstance(part, nn.Module)]
    hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in modules]
    for module in modules:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, (before, after) in zip(modules, hooks, strict=True):
            module._forward_pre_hooks, module._forward_hooks = before, after
        for part in parts:
            part.reshard()


def full_weights(module: nn.Module, *, keep: bool, trained_only: bool = False) -> dict[str, Tensor]:
    """All weights of a module in its own precision, on the CPU; every process must call this.

    Args:
        module: Any module.
        keep: Whether this process wants them; the others take part and get an empty dict.
        trained_only: Leave out weights that do not train.

    Returns:
        Weights by name. Tied weights stay one tensor.
    """
    found: dict[int, Tensor] = {}
    out: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if trained_only and not tensor.requires_grad:
            continue
        if id(tensor) not in found:
            value = full(tensor)
            found[id(tensor)] = value.cpu() if keep else value.new_empty(0)
        out[name] = found[id(tensor)]
    return out if keep else {}


def full(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over processes, in one piece and detached; every process must call this."""
    whole_tensor: Tensor = tensor.detach()
    return whole_tensor.full_tensor() if isinstance(whole_tensor, DTensor) else whole_tensor


def spread_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that all processes hold in full, spread as ``parameter`` is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    # Every process has the values, so that nothing is sent.
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
