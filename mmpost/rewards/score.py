"""Run reward functions over groups: columns in, scores out, with a time limit and no silent zero."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from mmpost.config.schema import RewardSpec
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Group
from mmpost.core.sample import Sample
from mmpost.rewards import REWARDS
from mmpost.rewards.call import Call, Reward
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
    try:
        parameters = inspect.signature(reward.function).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty and p.name not in given]


def check_columns(rewards: Sequence[Reward], samples: Sequence[Sample]) -> None:
    """Every column that a reward needs is in every row.

    Raises:
        MmpostError: MMP-D019.
    """
    for reward in rewards:
        for column in needed_columns(reward):
            lacking = sum(column not in sample.columns for sample in samples)
            if lacking:
                present = sorted({name for sample in samples[:1000] for name in sample.columns})
                raise MmpostError(
                    "MMP-D019",
                    f"reward '{reward.name}' needs column '{column}', which {lacking} of {len(samples)} rows lack; "
                    f"columns: {', '.join(present) or 'none'}.",
                    "Add the column, or map yours with data.columns.",
                )


def score(groups: Sequence[Group], rewards: Sequence[Reward]) -> dict[str, RewardStats]:
    """Fill ``score_parts`` and ``score`` of every rollout.

    Async functions run beside each other and beside the rest, which run one after the other.

    Returns:
        Counts by reward name for this call, also kept as ``Reward.stats``.

    Raises:
        MmpostError: MMP-R120 when a function raises, MMP-R121 when it returns the wrong number of scores or something
            that is no number, MMP-R122 when it takes too long (each unless ``on_error`` is ``null``).
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        return {reward.name: RewardStats() for reward in rewards}
    columns = _columns(groups)
    beside = {reward.name: Call(reward, columns) for reward in rewards if reward.is_async}
    by_name = {reward.name: Call(reward, columns).scores() for reward in rewards if not reward.is_async}
    by_name |= {name: call.scores() for name, call in beside.items()}
    weights = {reward.name: reward.spec.weight for reward in rewards}
    for index, rollout in enumerate(rollouts):
        part = {name: by_name[name][index] for name in weights}
        known = [weights[name] * value for name, value in part.items() if value is not None]
        rollout.score_parts = part
        rollout.score = sum(known) if known else None
    return {reward.name: reward.stats for reward in rewards}


def _columns(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """TRL's keyword arguments: prompts, completions, completion_ids and every data column, one entry per rollout."""
    own = ("prompts", "completions", "completion_ids")
    # A column of the data cannot take the place of what the policy wrote.
    names = sorted({name for group in groups for name in group.prompt.columns} - set(own))
    out: dict[str, list[Any]] = {name: [] for name in (*own, *names)}
    for group in groups:
        prompt = messages(group.prompt)
        for rollout in group.rollouts:
            out["prompts"].append(prompt)
            out["completions"].append([{"role": "assistant", "content": rollout.text}])
            out["completion_ids"].append(rollout.tokens.tolist())
            for name in names:
                out[name].append(group.prompt.columns.get(name))
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
