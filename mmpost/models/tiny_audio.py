"""Small Qwen2-Audio, built offline: two-second windows instead of thirty, everything else as released."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from mmpost.models.tiny_parts import Dims, init, text
from mmpost.models.tiny_tokenizer import QWEN2_AUDIO, train

WINDOW_SECONDS = 2  # Whisper's 30 would make every clip, however short, cost as much as 30 seconds
MEL_BANDS = 32


def qwen2_audio(dims: Dims, seed: int, corpus: Iterable[str] | None) -> tuple[Any, Any]:
    """Model and processor."""
    extractor = WhisperFeatureExtractor(feature_size=MEL_BANDS, chunk_length=WINDOW_SECONDS, return_attention_mask=True)
    tokenizer = train(QWEN2_AUDIO, corpus)
    processor = Qwen2AudioProcessor(extractor, tokenizer, chat_template=QWEN2_AUDIO.template)
    rope = {"rope_type": "default", "rope_theta": dims.theta}
    config = Qwen2AudioConfig(
        text_config=text(dims, QWEN2_AUDIO, tokenizer) | {"model_type": "qwen2", "rope_parameters": rope},
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": MEL_BANDS,
            "encoder_layers": dims.tower_layers,
            "encoder_attention_heads": dims.tower_heads,
            "encoder_ffn_dim": dims.tower_ffn,
            "d_model": dims.tower,
            "max_source_positions": extractor.nb_max_frames // 2,
            "initializer_range": dims.std,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    return init(Qwen2AudioForConditionalGeneration, config, seed, tokenizer), processor
