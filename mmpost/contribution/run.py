"""Ask all models about all rows: in blocks, each with its own journal, by as many processes as there are.

A block is 64 rows of one model, and its journal is the same whoever writes it: rows are batched in pieces of 32 by
their numbers, and draws are keyed by them. A process takes a block by locking it, so that any number of processes, of
one start or of several after a kill, share the work without repeating any of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from mmpost.config.schema import MediaSection, ModelSection, RewardSpec
from mmpost.contribution.score import Plan, score_rows
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Sample
from mmpost.models.load import LoadedModel, load
from mmpost.rewards.score import resolve
from mmpost.runs.journal import Journal

PIECE = 32
BLOCK = 2  # pieces
JOURNALS = "votes"
ENGINES = ("processes", "ray")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Voter:
    """One model that is asked.

    Attributes:
        name: Hub id, folder or ``tiny-*``.
        fingerprint: Changes with its weights.
        max_length: Longest prompt in tokens.
    """

    name: str
    fingerprint: str
    max_length: int = 1 << 30


@dataclass(frozen=True, slots=True)
class Work:
    """Everything that decides what the journals hold.

    Attributes:
        rows: All rows.
        rows_hash: Their fingerprint.
        voters: Models in order.
        plan: What is asked.
        media: How media are decoded.
        folder: Where the journals are.
        threads: CPU threads of every process: another number may change a last bit, and with it a drawn word.
    """

    rows: Sequence[Sample]
    rows_hash: str
    voters: tuple[Voter, ...]
    plan: Plan
    media: MediaSection
    folder: Path
    threads: int = 1

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(number of the model, number of the block), in order."""
        count = -(-len(self.rows) // (PIECE * BLOCK))
        return [(voter, block) for voter in range(len(self.voters)) for block in range(count)]

    def header(self, voter: int, block: int) -> dict[str, Any]:
        """First line of the journal of a block."""
        plan = self.plan
        return {
            "rows": self.rows_hash,
            "model": self.voters[voter].fingerprint,
            "modality": plan.modality,
            "null": [null.name for null in plan.nulls],
            "k": plan.k,
            "reward": plan.reward,
            "max_new_tokens": plan.sampling.max_new_tokens,
            "temperature": plan.sampling.temperature,
            "top_p": plan.sampling.top_p,
            "seed": plan.sampling.seed,
            "batch_size": plan.batch_size,
            "threads": self.threads,
            "piece": PIECE,
            "block": block,
        }

    def journal(self, voter: int, block: int) -> Journal:
        """Opened journal of a block.

        Raises:
            MmpostError: MMP-R226 when it was written with other options.
        """
        return Journal(self.folder / f"m{voter}-{block:05d}.jsonl", self.header(voter, block))

    def pieces(self, block: int) -> int:
        """Number of pieces of a block; the last one may have fewer."""
        left = len(self.rows) - block * BLOCK * PIECE
        return min(BLOCK, -(-left // PIECE))

    def is_done(self, voter: int, block: int) -> bool:
        """Whether the journal of a block is complete."""
        path = self.folder / f"m{voter}-{block:05d}.jsonl"
        return path.is_file() and path.read_bytes().count(b"\n") > self.pieces(block)


class Asker:
    """Works off blocks in this process, one open model at a time.

    Args:
        work: The work.
        opened: Models that are open already, by their place.
        device: Where models are opened, for example ``cuda:1``; None: CUDA where there is one.
    """

    def __init__(self, work: Work, opened: Mapping[int, LoadedModel] | None = None, device: str | None = None) -> None:
        self.work, self._given, self._device = work, dict(opened or {}), device
        self._rewards = resolve([RewardSpec(name=work.plan.reward)])
        self._open: tuple[int, LoadedModel] | None = None

    def __call__(self, voter: int, block: int, *, block_until_free: bool = True, alive: Callable[[], bool]) -> bool:
        """Finish a block.

        Args:
            voter: Number of the model.
            block: Number of the block.
            block_until_free: Wait for another process that has it, else leave it alone.
            alive: Asked before every piece; False stops.

        Returns:
            Whether the block is complete.
        """
        if self.work.is_done(voter, block):
            return True
        with _locked(self.work.folder / f"m{voter}-{block:05d}.lock", block_until_free) as mine:
            if not mine:
                return False
            journal = self.work.journal(voter, block)

            def piece(number: int) -> list[dict[str, Any]]:
                if not alive():
                    raise KeyboardInterrupt
                first = (block * BLOCK + number) * PIECE
                numbers = range(first, min(first + PIECE, len(self.work.rows)))
                return score_rows(self._model(voter), self.work.rows, numbers, self.work.plan, self._rewards)

            journal.complete(self.work.pieces(block), piece)
        return True

    def _model(self, voter: int) -> LoadedModel:
        if voter in self._given:
            return self._given[voter]
        if self._open is None or self._open[0] != voter:
            self._open = None
            one = self.work.voters[voter]
            section = ModelSection(model_name_or_path=one.name)
            device = torch.device(self._device) if self._device else None
            opened = load(section, peft=None, media=self.work.media, max_length=one.max_length, device=device)
            self._open = voter, opened
        return self._open[1]


@contextlib.contextmanager
def _locked(path: Path, wait_for_it: bool) -> Iterator[bool]:
    """Hold an advisory lock; the system lets go of it when the process ends, however it does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait_for_it else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def work_off(work: Work, number: int, count: int, device: str | None, alive: Callable[[], bool]) -> None:
    """What one process does: all blocks from its own place on, first those that nobody works on.

    Args:
        work: The work.
        number: Of this process.
        count: Processes in all.
        device: See ``Asker``.
        alive: Asked before every piece.
    """
    torch.set_num_threads(work.threads)
    asker, blocks = Asker(work, device=device), work.blocks
    start = number * len(blocks) // count
    turned = [*blocks[start:], *blocks[:start]]
    left = [one for one in turned if not asker(*one, block_until_free=False, alive=alive)]
    for one in left:
        asker(*one, alive=alive)


def run(
    work: Work,
    *,
    processes: int = 1,
    engine: str = "processes",
    devices: Sequence[str] = (),
    opened: Mapping[int, LoadedModel] | None = None,
    progress: Progress | None = None,
) -> list[list[dict[str, Any]]]:
    """Votes of every model about every row, ``[models][rows]``; what is in the journals is not asked again.

    Args:
        work: The work.
        processes: How many processes share it; with ``ray`` the number of actors.
        engine: ``processes`` on this machine, or ``ray`` on a cluster whose nodes share the folder.
        devices: Devices that processes take in turn.
        opened: Models that are open already, by their place; they are asked in this process.
        progress: Called with blocks done and blocks in all.

    Raises:
        MmpostError: MMP-R226 for journals of other work, MMP-R233 for damaged ones, MMP-R240 when a process dies, and
            what models, media and the verifier raise.
    """
    blocks = work.blocks
    for voter, block in blocks:  # a mistake is told before any process is started
        if (work.folder / f"m{voter}-{block:05d}.jsonl").is_file():
            with _locked(work.folder / f"m{voter}-{block:05d}.lock", True):
                work.journal(voter, block)
    if engine == "ray":
        from mmpost.contribution.ray_engine import run_on_ray  # noqa: PLC0415

        run_on_ray(work, processes, gpus=float(bool(devices)))
    elif processes > 1 and not opened:
        _side_by_side(work, processes, devices, progress)
    else:
        _alone(work, opened, devices, progress)
    votes: list[list[dict[str, Any]]] = [[] for _ in work.voters]
    for voter, block in blocks:
        votes[voter].extend(entry for piece in work.journal(voter, block).pieces for entry in piece)
    return votes


def _alone(
    work: Work, opened: Mapping[int, LoadedModel] | None, devices: Sequence[str], progress: Progress | None
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(work.threads)
    try:
        asker = Asker(work, opened, devices[0] if devices else None)
        for count, one in enumerate(work.blocks, 1):
            asker(*one, alive=lambda: True)
            if progress is not None:
                progress(count, len(work.blocks))
    finally:
        torch.set_num_threads(threads)


def _side_by_side(work: Work, processes: int, devices: Sequence[str], progress: Progress | None) -> None:
    context = multiprocessing.get_context("spawn")
    started: dict[Connection, Any] = {}
    left = set(work.blocks)
    try:
        for number in range(processes):
            here, there = context.Pipe(duplex=False)
            device = devices[number % len(devices)] if devices else None
            args = (work, number, processes, device, there, os.getpid())
            process = context.Process(target=_child, args=args, daemon=True)
            process.start()
            there.close()
            started[here] = process
        while started:
            for ready in wait(list(started), timeout=1.0):
                here = next(one for one in started if one is ready)
                process = started.pop(here)
                try:
                    error = here.recv()
                except EOFError:
                    process.join()
                    error = MmpostError(
                        "MMP-R240",
                        f"a process of the filter ended with exit code {process.exitcode}.",
                        "The same command goes on where it was; with less memory, use fewer --processes.",
                    )
                if error is not None:
                    raise error
            if progress is not None:
                left = {one for one in left if not work.is_done(*one)}
                progress(len(work.blocks) - len(left), len(work.blocks))
    finally:
        for process in started.values():
            process.terminate()
            process.join()


def _child(work: Work, number: int, count: int, device: str | None, told: Connection, parent: int) -> None:
    """A process of the filter; it ends before its next piece when the one that started it is gone."""
    try:
        work_off(work, number, count, device, lambda: os.getppid() == parent)
        told.send(None)
    except MmpostError as error:
        told.send(error)
    except KeyboardInterrupt:
        pass
