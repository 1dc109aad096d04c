"""mmpost's and TRL's trainers on the same rows, stopping at every step boundary.

mmpost is started as a user starts it, through its trainer classes; only the end of ``Learner.update`` is watched. A
step lasts from the end of one optimiser step to the end of the next: data, rollout, rewards, training and logging.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lockstep import Gate
from benchmarks.rows import BenchRow, for_mmpost, for_trl, in_drawing_order

SEED = 0
LEARNING_RATE = 1e-5
# No id of any vocabulary: a completion never ends before its length limit.
NEVER = -1


@dataclass(frozen=True, slots=True)
class Job:
    """What one trainer has to do.

    Attributes:
        folder: For its output and its log.
        model: Folder with weights and processor.
        rows: The data; every row is seen once.
        steps: Optimiser steps.
        micro_batch: Rows per forward pass, for both trainers.
        generations: Completions per prompt; 0 for supervised training.
        completion: Tokens per completion.
        device: ``cpu`` or ``cuda``.
        bf16: Weights in bfloat16 and bfloat16 autocast.
        freeze_vision: The vision tower does not train; its projector does.
        trl: Further options of TRL's configuration class.
        mmpost: Further options of mmpost's configuration class.
    """

    folder: str
    model: str
    rows: tuple[BenchRow, ...]
    steps: int
    micro_batch: int = 8
    generations: int = 0
    completion: int = 0
    device: str = "cpu"
    bf16: bool = False
    freeze_vision: bool = False
    trl: Mapping[str, Any] | None = None
    mmpost: Mapping[str, Any] | None = None

    @property
    def rows_per_step(self) -> int:
        """Rows of the data that one optimiser step takes."""
        return len(self.rows) // self.steps


def reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """A number in [0, 1) from the ids, for both trainers.

    Completions practically never tie, so every completion trains: mmpost leaves out rows without advantage, and a
    comparison must not profit from that. Ids, not text, because most ids of a large vocabulary have no text here.
    """
    return [zlib.crc32(repr([int(i) for i in ids]).encode()) / 2**32 for ids in completion_ids]


def _one_thread(job: Job) -> None:
    """CPU seconds mean the same on any number of cores only with one thread."""
    import torch

    if job.device == "cpu":
        torch.set_num_threads(1)


# -- mmpost -----------------------------------------------------------------------------------------------------------


def mmpost_trainer(job: Job, score: Callable[..., list[float]] = reward) -> Any:
    """An mmpost trainer over the job's rows."""
    from mmpost import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, load_data, load_model

    model = load_model(
        job.model,
        peft="full",
        freeze=["vision_tower"] if job.freeze_vision else [],
        dtype="bfloat16" if job.bf16 else "float32",
        max_length=16_384,
    )
    options: dict[str, Any] = {
        "output_dir": str(Path(job.folder) / "mmpost"),
        "max_steps": job.steps,
        "per_device_train_batch_size": job.micro_batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "bf16": job.bf16,
        "seed": SEED,
        "max_length": 16_384,
        "verify": "none",  # else every row would be encoded before the first step, where no clock runs
        "progress": "none",
        **(job.mmpost or {}),
    }
    data = load_data(for_mmpost(job.rows, answers=not job.generations))
    if not job.generations:
        return SFTTrainer(model, SFTConfig(**options | {"batch_size": job.rows_per_step}), data)
    model.adapter.stop_token_ids = (NEVER,)
    options |= {
        "num_generations": job.generations,
        "prompts_per_step": job.rows_per_step,
        "max_completion_length": job.completion,
    }
    return GRPOTrainer(model, [score], GRPOConfig(**options), data)


def run_mmpost(job: Job, gate: Gate) -> None:
    """Train with mmpost."""
    _one_thread(job)
    trainer = mmpost_trainer(job)
    _watch(gate)
    trainer.train()


def _watch(gate: Gate) -> None:
    from mmpost.train.learner import Learner
    from mmpost.train.loop import Loop

    run, update = Loop.run, Learner.update

    def watched_run(self: Loop) -> None:
        gate.open()
        run(self)

    def watched_update(self: Learner, *args: Any, **kwargs: Any) -> Any:
        report = update(self, *args, **kwargs)
        gate.step()
        return report

    Loop.run, Learner.update = watched_run, watched_update  # type: ignore[method-assign]


# -- TRL --------------------------------------------------------------------------------------------------------------


def trl_trainer(job: Job) -> Any:
    """A TRL trainer over the same rows in the same order."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch
    import trl
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mmpost.models.load import part_of

    processor = AutoProcessor.from_pretrained(job.model)
    dtype = torch.bfloat16 if job.bf16 else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(job.model, dtype=dtype, attn_implementation="sdpa")
    if job.freeze_vision:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) != "vision_tower")
    grpo = job.generations > 0
    per_step = job.rows_per_step * max(job.generations, 1)
    micro = min(job.micro_batch, per_step)
    options: dict[str, Any] = {
        "output_dir": str(Path(job.folder) / "trl"),
        "max_steps": job.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": per_step // micro,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": job.bf16,
        "use_cpu": job.device == "cpu",
        "seed": SEED,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **(job.trl or {}),
    }
    data = for_trl(in_drawing_order(job.rows, SEED), answers=not grpo)
    if not grpo:
        args = trl.SFTConfig(max_length=None, train_sampling_strategy="sequential", **options)
        return trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    args = trl.GRPOConfig(
        num_generations=job.generations,
        max_completion_length=job.completion,
        shuffle_dataset=False,
        # An end token would end a completion early; a media token would have no features behind it.
        generation_kwargs={"suppress_tokens": _ends_and_media(model)},
        **options,
    )
    return trl.GRPOTrainer(model=model, reward_funcs=reward, args=args, train_dataset=data, processing_class=processor)


def _ends_and_media(model: Any) -> list[int]:
    config = model.config
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ends = model.generation_config.eos_token_id
    return [*(ends if isinstance(ends, list) else [ends]), *(getattr(config, name) for name in names)]


def run_trl(job: Job, gate: Gate) -> None:
    """Train with TRL."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            gate.open()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            gate.step()

    _one_thread(job)
    trainer = trl_trainer(job)
    trainer.add_callback(Watch())
    trainer.train()
