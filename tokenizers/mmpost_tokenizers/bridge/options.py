"""Options of the training of index models. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmpost.config.schema import Settings


class BridgeTrainSection(Settings):
    """Optimiser and schedule; the defaults are those of the paper's final models."""

    batch_size: int = Field(2048, ge=1, description="images per step")
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
