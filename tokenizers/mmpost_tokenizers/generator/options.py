"""Options of the generator and of decoder post-training. Light: no torch.

Defaults are LlamaGen's for the generator (arXiv 2406.06525) and RobusTok's for post-training (arXiv 2509.12474).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmpost.config.schema import Settings


class GeneratorModelSection(Settings):
    """Shape of the generator."""

    size: str = Field("B", description="test, small, B, L, 400M, XL, XXL or 3B")
    num_classes: int | None = Field(None, ge=1, description="classes; null: those of the codes")
    class_dropout: float = Field(0.1, ge=0, lt=1, description="share of rows trained without class, for guidance")
    dropout: float | None = Field(None, ge=0, lt=1, description="of embeddings and blocks; null: that of the size")
    rope: Literal["1d", "2d"] = Field(
        "1d", description="rotary positions by place in the sequence, or by row and column as in LlamaGen"
    )


class GeneratorTrainSection(Settings):
    """Steps, optimiser, schedule."""

    max_steps: int | None = Field(None, ge=1, description="optimiser steps; overrides num_train_epochs")
    num_train_epochs: float = Field(300.0, gt=0, description="passes over the images, one crop each")
    batch_size: int = Field(256, ge=1, description="images per step")
    micro_batch_size: int | None = Field(None, ge=1, description="images per forward pass; null: all")
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    lr_scheduler_type: Literal["constant", "cosine"] = Field("constant", description="after the warm-up")
    min_learning_rate: float = Field(0.0, ge=0, description="rate at the end of the cosine")
    warmup_steps: float = Field(0.0, ge=0, description="steps of linear warm-up; below 1 a share of all steps")
    weight_decay: float = Field(0.05, ge=0, description="AdamW weight decay, on matrices only")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW first moment")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW second moment")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the gradient norm; 0 = never")
    bf16: bool | Literal["auto"] = Field("auto", description="bfloat16 autocast; auto: on CUDA")
    seed: int = Field(42, ge=0, description="seed of everything random")
    logging_steps: int = Field(10, ge=1, description="steps between reports")
    eval_steps: int | None = Field(None, ge=1, description="steps between held-out evaluations; null: only at the end")
    save_steps: int = Field(500, ge=1, description="steps between checkpoints")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept")


class SamplingSection(Settings):
    """How codes are drawn."""

    guidance: float = Field(2.0, ge=0, description="weight of classifier-free guidance; 1 = none, half the work")
    guidance_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="over the places of an image; cosine: that of RAR"
    )
    guidance_power: float = Field(1.0, gt=0, description="exponent of the cosine schedule")
    temperature: float = Field(1.0, ge=0, description="logits are divided by it; 0 = most likely code")
    top_k: int = Field(0, ge=0, description="codes kept; 0 = all")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    batch_size: int = Field(64, ge=1, description="images generated together")
    seed: int = Field(42, ge=0, description="seed of the draws")


class PosttrainSection(Settings):
    """Decoder post-training on codes that look generated."""

    sigma: float = Field(
        0.8,
        description="preservation ratio in (0, 1]: share of real codes; 0.7 suits tokenizers trained with perturbation",
    )
    pair_mode: Literal["reencode", "direct"] = Field(
        "reencode", description="decoder input: the codes of the decoded mixture, or the mixture itself"
    )
    main_learning_rate: float = Field(2.4e-4, gt=0, description="rate of the tokenizer's main training")
    learning_rate_share: float = Field(0.2, gt=0, le=1, description="share of it used here; 0.2 to 0.5 is published")
    min_learning_rate_share: float = Field(0.2, ge=0, le=1, description="share of the rate left at the cosine's end")
    max_steps: int = Field(1000, ge=1, description="optimiser steps at most")
    batch_size: int = Field(64, ge=1, description="images per step")
    micro_batch_size: int | None = Field(None, ge=1, description="images per forward pass; null: all")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW first moment")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW second moment")
    max_grad_norm: float = Field(0.0, ge=0, description="clip the gradient norm; 0 = never, as published")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="running mean of the decoder, which is saved; 0 = none")
    discriminator: Literal["none", "reuse", "reset"] = Field(
        "none", description="reuse: that of the main training; reset: a fresh one, as in the released configuration"
    )
    eval_steps: int = Field(50, ge=1, description="steps between measurements of the held-out pair loss")
    patience: int = Field(5, ge=1, description="measurements without a better one after which training stops")
    save_steps: int = Field(200, ge=1, description="steps between checkpoints")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept")
    logging_steps: int = Field(10, ge=1, description="steps between reports")
    bf16: bool | Literal["auto"] = Field("auto", description="bfloat16 autocast; auto: on CUDA")
    seed: int = Field(42, ge=0, description="seed of everything random")
