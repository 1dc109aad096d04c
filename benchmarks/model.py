"""Qwen2.5-VL with random weights in several sizes, written once and opened by every trainer that is compared."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATCH = 14
TOKEN_EDGE = 2 * PATCH  # 2x2 patches become one token
MAX_PIXELS = 1_003_520


@dataclass(frozen=True, slots=True)
class Size:
    """Widths and depths.

    Attributes:
        hidden: Width of the language model.
        layers: Its depth.
        heads: Its query heads.
        kv_heads: Its key-value heads.
        ffn: Inner width of its feed-forward layers.
        vocab: Entries of the embedding; None for those of the small tokenizer.
        tower: Width of the vision tower.
        tower_layers: Its depth.
        tower_heads: Its heads.
        tower_ffn: Inner width of its feed-forward layers.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int | None
    tower: int
    tower_layers: int
    tower_heads: int
    tower_ffn: int


# The language models of 0.5b and 3b have the shape of Qwen2.5-0.5B and of Qwen2.5-VL-3B; both have the released tower.
SIZES = {
    "tiny": Size(128, 4, 4, 2, 256, None, 64, 4, 4, 128),
    "small": Size(256, 6, 8, 2, 768, None, 128, 6, 4, 256),
    "0.5b": Size(896, 24, 14, 2, 4864, 151_936, 1280, 32, 16, 3420),
    "3b": Size(2048, 36, 16, 2, 11_008, 151_936, 1280, 32, 16, 3420),
}


def image_edge(tokens: int) -> int:
    """Side in pixels of the square image that becomes this many tokens.

    Raises:
        ValueError: When the number is not a square.
    """
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{tokens} image tokens are not a square number")
    return side * TOKEN_EDGE


def write(folder: Path, size: str, *, seed: int = 0, bf16: bool = False, device: str = "cpu") -> Path:
    """Build weights and processor in a process of its own and write them to ``folder``.

    The own process gives all memory of the construction back, on the device too.

    Raises:
        RuntimeError: When the process fails; its traceback is on stderr.
    """
    process = multiprocessing.get_context("spawn").Process(target=build, args=(folder, size, seed, bf16, device))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"building the {size} model failed")
    return folder


def build(folder: Path, size: str, seed: int = 0, bf16: bool = False, device: str = "cpu") -> None:
    """The same in this process."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    processor = _processor()
    tokenizer = processor.tokenizer
    config = _config(SIZES[size], tokenizer)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16 if bf16 else torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)


def _processor() -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    from mmpost.models.tiny_tokenizer import QWEN2, train

    # "Edges" are areas in pixels here, whatever the keys say.
    pixels = {"shortest_edge": TOKEN_EDGE**2, "longest_edge": MAX_PIXELS}
    options: dict[str, Any] = {"size": pixels, "patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**options),
        tokenizer=train(QWEN2),
        video_processor=Qwen2VLVideoProcessor(**options),
        chat_template=QWEN2.template,
    )


def _config(size: Size, tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    half_head = size.hidden // size.heads // 2
    axis = (half_head - half_head // 4) // 2
    full_every = max(2, size.tower_layers // 4)
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocab or len(tokenizer),
            "hidden_size": size.hidden,
            "intermediate_size": size.ffn,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 32_768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half_head - 2 * axis, axis, axis],
            },
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": size.tower_layers,
            "hidden_size": size.tower,
            "intermediate_size": size.tower_ffn,
            "num_heads": size.tower_heads,
            "out_hidden_size": size.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [i for i in range(size.tower_layers) if (i + 1) % full_every == 0],
        },
        tie_word_embeddings=True,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
