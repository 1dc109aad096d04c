"""Who samples completions: the trainer's own decode loop, transformers' ``generate``, or vLLM.

All engines answer the same call with the same record, so that the rest of the run does not know which one it has.
Shapes: an engine gets distinct prompts and fans out to ``n`` completions itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mmpost.config.schema import RolloutSection
from mmpost.core import seeding
from mmpost.core.batch import Encoded
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Rollout
from mmpost.core.sample import Sample
from mmpost.models.policy import Policy
from mmpost.rollout.generate import Sampling, complete
from mmpost.rollout.static import StaticDecoder, usable

# Name in ``rollout.engine`` (and ``vllm_mode``) to the class; nothing is imported before it is asked for.
ENGINES = {
    "native": "mmpost.rollout.engine:NativeEngine",
    "transformers": "mmpost.rollout.transformers_engine:TransformersEngine",
    "vllm-server": "mmpost.rollout.vllm_engine:VllmServer",
    "vllm-colocate": "mmpost.rollout.vllm_colocate:VllmColocate",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in both forms: what the trainer's model eats, and what an engine with its own processor is given.

    Attributes:
        encoded: Token ids with placeholders expanded, and media tensors.
        uid: Number of the prompt in the run; keys the random draws.
        sample: The row without its answer; its media are undecoded.
    """

    encoded: Encoded
    uid: int
    sample: Sample


@dataclass(frozen=True, slots=True)
class Setup:
    """What an engine is built from.

    Attributes:
        section: The options.
        policy: The bare module that trains.
        adapter: Pads prompts and decodes completions.
        model: Folder or hub id of the weights that the run began with.
        batch_size: Completions decoded together by the engines of this process.
        rank: Number of this process.
        barrier: Waits for all processes.
    """

    section: RolloutSection
    policy: Policy
    adapter: Any
    model: str
    batch_size: int
    rank: int = 0
    barrier: Callable[[], None] = lambda: None


class Engine(Protocol):
    """Samples completions with the weights of the newest ``sync``.

    Attributes:
        name: For logs.
        exact: True when weights and numerics are the trainer's own, so that nothing has to be corrected for.
        version: The weights that the next completions come from; None before the first ``sync``.
        unknown: Tokens so far whose log-probability the engine did not give; it is NaN in ``Rollout.logp``.
    """

    name: str
    exact: bool
    version: int | None
    unknown: int

    def complete(
        self, prompts: Sequence[Prompt], *, n: int, sampling: Sampling, first_generation: Sequence[int] | int = 0
    ) -> list[list[Rollout]]:
        """Sample ``n`` completions of each prompt.

        Args:
            prompts: Distinct prompts.
            n: Completions per prompt.
            sampling: Length, temperature, nucleus, seed.
            first_generation: Number of each prompt's first completion, when it has been completed before.

        Returns:
            Rollouts per prompt in generation order. ``logp`` is in nats at the sampling temperature.
        """
        ...

    def sync(self, policy: Policy, version: int) -> None:
        """Take over the weights of ``policy``; does nothing when ``version`` is the one it has.

        Every process of the run calls it, with the same version.
        """
        ...

    def close(self) -> None:
        """Release what the engine holds."""
        ...


def open_engine(setup: Setup) -> Engine:
    """The engine that ``setup.section`` names.

    Raises:
        MmpostError: MMP-E010 when its library is missing, MMP-E060 to MMP-E063 when its server is not usable.
    """
    name: str = setup.section.engine
    if name == "vllm":
        name = f"vllm-{setup.section.vllm.vllm_mode}"
    engine: Engine = Catalog("engines", ENGINES).get(name)(setup)
    return engine


class NativeEngine:
    """The trainer's own decode loop; draws depend on (seed, prompt, generation, position) alone.

    Raises:
        MmpostError: MMP-C067 for ``rollout.compile=true`` without ``rollout.cache=static``; later MMP-E066 when the
            model cannot be compiled.
    """

    name = "native"
    exact = True

    def __init__(self, setup: Setup) -> None:
        self.policy, self.adapter, self.batch_size = setup.policy, setup.adapter, setup.batch_size
        self.section = setup.section
        if self.section.compile is True and self.section.cache == "dynamic":
            raise MmpostError(
                "MMP-C067",
                "rollout.compile is true, but with rollout.cache=dynamic the shapes change at every token.",
                "Set rollout.cache=static.",
            )
        self.static: StaticDecoder | None = None
        self.version: int | None = None
        self.unknown = 0

    def complete(
        self, prompts: Sequence[Prompt], *, n: int, sampling: Sampling, first_generation: Sequence[int] | int = 0
    ) -> list[list[Rollout]]:
        """See ``Engine``."""
        return complete(
            self.policy,
            self.adapter,
            [prompt.encoded for prompt in prompts],
            [prompt.uid for prompt in prompts],
            n=n,
            sampling=sampling,
            batch_size=self.batch_size,
            first_generation=first_generation,
            static=self._decoder(),
        )

    def _decoder(self) -> StaticDecoder | None:
        """The decoder of fixed shapes, where it is asked for and the model can use it."""
        if self.section.cache == "static" and (self.static is None or self.static.policy is not self.policy):
            if not usable(self.policy):
                self.section = self.section.model_copy(update={"cache": "dynamic"})
                return None
            self.static = StaticDecoder(self.policy, self.adapter, self.section.compile)
        return self.static

    def sync(self, policy: Policy, version: int) -> None:
        """See ``Engine``; the weights are the trainer's own already."""
        self.policy, self.version = policy, version

    def close(self) -> None:
        """See ``Engine``."""
        self.static = None


def first_of_each(first_generation: Sequence[int] | int, count: int) -> list[int]:
    """``first_generation`` as one number per prompt."""
    return [int(first) for first in np.broadcast_to(np.asarray(first_generation), count)]


def request_seed(seed: int, uid: int, first_generation: int) -> int:
    """Seed of a request to an engine that draws by itself.

    Engines add the index of a completion to it, so completion ``g`` of a prompt has the same seed whether it was asked
    for in one go or later. Non-negative and below 2^49.
    """
    return int(seeding.uniform(seed, "engine", uid) * 2**48) + first_generation
