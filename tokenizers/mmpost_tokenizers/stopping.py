"""A run that is asked to stop finishes its step first."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from mmpost.runs.live import Progress


class StopRequest:
    """Context in which Ctrl-C and SIGTERM are remembered; the second one stops at once. Calling it asks."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self._asked = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether the run was asked to stop."""
        return self._asked

    def __enter__(self) -> StopRequest:
        try:
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            # Not the main thread (a notebook's worker, the studio): signals stay with their owner.
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        if self._progress is not None:
            self._progress.event("stopping after this step; press Ctrl-C again to stop at once")
