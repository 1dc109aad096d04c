"""What happened in one call of a reward function: counts that add up over calls and over processes."""

from __future__ import annotations

import math
import time
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any, Literal


@dataclass(slots=True)
class RewardStats:
    """Counts and sums of one reward; ``+`` joins those of two calls or processes.

    Attributes:
        completions: Completions that were to be scored.
        scored: Completions that got a score.
        failed: Completions without a score because the function failed (``on_error=null``).
        timed_out: Completions without a score because of a time limit, or because their worker process died.
        total: Sum of the scores, unweighted.
        total_squares: Sum of their squares.
        seconds: Wall time of the call.
    """

    completions: int = 0
    scored: int = 0
    failed: int = 0
    timed_out: int = 0
    total: float = 0.0
    total_squares: float = 0.0
    seconds: float = 0.0

    @property
    def mean(self) -> float | None:
        """Mean over scored completions; None when there is none."""
        return self.total / self.scored if self.scored else None

    @property
    def std(self) -> float | None:
        """Standard deviation over scored completions (divided by their number); None when there is none."""
        if not self.scored:
            return None
        # The difference of two equal sums may come out below 0 by rounding.
        return math.sqrt(max(0.0, self.total_squares / self.scored - (self.total / self.scored) ** 2))

    @property
    def share_not_applicable(self) -> float:
        """Share of completions to which the function itself gave None, in [0, 1]."""
        missing = self.completions - self.scored - self.failed - self.timed_out
        return missing / self.completions if self.completions else 0.0

    def add_scores(self, scores: list[float | None]) -> None:
        """Count the scores of a call."""
        known = [value for value in scores if value is not None]
        self.completions += len(scores)
        self.scored += len(known)
        self.total += math.fsum(known)
        self.total_squares += math.fsum(value * value for value in known)

    def __add__(self, other: RewardStats) -> RewardStats:
        return RewardStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(slots=True)
class Watch:
    """What a running call must keep to, and what it counts. Worker processes are run under the current one.

    Attributes:
        deadline: When the call has to be over, in seconds of ``time.monotonic``.
        on_error: ``null`` leaves out and counts what fails.
        stats: Where failures are counted.
        notes: What a reward that judges whole groups wants to say about each, by the group's number in the call.
    """

    deadline: float = math.inf
    on_error: Literal["raise", "null"] = "raise"
    stats: RewardStats = field(default_factory=RewardStats)
    notes: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline - time.monotonic()


_CURRENT: ContextVar[Watch | None] = ContextVar("reward_watch", default=None)


def current_watch() -> Watch:
    """The watch of the call that runs in this context; an unlimited one outside of ``score``."""
    return _CURRENT.get() or Watch()


def set_watch(watch: Watch) -> None:
    """Make ``watch`` the current one of this context."""
    _CURRENT.set(watch)
