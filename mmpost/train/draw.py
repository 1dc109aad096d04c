"""How many completions of which prompts make a step: all once, only groups with something to learn, or in rounds.

Every decision is made from numbers of all processes in the order of the prompts' uids, so that it does not depend on
how many processes there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from mmpost.core.rollout import Group, Rollout
from mmpost.train.rows import Drawn

# A reward above this counts as positive (a right answer).
THRESHOLD = 0.5


@dataclass(slots=True)
class Candidate:
    """A prompt of this process with the completions that were sampled of it.

    Attributes:
        drawn: The prompt.
        group: Its completions with their rewards, in generation order.
        threshold: A score above it is positive.
        is_stale: True when an earlier policy sampled the completions.
        seen: Completions sampled so far, those that were not kept included.
        scored: How many of them have a score.
        positive: How many of them have a score above the threshold.
    """

    drawn: Drawn
    group: Group
    threshold: float = THRESHOLD
    is_stale: bool = False
    seen: int = 0
    scored: int = 0
    positive: int = 0

    @property
    def uid(self) -> int:
        """Number of the prompt in the run."""
        return self.drawn.uid

    @property
    def has_spread(self) -> bool:
        """Whether two completions have different scores."""
        return len({rollout.score for rollout in self.group.rollouts if rollout.score is not None}) > 1

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Take in further completions that have been scored.

        All are counted anew: a vote over the whole group may have changed the scores of the earlier ones.
        """
        self.group.rollouts.extend(rollouts)
        self.seen += len(rollouts)
        self.scored = sum(rollout.score is not None for rollout in self.group.rollouts)
        self.positive = sum(self.is_positive(rollout) for rollout in self.group.rollouts)

    def is_positive(self, rollout: Rollout) -> bool:
        """Whether the score is above the threshold."""
        return rollout.score is not None and rollout.score > self.threshold


class Desk(Protocol):
    """What a draw may ask for; every process makes the same calls in the same order."""

    prompts_wanted: int
    num_generations: int

    def prompts(self) -> list[Drawn]:
        """This process's share of the next ``prompts_wanted`` prompts."""
        ...

    def complete(self, candidates: Sequence[Candidate], n: int) -> None:
        """Add ``n`` completions with their rewards to each candidate of this process."""
        ...

    def scrambled(self, candidates: Sequence[Candidate], n: int) -> list[list[Rollout]]:
        """``n`` scored completions of each prompt with its frames in a random order, of no group; none without frames.

        Candidates do not change.
        """
        ...

    def gather(self, values: Sequence[Any]) -> list[Any]:
        """Small values of all processes, one list."""
        ...


@dataclass(slots=True)
class Collected:
    """The groups of a step.

    Attributes:
        candidates: Groups of this process in the order of their uids.
        surplus: Groups that were sampled, are good, and were not needed; kept for the next step or dropped.
        metrics: Numbers of the draw, the same on every process.
    """

    candidates: list[Candidate]
    surplus: list[Candidate] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Draw:
    """K prompts, n completions each.

    Attributes:
        threshold: A reward above it is positive.
    """

    threshold: float = THRESHOLD

    def open(self, desk: Desk) -> list[Candidate]:
        """The next prompts, without completions."""
        return [Candidate(item, Group(item.sample, [], item.uid), self.threshold) for item in desk.prompts()]

    def collect(self, desk: Desk, carried: Sequence[Candidate] = ()) -> Collected:
        """Sample and score the groups of a step.

        Args:
            desk: Gives prompts, completions and the view over all processes.
            carried: ``surplus`` of the step before on this process.
        """
        candidates = self.open(desk)
        desk.complete(candidates, desk.num_generations)
        return Collected(candidates)


@dataclass(frozen=True)
class Dynamic(Draw):
    """Draw prompts until K groups have spread; groups with equal rewards teach nothing and are dropped.

    Source: DAPO, arXiv 2503.14476, section 3.2 (0 < right answers < G). The rule here is that two completions differ
    in reward, which is the same for right and wrong and also holds for graded rewards. Rounds draw K prompts each, as
    verl does.

    Attributes:
        max_rounds: Rounds at most; what is there then is trained, and ``short`` is logged.
        carry: Groups beyond K are trained in the next step, with the log-probabilities of the policy that sampled
            them as the old ones; else they are dropped.
    """

    max_rounds: int = 10
    carry: bool = False

    def collect(self, desk: Desk, carried: Sequence[Candidate] = ()) -> Collected:
        """Sample until K groups are kept, or ``max_rounds`` have passed."""
        good = list(carried)
        order = sorted(desk.gather([candidate.uid for candidate in good]))
        sources: list[tuple[str, bool]] = []
        rounds = 0
        while len(order) < desk.prompts_wanted and rounds < self.max_rounds:
            fresh = self.open(desk)
            desk.complete(fresh, desk.num_generations)
            good += [candidate for candidate in fresh if candidate.has_spread]
            seen = sorted(desk.gather([(c.uid, c.has_spread, c.drawn.sample.source) for c in fresh]))
            order += [uid for uid, has_spread, _ in seen if has_spread]
            sources += [(source, has_spread) for _, has_spread, source in seen]
            rounds += 1
        chosen = set(order[: desk.prompts_wanted])
        metrics: dict[str, Any] = {
            "kept": float(len(chosen)),
            "resampled": float(max(0, len(sources) - desk.prompts_wanted)),
            "rounds": float(rounds),
            "dynamic_short": float(desk.prompts_wanted - len(chosen)),
        }
        names = sorted({source for source, _ in sources})
        if len(names) > 1:
            # What is dropped changes the mixture of the sources; without this the weights of the run would mislead.
            flags = {name: [flag for source, flag in sources if source == name] for name in names}
            metrics["spread_by_source"] = {name: sum(found) / len(found) for name, found in flags.items()}
        surplus = [candidate for candidate in good if candidate.uid not in chosen] if self.carry else []
        return Collected([candidate for candidate in good if candidate.uid in chosen], surplus, metrics)


@dataclass(frozen=True)
class Adaptive(Draw):
    """Sample active prompts in rounds until their completions are diverse, then keep n of each.

    Source: Reinforce-Ada, arXiv 2510.04996, and its released code. The kept completions are the first ones in
    generation order, half of them positive as far as there are enough of either kind.

    Attributes:
        rounds: Rounds at most.
        per_round: Completions per active prompt and round.
        rule: ``balanced`` stops a prompt with n/2 positive and n/2 other completions, ``positive_focused`` with one
            positive completion (and n in all).
    """

    threshold: float = 0.7
    rounds: int = 4
    per_round: int = 8
    rule: Literal["balanced", "positive_focused"] = "balanced"

    def is_done(self, positive: int, negative: int, n: int) -> bool:
        """Whether a prompt with so many completions of either kind needs no further round."""
        if self.rule == "balanced":
            return positive >= n / 2 and negative >= n / 2
        return positive >= 1 and positive + negative >= n

    def collect(self, desk: Desk, carried: Sequence[Candidate] = ()) -> Collected:
        """Sample the rounds and keep ``num_generations`` completions of each prompt."""
        n = desk.num_generations
        candidates = self.open(desk)
        active, rounds = list(candidates), 0
        # Every process takes part in every round, because the policy may be spread over them.
        while rounds < self.rounds and any(desk.gather([bool(active)])):
            desk.complete(active, self.per_round)
            active = [c for c in active if not self.is_done(c.positive, c.scored - c.positive, n)]
            rounds += 1
        for candidate in candidates:
            flags = [candidate.is_positive(rollout) for rollout in candidate.group.rollouts]
            kept = balanced(flags, n)
            candidate.group.rollouts = [candidate.group.rollouts[i] for i in kept]
        seen = desk.gather([candidate.seen for candidate in candidates])
        found = desk.gather([candidate.positive for candidate in candidates])
        metrics = {
            "kept": float(len(seen)),
            "rounds": float(rounds),
            "samples_per_prompt": float(np.mean(seen)) if seen else 0.0,
            "solved": float(np.mean([count > 0 for count in found])) if found else 0.0,
        }
        return Collected(candidates, metrics=metrics)


def balanced(positive: Sequence[bool], n: int) -> list[int]:
    """Indices of ``n`` completions, the first of each kind, half of them positive where there are enough of both.

    Args:
        positive: Per completion.
        n: How many to keep; all when there are fewer.

    Returns:
        Indices in ascending order.
    """
    good = [i for i, flag in enumerate(positive) if flag]
    bad = [i for i, flag in enumerate(positive) if not flag]
    take_good = min(len(good), max(n // 2, n - len(bad)))
    take_bad = min(len(bad), n - take_good)
    return sorted(good[:take_good] + bad[:take_bad])
