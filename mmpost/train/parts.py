"""The four pluggable parts of the estimator, and how a choice of parts becomes its terms.

A method is a ``Parts`` value: which aggregation, which denominator, which stabilisers, which advantage. The loop never
asks which method runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mmpost.config.schema import LossSection
from mmpost.train import estimator
from mmpost.train.estimator import Aggregate, Terms


@dataclass(frozen=True, slots=True)
class Positions:
    """What is known of each trained position of a micro-batch when its coefficient is made; all ``[M]``, detached.

    Attributes:
        logp: Under the policy.
        old: Under the policy that is held fixed while a rollout batch is used; equal to ``logp`` on-policy.
        advantage: Of the position's row.
        reference: Under the reference model, or None when there is no penalty.
    """

    logp: Tensor
    old: Tensor
    advantage: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Parts:
    """A method.

    Attributes:
        aggregate: How positions are weighted in the step's mean.
        denominator: Key of ``DENOMINATORS``.
        stabilise: Keys of ``STABILISERS``; they multiply.
        advantage: Key of ``advantages.ADVANTAGES``.
        epsilon: Lower clip distance.
        epsilon_high: Upper clip distance.
        kl: Estimator of the penalty.
        beta: Weight of the penalty.
    """

    aggregate: Aggregate
    denominator: str
    advantage: str
    stabilise: tuple[str, ...] = ()
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    kl: Literal["k2", "k3", "rho_k3"] = "k2"
    beta: float = 0.0

    def override(self, section: LossSection) -> Parts:
        """The preset with the user's choices in it."""
        chosen: dict[str, object] = {
            name: getattr(section, name)
            for name in ("aggregate", "denominator", "advantage", "epsilon")
            if getattr(section, name) is not None
        }
        if section.stabilise is not None:
            chosen["stabilise"] = tuple(section.stabilise)
        high = section.epsilon_high if section.epsilon_high is not None else section.epsilon
        if high is not None:
            chosen["epsilon_high"] = high
        return replace(self, kl=section.kl.kl, beta=section.kl.beta, **chosen)  # type: ignore[arg-type]


def _self(p: Positions) -> Tensor:
    return torch.ones_like(p.logp)


def _old(p: Positions) -> Tensor:
    return estimator.log_ratio(p.logp, p.old).exp()


# rho = pi / pi_ref by the choice of pi_ref.
DENOMINATORS: dict[str, Callable[[Positions], Tensor]] = {"self": _self, "old": _old}


def _clip(p: Positions, ratio: Tensor, parts: Parts) -> Tensor:
    return estimator.clip_mask(ratio, p.advantage, parts.epsilon, parts.epsilon_high)


STABILISERS: dict[str, Callable[[Positions, Tensor, Parts], Tensor]] = {"clip": _clip}


def terms(parts: Parts, p: Positions) -> Terms:
    """The method's terms at each position."""
    ratio = DENOMINATORS[parts.denominator](p)
    stabiliser = torch.ones_like(ratio)
    for name in parts.stabilise:
        stabiliser = stabiliser * STABILISERS[name](p, ratio, parts)
    shift = None
    if p.reference is not None and parts.beta:
        shift = parts.beta * estimator.kl_coefficient(parts.kl, p.logp, p.reference, ratio)
    objective = ratio * p.advantage
    if "clip" in parts.stabilise:
        clipped = ratio.clamp(1 - parts.epsilon, 1 + parts.epsilon_high)
        objective = torch.minimum(objective, clipped * p.advantage)
    return Terms(stabiliser, ratio, p.advantage, shift, objective)
