"""Where the rows of a step come from: demonstrations of a file, or completions of the policy itself.

Both yield ``Update``s; the loop cannot tell them apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from mmpost.config.schema import GrpoSection
from mmpost.core import seeding
from mmpost.core.batch import Encoded
from mmpost.core.protocols import Adapter
from mmpost.core.rollout import Group, Rollout
from mmpost.core.sample import Sample
from mmpost.models.policy import Policy
from mmpost.rewards import score as reward_score
from mmpost.rollout.generate import Sampling, complete
from mmpost.train.advantages import of_group
from mmpost.train.distributed import Processes
from mmpost.train.parts import Parts
from mmpost.train.rows import Row, RowStream, Update


class Source(Protocol):
    """Yields the updates of one rollout batch (one update for demonstrations)."""

    stream: RowStream
    updates_per_batch: int

    def updates(self) -> Iterator[Update]:
        """Updates in order; the policy changes between them."""
        ...


class Demonstrations:
    """Rows whose assistant turns are the target."""

    updates_per_batch = 1

    def __init__(self, stream: RowStream, *, num_samples: int) -> None:
        self.stream, self.num_samples = stream, num_samples
        self._last: Row | None = None

    def updates(self) -> Iterator[Update]:
        """One update per batch."""
        drawn = self.stream.next()
        rows = [Row(item.encoded) for item in drawn if item.encoded.num_trained]
        if rows:
            self._last = rows[0]
        if self._last is None:
            self._last = Row(self.stream.any_row())
        samples = [
            sample_record(item.sample, item.sample.turns[-1].text, tokens=item.encoded.num_trained)
            for item in drawn[: self.num_samples]
        ]
        positions = sum(row.encoded.num_trained for row in rows)
        yield Update(rows, positions, len(rows), self._last, {}, samples)


class Completions:
    """Prompts that the policy completes, scored by rewards.

    Args:
        stream: Prompts; its ``count`` is the number of prompts per mini-batch over all processes.
        policy: The bare module, which is also the one that trains.
        log_probs: Computes log-probabilities of rows; with ``module`` those of another policy.
        reference: Policy of the penalty, or None.
    """

    def __init__(
        self,
        stream: RowStream,
        *,
        policy: Policy,
        adapter: Adapter,
        rewards: Sequence[reward_score.Reward],
        section: GrpoSection,
        parts: Parts,
        processes: Processes,
        log_probs: Callable[..., list[np.ndarray]],
        reference: Callable[[Sequence[Row]], list[np.ndarray]] | None,
        seed: int,
        num_samples: int,
    ) -> None:
        self.stream, self.policy, self.adapter, self.rewards = stream, policy, adapter, rewards
        self.section, self.parts, self.processes = section, parts, processes
        self.log_probs, self.reference, self.seed, self.num_samples = log_probs, reference, seed, num_samples
        self.updates_per_batch = section.mini_batches * section.num_iterations
        self.sampling = Sampling(section.max_completion_length, section.temperature, section.top_p, seed)
        self._spare: Row | None = None

    def updates(self) -> Iterator[Update]:
        """Roll out, score, and hand out the mini-batches, ``num_iterations`` times over."""
        batches = [self._collect() for _ in range(self.section.mini_batches)]
        if self.updates_per_batch > 1:
            for batch in batches:
                for row, old in zip(batch.rows, self.log_probs(batch.rows), strict=True):
                    row.old = old
        for iteration in range(self.section.num_iterations):
            for batch in batches:
                # Metrics of the rollout count once; the samples are those of every step that works on them.
                again = Update(batch.rows, batch.positions, batch.row_count, batch.spare, samples=batch.samples)
                yield batch if iteration == 0 else again

    def _collect(self) -> Update:
        clock = time.perf_counter()
        drawn = self.stream.next()
        data_s = time.perf_counter() - clock
        with self.processes.autocast():
            completions = complete(
                self.policy,
                self.adapter,
                [item.encoded for item in drawn],
                [item.uid for item in drawn],
                n=self.section.num_generations,
                sampling=self.sampling,
                batch_size=self.section.rollout_batch_size,
            )
        groups = [Group(item.sample, rollouts, item.uid) for item, rollouts in zip(drawn, completions, strict=True)]
        rollout_s = time.perf_counter() - clock - data_s
        reward_score.score(groups, self.rewards)
        reward_s = time.perf_counter() - clock - data_s - rollout_s
        update = self._to_rows(groups, [item.encoded for item in drawn])
        if self.reference is not None:
            for row, logp in zip(update.rows, self.reference(update.rows), strict=True):
                row.reference = logp
        update.metrics = self._metrics(groups)
        update.metrics["phase_s"] = {"data": data_s, "rollout": rollout_s, "reward": reward_s}
        return update

    def _to_rows(self, groups: Sequence[Group], prompts: Sequence[Encoded]) -> Update:
        """Advantages per group, and one row per completion that can move the policy."""
        rows: list[Row] = []
        samples: list[dict[str, Any]] = []
        positions = row_count = 0
        for group, prompt in zip(groups, prompts, strict=True):
            advantages = of_group(self.parts.advantage, self._scores(group))
            for rollout, advantage in zip(group.rollouts, advantages, strict=True):
                if len(samples) < self.num_samples:
                    samples.append(self._record(group, rollout, advantage))
                if np.isnan(advantage) or (rollout.truncated and self.section.mask_truncated_completions):
                    continue
                encoded = prompt.with_completion(torch.from_numpy(rollout.tokens))
                row = Row(encoded, float(advantage), engine=rollout.logp)
                self._spare = self._spare or row
                positions += len(rollout.tokens)
                row_count += 1
                # A zero advantage moves nothing unless a penalty pulls; the row still counts in the means.
                if advantage != 0 or self.parts.beta:
                    rows.append(row)
        if self._spare is None:
            prompt = prompts[0] if prompts else self.stream.any_row()
            self._spare = Row(prompt.with_completion(torch.tensor([self.adapter.pad_token_id])), 0.0)
        return Update(rows, positions, row_count, self._spare, samples=samples)

    def _scores(self, group: Group) -> list[float | None]:
        scores = [rollout.score for rollout in group.rollouts]
        if self.section.shuffle_rewards:
            order = seeding.generator(self.seed, "shuffle_rewards", group.uid).permutation(len(scores))
            return [scores[i] for i in order]
        return scores

    def _record(self, group: Group, rollout: Rollout, advantage: float) -> dict[str, Any]:
        return {
            **sample_record(group.prompt, rollout.text, tokens=len(rollout.tokens)),
            "rewards": dict(rollout.score_parts),
            "score": rollout.score,
            "correct": rollout.score_parts.get(self.rewards[0].name),
            "advantage": None if np.isnan(advantage) else round(float(advantage), 4),
            "truncated": rollout.truncated,
        }

    def _metrics(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Means over the completions of all processes."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        scores = [[r.score for r in group.rollouts if r.score is not None] for group in groups]
        names = [reward.name for reward in self.rewards]
        known = [r.score for r in rollouts if r.score is not None]
        parts = [[r.score_parts[name] for r in rollouts if r.score_parts.get(name) is not None] for name in names]
        sums = self.processes.sum(
            [
                len(rollouts),
                len(groups),
                sum(known),
                len(known),
                sum(float(np.std(s)) for s in scores if s),
                sum(len(set(s)) <= 1 for s in scores),
                sum(r.truncated for r in rollouts),
                sum(len(r.tokens) for r in rollouts),
                *(float(sum(value or 0.0 for value in values)) for values in parts),
                *(float(len(values)) for values in parts),
            ]
        )
        count, group_count = max(sums[0], 1), max(sums[1], 1)
        by_name = {
            name: sums[8 + i] / sums[8 + len(names) + i] if sums[8 + len(names) + i] else None
            for i, name in enumerate(names)
        }
        total = sums[2] / sums[3] if sums[3] else None
        return {
            "reward": {"total": total, "by_name": by_name, "std_within": sums[4] / group_count},
            "zero_spread": sums[5] / group_count,
            "truncated": sums[6] / count,
            "completion_length": sums[7] / count,
        }


def sample_record(sample: Sample, completion: str, *, tokens: int) -> dict[str, Any]:
    """What people look at: pictures, question, answer."""
    return {
        "row_id": sample.id,
        "source": sample.source,
        "prompt": "\n".join(turn.text for turn in sample.prompt().turns),
        "media": [{"type": part.kind, "ref": part.ref} for part in sample.media()],
        "completion": completion,
        "tokens": tokens,
        "solution": sample.columns.get("solution"),
    }
