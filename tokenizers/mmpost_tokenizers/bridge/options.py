"""Options of the training of index models. No torch here.

Defaults are those of TokenBridge-L (arXiv 2503.16430, table 4 and the released configuration).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from mmpost.config.run import Options
from mmpost.config.schema import LogSection, Settings


class BridgeModelSection(Settings):
    """Spatial model and head."""

    backbone: Literal["masked", "raster"] = Field(
        "masked", description="masked: random order, as published (MAR); raster: row by row, exact likelihood"
    )
    head: Literal["ar", "independent"] = Field(
        "ar", description="ar: channel after channel; independent: all channels at once, the paper's baseline"
    )
    num_classes: int | None = Field(None, ge=1, description="classes; null: those of the data")
    width: int = Field(1024, ge=1, description="of the spatial model, a multiple of heads")
    depth: int = Field(16, ge=1, description="blocks; masked: of the encoder, and as many of the decoder")
    heads: int = Field(16, ge=1, description="attention heads of the spatial model")
    buffer: int = Field(64, ge=1, description="masked: tokens with the class before the sequence")
    dropout: float = Field(0.1, ge=0, lt=1, description="of the spatial model")
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of images trained without class, for guidance")
    mask_min: float = Field(0.7, gt=0, lt=1, description="masked: smallest share of positions that is predicted")
    mask_std: float = Field(0.25, gt=0, description="masked: deviation of that share from 1, before the cut")
    head_width: int = Field(1024, ge=1, description="of the head, a multiple of head_heads")
    head_depth: int = Field(4, ge=1, description="blocks of the head")
    head_heads: int = Field(8, ge=1, description="attention heads of the head")
    head_dropout: float = Field(0.1, ge=0, lt=1, description="of the head")


class BridgeTrainSection(Settings):
    """Optimiser and schedule; the defaults are those of the paper's final models."""

    batch_size: int = Field(2048, ge=1, description="images per step")
    micro_batch_size: int | None = Field(None, ge=1, description="images per forward pass; null: all of a step")
    max_steps: int | None = Field(
        None, ge=1, description="optimiser steps; overrides epochs, and the same share of them is warm-up"
    )
    epochs: float = Field(800, gt=0, description="passes over the images")
    warmup_epochs: float = Field(200, ge=0, description="of these, with a rising learning rate")
    learning_rate: float = Field(8e-4, gt=0, description="highest rate; falls to 0 along a cosine")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta1")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW beta2")
    weight_decay: float = Field(0.02, ge=0, description="AdamW weight decay; not on biases and norms")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0: none. The released code has 3.0")
    ema: float = Field(0.9999, ge=0, lt=1, description="decay of the running mean of the weights; 0: none")
    precision: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the forward pass (autocast)")
    seed: int = Field(0, ge=0, description="of the order of the images, masks and dropout")
    save_steps: int = Field(0, ge=0, description="steps between checkpoints; 0: none")
    logging_steps: int = Field(50, ge=1, description="steps between log records")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept")


class BridgeEvalSection(Settings):
    """Held-out likelihood."""

    draws: int = Field(4, ge=1, description="passes over the held-out images, each with masks of its own")
    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations; null: only at the end")
    samples: int = Field(40, ge=0, description="images drawn for the report; 0: none")


class BridgeRunConfig(Options):
    """Training a model of the tokens of a bridge."""

    model_config = ConfigDict(defer_build=True)

    command: ClassVar[str] = "tokenizer bridge-train"

    model: BridgeModelSection = Field(default_factory=BridgeModelSection)
    train: BridgeTrainSection = Field(default_factory=BridgeTrainSection)
    eval: BridgeEvalSection = Field(default_factory=BridgeEvalSection)
    log: LogSection = Field(default_factory=LogSection)
