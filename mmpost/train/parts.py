"""The pluggable parts of the estimator, and how a choice of parts becomes its terms.

Each part is a callable, so that a new objective needs no registration: write a function and name it in ``Parts``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from mmpost.train import estimator
from mmpost.train.denominators import OWN
from mmpost.train.estimator import Aggregate, Terms
from mmpost.train.mismatch import Mismatch
from mmpost.train.positions import Positions
from mmpost.train.stabilisers import Stabiliser, Surveyor, Valued


@dataclass(frozen=True, slots=True)
class Kl:
    """A penalty for leaving another model.

    Attributes:
        estimator: ``k2``, ``k3`` or ``rho_k3`` shift the coefficient (``estimator.kl_coefficient``); ``k1_reward``
            takes beta * sum of log(old / other) over the row off its advantage, as in RLHF.
        beta: Weight at the start of the run; 0 for no penalty.
        final_beta: Weight at the end, reached on a straight line; None for ``beta``.
        to: The starting weights or the teacher.
        rows: From a completion's score to whether its row is penalised; None for all rows.
        engine_weight: Whether the weight for the engine's mismatch acts on the penalty, too.
    """

    estimator: Literal["k2", "k3", "rho_k3", "k1_reward"] = "k2"
    beta: float = 0.0
    final_beta: float | None = None
    to: Literal["reference", "teacher"] = "reference"
    rows: Callable[[float | None], bool] | None = None
    engine_weight: bool = True

    @property
    def is_on(self) -> bool:
        """Whether it ever acts."""
        return bool(self.beta or self.final_beta)

    def at(self, progress: float) -> float:
        """Weight after a share of the run, in [0, 1]."""
        return self.beta if self.final_beta is None else self.beta + progress * (self.final_beta - self.beta)

    def other(self, p: Positions) -> Tensor | None:
        """Log-probabilities under the other model, where they are known."""
        return p.reference if self.to == "reference" else p.teacher


@dataclass(frozen=True, slots=True)
class Parts:
    """What an objective says about each trained position.

    Attributes:
        aggregate: How positions are weighted in the step's mean.
        denominator: From positions to rho = pi / pi_ref; ``denominators`` has the usual ones.
        stabilise: From positions and rho to factors, which multiply; ``stabilisers`` has the usual ones.
        kl: Penalty.
        mismatch: Weights for the distance to the rollout engine.
    """

    aggregate: Aggregate = "token"
    denominator: Callable[[Positions], Tensor] = OWN
    stabilise: tuple[Stabiliser, ...] = ()
    kl: Kl = Kl()
    mismatch: Mismatch = field(default_factory=Mismatch)

    @property
    def surveyors(self) -> list[Surveyor]:
        """Stabilisers that look at the whole step first."""
        parts: tuple[object, ...] = self.stabilise
        return [part for part in parts if isinstance(part, Surveyor)]


def terms(parts: Parts, p: Positions) -> Terms:
    """The objective's terms at each position: engine weight, stabilisers in their order, ratio, advantage, penalty."""
    p = parts.mismatch.applied(p)
    beta, other = parts.kl.at(p.progress), parts.kl.other(p)
    if beta and other is not None and parts.kl.estimator == "k1_reward":
        p = replace(p, advantage=p.advantage - _only_penalised(p, beta * p.row_sum(estimator.log_ratio(p.old, other))))
    ratio = parts.denominator(p)
    weight = parts.mismatch.weight(p)
    stabiliser = torch.ones_like(ratio) if weight is None else weight
    value = ratio * p.advantage * (p.logp if getattr(parts.denominator, "is_weight", False) else 1.0)
    removed, clipped = [], torch.zeros_like(ratio, dtype=torch.bool)
    for part in parts.stabilise:
        factor = part(p, ratio)
        stabiliser = stabiliser * factor
        removed.append((factor == 0).sum())
        clipped = clipped if isinstance(part, Surveyor) else clipped | (factor == 0)
        value = part.value(p, ratio, value) if isinstance(part, Valued) else factor * value
    if weight is not None:
        value = weight * value
    shift = None
    if beta and other is not None and parts.kl.estimator != "k1_reward":
        shift, penalty = _penalty(parts.kl, beta, p, other, weight)
        value = value - penalty
    return Terms(stabiliser, ratio, p.advantage, shift, value, tuple(removed), clipped.sum())


def _penalty(kl: Kl, beta: float, p: Positions, other: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradient coefficient and value of the penalty at each position."""
    assert kl.estimator != "k1_reward"
    ratio = estimator.log_ratio(p.logp, p.old).exp()
    shift = beta * estimator.kl_coefficient(kl.estimator, p.logp, other, ratio)
    value = beta * estimator.kl_estimate(kl.estimator, p.logp, other, ratio)
    if weight is not None and kl.engine_weight:
        shift, value = weight * shift, weight * value
    return _only_penalised(p, shift), _only_penalised(p, value)


def _only_penalised(p: Positions, values: Tensor) -> Tensor:
    return values if p.penalised is None else torch.where(p.penalised, values, torch.zeros_like(values))
