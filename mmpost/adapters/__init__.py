"""Sample to model inputs: how many tokens, which positions train. One file per model family."""

# transformers' ``config.model_type`` to the class that handles it.
ADAPTERS = {
    "qwen2_vl": "mmpost.adapters.qwen_vl:QwenVLAdapter",
    "qwen2_5_vl": "mmpost.adapters.qwen_vl:QwenVLAdapter",
    "qwen3_vl": "mmpost.adapters.qwen_vl:Qwen3VLAdapter",
    "qwen2_audio": "mmpost.adapters.qwen2_audio:Qwen2AudioAdapter",
    "qwen2_5_omni_thinker": "mmpost.adapters.qwen_omni:QwenOmniAdapter",
    "audioflamingo3": "mmpost.adapters.audio_flamingo:AudioFlamingoAdapter",
    "smolvlm": "mmpost.adapters.smolvlm:SmolVLMAdapter",
}
