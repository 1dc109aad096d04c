"""A post-training method as data: which rows it trains on, what credit they get, and the parts of its estimator.

Every file in ``mmpost/algos`` defines ``preset(**constants) -> Method``; the constants have the paper's values as
defaults and are what ``loss.args`` may change. The loop asks a ``Method`` and never which method it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from mmpost.core.batch import Encoded
from mmpost.core.rollout import Group
from mmpost.train.draw import Draw
from mmpost.train.parts import Parts
from mmpost.train.soft import Soft


@dataclass(frozen=True, slots=True)
class Scored:
    """One group in numbers; small, so that all processes can see the groups of all.

    Attributes:
        uid: Number of the prompt in the run.
        source: Name of its data source.
        scores: Per completion after shaping; None where no reward applies.
        lengths: Tokens per completion.
        truncated: Per completion, whether the length limit ended it.
        drawn: Completions that were sampled of the prompt, those not kept included.
        positive: How many of these had a score above the method's threshold.
        components: Per reward function its scores, one per completion; empty where the method asks for sums only.
        weights: Factor of each reward function in the sum.
    """

    uid: int
    source: str
    scores: tuple[float | None, ...]
    lengths: tuple[int, ...]
    truncated: tuple[bool, ...]
    drawn: int = 0
    positive: int = 0
    components: tuple[tuple[float | None, ...], ...] = ()
    weights: tuple[float, ...] = ()


class Advantage(Protocol):
    """Credit from scores."""

    def __call__(self, groups: Sequence[Scored], state: dict[str, Any]) -> list[np.ndarray]:
        """Advantages per group, float64 ``[G]`` each; NaN for a completion that shall not train.

        Args:
            groups: All groups of the step over all processes, in the order of their uids.
            state: Plain JSON that the method keeps between steps (running quantiles); it is part of a checkpoint.
        """
        ...


# Scores of one group made from those that the rewards gave; sees texts and tokens of this process's groups.
Shape = Callable[[Group], list[float | None]]


@dataclass(frozen=True, slots=True)
class Method:
    """What a method does with a step.

    Attributes:
        rollout: Parts for completions of the policy; None when the method has none (supervised fine-tuning).
        demo: Parts for demonstrations; None when the method has none.
        advantage: Credit of completions; None only without ``rollout``. Demonstrations have credit 1.
        shape: Change the scores of a group, one after the other, before advantages are made.
        draw: How many completions of which prompts make a step.
        gate: True for a group that is trained on its demonstration instead of its completions. Without a gate every
            group is trained on both, where the method has parts for demonstrations.
        joins: Demonstrations are scored as the last completion of their group and get the credit that comes of it.
        demo_weight: Factor on the demonstrations' share of the loss.
        soft: Terms over the whole vocabulary (KL to another model, entropy bonus).
        encode: Change to encoded rows before they train (ids, targets), with the tokenizer and a row number.
        keep: Which positions of demonstrations train, from their log-probabilities and entropies.
    """

    rollout: Parts | None = None
    demo: Parts | None = None
    advantage: Advantage | None = None
    shape: tuple[Shape, ...] = ()
    draw: Draw = field(default_factory=Draw)
    gate: Callable[[Scored], bool] | None = None
    joins: bool = False
    demo_weight: float = 1.0
    soft: tuple[Soft, ...] = ()
    encode: Callable[[Encoded, Any, int], Encoded] | None = None
    keep: Callable[[Mapping[str, Any]], Sequence[np.ndarray]] | None = None

    @property
    def parts(self) -> tuple[Parts, ...]:
        """Parts of all kinds of rows that the method has."""
        return tuple(part for part in (self.rollout, self.demo) if part is not None)

    @property
    def anchored(self) -> bool:
        """Whether completions move the policy, or a statistic of the step, even with an advantage of 0."""
        pulled = any(soft.weight and soft.rows != "demo" for soft in self.soft)
        parts = self.rollout
        return pulled or (parts is not None and (parts.kl.is_on or bool(parts.surveyors)))

    def asks(self, other: Literal["reference", "teacher"]) -> bool:
        """Whether log-probabilities of sampled tokens under another model are needed."""
        return any(part.kl.is_on and part.kl.to == other for part in self.parts)

    def compares(self, other: Literal["reference", "teacher"]) -> bool:
        """Whether the whole distribution of another model is needed at each position."""
        return any(soft.weight and soft.kind != "entropy" and soft.to == other for soft in self.soft)
