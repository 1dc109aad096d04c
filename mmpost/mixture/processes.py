"""Run commands of this package side by side, each once, whatever happens to the process that started them.

A run holds an advisory lock for as long as it lives, through a file descriptor that it inherits. When the starter is
killed its runs go on; the next starter waits for their locks instead of starting a second process in the same folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

_POLL_S = 0.05
# How long interrupted runs get for their checkpoint.
_GRACE_S = 120.0


@dataclass(frozen=True, slots=True)
class Job:
    """One run.

    Attributes:
        name: Its folder's name.
        command: Words to execute.
        folder: Where it writes.
        log: File for what it prints.
        lock: File that is locked while it lives.
        environment: Variables beside those of the starter.
        needs: Names of jobs of the same call that must have ended well before; it never starts when one has failed.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    log: Path
    lock: Path
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


class Engine(Protocol):
    """Runs jobs."""

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, int]]:
        """Jobs as they end, with their exit codes; a job that another process has just finished ends with 0."""
        ...


class Queue:
    """Jobs that have not started, in the order in which they are wanted.

    Args:
        jobs: All jobs of a call.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.waiting = list(jobs)
        self._done: set[str] = set()

    def ready(self) -> list[Job]:
        """Those that need nothing more."""
        return [job for job in self.waiting if self._done.issuperset(job.needs)]

    def ended(self, job: Job, code: int) -> None:
        """Note how a job ended; what needed one that failed is given up."""
        if code == 0:
            self._done.add(job.name)
            return
        lost = {job.name}
        for other in self.waiting:  # in order, so that what needs a lost one is lost as well
            if lost.intersection(other.needs):
                lost.add(other.name)
        self.waiting = [other for other in self.waiting if other.name not in lost]


def start(job: Job, is_done: Callable[[Job], bool]) -> subprocess.Popen[bytes] | int | None:
    """Start a job.

    Returns:
        The process; 0 when the job was done before; None while another process runs it.
    """
    job.lock.parent.mkdir(parents=True, exist_ok=True)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(job.lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if is_done(job):
            return 0
        with job.log.open("ab") as log:
            return subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **job.environment},
                pass_fds=(descriptor,),
            )
    finally:
        # The lock belongs to the open file, of which a started process keeps a copy.
        os.close(descriptor)


def run_one(job: Job, is_done: Callable[[Job], bool]) -> int:
    """Run a job, or wait for the process that runs it, and return the exit code."""
    while True:
        started = start(job, is_done)
        if isinstance(started, int):
            return started
        if started is not None:
            return started.wait()
        time.sleep(_POLL_S)


class Processes:
    """Jobs as processes on this machine.

    Args:
        slots: Processes at once.
        is_done: Whether a job has nothing left to do.
        devices: CUDA devices that the slots use in turn; empty leaves the choice to the runs.
    """

    def __init__(self, slots: int, is_done: Callable[[Job], bool], devices: Sequence[str] = ()) -> None:
        self.slots, self.is_done, self.devices = slots, is_done, tuple(devices)

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, int]]:
        """Jobs as they end; Ctrl-C is passed on, and the runs write checkpoints."""
        queue, free = Queue(jobs), list(range(self.slots))
        running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
        try:
            while queue.waiting or running:
                for job in queue.ready():
                    if not free:
                        break
                    started = start(self._on_device(job, free[0]), self.is_done)
                    if started is None:
                        continue
                    queue.waiting.remove(job)
                    if isinstance(started, int):
                        queue.ended(job, started)
                        yield job, started
                    else:
                        running[free.pop(0)] = job, started
                for slot, (job, process) in list(running.items()):
                    code = process.poll()
                    if code is not None:
                        del running[slot]
                        free.append(slot)
                        queue.ended(job, code)
                        yield job, code
                time.sleep(_POLL_S)
        finally:
            _interrupt([process for _, process in running.values()])

    def _on_device(self, job: Job, slot: int) -> Job:
        if not self.devices:
            return job
        chosen = {"CUDA_VISIBLE_DEVICES": self.devices[slot % len(self.devices)]}
        return replace(job, environment={**job.environment, **chosen})


def _interrupt(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask runs to write a checkpoint and end."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
