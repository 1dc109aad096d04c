"""Run reward functions over groups: columns in, scores out, with a time limit and no silent zero."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mmpost.config.schema import RewardSpec
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Group, Rollout
from mmpost.core.sample import Sample
from mmpost.rewards import REWARDS
from mmpost.rewards.call import GROUP_COLUMNS, Call, Reward
from mmpost.rewards.stats import RewardStats


def resolve(specs: Sequence[RewardSpec | Callable[..., Any]]) -> list[Reward]:
    """Functions by name, by ``file.py:function`` or as given."""
    rewards = []
    for spec in specs:
        if isinstance(spec, RewardSpec):
            name = spec.name.rpartition(":")[2]
            rewards.append(Reward(name, Catalog("rewards", REWARDS).get(spec.name), spec))
        else:
            name = getattr(spec, "__name__", type(spec).__name__)
            rewards.append(Reward(name, spec, RewardSpec(name=name)))
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise MmpostError("MMP-C030", f"reward '{name}' is listed twice.", "Give each function its own name.")
    return rewards


def needed_columns(reward: Reward) -> list[str]:
    """Columns that the function cannot run without: keyword parameters that have no default and no option."""
    given = {"prompts", "completions", "completion_ids", "trainer_state", *reward.spec.args}
    if reward.judges_groups:
        given |= set(GROUP_COLUMNS)
    try:
        parameters = inspect.signature(reward.function).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty and p.name not in given]


def applies(reward: Reward, sample: Sample) -> bool:
    """Whether the reward scores rows of the sample's source."""
    return not reward.spec.sources or sample.source in reward.spec.sources


def check_sources(rewards: Sequence[Reward], weights: Mapping[str, float]) -> None:
    """Rewards name sources that exist, and every source that is drawn has a reward.

    Args:
        rewards: All rewards of the run.
        weights: Weight by name of the source.

    Raises:
        MmpostError: MMP-C006 for an unknown source, MMP-C032 for a source that nothing scores.
    """
    for reward in rewards:
        for name in reward.spec.sources:
            if name not in weights:
                raise MmpostError(
                    "MMP-C006",
                    f"unknown name '{name}' among sources of reward '{reward.name}'.",
                    f"Known: {', '.join(weights)}",
                )
    for name, weight in weights.items():
        judged = any(not reward.spec.sources or name in reward.spec.sources for reward in rewards)
        if rewards and weight > 0 and not judged:
            raise MmpostError(
                "MMP-C032",
                f"no reward scores the rows of source '{name}'.",
                "Add its name to rewards.sources of one, or leave rewards.sources of one empty.",
            )


def check_columns(rewards: Sequence[Reward], samples: Sequence[Sample]) -> None:
    """Every column that a reward needs is in every row that it scores.

    Raises:
        MmpostError: MMP-D019.
    """
    for reward in rewards:
        scored = [sample for sample in samples if applies(reward, sample)]
        for column in needed_columns(reward):
            lacking = sum(column not in sample.columns for sample in scored)
            if lacking:
                present = sorted({name for sample in scored[:1000] for name in sample.columns})
                raise MmpostError(
                    "MMP-D019",
                    f"reward '{reward.name}' needs column '{column}', which {lacking} of {len(scored)} rows lack; "
                    f"columns: {', '.join(present) or 'none'}.",
                    "Add the column, or map yours with data.columns.",
                )


def refuse_labels(rewards: Sequence[Reward], labels: Collection[str]) -> None:
    """No reward needs a column that holds labels.

    Raises:
        MmpostError: MMP-R220.
    """
    for reward in rewards:
        needed = [column for column in needed_columns(reward) if column in labels]
        if needed:
            raise MmpostError(
                "MMP-R220",
                f"reward '{reward.name}' needs the column '{needed[0]}', but mmpost upt trains without labels.",
                "Leave it out, or train with labels: mmpost grpo.",
            )


def score(
    groups: Sequence[Group],
    rewards: Sequence[Reward],
    *,
    earlier: Sequence[Sequence[Rollout]] = (),
    hidden: Collection[str] = (),
) -> dict[str, RewardStats]:
    """Fill ``score_parts`` and ``score`` of every rollout, and ``notes`` of every group.

    A reward with ``sources`` is given the rows of those only. Async functions run beside each other and beside the
    rest, which run one after the other.

    Args:
        groups: Completions that have no score yet.
        rewards: Functions; those that judge whole groups see no column of the data.
        earlier: Per group the completions of its prompt that have been scored before. Rewards that judge whole groups
            judge them again, together with the new ones.
        hidden: Columns of the data that no reward gets.

    Returns:
        Counts by reward name for this call, also kept as ``Reward.stats``.

    Raises:
        MmpostError: MMP-R120 when a function raises, MMP-R121 when it returns the wrong number of scores or something
            that is no number, MMP-R122 when it takes too long (each unless ``on_error`` is ``null``).
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        return {reward.name: RewardStats() for reward in rewards}
    before = earlier or [()] * len(groups)
    whole = [Group(group.prompt, [*old, *group.rollouts], group.uid) for group, old in zip(groups, before, strict=True)]
    everyone = [rollout for group in whole for rollout in group.rollouts]
    columns: dict[Any, dict[str, list[Any]]] = {}
    parts = {reward.name: _Part(reward, whole if reward.judges_groups else groups) for reward in rewards}
    for reward in rewards:
        if reward.is_async:
            parts[reward.name].start(columns, hidden)
    for reward in rewards:
        if not reward.is_async:
            parts[reward.name].start(columns, hidden)
            parts[reward.name].finish()
    for reward in rewards:
        if reward.is_async:
            parts[reward.name].finish()
    for rollout in everyone:
        known = [(reward.spec.weight, rollout.score_parts.get(reward.name)) for reward in rewards]
        values = [weight * value for weight, value in known if value is not None]
        rollout.score = sum(values) if values else None
    for index, group in enumerate(groups):
        group.notes = {reward.name: reward.notes[index] for reward in rewards if index in reward.notes}
    return {reward.name: reward.stats for reward in rewards}


class _Part:
    """A call of one reward over the groups whose sources it scores; for the others its score is None."""

    def __init__(self, reward: Reward, groups: Sequence[Group]) -> None:
        self.reward, self.groups = reward, groups
        self.places = tuple(index for index, group in enumerate(groups) if applies(reward, group.prompt))
        self._call: Call | None = None

    def start(self, made: dict[Any, dict[str, list[Any]]], hidden: Collection[str]) -> None:
        """Call it; columns that another reward has asked for are in ``made``."""
        key, scored = (self.reward.judges_groups, self.places), [self.groups[place] for place in self.places]
        if not any(group.rollouts for group in scored):
            self.reward.stats, self.reward.notes = RewardStats(), {}
            return
        if key not in made:
            made[key] = _group_columns(scored) if self.reward.judges_groups else _columns(scored, hidden)
        self._call = Call(self.reward, made[key])

    def finish(self) -> None:
        """Wait for the scores and write them down."""
        scores = iter(self._call.scores() if self._call is not None else ())
        own = set(self.places)
        for index, group in enumerate(self.groups):
            for rollout in group.rollouts:
                value = next(scores) if index in own else None
                rollout.score_parts = {**rollout.score_parts, self.reward.name: value}
        # The function numbers the groups that it was given.
        self.reward.notes = {self.places[number]: note for number, note in self.reward.notes.items()}


def _columns(groups: Sequence[Group], hidden: Collection[str] = ()) -> dict[str, list[Any]]:
    """TRL's keyword arguments: prompts, completions, completion_ids and every data column, one entry per rollout."""
    out = _common_columns(groups)
    # A column of the data cannot take the place of what the policy wrote.
    for name in sorted({name for group in groups for name in group.prompt.columns} - set(out) - set(hidden)):
        out[name] = [group.prompt.columns.get(name) for group in groups for _ in group.rollouts]
    return out


def _group_columns(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """What a reward that judges whole groups gets."""
    out = _common_columns(groups)
    out["group"] = [number for number, group in enumerate(groups) for _ in group.rollouts]
    out["uid"] = [group.uid for group in groups for _ in group.rollouts]
    out["mean_logp"] = [
        float(rollout.logp.mean()) if len(rollout.logp) else None for group in groups for rollout in group.rollouts
    ]
    return out


def _common_columns(groups: Sequence[Group]) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {"prompts": [], "completions": [], "completion_ids": []}
    for group in groups:
        prompt = messages(group.prompt)
        for rollout in group.rollouts:
            out["prompts"].append(prompt)
            out["completions"].append([{"role": "assistant", "content": rollout.text}])
            out["completion_ids"].append(rollout.tokens.tolist())
    return out


def messages(sample: Sample) -> list[dict[str, Any]]:
    """A sample as chat messages; media stand as parts without content."""
    out: list[dict[str, Any]] = []
    for turn in sample.turns:
        if all(part.kind == "text" for part in turn.parts):
            out.append({"role": turn.role, "content": turn.text})
        else:
            parts = [{"type": "text", "text": p.text} if p.kind == "text" else {"type": p.kind} for p in turn.parts]
            out.append({"role": turn.role, "content": parts})
    return out
