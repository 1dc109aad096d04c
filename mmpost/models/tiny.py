"""Small models of text with pictures, videos or sounds of the real classes, built offline from a seed.

Config, weights, processor, tokenizer and chat template are those of the family, only smaller: what runs on a tiny
model runs on the released one. Nothing is downloaded, and the same seed gives the same bytes.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.utils import logging as hf_logging

from mmpost.core.errors import MmpostError
from mmpost.models.tiny_audio import audio_flamingo, qwen2_audio, qwen_omni
from mmpost.models.tiny_parts import DIMS, Builder, Dims, Size, init, rope, text, tower
from mmpost.models.tiny_tokenizer import QWEN2, QWEN3, SMOLVLM, Style, train

VERSION = 2  # raise it with every change that changes the weights or the tokenizer; caches are named after it

_IMAGENET_HALF = [0.5, 0.5, 0.5]  # Qwen3-VL scales pixels to [-1, 1]


def build(
    family: str, folder: Path, *, seed: int = 0, corpus: Iterable[str] | None = None, size: Size = "test"
) -> Path:
    """Write a random model with its processor into ``folder``, where plain transformers opens it.

    Args:
        family: One of ``FAMILIES``.
        folder: Where to write; made if missing.
        seed: Seed of the weights. The tokenizer does not depend on it.
        corpus: More text for the tokenizer to learn from, see ``tiny_tokenizer.train``.
        size: ``test`` (0.2 to 0.4 million parameters) or ``demo`` (about 1.1 million, learns from scratch on a CPU).

    Returns:
        ``folder``.

    Raises:
        MmpostError: MMP-C006 for an unknown family or size, MMP-E010 when the family's processor needs num2words
            and it is not installed.
    """
    _known(family, FAMILIES, "families of tiny models")
    _known(size, DIMS, "sizes of tiny models")
    model, processor = FAMILIES[family](DIMS[size], seed, corpus)
    folder.mkdir(parents=True, exist_ok=True)
    # transformers writes weights on the first process of a group only, but here each process may be the builder.
    model.should_save_on_this_rank = lambda _: True
    with _no_progress_bar():
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_name(name: str) -> tuple[str, Size]:
    """Family and size of a name such as ``tiny-vlm``.

    Raises:
        MmpostError: MMP-C006 for an unknown name.
    """
    _known(name, _NAMES, "tiny models")
    return _NAMES[name]


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Saving a megabyte needs no bar."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _known(name: str, table: Mapping[str, Any], kind: str) -> None:
    if name in table:
        return
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    raise MmpostError("MMP-C006", f"unknown name '{name}' among {kind}.", f"{hint}Known: {', '.join(table)}")


def _qwen2_vl(dims: Dims, seed: int, corpus: Iterable[str] | None) -> tuple[Any, Any]:
    processor = _qwen_processor(Qwen2VLProcessor, Qwen2VLVideoProcessor, QWEN2, dims, corpus)
    config = Qwen2VLConfig(
        text_config=text(dims, QWEN2, processor.tokenizer) | {"rope_parameters": rope(dims)},
        vision_config=tower(dims)
        | {"embed_dim": dims.tower, "hidden_size": dims.hidden, "mlp_ratio": dims.tower_ffn // dims.tower},
        **_qwen_ids(processor.tokenizer),
    )
    return init(Qwen2VLForConditionalGeneration, config, seed, processor.tokenizer), processor


def _qwen2_5_vl(dims: Dims, seed: int, corpus: Iterable[str] | None) -> tuple[Any, Any]:
    processor = _qwen_processor(Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, QWEN2, dims, corpus)
    windowed = dims.tower_layers - 1 if dims.window else 0  # only the last layer sees the whole image
    config = Qwen2_5_VLConfig(
        text_config=text(dims, QWEN2, processor.tokenizer) | {"rope_parameters": rope(dims)},
        vision_config=tower(dims)
        | {
            "hidden_size": dims.tower,
            "intermediate_size": dims.tower_ffn,
            "out_hidden_size": dims.hidden,
            "window_size": dims.window or 112,
            "fullatt_block_indexes": list(range(windowed, dims.tower_layers)),
        },
        **_qwen_ids(processor.tokenizer),
    )
    return init(Qwen2_5_VLForConditionalGeneration, config, seed, processor.tokenizer), processor


def _qwen3_vl(dims: Dims, seed: int, corpus: Iterable[str] | None) -> tuple[Any, Any]:
    patch = 16 if dims.patch == 14 else dims.patch  # 16 is the family's own; code that assumes 14 must fail
    processor = _qwen_processor(
        Qwen3VLProcessor, Qwen3VLVideoProcessor, QWEN3, dims, corpus, patch_size=patch,
        image_mean=_IMAGENET_HALF, image_std=_IMAGENET_HALF,
    )  # fmt: skip
    axis = dims.hidden // dims.heads // 6
    sections = [sum(dims.sections) - 2 * axis, axis, axis]
    turns = rope(dims) | {"mrope_section": sections, "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=text(dims, QWEN3, processor.tokenizer)
        | {"rope_parameters": turns, "head_dim": dims.hidden // dims.heads},
        vision_config=tower(dims)
        | {
            "hidden_size": dims.tower,
            "intermediate_size": dims.tower_ffn,
            "out_hidden_size": dims.hidden,
            "patch_size": patch,
            "num_position_embeddings": 64,  # a learnt 8x8 map, interpolated to the size of the image
            # Features of these tower layers are added to the output of the first decoder layers.
            "deepstack_visual_indexes": list(range(min(2, dims.tower_layers))),
        },
        **_qwen_ids(processor.tokenizer),
    )
    return init(Qwen3VLForConditionalGeneration, config, seed, processor.tokenizer), processor


def _smolvlm(dims: Dims, seed: int, corpus: Iterable[str] | None) -> tuple[Any, Any]:
    if importlib.util.find_spec("num2words") is None:
        raise MmpostError(
            "MMP-E010",
            "'smolvlm' needs num2words, which is not installed.",
            'Run: pip install "mmpost-toolkit[smolvlm]"',
        )
    tile = 4 * dims.patch
    scale = 2
    sizes = {"size": {"longest_edge": 2 * tile}, "max_image_size": {"longest_edge": tile}}
    tokenizer = train(SMOLVLM, corpus)
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes),
        tokenizer,
        SmolVLMVideoProcessor(
            **sizes, video_sampling={"max_frames": 8, "fps": 1, "video_size": {"longest_edge": tile}}
        ),
        image_seq_len=(tile // dims.patch // scale) ** 2,
        chat_template=SMOLVLM.template,
    )
    config = SmolVLMConfig(
        text_config=text(dims, SMOLVLM, tokenizer)
        | {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": dims.theta}},
        vision_config={
            "hidden_size": dims.tower,
            "intermediate_size": dims.tower_ffn,
            "num_hidden_layers": dims.tower_layers,
            "num_attention_heads": dims.tower_heads,
            "image_size": tile,
            "patch_size": dims.patch,
            "initializer_range": dims.std,
        },
        scale_factor=scale,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return init(SmolVLMForConditionalGeneration, config, seed, tokenizer), processor


def _qwen_processor(
    kind: Any, video_kind: Any, style: Style, dims: Dims, corpus: Iterable[str] | None, **options: Any
) -> Any:
    # "Edges" are areas in pixels here, whatever the keys say.
    options = {
        "size": {"shortest_edge": dims.min_pixels, "longest_edge": dims.max_pixels},
        "patch_size": dims.patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
    } | options
    # Qwen3-VL counts the pixels of all frames together.
    frames = 8 if video_kind is Qwen3VLVideoProcessor else 1
    video_size = {"shortest_edge": dims.min_pixels, "longest_edge": dims.max_pixels * frames}
    return kind(
        image_processor=Qwen2VLImageProcessor(**options),
        tokenizer=train(style, corpus),
        video_processor=video_kind(**options | {"size": video_size}),
        chat_template=style.template,
    )


def _qwen_ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        "tie_word_embeddings": True,
    }


FAMILIES: Mapping[str, Builder] = {
    "qwen2-vl": _qwen2_vl,
    "qwen2.5-vl": _qwen2_5_vl,
    "qwen3-vl": _qwen3_vl,
    "smolvlm": _smolvlm,
    "qwen2-audio": qwen2_audio,
    "qwen2.5-omni": qwen_omni,
    "audio-flamingo-3": audio_flamingo,
}
_NAMES: Mapping[str, tuple[str, Size]] = {
    "tiny-vlm": ("qwen2.5-vl", "demo"),
    **{f"tiny-{family}": (family, "test") for family in FAMILIES},
}
