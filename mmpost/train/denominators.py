"""The reference measure of the policy ratio, rho = pi / pi_ref: what the estimator divides by.

Sources: Table 1 of arXiv 2509.04419 (``self``, ``one``, ``old``); GSPO, arXiv 2507.18071 (``seq``); CISPO,
arXiv 2506.13585 (``capped``); ``behaviour`` divides by what the rollout engine sampled from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpost.train.estimator import log_ratio
from mmpost.train.positions import Positions


@dataclass(frozen=True, slots=True)
class Denominator:
    """A ratio with its name.

    Attributes:
        name: As in ``loss.denominator``.
        ratio: From positions to rho, ``[M]``, detached.
        is_weight: The published objective is ``rho * A * log pi`` with rho fixed; else it is ``rho * A`` itself. Both
            have the same gradient, so that this matters for the logged value only.
        by_row: All positions of a row share the ratio.
    """

    name: str
    ratio: Callable[[Positions], Tensor]
    is_weight: bool = False
    by_row: bool = False

    def __call__(self, p: Positions) -> Tensor:
        """rho, ``[M]``."""
        return self.ratio(p)


def _engine(p: Positions) -> Tensor:
    if p.engine is None:
        return log_ratio(p.logp, p.old).exp()
    return log_ratio(p.logp, torch.where(p.engine.isfinite(), p.engine, p.old)).exp()


OWN = Denominator("self", lambda p: torch.ones_like(p.logp), is_weight=True)
ONE = Denominator("one", lambda p: p.logp.exp(), is_weight=True)
OLD = Denominator("old", lambda p: log_ratio(p.logp, p.old).exp())
SEQUENCE = Denominator("seq", lambda p: p.row_mean(log_ratio(p.logp, p.old)).exp(), by_row=True)
BEHAVIOUR = Denominator("behaviour", _engine)


def capped(cap: float = 5.0, low: float | None = None) -> Denominator:
    """pi / pi_old cut at ``cap`` and, unless None, at ``low`` from below; cut positions keep their gradient."""
    return Denominator("capped", lambda p: log_ratio(p.logp, p.old).exp().clamp(low, cap), is_weight=True)


DENOMINATORS: dict[str, Denominator] = {
    denominator.name: denominator for denominator in (OWN, ONE, OLD, SEQUENCE, BEHAVIOUR, capped())
}
