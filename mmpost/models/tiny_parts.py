"""What builders of tiny models share: sizes, the parts of a configuration, and drawing the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mmpost.models.tiny_tokenizer import Style

Size = Literal["test", "demo"]


@dataclass(frozen=True, slots=True)
class Dims:
    """Widths and depths.

    Attributes:
        hidden: Width of the language model.
        layers: Depth of the language model.
        heads: Query heads of the language model; there are half as many key-value heads.
        ffn: Inner width of its feed-forward layers.
        tower: Width of the vision tower.
        tower_layers: Depth of the vision tower.
        tower_heads: Its heads; the head width must be a multiple of 4 for the two rotary axes.
        tower_ffn: Inner width of its feed-forward layers.
        patch: Side of a patch in pixels; 2x2 patches become one token.
        theta: Base of the rotary frequencies.
        sections: Frequencies for time, height and width, fastest first; the sum is half a head. Qwen3-VL interleaves
            them instead and Llama (SmolVLM) has one axis.
        window: Side of an attention window in pixels (Qwen2.5-VL), 0 for full attention in every layer.
        std: Standard deviation of the initial weights.
        min_pixels: Smaller images are enlarged to this area.
        max_pixels: Larger images are shrunk to this area.
    """

    hidden: int
    layers: int
    heads: int
    ffn: int
    tower: int
    tower_layers: int
    tower_heads: int
    tower_ffn: int
    patch: int
    theta: float
    sections: tuple[int, int, int]
    window: int = 0
    std: float = 0.06  # 0.02 suits widths in the thousands; at width 128 it costs about 100 steps at the start
    min_pixels: int = 28 * 28
    max_pixels: int = 112 * 112


# One of two tower layers of Qwen2.5-VL sees windows only, as in the released model.
_TEST = Dims(
    64, 2, 4, 160, tower=48, tower_layers=2, tower_heads=4, tower_ffn=96, patch=14, theta=1e4, sections=(2, 3, 3),
    window=56,
)  # fmt: skip
# Pictures are 28x28 tiles side by side, unscaled, one token each. With the released sections (2:3:3) and theta 1e4 the
# width axis turns by under 0.01 rad a tile and "left" stays a coin toss for 700 steps of 32 rows; with these, which
# give the width most of the frequencies and let every one of them turn, it is learnt in 150 to 200.
_DEMO = Dims(
    128, 4, 4, 384, tower=64, tower_layers=2, tower_heads=4, tower_ffn=128, patch=14, theta=10.0, sections=(2, 2, 12)
)
DIMS: Mapping[str, Dims] = {"test": _TEST, "demo": _DEMO}

Builder = Callable[[Dims, int, Iterable[str] | None], tuple[Any, Any]]


def text(dims: Dims, style: Style, tokenizer: Any) -> dict[str, Any]:
    """Configuration of the language model, without rotary positions."""
    return {
        "vocab_size": len(tokenizer),  # no spare rows: every id that can be sampled can be decoded
        "hidden_size": dims.hidden,
        "intermediate_size": dims.ffn,
        "num_hidden_layers": dims.layers,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.heads // 2,
        "max_position_embeddings": 32768,
        "initializer_range": dims.std,
        "bos_token_id": tokenizer.convert_tokens_to_ids(style.bos),
        "eos_token_id": tokenizer.convert_tokens_to_ids(style.eos),
        "pad_token_id": tokenizer.convert_tokens_to_ids(style.pad),
    }


def rope(dims: Dims) -> dict[str, Any]:
    """Rotary positions over time, height and width."""
    return {"rope_type": "default", "rope_theta": dims.theta, "mrope_section": list(dims.sections)}


def tower(dims: Dims) -> dict[str, Any]:
    """What the vision towers of the Qwen families share."""
    return {
        "depth": dims.tower_layers,
        "num_heads": dims.tower_heads,
        "patch_size": dims.patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": dims.std,
    }


def init(kind: Any, config: Any, seed: int, tokenizer: Any) -> Any:
    """Draw the weights without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        model = kind(config)
    generation = model.generation_config
    generation.bos_token_id = tokenizer.bos_token_id
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    return model
