"""The policy's weights under the names that its checkpoint has, for engines that hold a copy of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmpost.models.policy import Policy

# What wrappers put into the names of parameters.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def named_weights(policy: Policy, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """All weights, one after the other, sharded ones gathered.

    LoRA is added out of place, W + BA in float32: merging into the trained weights and taking it out again would
    drift in bfloat16. Tied weights come once. With sharded weights every process has to iterate, in step.

    Args:
        policy: The module that trains.
        dtype: What floating-point weights are cast to; None for their own.

    Yields:
        Name as in the checkpoint, tensor without gradient.
    """
    modules = dict(policy.inner.named_modules())
    with torch.no_grad():
        for name, parameter in _parameters(policy):
            weight = _full(parameter.detach())
            owner, found, attribute = name.rpartition(".base_layer.")
            if found and attribute == "weight":
                weight = _merged(modules[owner], weight)
            yield _plain(name), weight.to(_kind(parameter, dtype)).contiguous()


def announce(policy: Policy, dtype: torch.dtype | None = None) -> list[tuple[str, torch.dtype, list[int]]]:
    """Name, type and shape of what ``named_weights`` will yield, in its order; nothing is gathered."""
    return [(_plain(name), _kind(parameter, dtype), list(parameter.shape)) for name, parameter in _parameters(policy)]


def _parameters(policy: Policy) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that the checkpoint has too, under the names that PEFT gave them."""
    for name, parameter in policy.inner.named_parameters():
        parts = name.split(".")
        if "original_module" not in parts and not any(part.startswith("lora_") for part in parts):
            yield name, parameter


def _kind(parameter: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype


def is_sharded(policy: Policy) -> bool:
    """Whether gathering a weight needs every process."""
    return any(callable(getattr(parameter, "full_tensor", None)) for parameter in policy.parameters())


def _full(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return gather() if callable(gather) else tensor


def _merged(layer: Any, weight: Tensor) -> Tensor:
    """``W + BA`` of the active adapters, computed in float32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide)
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            # Sharded A and B are gathered by the product's own redistribution.
            total = total + _full(layer.get_delta_weight(adapter)).to(wide)
    return total.to(weight.dtype)


def _plain(name: str) -> str:
    """The name without what PEFT and wrappers add."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    parts = name.replace(".base_layer.", ".").split(".")
    while "modules_to_save" in parts:
        # modules_to_save.<adapter>.<rest>
        at = parts.index("modules_to_save")
        parts = parts[:at] + parts[at + 2 :]
    return ".".join(parts)
