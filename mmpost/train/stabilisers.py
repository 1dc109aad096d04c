"""Factors M that keep a step from going too far: masks and weights that multiply, in the order they are listed.

A stabiliser is any callable from positions and ratio to M ``[M]`` in [0, inf). One that knows the value which its
paper maximises has a method ``value`` besides; one that needs numbers of the whole step has ``survey``.

Sources: PPO, arXiv 1707.06347 (``Clip``); arXiv 1912.09729 (``Dual``); INTELLECT-2, arXiv 2505.07291 (``Delta``);
arXiv 2511.20347 (``Sapo``); arXiv 2602.10693 (``Vespo``); LUFFY, arXiv 2504.14945 (``Luffy``); DeepSeek-V3.2,
arXiv 2512.02556 (``OffSequence``); arXiv 2506.01939 (``EntropyTop``); arXiv 2505.22617 (``ClipCov``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mmpost.train.estimator import clip_mask, log_ratio
from mmpost.train.positions import Positions

Stabiliser = Callable[[Positions, Tensor], Tensor]
# Lower limit of a row's log-ratio in ``Vespo``, as released.
_LOG_FLOOR = math.log(1e-8)


@runtime_checkable
class Valued(Protocol):
    """A stabiliser with a published value."""

    def value(self, p: Positions, ratio: Tensor, value: Tensor) -> Tensor:
        """What is maximised per position, made from what the parts before it maximise."""
        ...


@dataclass(frozen=True, slots=True)
class Survey:
    """All trained positions of a step over all processes, float64 ``[N]`` each."""

    logp: np.ndarray
    entropy: np.ndarray
    advantage: np.ndarray


@runtime_checkable
class Surveyor(Protocol):
    """A stabiliser that looks at the whole step first, which costs one more forward pass."""

    def survey(self, step: Survey) -> dict[str, float]:
        """Numbers that it will find in ``Positions.facts`` under the name of its class."""
        ...


@dataclass(frozen=True, slots=True)
class Clip:
    """min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A): 0 where the clipped branch decides.

    Attributes:
        epsilon: Lower distance.
        epsilon_high: Upper distance; None for the lower one.
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None

    @property
    def high(self) -> float:
        """Upper distance."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def __call__(self, p: Positions, ratio: Tensor) -> Tensor:
        """M, ``[M]``."""
        return clip_mask(ratio, p.advantage, self.epsilon, self.high)

    def value(self, p: Positions, ratio: Tensor, value: Tensor) -> Tensor:
        """The minimum of both branches."""
        return torch.minimum(value, ratio.clamp(1 - self.epsilon, 1 + self.high) * p.advantage)


@dataclass(frozen=True, slots=True)
class Dual:
    """max(., c A) for negative advantages: 0 where the ratio exceeds ``cap``. List it behind ``Clip``."""

    cap: float = 3.0

    def __call__(self, p: Positions, ratio: Tensor) -> Tensor:
        """M, ``[M]``."""
        return (~((p.advantage < 0) & (ratio > self.cap))).to(ratio.dtype)

    def value(self, p: Positions, ratio: Tensor, value: Tensor) -> Tensor:
        """At least ``cap`` times a negative advantage."""
        return torch.where(p.advantage < 0, torch.maximum(value, self.cap * p.advantage), value)


@dataclass(frozen=True, slots=True)
class Delta:
    """Ratios cut at ``delta`` for both signs: 0 above it. List it before ``Clip``."""

    delta: float = 4.0

    def __call__(self, p: Positions, ratio: Tensor) -> Tensor:
        """M, ``[M]``."""
        return (ratio <= self.delta).to(ratio.dtype)

    def value(self, p: Positions, ratio: Tensor, value: Tensor) -> Tensor:
        """With the ratio cut."""
        return ratio.clamp(max=self.delta) * p.advantage


@dataclass(frozen=True, slots=True)
class Sapo:
    """4 s (1 - s) with s = sigmoid(tau (rho - 1)): a clip without edges, 1 at rho = 1.

    Attributes:
        positive: tau of positive advantages.
        negative: tau of the others.
    """

    positive: float = 1.0
    negative: float = 1.05

    def _gate(self, p: Positions, ratio: Tensor) -> tuple[Tensor, Tensor]:
        tau = torch.where(p.advantage > 0, self.positive, self.negative).to(ratio.dtype)
        return tau, torch.sigmoid(tau * (ratio - 1))

    def __call__(self, p: Positions, ratio: Tensor) -> Tensor:
        """M, ``[M]``."""
        _, gate = self._gate(p, ratio)
        return 4 * gate * (1 - gate)

    def value(self, p: Positions, ratio: Tensor, value: Tensor) -> Tensor:
        """4 s / tau * A."""
        tau, gate = self._gate(p, ratio)
        return 4 * gate / tau * p.advantage


@dataclass(frozen=True, slots=True)
class Vespo:
    """exp(lambda) W^k exp(-lambda W) of the row's ratio W = exp(sum of log-ratios): 1 at W = 1. Used with ``self``.

    Attributes:
        k_positive: Exponent for advantages of at least 0.
        lambda_positive: Decay for advantages of at least 0.
        k_negative: Exponent for negative advantages.
        lambda_negative: Decay for negative advantages.
    """

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0

    def __call__(self, p: Positions, ratio: Tensor) -> Tensor:
        """M, ``[M]``."""
        log_row = p.row_sum(log_ratio(p.logp, p.old)).clamp(_LOG_FLOOR, 20.0)
        good = p.advantage >= 0
        k = torch.where(good, self.k_positive, self.k_negative).to(log_row.dtype)
        decay = torch.where(good, self.lambda_positive, self.lambda_negative).to(log_row.dtype)
        return (decay + k * log_row - decay * log_row.exp()).exp()


@dataclass(frozen=True, slots=True)
class Luffy:
    """gamma / (pi + gamma)^2, used with ``one``: the gradient of pi / (pi + gamma)."""

    gamma: float = 0.1

    def __call__(self, p: Positions, ratio: Tensor) -> Tensor:
        """M, ``[M]``."""
        return self.gamma / (p.logp.exp() + self.gamma) ** 2

    def value(self, p: Positions, ratio: Tensor, value: Tensor) -> Tensor:
        """pi / (pi + gamma) * A."""
        chance = p.logp.exp()
        return chance / (chance + self.gamma) * p.advantage


@dataclass(frozen=True, slots=True)
class OffSequence:
    """0 on rows with a negative advantage that the policy has moved away from: mean(old - logp) > ``delta``.

    What the engine reported takes the place of ``old`` where it is known, so that both kinds of distance count.
    """

    delta: float = 0.5

    def __call__(self, p: Positions, ratio: Tensor) -> Tensor:
        """M, ``[M]``."""
        behaviour = p.old if p.engine is None else p.engine
        gap = torch.nan_to_num(behaviour - p.logp, nan=0.0, posinf=0.0, neginf=0.0)
        return (~((p.advantage < 0) & (p.row_mean(gap) > self.delta))).to(ratio.dtype)


@dataclass(frozen=True, slots=True)
class EntropyTop:
    """1 on the ``share`` of the step's positions with the highest entropy, else 0."""

    share: float = 0.2

    def survey(self, step: Survey) -> dict[str, float]:
        """The entropy that a position must reach."""
        return {"least": float(np.quantile(step.entropy, 1 - self.share)) if len(step.entropy) else 0.0}

    def __call__(self, p: Positions, ratio: Tensor) -> Tensor:
        """M, ``[M]``."""
        assert p.entropy is not None
        # The forward pass here and the one of the survey may differ in the last bits.
        least = p.facts["EntropyTop"]["least"]
        return (p.entropy >= least - 1e-6 * abs(least)).to(ratio.dtype)


@dataclass(frozen=True, slots=True)
class ClipCov:
    """0 on the ``share`` of positions with the largest (log pi - mean)(A - mean), if that lies in [low, high].

    The release draws the positions at random from that range; the largest ones are taken here, so that a step does
    not depend on how it was split.
    """

    share: float = 2e-4
    low: float = 1.0
    high: float = 5.0

    def survey(self, step: Survey) -> dict[str, float]:
        """Means, and the covariance from which positions are dropped."""
        if not len(step.logp):
            return {"logp": 0.0, "advantage": 0.0, "least": math.inf}
        means = float(step.logp.mean()), float(step.advantage.mean())
        covariance = (step.logp - means[0]) * (step.advantage - means[1])
        inside = np.sort(covariance[(covariance > self.low) & (covariance < self.high)])
        count = max(int(self.share * len(covariance)), 1)
        least = float(inside[-count:][0]) if len(inside) else math.inf
        return {"logp": means[0], "advantage": means[1], "least": least}

    def __call__(self, p: Positions, ratio: Tensor) -> Tensor:
        """M, ``[M]``."""
        facts = p.facts["ClipCov"]
        covariance = (p.logp - facts["logp"]) * (p.advantage - facts["advantage"])
        least = facts["least"]
        return (~((covariance >= least - 1e-6 * abs(least)) & (covariance < self.high))).to(ratio.dtype)


# By the name in ``loss.stabilise``.
STABILISERS: dict[str, Callable[..., Any]] = {
    "clip": Clip,
    "dual": Dual,
    "delta": Delta,
    "sapo": Sapo,
    "vespo": Vespo,
    "luffy": Luffy,
    "offseq": OffSequence,
    "entropy_top": EntropyTop,
    "clip_cov": ClipCov,
}
