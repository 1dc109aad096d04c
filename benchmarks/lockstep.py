"""Trainers in processes of their own that take steps in turn, and what their times say.

Each trainer runs in its own process, so that its peak memory is its own. A trainer stops at every step boundary until
it is told to go on; while one works, the others sleep. Times of one round are therefore taken within seconds of each
other, and the order is reversed every other round (A B, B A), which cancels a slow drift of the machine.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 4000


class Gate:
    """The step boundary of a trainer; lives in the trainer's process.

    Args:
        connection: To the process that tells whose turn it is.
        steps: Steps after which the process ends.
        cuda: Measure wall time after synchronisation and the allocator's peak, else CPU seconds of the process and
            the growth of its resident memory.
    """

    def __init__(self, connection: Connection, steps: int, *, cuda: bool) -> None:
        self._connection, self._steps, self._cuda = connection, steps, cuda
        self._done, self._base, self._started = 0, 0, 0.0

    def open(self) -> None:
        """The trainer is set up and its first step begins."""
        gc.collect()
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            # Freed memory that malloc still holds would hide the growth of the steps.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            self._base = _status("VmRSS")
        self._wait("ready")

    def step(self) -> None:
        """A step has ended. The process ends with the last one: what trainers write afterwards is not measured."""
        seconds = self._now() - self._started
        self._done += 1
        answer = {"seconds": seconds, "peak": self._peak()}
        if self._done == self._steps:
            self._connection.send(("step", answer))
            sys.stdout.flush()
            os._exit(0)
        self._wait("step", answer)

    def _wait(self, kind: str, answer: Any = None) -> None:
        self._connection.send((kind, answer))
        self._connection.recv()
        self._started = self._now()

    def _now(self) -> float:
        if not self._cuda:
            return time.process_time()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    def _peak(self) -> int:
        if not self._cuda:
            return _status("VmHWM") - self._base
        import torch

        return torch.cuda.max_memory_allocated()


def _status(name: str) -> int:
    """A memory figure of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


@dataclass(slots=True)
class Run:
    """What one trainer took.

    Attributes:
        seconds: Of every measured step.
        peak: Bytes; on a CPU the growth over the memory before the first step, on a GPU all that was allocated.
    """

    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def median(self) -> float:
        """Seconds of the middle step."""
        return statistics.median(self.seconds)


class Racer:
    """One trainer as seen from the measuring process."""

    def __init__(self, name: str, work: Callable[..., None], job: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(work, job, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._hear()

    def step(self) -> dict[str, Any]:
        """Let it take one step."""
        self._connection.send("go")
        return self._hear()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _hear(self) -> Any:
        try:
            kind, answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name} ended with exit code {self._process.exitcode}") from None
        if kind == "failed":
            raise RuntimeError(f"{self.name} failed:\n{answer}")
        return answer


def _serve(work: Callable[..., None], job: Any, connection: Connection) -> None:
    """Run a trainer; what it prints goes to a file."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        work(job, Gate(connection, job.steps, cuda=job.device == "cuda"))
        connection.send(("failed", f"it ended before step {job.steps}"))
    except BaseException:
        connection.send(("failed", traceback.format_exc()))
        raise


def race(
    racers: Mapping[str, tuple[Callable[..., None], Any]], *, rounds: int, warmup: int, together: bool
) -> dict[str, Run]:
    """Let trainers take ``warmup + rounds`` steps each.

    Args:
        racers: Name to the function that trains and its job; the job has ``folder``, ``device`` and ``steps``.
        rounds: Measured steps.
        warmup: Steps before them.
        together: Take turns step by step; else one trainer after the other, for models that do not fit twice.

    Raises:
        RuntimeError: A trainer failed; with its traceback.
    """
    runs = {name: Run() for name in racers}
    groups = [list(racers)] if together else [[name] for name in racers]
    for group in groups:
        with ExitStack() as stack:
            live = []
            for name in group:
                live.append(Racer(name, *racers[name]))
                stack.callback(live[-1].close)
            for index in range(warmup + rounds):
                for racer in live if index % 2 == 0 else reversed(live):
                    answer = racer.step()
                    run = runs[racer.name]
                    run.peak = max(run.peak, answer["peak"])
                    if index >= warmup:
                        run.seconds.append(answer["seconds"])
    return runs


def ratio(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """How many times longer their median step takes, with a 95 % bootstrap interval over rounds.

    Args:
        ours: Seconds of our steps, by round.
        theirs: Seconds of theirs in the same rounds.
        seed: Of the resampling.

    Returns:
        Ratio of medians, low, high. The interval covers the noise of these steps on this machine, nothing else.

    Raises:
        ValueError: When the lengths differ or there are no rounds.
    """
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"{a.size} of our steps but {b.size} of theirs")
    draws = np.random.default_rng(seed).integers(a.size, size=(RESAMPLES, a.size))
    resampled = np.median(b[draws], axis=1) / np.median(a[draws], axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(np.median(b) / np.median(a)), float(low), float(high)
