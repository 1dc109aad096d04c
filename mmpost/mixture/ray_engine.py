"""Jobs on a Ray cluster. Imported only when it is asked for; folders must be on a disk that all nodes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from mmpost.mixture.processes import Job, Queue, run_one


class RayEngine:
    """Jobs as Ray tasks.

    Args:
        slots: Tasks at once.
        is_done: Whether a job has nothing left to do.
        devices: GPUs per task as a number in a list of one, for example ``["1"]``; empty asks for none.
    """

    def __init__(self, slots: int, is_done: Callable[[Job], bool], devices: Sequence[str] = ()) -> None:
        self.slots, self.is_done = slots, is_done
        self.gpus = float(devices[0]) if devices else 0.0

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, int]]:
        """Jobs as they end."""
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        # A run is made of processes of its own; retries would start it again after an error of its own.
        task = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=0)(run_one)
        queue = Queue(jobs)
        running: dict[Any, Job] = {}
        while queue.waiting or running:
            for job in queue.ready()[: self.slots - len(running)]:
                queue.waiting.remove(job)
                running[task.remote(job, self.is_done)] = job
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                job, code = running.pop(reference), ray.get(reference)
                queue.ended(job, code)
                yield job, code
