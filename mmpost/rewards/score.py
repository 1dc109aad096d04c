"""Run reward functions over groups: columns in, scores out, with a time limit and no silent zero."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmpost.config.schema import RewardSpec
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Group
from mmpost.core.sample import Sample
from mmpost.rewards import REWARDS


@dataclass(slots=True)
class Reward:
    """A reward function ready to run.

    Attributes:
        name: For logs.
        function: In TRL's signature, sync or async.
        spec: Weight, options, failure policy, time limit.
        failures: Calls that failed under ``on_error=null``.
    """

    name: str
    function: Callable[..., Any]
    spec: RewardSpec
    failures: int = 0


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


def score(groups: Sequence[Group], rewards: Sequence[Reward]) -> None:
    """Fill ``score_parts`` and ``score`` of every rollout.

    Raises:
        MmpostError: MMP-R120 when a function raises, MMP-R121 when it returns the wrong number of scores or something
            that is no number, MMP-R122 when it takes too long (each unless ``on_error`` is ``null``).
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        return
    columns = _columns(groups)
    parts: list[dict[str, float | None]] = [{} for _ in rollouts]
    for reward in rewards:
        for part, value in zip(parts, _run(reward, columns, groups), strict=True):
            part[reward.name] = value
    weights = {reward.name: reward.spec.weight for reward in rewards}
    for rollout, part in zip(rollouts, parts, strict=True):
        known = [weights[name] * value for name, value in part.items() if value is not None]
        rollout.score_parts = part
        rollout.score = sum(known) if known else None


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


def _run(reward: Reward, columns: dict[str, list[Any]], groups: Sequence[Group]) -> list[float | None]:
    count = len(columns["completions"])
    try:
        return _validated(reward, _call(reward, columns), count)
    except MmpostError:
        if reward.spec.on_error == "raise":
            raise
        reward.failures += 1
        return [None] * count


def _call(reward: Reward, columns: dict[str, list[Any]]) -> Any:
    """Call in a thread, so that the time limit holds; the thread is left behind when it is exceeded."""
    box: dict[str, Any] = {}

    def work() -> None:
        try:
            value = reward.function(**{**columns, **reward.spec.args})
            box["value"] = asyncio.run(value) if inspect.iscoroutine(value) else value
        except BaseException as error:  # user code may raise anything, sys.exit included; reported with its own words
            box["error"] = error

    thread = threading.Thread(target=work, daemon=True, name=f"reward-{reward.name}")
    thread.start()
    thread.join(reward.spec.timeout)
    if thread.is_alive():
        raise MmpostError(
            "MMP-R122",
            f"reward '{reward.name}' took longer than {reward.spec.timeout:g} s.",
            "Make it faster or raise rewards.timeout.",
        )
    if "error" in box:
        error = box["error"]
        where = _user_line(error, reward.function)
        raise MmpostError(
            "MMP-R120",
            f"reward '{reward.name}' raised {type(error).__name__}: {error}{where}.",
            "Correct the function, or set rewards.on_error=null to leave its score out.",
        ) from error
    return box["value"]


def _user_line(error: BaseException, function: Callable[..., Any]) -> str:
    """Where in the function's own file it went wrong, as `` (file:line)``; empty when the call itself was refused."""
    called = inspect.unwrap(function)
    code = getattr(called, "__code__", None) or getattr(type(called).__call__, "__code__", None)
    lines = [
        f" ({frame.filename}:{frame.lineno})"
        for frame in traceback.extract_tb(error.__traceback__)
        if code is not None and frame.filename == code.co_filename
    ]
    return lines[-1] if lines else ""


def _validated(reward: Reward, values: Any, count: int) -> list[float | None]:
    try:
        scores = list(values)
    except TypeError:
        scores = [values]
    if len(scores) != count or not hasattr(values, "__iter__"):
        got = f"{len(scores)} scores" if hasattr(values, "__iter__") else type(values).__name__
        raise MmpostError(
            "MMP-R121",
            f"reward '{reward.name}' returned {got} for {count} completions.",
            "Return one number or None per completion.",
        )
    out: list[float | None] = []
    for index, value in enumerate(scores):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            number = math.inf
        if number is not None and math.isinf(number):
            raise MmpostError(
                "MMP-R121",
                f"reward '{reward.name}' returned {value!r} for completion {index + 1}; "
                "expected a finite number or None.",
                "Return one number or None per completion.",
            )
        # NaN is TRL's way to say that a reward does not apply.
        out.append(None if number is None or math.isnan(number) else number)
    return out
