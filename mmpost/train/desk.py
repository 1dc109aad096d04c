"""Where a draw gets its groups: prompts from the data, completions from the policy, scores from the rewards.

It also counts what was sampled, so that the log tells of all completions and not of those alone that are trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmpost.core.batch import Encoded
from mmpost.core.rollout import Group, Rollout
from mmpost.rewards import score as reward_score
from mmpost.rewards.call import Reward
from mmpost.rewards.stats import RewardStats
from mmpost.rollout.engine import Prompt
from mmpost.train.distributed import Processes
from mmpost.train.draw import Candidate
from mmpost.train.rows import Drawn, RowStream
from mmpost.train.votes import Vote, summary, votes_of

# Prompts, completions of each, and the number of each prompt's first completion.
Sample = Callable[[Sequence[Prompt], int, Sequence[int]], list[list[Rollout]]]

# Completions of scrambled prompts are numbered from here, so that they share no random draw with the others.
SCRAMBLED_FROM = 1 << 20


class RolloutDesk:
    """The desk of one rollout batch.

    Args:
        stream: Prompts.
        sample: Completes prompts.
        rewards: Score completions.
        processes: The view over all processes.
        num_generations: Completions per prompt of a step.
        labels: Columns of the data that hold labels, with which votes are compared in the log.
        blind: No reward gets these columns.
        scramble: A prompt with its frames in a random order, or None for one without frames.

    Attributes:
        prompts_wanted: Prompts of a step over all processes.
        num_generations: Completions per prompt of a step.
        seconds: Wall time by phase: data, rollout, reward.
    """

    def __init__(
        self,
        stream: RowStream,
        *,
        sample: Sample,
        rewards: Sequence[Reward],
        processes: Processes,
        num_generations: int,
        labels: Sequence[str] = (),
        blind: bool = False,
        scramble: Callable[[Drawn], Encoded | None] = lambda drawn: None,
    ) -> None:
        self.stream, self.rewards, self.processes = stream, rewards, processes
        self._scramble = scramble
        self.labels, self._hidden = labels, labels if blind else ()
        self.prompts_wanted, self.num_generations = stream.count, num_generations
        self._sample = sample
        self.seconds = {"data": 0.0, "rollout": 0.0, "reward": 0.0}
        self._rollouts: dict[int, list[Rollout]] = {}
        self._votes: dict[int, list[Vote]] = {}
        self._stats = {reward.name: RewardStats() for reward in rewards}

    def prompts(self) -> list[Drawn]:
        """This process's share of the next prompts."""
        clock = time.perf_counter()
        drawn = self.stream.next()
        self.seconds["data"] += time.perf_counter() - clock
        return drawn

    def complete(self, candidates: Sequence[Candidate], n: int) -> None:
        """Add ``n`` completions with their rewards to each candidate.

        Generation numbers go on where an earlier round ended, so that no random draw is used twice.
        """
        clock = time.perf_counter()
        fresh = self._sample(
            [Prompt(candidate.drawn.encoded, candidate.uid, candidate.drawn.sample) for candidate in candidates],
            n,
            [candidate.seen for candidate in candidates],
        )
        sampled = time.perf_counter()
        groups = [
            Group(candidate.drawn.sample, rollouts, candidate.uid)
            for candidate, rollouts in zip(candidates, fresh, strict=True)
        ]
        found = reward_score.score(
            groups,
            self.rewards,
            earlier=[candidate.group.rollouts for candidate in candidates],
            hidden=self._hidden,
        )
        for name, stats in found.items():
            self._stats[name] = self._stats[name] + stats
        for candidate, group in zip(candidates, groups, strict=True):
            candidate.group.notes = group.notes
            candidate.add(group.rollouts)
            self._rollouts.setdefault(candidate.uid, []).extend(group.rollouts)
            self._votes[candidate.uid] = votes_of(group.notes, group.prompt.columns, self.labels)
        self.seconds["rollout"] += sampled - clock
        self.seconds["reward"] += time.perf_counter() - sampled

    def scrambled(self, candidates: Sequence[Candidate], n: int) -> list[list[Rollout]]:
        """See ``Desk``; these completions are in no count of ``metrics``."""
        clock = time.perf_counter()
        encoded = [self._scramble(candidate.drawn) for candidate in candidates]
        places = [place for place, prompt in enumerate(encoded) if prompt is not None]
        chosen = [(candidates[place], prompt) for place, prompt in enumerate(encoded) if prompt is not None]
        fresh = self._sample(
            [Prompt(prompt, candidate.uid, candidate.drawn.sample) for candidate, prompt in chosen],
            n,
            [SCRAMBLED_FROM] * len(chosen),
        )
        groups = [Group(c.drawn.sample, rollouts, c.uid) for (c, _), rollouts in zip(chosen, fresh, strict=True)]
        sampled = time.perf_counter()
        reward_score.score(groups, self.rewards, hidden=self._hidden)
        self.seconds["rollout"] += sampled - clock
        self.seconds["reward"] += time.perf_counter() - sampled
        out: list[list[Rollout]] = [[] for _ in candidates]
        for place, group in zip(places, groups, strict=True):
            out[place] = group.rollouts
        return out

    def gather(self, values: Sequence[Any]) -> list[Any]:
        """Small values of all processes, one list."""
        return [value for part in self.processes.gather(list(values)) for value in part]

    def metrics(self) -> dict[str, Any]:
        """Means over all completions that were sampled, by all processes."""
        rollouts = [rollout for found in self._rollouts.values() for rollout in found]
        known = [rollout.score for rollout in rollouts if rollout.score is not None]
        scores = [[r.score for r in found if r.score is not None] for found in self._rollouts.values()]
        sums = self.processes.sum(
            [
                len(rollouts),
                len(scores),
                sum(known),
                len(known),
                sum(float(np.std(group)) for group in scores if group),
                sum(len(set(group)) <= 1 for group in scores),
                sum(rollout.truncated for rollout in rollouts),
                sum(len(rollout.tokens) for rollout in rollouts),
            ]
        )
        count, groups = max(sums[0], 1), max(sums[1], 1)
        self._recount()
        stats = self._all_stats()
        reward: dict[str, Any] = {
            "total": sums[2] / sums[3] if sums[3] else None,
            "by_name": {name: stat.mean for name, stat in stats.items()},
            "std_by_name": {name: stat.std for name, stat in stats.items()},
            "std_within": sums[4] / groups,
        }
        # What did not happen is not logged: most rewards always apply and never fail.
        for field in ("share_not_applicable", "failed", "timed_out"):
            found = {name: float(getattr(stat, field)) for name, stat in stats.items() if getattr(stat, field)}
            if found:
                reward[field] = found
        votes = {}
        if any(reward.judges_groups for reward in self.rewards):
            votes = summary(self.gather([vote for found in self._votes.values() for vote in found]))
        return {
            **({"vote": votes} if votes else {}),
            "reward": reward,
            "zero_spread": sums[5] / groups,
            "truncated": sums[6] / count,
            "completion_length": sums[7] / count,
        }

    def _recount(self) -> None:
        """Count what was judged several times once, as it was judged in the end."""
        for name in [reward.name for reward in self.rewards if reward.judges_groups]:
            scores = [rollout.score_parts.get(name) for found in self._rollouts.values() for rollout in found]
            calls, missing = self._stats[name], sum(score is None for score in scores)
            stats = RewardStats(timed_out=min(calls.timed_out, missing), seconds=calls.seconds)
            stats.failed = min(calls.failed, missing - stats.timed_out)
            stats.add_scores(scores)
            self._stats[name] = stats

    def _all_stats(self) -> dict[str, RewardStats]:
        parts = self.processes.gather(self._stats)
        return {name: sum((part[name] for part in parts), start=RewardStats()) for name in self._stats}
