"""From prompts to the updates of a step: draw, roll out, score, share out credit, select, make rows.

Everything that is decided is decided from numbers of all processes in the order of the prompts' uids.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmpost.config.schema import GrpoSection, RolloutSection
from mmpost.core import seeding
from mmpost.core.batch import Encoded
from mmpost.core.protocols import Adapter
from mmpost.core.rollout import Group, Rollout
from mmpost.models.policy import Policy
from mmpost.rewards import score as reward_score
from mmpost.rewards.call import Reward
from mmpost.rollout.engine import Engine, NativeEngine, Prompt, Setup
from mmpost.rollout.generate import Sampling
from mmpost.train import carry
from mmpost.train.demos import demonstration
from mmpost.train.desk import RolloutDesk
from mmpost.train.distributed import Processes
from mmpost.train.draw import Candidate
from mmpost.train.method import Method, Scored
from mmpost.train.rows import Drawn, Row, RowStream, Update
from mmpost.train.sources import sample_record

LogProbs = Callable[[Sequence[Row]], list[np.ndarray]]

# Where labels stand unless the configuration says otherwise.
LABEL = "solution"


@dataclass(slots=True)
class Entry:
    """A group with its part in the step's statistics.

    Attributes:
        candidate: The prompt and its completions.
        demo: Its demonstration, where the method wants one and the row has one.
        scored: Scores after shaping; the last is the demonstration's where it joins.
    """

    candidate: Candidate
    demo: Rollout | None
    scored: Scored


class Completions:
    """Prompts that the policy completes, scored by rewards.

    Args:
        stream: Prompts; its ``count`` is the number of prompts per mini-batch over all processes.
        policy: The bare module, which is also the one that trains.
        adapter: Decodes completions and encodes demonstrations.
        rewards: Score completions.
        section: How many, how long, how random.
        method: What the step trains on.
        processes: The view over all processes.
        log_probs: Log-probabilities of rows under the policy.
        seed: Of the run.
        num_samples: Records for people to look at, per step.
        reference: Log-probabilities under the starting weights, when the method asks for them.
        teacher: Likewise under the teacher.
        engine: Samples; default the trainer's own decode loop.
        labels: Columns that hold labels; the log compares votes with them.
        blind: No reward gets these columns.
    """

    def __init__(
        self,
        stream: RowStream,
        *,
        policy: Policy,
        adapter: Adapter,
        rewards: Sequence[Reward],
        section: GrpoSection,
        method: Method,
        processes: Processes,
        log_probs: LogProbs,
        seed: int,
        num_samples: int,
        reference: LogProbs | None = None,
        teacher: LogProbs | None = None,
        engine: Engine | None = None,
        labels: Sequence[str] = (LABEL,),
        blind: bool = False,
    ) -> None:
        self.labels, self.blind = labels, blind
        self.stream, self.policy, self.adapter, self.rewards = stream, policy, adapter, rewards
        self.section, self.method, self.processes = section, method, processes
        # Shapes that depend on the options of the run learn them here.
        self.shapes = [shape.bind(section) if hasattr(shape, "bind") else shape for shape in method.shape]
        self.log_probs, self.reference, self.teacher = log_probs, reference, teacher
        self.seed, self.num_samples = seed, num_samples
        self.updates_per_batch = section.mini_batches * section.num_iterations
        self.sampling = Sampling(section.max_completion_length, section.temperature, section.top_p, seed)
        self.engine = engine or NativeEngine(
            Setup(RolloutSection(), policy, adapter, "", batch_size=section.rollout_batch_size)
        )
        self.state: dict[str, Any] = {}
        self._surplus: list[Candidate] = []
        self._version = 0
        self._spare: Row | None = None

    def updates(self) -> Iterator[Update]:
        """Roll out, score, and hand out the mini-batches, ``num_iterations`` times over."""
        self._version += 1
        self.engine.sync(self.policy, self._version)
        for candidate in self._surplus:
            candidate.is_stale = True
        collected = [self._collect() for _ in range(self.section.mini_batches)]
        advantages = self._advantages([entry.scored for entries, _ in collected for entry in entries])
        batches = []
        for entries, metrics in collected:
            batch = self._to_update(entries, advantages)
            batch.metrics = {**metrics, **batch.metrics}
            batches.append(batch)
        # Numbers of the method belong to the whole rollout batch and are logged once.
        batches[0].metrics.update({"method": log} if (log := self.state.pop("log", None)) else {})
        for batch in batches:
            self._fill_in(batch.rows)
        for iteration in range(self.section.num_iterations):
            for batch in batches:
                # Metrics of the rollout count once; the samples are those of every step that works on them.
                yield batch if iteration == 0 else dataclasses.replace(batch, metrics={})

    # -- collecting ----------------------------------------------------------------------------------------------

    def _collect(self) -> tuple[list[Entry], dict[str, Any]]:
        """The groups of one mini-batch on this process, and what the log says about them."""
        desk = RolloutDesk(
            self.stream,
            sample=self._sample,
            rewards=self.rewards,
            processes=self.processes,
            num_generations=self.section.num_generations,
            labels=self.labels,
            blind=self.blind,
            scramble=self._scrambled,
        )
        # An engine that runs the policy itself needs all of its weights here; others have their own copy.
        with self.processes.whole(self.policy) if self.engine.exact else contextlib.nullcontext():
            collected = self.method.draw.collect(desk, self._surplus)
        self._surplus = collected.surplus
        demos = self._demonstrations(collected.candidates)
        entries = [self._entry(c, demo) for c, demo in zip(collected.candidates, demos, strict=True)]
        metrics = {**desk.metrics(), "phase_s": desk.seconds}
        if collected.metrics:
            metrics["draw"] = collected.metrics
        return entries, metrics

    def _sample(self, prompts: Sequence[Prompt], n: int, first: Sequence[int]) -> list[list[Rollout]]:
        with self.processes.autocast():
            return self.engine.complete(prompts, n=n, sampling=self.sampling, first_generation=first)

    def _scrambled(self, drawn: Drawn) -> Encoded | None:
        """The prompt with its frames in an order that belongs to its number in the run."""
        random = seeding.generator(self.seed, "scrambled", drawn.uid)
        return self.adapter.encode_scrambled(drawn.sample.prompt(), random)

    def _demonstrations(self, candidates: Sequence[Candidate]) -> list[Rollout | None]:
        """Demonstrations of the prompts, scored where the method counts them in; None where there is none."""
        if self.method.demo is None:
            return [None] * len(candidates)
        found = [demonstration(self.adapter, candidate.drawn.sample) for candidate in candidates]
        if self.method.joins:
            groups = [
                Group(candidate.drawn.sample, [demo], candidate.uid)
                for candidate, demo in zip(candidates, found, strict=True)
                if demo is not None
            ]
            reward_score.score(groups, self.rewards, hidden=self.labels if self.blind else ())
        return found

    def _entry(self, candidate: Candidate, demo: Rollout | None = None) -> Entry:
        """Scores of a group after shaping, with its demonstration."""
        prompt = candidate.drawn.sample
        rollouts = list(candidate.group.rollouts)
        if demo is not None and self.method.joins:
            rollouts.append(demo)
        names = [reward.name for reward in self.rewards]
        scored = Scored(
            candidate.uid,
            prompt.source,
            tuple(self.scores(Group(prompt, rollouts, candidate.uid, candidate.group.notes))),
            tuple(len(rollout.tokens) for rollout in rollouts),
            tuple(rollout.truncated for rollout in rollouts),
            # A completion without a score says nothing about how often the policy is right.
            drawn=candidate.scored,
            positive=candidate.positive,
            components=tuple(tuple(r.score_parts.get(name) for r in rollouts) for name in names),
            weights=tuple(reward.spec.weight for reward in self.rewards),
        )
        return Entry(candidate, demo, scored)

    def scores(self, group: Group) -> list[float | None]:
        """Scores of a group as the advantage sees them."""
        scores = [rollout.score for rollout in group.rollouts]
        if self.section.shuffle_rewards:
            order = seeding.generator(self.seed, "shuffle_rewards", group.uid).permutation(len(scores))
            scores = [scores[i] for i in order]
        for shape in self.shapes:
            rollouts = [dataclasses.replace(r, score=s) for r, s in zip(group.rollouts, scores, strict=True)]
            scores = shape(Group(group.prompt, rollouts, group.uid, group.notes))
        return scores

    def _advantages(self, mine: Sequence[Scored]) -> dict[int, np.ndarray]:
        """Credit by uid, made from the groups of all processes."""
        table = [scored for part in self.processes.gather(list(mine)) for scored in part]
        table.sort(key=lambda scored: scored.uid)
        assert self.method.advantage is not None
        made = self.method.advantage(table, self.state)
        return {scored.uid: advantages for scored, advantages in zip(table, made, strict=True)}

    # -- rows ----------------------------------------------------------------------------------------------------

    def _to_update(self, entries: Sequence[Entry], advantages: dict[int, np.ndarray]) -> Update:
        """Rows of the groups: completions, demonstrations, or both."""
        update = Update([], 0, 0, self._spare_row(entries))
        missing = 0
        for entry in entries:
            credit = advantages[entry.scored.uid]
            gated = self.method.gate is not None and self.method.gate(entry.scored)
            for rollout, advantage in zip(entry.candidate.group.rollouts, credit, strict=False):
                if len(update.samples) < self.num_samples:
                    update.samples.append(self._record(entry, rollout, float(advantage)))
                if not gated:
                    self._add_completion(update, entry, rollout, float(advantage))
            if self.method.demo is None or (self.method.gate is not None and not gated):
                continue
            if entry.demo is None:
                missing += 1
            else:
                self._add_demo(update, entry, float(credit[-1]) if self.method.joins else 1.0)
        if self.method.demo is not None:
            sums = self.processes.sum([update.demo_row_count, update.row_count, missing])
            share = sums[0] / max(sums[0] + sums[1], 1)
            update.metrics["demo"] = {"share": share, "rows": sums[0], "missing": sums[2]}
        return update

    def _add_completion(self, update: Update, entry: Entry, rollout: Rollout, advantage: float) -> None:
        if np.isnan(advantage) or (rollout.truncated and self.section.mask_truncated_completions):
            return
        assert self.method.rollout is not None
        rows_rule = self.method.rollout.kl.rows
        row = Row(
            entry.candidate.drawn.encoded,
            advantage,
            completion=rollout.tokens,
            old=rollout.logp if entry.candidate.is_stale else None,
            engine=rollout.logp,
            penalised=rows_rule is None or rows_rule(rollout.score),
        )
        update.positions += len(rollout.tokens)
        update.row_count += 1
        # A zero advantage moves nothing unless a penalty pulls; the row still counts in the means.
        if advantage != 0 or self.method.anchored:
            update.rows.append(row)

    def _add_demo(self, update: Update, entry: Entry, advantage: float) -> None:
        assert entry.demo is not None
        if np.isnan(advantage):
            return
        update.demo_positions += len(entry.demo.tokens)
        update.demo_row_count += 1
        if advantage != 0 or self.method.anchored:
            prompt = entry.candidate.drawn.encoded
            update.rows.append(Row(prompt, advantage, completion=entry.demo.tokens, demo=True))

    def _fill_in(self, rows: Sequence[Row]) -> None:
        """Log-probabilities under other policies than the one that trains."""
        # A row without it counts as sampled by the policy that trains; so carried groups may stand beside fresh ones.
        if self.updates_per_batch > 1:
            fresh = [row for row in rows if row.old is None]
            for row, logp in zip(fresh, self.log_probs(fresh), strict=True):
                row.old = logp
        if self.reference is not None:
            for row, logp in zip(rows, self.reference(rows), strict=True):
                row.reference = logp
        if self.teacher is not None:
            for row, logp in zip(rows, self.teacher(rows), strict=True):
                row.teacher = logp

    def _spare_row(self, entries: Sequence[Entry]) -> Row:
        """A row for passes that only keep processes in step."""
        if self._spare is None:
            prompt = entries[0].candidate.drawn.encoded if entries else self.stream.any_row()
            self._spare = Row(prompt, 0.0, completion=np.array([self.adapter.pad_token_id]))
        return self._spare

    def _record(self, entry: Entry, rollout: Rollout, advantage: float) -> dict[str, Any]:
        labels = [note["label"] for note in entry.candidate.group.notes.values() if "label" in note]
        return {
            **({"pseudo_label": labels[0]} if labels else {}),
            **sample_record(entry.candidate.drawn.sample, rollout.text, tokens=len(rollout.tokens)),
            "rewards": dict(rollout.score_parts),
            "score": rollout.score,
            "correct": rollout.score_parts.get(self.rewards[0].name),
            "advantage": None if np.isnan(advantage) else round(advantage, 4),
            "truncated": rollout.truncated,
        }

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Stream, method and groups that wait for the next step; every process calls it."""
        waiting = [group for part in self.processes.gather(carry.to_json(self._surplus)) for group in part]
        return {
            "stream": self.stream.state_dict(),
            "method": self.state,
            "surplus": sorted(waiting, key=lambda group: group["uid"]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken, also with another number of processes."""
        self.stream.load_state_dict(state["stream"])
        self.state = state["method"]
        mine = state["surplus"][self.processes.rank :: self.processes.world]
        self._surplus = carry.from_json(mine, self.stream)
