"""Run what may hang in processes of its own, and kill it when it does.

Python cannot stop a thread, and alarms work in the main thread only; a process can always be killed. Workers are fresh
interpreters started once and kept between steps. They are no ``multiprocessing`` children, because those import the
user's main program again, which without an ``if __name__ == "__main__"`` would train a second time.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmpost.rewards.stats import current_watch
from mmpost.rewards.worker import Failure, Reply

# A worker imports its function before the clock of an item runs; sympy takes seconds on a busy machine.
START_S = 60.0
MAX_WORKERS = 4
# Workers of one call that may end before they begin; one can have been killed while it was idle.
MAX_FALSE_STARTS = 3


class WorkerError(Exception):
    """A function failed in a worker process.

    Attributes:
        failure: In words.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure

    def __str__(self) -> str:
        return f"{self.failure.kind}: {self.failure.text}"


class CallTimeout(Exception):
    """The deadline of the whole call has passed."""


def run(function: str, items: Sequence[tuple[Hashable, ...]], *, limit_s: float) -> list[Any]:
    """``function(*item)`` for every item, in worker processes; equal items are worked out once.

    Inside a reward that ``score`` runs, the time limit of the call and its ``on_error`` hold, and what is left out is
    counted in its ``RewardStats``.

    Args:
        function: ``module:function`` or ``file.py:function``. What it prints is dropped.
        items: Positional arguments of each call; hashable and picklable.
        limit_s: Seconds for one item, above 0; its worker is then killed. Imports do not count.

    Returns:
        Results in the order of the items; None where the worker was killed or died, or where the function failed and
        ``on_error`` is ``null``.

    Raises:
        WorkerError: The function failed, or cannot be imported.
        CallTimeout: The call as a whole is late.
    """
    if not items:
        return []
    watch = current_watch()
    different = list(dict.fromkeys(items))
    replies = shared_pool().map(function, different, limit_s=limit_s, deadline=watch.deadline)
    by_item = dict(zip(different, replies, strict=True))
    results: list[Any] = []
    for item in items:
        reply = by_item[item]
        results.append(None if reply is None else reply.value)
        if reply is None:
            watch.stats.timed_out += 1
        elif reply.failure is not None:
            if watch.on_error == "raise":
                raise WorkerError(reply.failure)
            watch.stats.failed += 1
    return results


@dataclass(eq=False, slots=True)
class _Worker:
    """A process and what it works on.

    Attributes:
        item: Index of the item in work, or None.
        is_started: The item's clock runs.
        due: When that item is late, in seconds of ``time.monotonic``.
    """

    process: subprocess.Popen[bytes]
    item: int | None = None
    is_started: bool = False
    due: float = 0.0


@dataclass(slots=True)
class _Call:
    """What one ``map`` has done so far."""

    function: str
    items: Sequence[tuple[Any, ...]]
    limit_s: float
    deadline: float
    waiting: deque[int]
    replies: list[Reply | None]
    false_starts: int = 0


@dataclass(slots=True)
class Pool:
    """Worker processes of one parent.

    Attributes:
        size: Largest number of processes.
        owner: Process id of the parent; a fork gets a pool of its own.
        started: Processes started so far, replacements included.
    """

    size: int
    owner: int = field(default_factory=os.getpid)
    started: int = 0
    _workers: list[_Worker] = field(default_factory=list)
    _inbox: queue.SimpleQueue[tuple[_Worker, Reply | None]] = field(default_factory=queue.SimpleQueue)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def map(
        self, function: str, items: Sequence[tuple[Any, ...]], *, limit_s: float, deadline: float = math.inf
    ) -> list[Reply | None]:
        """Replies in the order of the items; None where the worker was killed at the limit or died.

        Args:
            function: ``module:function`` or ``file.py:function``.
            items: Positional arguments of each call; picklable.
            limit_s: Seconds for one item.
            deadline: When the whole call is late, in seconds of ``time.monotonic``.

        Raises:
            CallTimeout: The deadline has passed; workers that were busy are killed.
            WorkerError: Workers end before they begin.
        """
        call = _Call(function, items, limit_s, deadline, deque(range(len(items))), [None] * len(items))
        if not self._lock.acquire(timeout=_patience(deadline)):
            raise CallTimeout
        try:
            while call.waiting or self._busy():
                while call.waiting and (worker := self._idle()) is not None:
                    self._give(worker, call)
                self._take(call)
                self._kill_late(call)
        finally:
            for worker in self._busy():
                self._drop(worker)
            self._lock.release()
        return call.replies

    def close(self) -> None:
        """End all workers."""
        for worker in list(self._workers):
            self._drop(worker)

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.item is not None]

    def _idle(self) -> _Worker | None:
        """A worker without an item, started if need be; None when all are busy."""
        for worker in self._workers:
            if worker.item is None:
                return worker
        if len(self._workers) >= self.size:
            return None
        # The path goes along, so that the worker finds what this process finds.
        code = f"import sys; sys.path[:] = {sys.path!r}; from mmpost.rewards.worker import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the parent, which then ends its workers
        )
        worker = _Worker(process)
        self._workers.append(worker)
        self.started += 1
        threading.Thread(target=self._read, args=(worker,), daemon=True, name="reward-worker-reader").start()
        return worker

    def _read(self, worker: _Worker) -> None:
        """Thread: pass on what the worker says; None at its end."""
        assert worker.process.stdout is not None
        try:
            with worker.process.stdout as stream, contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
                while True:
                    self._inbox.put((worker, pickle.load(stream)))
        finally:
            self._inbox.put((worker, None))

    def _give(self, worker: _Worker, call: _Call) -> None:
        message = pickle.dumps((call.function, call.items[call.waiting[0]], call.limit_s))
        worker.item, worker.is_started, worker.due = call.waiting.popleft(), False, time.monotonic() + START_S
        assert worker.process.stdin is not None
        # A worker that died while idle cannot be written to; its end lies in the inbox.
        with contextlib.suppress(OSError):
            worker.process.stdin.write(message)
            worker.process.stdin.flush()

    def _take(self, call: _Call) -> None:
        """Take one message, or wait until somebody is late."""
        due = min([worker.due for worker in self._busy()] + [call.deadline])
        try:
            worker, reply = self._inbox.get(timeout=_patience(due))
        except queue.Empty:
            return
        if worker not in self._workers:  # the last words of one that was killed
            return
        if reply is None:
            self._ended(worker, call)
        elif reply.state == "started":
            worker.is_started, worker.due = True, time.monotonic() + call.limit_s
        elif worker.item is not None:
            call.replies[worker.item], worker.item = reply, None
            if reply.retires:
                self._drop(worker)

    def _ended(self, worker: _Worker, call: _Call) -> None:
        """A worker has ended by itself. Its item is given up if it was begun, else tried again."""
        self._drop(worker)
        if worker.item is None or worker.is_started:
            return
        call.waiting.appendleft(worker.item)
        call.false_starts += 1
        if call.false_starts >= MAX_FALSE_STARTS:
            text = f"worker processes end before they begin (exit status {worker.process.returncode})"
            raise WorkerError(Failure("WorkerError", text, ""))

    def _kill_late(self, call: _Call) -> None:
        now = time.monotonic()
        if now >= call.deadline:
            raise CallTimeout
        for worker in self._busy():
            if now < worker.due:
                continue
            self._drop(worker)
            if not worker.is_started:
                text = f"a worker process did not import {call.function} within {START_S:g} s"
                raise WorkerError(Failure("WorkerError", text, ""))

    def _drop(self, worker: _Worker) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
        worker.process.kill()
        worker.process.wait()
        if worker.process.stdin is not None:
            # Bytes that a dead process did not take.
            with contextlib.suppress(OSError):
                worker.process.stdin.close()


def _patience(until: float) -> float:
    """Seconds that may be waited until a moment of ``time.monotonic``, which may be infinite."""
    return min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX)


_pool: Pool | None = None
_pool_lock = threading.Lock()


def shared_pool() -> Pool:
    """The pool of this process, made on first use; its workers start when there is work."""
    global _pool  # noqa: PLW0603 - one pool per process, whoever asks
    with _pool_lock:
        if _pool is None or _pool.owner != os.getpid():
            neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            _pool = Pool(max(1, min(MAX_WORKERS, (os.cpu_count() or 1) // neighbours)))
            atexit.register(_pool.close)
        return _pool
