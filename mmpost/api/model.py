"""Models by name, ready to train or to answer."""

from __future__ import annotations

from typing import Any

from mmpost.config.schema import FullSettings, LoraSettings, MediaSection, ModelSection
from mmpost.models.load import LoadedModel, load


def load_model(
    name: str,
    *,
    peft: str | dict[str, Any] | LoraSettings | FullSettings | None = "full",
    freeze: list[str] | None = None,
    max_pixels: int | None = None,
    max_length: int = 4096,
    dtype: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: str = "none",
    gradient_checkpointing: bool = False,
    attn_implementation: str = "sdpa",
) -> LoadedModel:
    """Open weights, processor and adapter.

    Args:
        name: Hub id, local folder (weights or a LoRA adapter), or ``tiny-vlm``.
        peft: ``"lora"``, ``"full"``, settings, or None for evaluation only.
        freeze: Parts that do not train; default the vision tower.
        max_pixels: Largest image in pixels.
        max_length: Longest row in tokens.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        seed: Of ``tiny-*`` weights and of new LoRA weights.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run code that comes with the checkpoint.
        quantization: ``none``, ``nf4`` (QLoRA) or ``int8``.
        gradient_checkpointing: Recompute the language model's activations to save memory.
        attn_implementation: ``sdpa``, ``eager`` or ``flash_attention_2``.

    Raises:
        MmpostError: MMP-E030 when it cannot be opened, MMP-C006 for an unsupported model type.
    """
    options: dict[str, Any] = {} if freeze is None else {"freeze": freeze}
    section = ModelSection(
        model_name_or_path=name,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
        gradient_checkpointing=gradient_checkpointing,
        attn_implementation=attn_implementation,
        **options,
    )
    return load(
        section, peft=settings(peft), media=MediaSection(max_pixels=max_pixels), max_length=max_length, seed=seed
    )


def settings(peft: str | dict[str, Any] | LoraSettings | FullSettings | None) -> LoraSettings | FullSettings | None:
    """PEFT settings from a word, a mapping or themselves."""
    if peft is None or isinstance(peft, LoraSettings | FullSettings):
        return peft
    values = {"kind": peft} if isinstance(peft, str) else dict(peft)
    return LoraSettings(**values) if values.get("kind", "lora") == "lora" else FullSettings(**values)
