"""Small Qwen2-Audio, Qwen2.5-Omni (thinker) and Audio Flamingo 3, built offline: windows of two seconds, not thirty."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from mmpost.models.tiny_parts import Dims, init, rope, text, tower
from mmpost.models.tiny_tokenizer import AUDIO_FLAMINGO, QWEN2_AUDIO, QWEN_OMNI, train

WINDOW_SECONDS = 2  # Whisper's 30 would make every clip, however short, cost as much as 30 seconds
MEL_BANDS = 32


def qwen2_audio(dims: Dims, seed: int, corpus: Iterable[str] | None) -> tuple[Any, Any]:
    """Model and processor."""
    extractor = _extractor()
    tokenizer = train(QWEN2_AUDIO, corpus)
    processor = Qwen2AudioProcessor(extractor, tokenizer, chat_template=QWEN2_AUDIO.template)
    turns = {"rope_type": "default", "rope_theta": dims.theta}
    config = Qwen2AudioConfig(
        text_config=text(dims, QWEN2_AUDIO, tokenizer) | {"model_type": "qwen2", "rope_parameters": turns},
        audio_config=_encoder(dims, extractor) | {"model_type": "qwen2_audio_encoder"},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    return init(Qwen2AudioForConditionalGeneration, config, seed, tokenizer), processor


def qwen_omni(dims: Dims, seed: int, corpus: Iterable[str] | None) -> tuple[Any, Any]:
    """Thinker and processor."""
    extractor, tokenizer = _extractor(), train(QWEN_OMNI, corpus)
    # "Edges" are areas in pixels here, whatever the keys say.
    patches = {
        "size": {"shortest_edge": dims.min_pixels, "longest_edge": dims.max_pixels},
        "patch_size": dims.patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    processor = Qwen2_5OmniProcessor(
        Qwen2VLImageProcessor(**patches),
        Qwen2VLVideoProcessor(**patches),
        extractor,
        tokenizer,
        chat_template=QWEN_OMNI.template,
    )
    windowed = dims.tower_layers - 1 if dims.window else 0
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in QWEN_OMNI.named.items()}
    config = Qwen2_5OmniThinkerConfig(
        text_config=text(dims, QWEN_OMNI, tokenizer) | {"rope_parameters": rope(dims), "tie_word_embeddings": False},
        vision_config=tower(dims)
        | {
            "hidden_size": dims.tower,
            "intermediate_size": dims.tower_ffn,
            "out_hidden_size": dims.hidden,
            "window_size": dims.window or 112,
            "fullatt_block_indexes": list(range(windowed, dims.tower_layers)),
        },
        # Windows of half a second, so that short clips have several.
        audio_config=_encoder(dims, extractor) | {"output_dim": dims.hidden, "n_window": 25},
        image_token_index=ids["image_token"],
        video_token_index=ids["video_token"],
        audio_token_index=ids["audio_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
    )
    return init(Qwen2_5OmniThinkerForConditionalGeneration, config, seed, tokenizer), processor


def audio_flamingo(dims: Dims, seed: int, corpus: Iterable[str] | None) -> tuple[Any, Any]:
    """Model and processor; clips of up to three windows."""
    extractor, tokenizer = _extractor(), train(AUDIO_FLAMINGO, corpus)
    processor = AudioFlamingo3Processor(
        extractor, tokenizer, chat_template=AUDIO_FLAMINGO.template, max_audio_len=3 * WINDOW_SECONDS
    )
    turns = {"rope_type": "default", "rope_theta": dims.theta}
    config = AudioFlamingo3Config(
        text_config=text(dims, AUDIO_FLAMINGO, tokenizer) | {"model_type": "qwen2", "rope_parameters": turns},
        audio_config={
            "model_type": "audioflamingo3_encoder",
            "num_mel_bins": MEL_BANDS,
            "num_hidden_layers": dims.tower_layers,
            "num_attention_heads": dims.tower_heads,
            "intermediate_size": dims.tower_ffn,
            "hidden_size": dims.tower,
            "max_source_positions": extractor.nb_max_frames // 2,
            "initializer_range": dims.std,
        },
        audio_token_id=tokenizer.convert_tokens_to_ids("<sound>"),
    )
    return init(AudioFlamingo3ForConditionalGeneration, config, seed, tokenizer), processor


def _extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=MEL_BANDS, chunk_length=WINDOW_SECONDS, return_attention_mask=True)


def _encoder(dims: Dims, extractor: WhisperFeatureExtractor) -> dict[str, Any]:
    return {
        "num_mel_bins": MEL_BANDS,
        "encoder_layers": dims.tower_layers,
        "encoder_attention_heads": dims.tower_heads,
        "encoder_ffn_dim": dims.tower_ffn,
        "d_model": dims.tower,
        "max_source_positions": extractor.nb_max_frames // 2,
        "initializer_range": dims.std,
    }
