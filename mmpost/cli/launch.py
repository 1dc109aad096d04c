"""Several processes from one command: ``--gpus N``, ``--processes N``, and the words for several machines.

The command starts itself once per process and passes on signals and the exit code. A launcher of someone else
(torchrun, accelerate, srun with RANK set) is recognised by its environment, and nothing is started then.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from mmpost.core.errors import MmpostError

OPTIONS = ("--gpus", "--processes")
WORDS = ("nproc", "nnodes", "node_rank", "master")
PORT = 29500
# After one process failed, the others may end by themselves this long, are asked to, and are killed.
GRACE_S, KILL_S = 5.0, 15.0
# Done, and interrupted with a checkpoint: the others of such a process are about to end by themselves.
ORDERLY = (0, 130)


@dataclass(frozen=True, slots=True)
class Launch:
    """How many processes of a run, and where.

    Attributes:
        nproc: Processes on this machine.
        kind: ``gpus``: one per CUDA device; ``processes``: on the CPU; ``nproc``: whichever there is.
        nnodes: Machines.
        node_rank: Number of this machine.
        master: ``host:port`` of the first machine; None on a single one.
    """

    nproc: int
    kind: str
    nnodes: int = 1
    node_rank: int = 0
    master: str | None = None


def split(args: Sequence[str]) -> tuple[Launch | None, list[str]]:
    """Take the words about processes out of a command line.

    Returns:
        What they ask for (None without them), and the other words.

    Raises:
        MmpostError: MMP-C060 when a word has no sensible value or words do not belong together.
    """
    found: dict[str, str] = {}
    rest: list[str] = []
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in OPTIONS and not (equals and name in WORDS):
            rest.append(word)
            continue
        key = name.removeprefix("--")
        if key in found:
            raise MmpostError("MMP-C060", f"'{name}' is given twice.", "Leave one of them out.")
        found[key] = value if equals else next(words, "")
    return (_launch(found) if found else None), rest


def _launch(found: dict[str, str]) -> Launch:
    kinds = [kind for kind in ("gpus", "processes", "nproc") if kind in found]
    if len(kinds) != 1:
        names = ", ".join(f"--{kind}" if kind != "nproc" else kind for kind in kinds) or ", ".join(found)
        raise MmpostError(
            "MMP-C060", f"cannot tell the number of processes from: {names}.", "Give one of --gpus, --processes, nproc."
        )
    nproc, nnodes = _number(found, kinds[0], 1), _number(found, "nnodes", 1)
    node_rank = _number(found, "node_rank", 0)
    if nnodes > 1 and ("master" not in found or "node_rank" not in found):
        raise MmpostError(
            "MMP-C060",
            f"nnodes={nnodes} needs node_rank and master.",
            "Add, on each machine: node_rank=NUMBER master=HOST:PORT, where HOST is the machine with number 0.",
        )
    if node_rank >= nnodes:
        raise MmpostError(
            "MMP-C060", f"node_rank={node_rank} with nnodes={nnodes}.", f"Number the machines from 0 to {nnodes - 1}."
        )
    return Launch(nproc, kinds[0], nnodes, node_rank, found.get("master"))


def _number(found: dict[str, str], key: str, lowest: int) -> int:
    text = found.get(key, str(lowest))
    if not text.isdecimal() or int(text) < lowest:
        raise MmpostError(
            "MMP-C060",
            f"{key}: expected a whole number from {lowest} on, got '{text}'.",
            f"Write for example {key}=2." if key in WORDS else f"Write for example --{key} 2.",
        )
    return int(text)


def needed(launch: Launch | None) -> bool:
    """Whether processes have to be started; False inside a launcher, and for one process on one machine.

    Raises:
        MmpostError: MMP-E040 when there are fewer CUDA devices than asked for.
    """
    if launch is None or "RANK" in os.environ:
        return False
    if launch.kind == "processes":
        # Before CUDA is looked at for the first time, in this process and in those that it starts.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        _check_devices(launch)
    return launch.nproc * launch.nnodes > 1


def _check_devices(launch: Launch) -> None:
    import torch

    there = torch.cuda.device_count()
    if launch.nproc > there and (there or launch.kind == "gpus"):
        shown = "no CUDA device" if not there else f"{there} CUDA device{'s' if there > 1 else ''}"
        word = "--gpus" if launch.kind == "gpus" else "nproc"
        raise MmpostError(
            "MMP-E040",
            f"{word} {launch.nproc}, but this machine shows {shown}.",
            f"To run on the CPU: --processes {launch.nproc}" if not there else f"At most: {word} {there}",
        )


def start(launch: Launch, words: Sequence[str]) -> int:
    """Run ``mmpost WORDS`` in all processes of this machine.

    Returns:
        Exit code of the first that failed, 0 when none did.
    """
    host, _, port = (launch.master or "").partition(":")
    threads = max(1, (os.cpu_count() or 1) // launch.nproc)
    shared = {
        "MASTER_ADDR": host or "127.0.0.1",
        "MASTER_PORT": port or str(PORT if launch.master else _free_port()),
        "WORLD_SIZE": str(launch.nproc * launch.nnodes),
        "LOCAL_WORLD_SIZE": str(launch.nproc),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    with _Signals() as signals:
        for local in range(launch.nproc):
            place = {"LOCAL_RANK": str(local), "RANK": str(launch.node_rank * launch.nproc + local)}
            # A session of its own: Ctrl-C reaches a process once, from here, and not a second time from the terminal.
            signals.children.append(
                subprocess.Popen(
                    [sys.executable, "-m", "mmpost", *words],
                    env={**os.environ, **shared, **place},
                    start_new_session=True,
                )
            )
        try:
            return _wait(signals.children)
        finally:
            for child in signals.children:
                child.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; when one fails, end the others."""
    failed: int | None = None
    ask_at = kill_at = float("inf")
    while True:
        codes = [child.poll() for child in children]
        bad = [code for code in codes if code is not None and code not in ORDERLY]
        now = time.monotonic()
        if failed is None and bad:
            failed = bad[0]
            # The first process speaks for all, so that the others need not tell the same.
            ask_at = now + (0.0 if codes[0] == failed else GRACE_S)
            kill_at = ask_at + KILL_S
        if None not in codes:
            break
        if now >= ask_at or now >= kill_at:
            for child in children:
                if child.poll() is None:
                    child.send_signal(signal.SIGKILL if now >= kill_at else signal.SIGTERM)
            ask_at = float("inf")
        time.sleep(0.05)
    if failed is not None:
        return failed if failed > 0 else 128 - failed
    return max(code for code in codes if code is not None)


class _Signals:
    """While open, signals to this process go to its children instead.

    Attributes:
        children: Who gets them.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.children: list[subprocess.Popen[bytes]] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._pass_on) for number in self.NUMBERS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)
