"""The configurations of the training commands, and the rules that join several of their options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator

from mmpost.config.check import config_values
from mmpost.config.dump import leaves, to_yaml
from mmpost.config.load import load
from mmpost.config.schema import GrpoSection, RewardSpec, RolloutSection, RunConfig, Settings
from mmpost.core.errors import MmpostError

_TIMES = "\N{MULTIPLICATION SIGN}"
_VALID = "Valid gradient_accumulation_steps with this micro-batch:"


class Options(Settings):
    """What the configurations of all commands can do, whatever their sections are."""

    # A command needs one of these classes; building the validators of the others would slow down every start.
    model_config = ConfigDict(defer_build=True)

    def __init__(self, **values: Any) -> None:
        """Take sections and bare option names alike.

        Args:
            values: ``train=...`` as a section object or a dict; ``max_steps=20`` where that name is unique.

        Raises:
            MmpostError: MMP-C001 unknown name, MMP-C003 ambiguous name, MMP-C004 wrong value, MMP-C005 given
                twice; ManyErrors with all of them.
        """
        super().__init__(**config_values(type(self), values))

    @classmethod
    def from_yaml(cls, path: str | Path | Sequence[str | Path], *overrides: str) -> Self:
        """Read one file, or several of which later ones win, then apply ``"train.seed=1"`` and the like.

        Raises:
            MmpostError: As ``mmpost.config.load.load``.
        """
        files = [path] if isinstance(path, str | Path) else path
        return load(cls, files, overrides).config

    def to_yaml(self) -> str:
        """All options as YAML; ``from_yaml`` gives an equal configuration."""
        return to_yaml(self, {}, {})

    def diff(self, other: Settings) -> dict[str, tuple[Any, Any]]:
        """Options that differ, as dotted name: (here, there); None where an option is missing on one side.

        Lists of sources or rewards are compared item by item when they are equally long, else as a whole.
        """
        here, there = dict(leaves(self, other)), dict(leaves(other, self))
        absent = object()
        return {
            name: (here.get(name), there.get(name))
            for name in [*here, *(name for name in there if name not in here)]
            if here.get(name, absent) != there.get(name, absent)
        }


class CommandConfig(Options, RunConfig):
    """The configurations of commands that train a model on rows."""

    model_config = ConfigDict(defer_build=True)

    command: ClassVar[Literal["sft", "grpo", "upt"]]


class SFTConfig(CommandConfig):
    """Supervised fine-tuning.

    >>> config = SFTConfig(output_dir="runs/first", max_steps=20, learning_rate=1e-4)
    >>> config.train.max_steps
    20
    """

    command: ClassVar[Literal["sft", "grpo", "upt"]] = "sft"


class GRPOConfig(CommandConfig):
    """Reinforcement learning with verifiable rewards.

    >>> GRPOConfig(num_generations=4, rewards="format").rewards[0].name
    'format'
    """

    command: ClassVar[Literal["sft", "grpo", "upt"]] = "grpo"

    grpo: GrpoSection = Field(default_factory=GrpoSection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    rewards: list[RewardSpec] = Field([], description="reward functions; a name or a list of names is accepted")

    @field_validator("rewards", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict) else value


def check_batch(config: RunConfig, world: int, sources: Mapping[str, str] | None = None) -> None:
    """Check that the batch options give the same number of rows from both sides.

    GRPO: prompts_per_step x num_generations = world x per_device_train_batch_size x
    gradient_accumulation_steps, with mini_batches > 1 per mini-batch.
    SFT: batch_size = world x per_device_train_batch_size x gradient_accumulation_steps.
    Without gradient_accumulation_steps there is nothing to check, because that number is derived.

    Args:
        config: The configuration of the run.
        world: Number of processes, at least 1.
        sources: Where the options were written, as in ``Loaded.sources``; named in the message.

    Raises:
        MmpostError: MMP-C020 with both products and the values that would fit.
    """
    train = config.train
    steps, micro = train.gradient_accumulation_steps, train.per_device_train_batch_size
    if steps is None:
        return
    if isinstance(config, GRPOConfig):
        grpo = config.grpo
        total = grpo.prompts_per_step * grpo.num_generations
        product = f"{grpo.prompts_per_step} prompts {_TIMES} {grpo.num_generations} generations"
        left = f"{product} = {total} completions per step"
        names = ["grpo.prompts_per_step", "grpo.num_generations"]
        if grpo.mini_batches > 1:
            left = f"{left} in {grpo.mini_batches} mini-batches"
            names.append("grpo.mini_batches")
        mini_batches = grpo.mini_batches
    elif train.batch_size is not None:
        total, mini_batches, names = train.batch_size, 1, ["train.batch_size"]
        left = f"batch_size is {total} rows per step"
    else:
        return
    got = world * micro * steps
    if got * mini_batches == total:
        return
    names += ["train.per_device_train_batch_size", "train.gradient_accumulation_steps"]
    devices = f"{world} device{'s' if world > 1 else ''}"
    raise MmpostError(
        "MMP-C020",
        f"{_places(names, sources or {})}{left}, but {devices} {_TIMES} {micro} {_TIMES} {steps} = {got}.",
        _batch_advice(total, mini_batches * world, micro),
    )


def _places(names: Sequence[str], sources: Mapping[str, str]) -> str:
    """``grpo.yaml:8,12: `` for the options that were written somewhere."""
    lines: dict[str, list[int]] = {}
    for name in names:
        source = sources.get(name, "default")
        label, _, line = source.rpartition(":")
        if label and line.isdigit():
            lines.setdefault(label, []).append(int(line))
        elif source != "default":
            lines.setdefault(source, [])
    places = [f"{label}:{','.join(map(str, sorted(found)))}" if found else label for label, found in lines.items()]
    return f"{', '.join(places)}: " if places else ""


def _batch_advice(total: int, parts: int, micro: int) -> str:
    """Values of the other factors that would fit.

    Args:
        total: Rows of the left-hand side.
        parts: What they are divided by before a device sees them: devices, times mini-batches.
        micro: Rows per forward pass.
    """
    if total % parts:
        return f"{total} cannot be shared among {parts}: make it {_near(total, parts)}."
    share = total // parts
    if share % micro == 0:
        return f"{_VALID} {share // micro}."
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    above = min((size for size in divisors if size > micro), default=None)
    below = max((size for size in divisors if size < micro), default=None)
    fits = " or ".join(f"{size} ({share // size} steps)" for size in (above, below) if size is not None)
    return f"{_VALID} none; set per_device_train_batch_size to {fits}."


def _near(total: int, parts: int) -> str:
    lower, upper = total // parts * parts, math.ceil(total / parts) * parts
    return f"{lower} or {upper}" if lower else str(upper)
