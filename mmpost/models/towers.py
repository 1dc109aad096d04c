"""The vision tower sees each distinct picture of a batch once, however many prompts show it.

A batch says which of its pictures are the same; the tower is given the first of each, and its features are handed out
to all. Done by hooks on the tower, so that the model's own code is neither copied nor patched. The gradient is exact: a
feature that is used twice gets the sum of both gradients. Models without these hooks encode every picture, which gives
the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Names in a batch's inputs: ``same_image`` int64 [items], for each item of the tower the number of the first equal one.
SAME = "same_"
# Which pixels the tower is called with for which kind, in the order in which models call it.
CALLS = {"image": "pixel_values", "video": "pixel_values_videos"}
_MARK = "_mmpost_shares"


@dataclass(slots=True)
class _Sharing:
    """Pictures that are the same in the forward call under way.

    Attributes:
        calls: For each call of the tower that is to come, the first equal item of each, or None where all differ.
        open: Of the call under way, with the number of features of each item.
    """

    calls: list[list[int] | None]
    open: tuple[list[int], list[int]] | None = None


_sharing: ContextVar[_Sharing | None] = ContextVar("sharing", default=None)


@contextmanager
def sharing(inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A forward call's arguments without what is said about equal pictures, which the tower knows inside."""
    plain = {name: tensor for name, tensor in inputs.items() if not name.startswith(SAME)}
    if len(plain) == len(inputs):
        yield plain
        return
    found = (inputs.get(SAME + kind) for kind, name in CALLS.items() if name in plain)
    token = _sharing.set(_Sharing([None if same is None else same.tolist() for same in found]))
    try:
        yield plain
    finally:
        _sharing.reset(token)


def install(model: Any) -> None:
    """Put the hooks on the tower of a model; does nothing for models whose tower is not known, or a second time."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    base = inner.base_model
    visual = getattr(base, "visual", None)
    if isinstance(visual, nn.Module) and hasattr(visual, "spatial_merge_size"):
        _hook(visual, _first_patches, _all_patches)
    elif isinstance(getattr(base, "vision_model", None), nn.Module) and isinstance(
        getattr(base, "connector", None), nn.Module
    ):
        _hook(base.vision_model, _first_tiles, None)
        _hook(base.connector, None, _all_tiles)


def _hook(module: nn.Module, before: Any, after: Any) -> None:
    if getattr(module, _MARK, False):
        return
    setattr(module, _MARK, True)
    if before is not None:
        module.register_forward_pre_hook(before, with_kwargs=True)
    if after is not None:
        module.register_forward_hook(after)


def _next_call() -> tuple[_Sharing, list[int]] | None:
    """What is the same in the call of the tower that begins; None when nothing is."""
    now = _sharing.get()
    if now is None or not now.calls:
        return None
    same = now.calls.pop(0)
    return None if same is None else (now, same)


def _spread(starts: list[int], sizes: list[int], chosen: list[int], device: torch.device) -> Tensor:
    """Numbers of everything that belongs to the chosen items."""
    return torch.cat([torch.arange(starts[i], starts[i] + sizes[i]) for i in chosen]).to(device)


def _starts(sizes: list[int]) -> list[int]:
    return [0, *torch.tensor(sizes).cumsum(0).tolist()]


def _first_patches(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Patches and grids of the first of equal pictures: Qwen-VL's tower, called with pixels and ``grid_thw``."""
    found = _next_call()
    if found is None:
        return None
    now, same = found
    pixels, grid = args[0], kwargs["grid_thw"]
    patches = grid.prod(-1).tolist()
    assert len(patches) == len(same), f"{len(patches)} pictures, {len(same)} said to be equal or not"
    first = sorted(set(same))
    merged = int(module.spatial_merge_size) ** 2  # type: ignore[arg-type]
    now.open = same, [count // merged for count in patches]
    fewer = pixels.index_select(0, _spread(_starts(patches), patches, first, pixels.device))
    return (fewer, *args[1:]), {**kwargs, "grid_thw": grid[first]}


def _all_patches(module: nn.Module, args: Any, output: Any) -> Any:
    """Features of every picture again, deepstack features included."""
    now = _sharing.get()
    if now is None or now.open is None:
        return None
    (same, features), now.open = now.open, None
    first = sorted(set(same))
    begin = dict(zip(first, _starts([features[i] for i in first]), strict=False))
    starts = [begin.get(i, 0) for i in range(len(same))]

    def everyone(tensor: Tensor) -> Tensor:
        return tensor.index_select(0, _spread(starts, features, same, tensor.device))

    output.pooler_output = everyone(output.pooler_output)
    if getattr(output, "deepstack_features", None) is not None:
        output.deepstack_features = [everyone(tensor) for tensor in output.deepstack_features]
    return output


def _first_tiles(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first of equal tiles: SmolVLM's tower, called with one entry per tile."""
    found = _next_call()
    if found is None:
        return None
    now, same = found
    assert len(kwargs["pixel_values"]) == len(same), f"{len(kwargs['pixel_values'])} tiles, {len(same)} known"
    now.open = same, []
    first = sorted(set(same))
    names = [name for name in ("pixel_values", "patch_attention_mask") if kwargs.get(name) is not None]
    return args, {**kwargs, **{name: kwargs[name][first] for name in names}}


def _all_tiles(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """Features of every tile again, behind the connector."""
    now = _sharing.get()
    if now is None or now.open is None:
        return None
    (same, _), now.open = now.open, None
    place = {item: number for number, item in enumerate(sorted(set(same)))}
    return output.index_select(0, torch.tensor([place[i] for i in same], device=output.device))
