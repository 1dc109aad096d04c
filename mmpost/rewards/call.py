"""Call one reward function under its time limit, and turn whatever goes wrong into words."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mmpost.config.schema import RewardSpec
from mmpost.core.errors import MmpostError
from mmpost.rewards.stats import RewardStats, Watch, set_watch
from mmpost.rewards.worker import describe
from mmpost.rewards.workers import CallTimeout, WorkerError

_FIX = "Return one number or None per completion."


Function = TypeVar("Function", bound=Callable[..., Any])

# What a function that judges whole groups gets beside prompts and completions; see ``mmpost.rewards.score``.
GROUP_COLUMNS = ("group", "uid", "mean_logp")


def judges_groups(function: Function) -> Function:
    """Mark a reward that has to see all completions of a prompt together, such as a vote.

    It is called with ``prompts``, ``completions``, ``completion_ids`` and ``GROUP_COLUMNS``, and with no column of the
    data: what it says cannot depend on a label. When a prompt gets more completions later, it judges all of them again.
    """
    function.judges_groups = True  # type: ignore[attr-defined]
    return function


@dataclass(slots=True)
class Reward:
    """A reward function ready to run.

    Attributes:
        name: For logs.
        function: In TRL's signature, sync or async.
        spec: Weight, options, failure policy, time limit.
        failures: Calls that failed under ``on_error=null``.
        stats: Counts of the latest step.
        notes: What the latest call said about groups, by their number in it.
    """

    name: str
    function: Callable[..., Any]
    spec: RewardSpec
    failures: int = 0
    stats: RewardStats = field(default_factory=RewardStats)
    notes: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def judges_groups(self) -> bool:
        """Whether it has to see all completions of a prompt together."""
        return bool(getattr(inspect.unwrap(self.function), "judges_groups", False))

    @property
    def is_async(self) -> bool:
        """Whether calls of it can run beside each other."""
        function = inspect.unwrap(self.function)
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class Call:
    """A call in a thread of its own, so that the time limit holds; the thread is left behind when it is exceeded.

    Work that the function gives to worker processes ends with the time limit, and so does what a coroutine awaits.
    """

    def __init__(self, reward: Reward, columns: Mapping[str, list[Any]]) -> None:
        self.reward, self.count = reward, len(columns["completions"])
        self.begun = time.monotonic()
        self.watch = Watch(self.begun + reward.spec.timeout, reward.spec.on_error)
        self._value: Any = None
        self._error: BaseException | None = None
        context = copy_context()
        context.run(set_watch, self.watch)
        arguments = {**columns, **reward.spec.args}
        self._thread = threading.Thread(
            target=context.run, args=(self._work, arguments), daemon=True, name=f"reward-{reward.name}"
        )
        self._thread.start()

    def _work(self, arguments: dict[str, Any]) -> None:
        try:
            value = self.reward.function(**arguments)
            self._value = asyncio.run(self._awaited(value)) if inspect.isawaitable(value) else value
        except BaseException as error:  # user code may raise anything, sys.exit included; reported with its own words
            self._error = error

    async def _awaited(self, value: Any) -> Any:
        limit = asyncio.timeout(self.watch.left)
        try:
            async with limit:
                return await value
        except TimeoutError:
            if limit.expired():
                raise CallTimeout from None
            raise

    def scores(self) -> list[float | None]:
        """Wait for the call. Its statistics are then those of the reward.

        Returns:
            One finite score or None per completion; all None after a failure that ``on_error=null`` leaves out.

        Raises:
            MmpostError: MMP-R120, MMP-R121 or MMP-R122 unless ``on_error`` is ``null``.
        """
        stats = self.watch.stats
        self.reward.notes = {}
        try:
            scores = validated(self.reward.name, self._result(), self.count)
            self.reward.notes = self.watch.notes
        except MmpostError as error:
            if self.reward.spec.on_error == "raise":
                raise
            self.reward.failures += 1
            scores = [None] * self.count
            is_late = error.code == "MMP-R122"
            # A new one: a thread that was left behind may still count in the old one.
            stats = RewardStats(failed=0 if is_late else self.count, timed_out=self.count if is_late else 0)
        stats.add_scores(scores)
        stats.seconds = time.monotonic() - self.begun
        self.reward.stats = stats
        return scores

    def _result(self) -> Any:
        reward = self.reward
        self._thread.join(max(0.0, self.watch.left))
        error = self._error
        if isinstance(error, CallTimeout) or self._thread.is_alive():
            raise MmpostError(
                "MMP-R122",
                f"reward '{reward.name}' took longer than {reward.spec.timeout:g} s.",
                "Make it faster or raise rewards.timeout.",
            )
        if isinstance(error, MmpostError):
            raise error
        if error is not None:
            failure = error.failure if isinstance(error, WorkerError) else describe(error, reward.function)
            place = f" ({failure.place})" if failure.place else ""
            raise MmpostError(
                "MMP-R120",
                f"reward '{reward.name}' raised {failure.kind}: {failure.text}{place}.",
                "Correct the function, or set rewards.on_error=null to leave its score out.",
            ) from error
        return self._value


def validated(name: str, values: Any, count: int) -> list[float | None]:
    """What a function returned, as one finite number or None per completion; NaN becomes None, as in TRL.

    Raises:
        MmpostError: MMP-R121 for another number of scores or a score that is no finite number.
    """
    try:
        scores = list(values)
    except TypeError:
        scores = [values]
    if len(scores) != count or not hasattr(values, "__iter__"):
        got = f"{len(scores)} scores" if hasattr(values, "__iter__") else type(values).__name__
        raise MmpostError("MMP-R121", f"reward '{name}' returned {got} for {count} completions.", _FIX)
    out: list[float | None] = []
    for index, value in enumerate(scores):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            number = math.inf
        if number is not None and math.isinf(number):
            what = f"reward '{name}' returned {value!r} for completion {index + 1}; expected a finite number or None."
            raise MmpostError("MMP-R121", what, _FIX)
        out.append(None if number is None or math.isnan(number) else number)
    return out
