"""One estimator for every objective.

Source: "Towards a Unified View of Large Language Model Post-Training", arXiv 2509.04419: the gradient of every
post-training objective is stabilisation mask x 1/reference policy x advantage x gradient of the likelihood. With
rho = pi / pi_ref and the log-derivative this is, for each trained position m,

    kappa_m = w_m * M_m * rho_m * A_m    (all detached)        L = - sum_m kappa_m * log pi_m

An aggregation weight w is added to the paper's four parts, because it is where many objectives differ. A KL penalty is
a shift of the coefficient that the stabiliser does not touch. ``L`` has the right gradient; its value means nothing.

Everything here is flat: vectors over the M trained positions, with ``row`` giving each position's row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregate = Literal["token", "seq_mean", "const", "seq_sum", "micro_token"]
# Log-ratios beyond this are cut before exp, so that a stale row cannot overflow.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class Terms:
    """What a method says about each trained position, all ``[M]`` and detached.

    Attributes:
        stabiliser: Factor M in [0, inf); usually 0 or 1.
        ratio: rho = pi / pi_ref.
        advantage: A.
        kl_shift: Subtracted from M * rho * A; the gradient coefficient of beta times the KL penalty.
        objective: Value per position that the method's paper maximises, penalty included, for the log only.
        removed: Positions that each stabiliser sets to 0, counts in the order of the stabilisers.
        clipped: Number of positions set to 0 because they went too far, not because of what the step looks like.
    """

    stabiliser: Tensor
    ratio: Tensor
    advantage: Tensor
    kl_shift: Tensor | None = None
    objective: Tensor | None = None
    removed: tuple[Tensor, ...] = ()
    clipped: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """Sizes of the whole optimiser step, over all processes and micro-batches.

    Attributes:
        positions: N, number of trained positions.
        rows: R*, number of rows that count (rows with trained positions, and rows skipped because their advantage
            is zero).
        max_length: Longest completion allowed; only ``const`` uses it.
        micro_batches: Forward passes of the step; only ``micro_token`` uses it.
    """

    positions: int
    rows: int
    max_length: int = 1
    micro_batches: int = 1


def aggregation_weight(name: Aggregate, row: Tensor, row_lengths: Tensor, counts: Counts) -> Tensor:
    """Share w of each position in the step's mean, ``[M]`` float64.

    Args:
        name: ``token`` 1/N, ``seq_mean`` 1/(R* n_row), ``const`` 1/(R* max_length), ``seq_sum`` 1/R*;
            ``micro_token`` 1/(M * micro-batches), the only one that depends on how the step is split.
        row: Row of each position, int64 ``[M]``.
        row_lengths: Trained positions of each row of this micro-batch, ``[rows]``.
        counts: Sizes of the whole step, so that splitting it changes nothing.
    """
    rows = max(counts.rows, 1)
    if name == "seq_mean":
        return 1.0 / (rows * row_lengths.clamp(min=1)[row].double())
    share = {
        "token": 1.0 / max(counts.positions, 1),
        "const": 1.0 / (rows * counts.max_length),
        "seq_sum": 1.0 / rows,
        "micro_token": 1.0 / (max(len(row), 1) * max(counts.micro_batches, 1)),
    }
    return torch.full(row.shape, share[name], device=row.device, dtype=torch.float64)


def coefficient(weight: Tensor, terms: Terms) -> Tensor:
    """kappa ``[M]``, detached. A position that the stabiliser removes is exactly 0 even if its ratio is not finite."""
    policy = torch.where(terms.stabiliser == 0, 0.0, terms.stabiliser * terms.ratio * terms.advantage)
    total = policy if terms.kl_shift is None else policy - terms.kl_shift
    return (weight * total).detach()


def surrogate(logp: Tensor, kappa: Tensor) -> Tensor:
    """Scalar whose gradient is the estimator's.

    Args:
        logp: ``[M]`` log-probabilities under the policy, nats, with gradient.
        kappa: ``[M]`` coefficients.
    """
    return -(kappa.detach() * logp).sum()


def log_ratio(logp: Tensor, other: Tensor) -> Tensor:
    """log pi - log other, detached and limited to +-20."""
    return (logp.detach() - other.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clip_mask(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """1 where the unclipped branch of min(rho A, clip(rho, 1 - low, 1 + high) A) decides, else 0; ``[M]``."""
    outside = ((ratio > 1 + high) & (advantage > 0)) | ((ratio < 1 - low) & (advantage < 0))
    return (~outside).to(ratio.dtype)


def kl_coefficient(kind: Literal["k2", "k3", "rho_k3"], logp: Tensor, other: Tensor, ratio: Tensor) -> Tensor:
    """Gradient coefficient g of the KL estimator, ``[M]``: the penalty's gradient is g times that of log pi.

    Source: "Approximating KL divergence" estimators k2, k3. ``k2`` is log(pi/other): on-policy exactly the gradient of
    KL(pi || other). ``rho_k3`` is its off-policy form. ``k3`` is 1 - other/pi as in the GRPO paper; its expected
    gradient is that of the other direction, KL(other || pi). The coefficient of ``k1`` would be 1, whose expectation
    is no gradient at all, so there is no k1.

    Args:
        kind: Estimator.
        logp: Under the policy.
        other: Under the other model.
        ratio: pi / pi_old, whatever the objective divides by.
    """
    log_pi_other = log_ratio(logp, other)
    if kind == "k2":
        return log_pi_other
    if kind == "k3":
        return 1 - (-log_pi_other).exp()
    return ratio * log_pi_other


def kl_estimate(kind: Literal["k2", "k3", "rho_k3"], logp: Tensor, other: Tensor, ratio: Tensor) -> Tensor:
    """Value of the estimator whose gradient ``kl_coefficient`` gives, ``[M]``; for the log."""
    if kind == "k2":
        return 0.5 * log_ratio(logp, other) ** 2
    k3 = kl_value(logp, other)
    return k3 if kind == "k3" else ratio * k3


def kl_value(logp: Tensor, other: Tensor) -> Tensor:
    """Non-negative estimate k3 of KL(pi || other) per position, ``[M]``; for the log."""
    difference = log_ratio(logp, other)
    return (-difference).exp() - 1 + difference
