"""Which source gives the next row, and which row: an endless sequence that is a function of the seed alone.

Proportions are exact, not random: after n draws each source has been drawn within one of n times its weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from mmpost.core.errors import MmpostError
from mmpost.core.seeding import generator


class Draw(NamedTuple):
    """One drawn row.

    Attributes:
        source: Index of the source.
        row: Index of the row in the source.
        epoch: How often this source had been gone through completely before.
    """

    source: int
    row: int
    epoch: int


class Sampler:
    """Draws from several sources in fixed proportions, each source in a new order every epoch.

    The state is one number per source, whatever the number of draws; the order of an epoch is computed from
    the seed.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int) -> None:
        """Start before the first draw.

        Args:
            sizes: Rows per source.
            weights: Share of each source; only ratios count. 0 means never.
            seed: Seed of the run.

        Raises:
            MmpostError: MMP-D020 for weights that are negative, not finite or all 0; MMP-D029 for a drawn
                source without rows.
        """
        if len(sizes) != len(weights):
            raise ValueError(f"{len(sizes)} sizes but {len(weights)} weights")
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise MmpostError("MMP-D020", f"mixture weights must be ≥ 0 and not all 0; got {list(weights)}")
        for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            if weight > 0 and size < 1:
                raise MmpostError("MMP-D029", f"source {source + 1} of {len(sizes)} has weight {weight} but no rows")
        self.sizes, self.weights, self.seed = [int(size) for size in sizes], [float(w) for w in weights], seed
        # Integers instead of floats: exact proportions after any number of draws.
        exact = [Fraction(weight) for weight in self.weights]
        common = math.lcm(*(share.denominator for share in exact))
        self._shares = [int(share * common) for share in exact]
        divisor = math.gcd(*self._shares)
        self._shares = [share // divisor for share in self._shares]
        self._total = sum(self._shares)
        self._drawn = [0] * len(self.sizes)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def position(self) -> int:
        """Draws made so far."""
        return sum(self._drawn)

    def draw(self, n: int) -> list[Draw]:
        """The next ``n`` draws; the same sequence however it is cut into calls."""
        return [self._next() for _ in range(n)]

    def _next(self) -> Draw:
        source = self._next_source()
        epoch, index = divmod(self._drawn[source], self.sizes[source])
        self._drawn[source] += 1
        return Draw(source, int(self._order(source, epoch)[index]), epoch)

    def _next_source(self) -> int:
        """The source whose next draw is due first, among those that would not get ahead by one.

        The j-th draw of a source with share w keeps it within one of n * w exactly if it happens after draw
        (j-1)/w and not after draw ceil(j/w). Earliest deadline first meets all such windows when the shares
        add up to 1, while taking the largest deficit can miss by more than one with three sources.
        Source: Baruah et al., "Proportionate Progress", Algorithmica 15 (1996), for one processor.
        """
        step = self.position + 1
        best, best_due = -1, (0, 0)
        for source, (share, drawn) in enumerate(zip(self._shares, self._drawn, strict=True)):
            if share == 0 or drawn * self._total >= step * share:
                continue
            due = (-(-(drawn + 1) * self._total // share), source)
            if best < 0 or due < best_due:
                best, best_due = source, due
        return best

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """Row indices of one epoch, int64 ``[size]``; only the current epoch of each source is kept."""
        kept = self._orders.get(source)
        if kept is None or kept[0] != epoch:
            order = generator(self.seed, "shuffle", source, epoch).permutation(self.sizes[source])
            kept = self._orders[source] = (epoch, order)
        return kept[1]

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs, ready for JSON."""
        return {
            "seed": self.seed,
            "sizes": self.sizes[:],
            "weights": self.weights[:],
            "drawn": self._drawn[:],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            MmpostError: MMP-D036 when seed, sizes or weights differ: the sequence would not be the same.
        """
        for name in ("seed", "sizes", "weights"):
            now, then = getattr(self, name), state[name]
            if now != then:
                raise MmpostError(
                    "MMP-D036",
                    f"the data are not those of the saved state: {name} were {then} and are {now}.",
                    "Resume with the same sources and seed, or start a new run",
                )
        self._drawn = [int(count) for count in state["drawn"]]
