"""Decode in a process that can be killed: no hang, no crash and no lack of memory of a decoder reaches training.

One process per thread that decodes at the time, started at first use and kept for whoever decodes next. Frames come
back through a segment of shared memory that both sides keep. A fork gets processes of its own, since two users of one
socket would read each other's frames.
"""

from __future__ import annotations

import atexit
import json
import math
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import mmpost
from mmpost.core.errors import MmpostError
from mmpost.media.decode_process import FIRST_BYTES, HEAD, KEEP_BYTES, Array, answer, receive
from mmpost.media.ref import shown

# A process is replaced after so many jobs, whatever its decoders have leaked by then.
MAX_JOBS = 5000
START_SECONDS = 120.0  # importing torchcodec imports torch
MAX_DESCRIPTORS = 4
# glibc would give the pages of every clip back and fault them in again for the next one, a quarter of a short decode.
_KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "MALLOC_TOP_PAD_": str(8 << 20),
}
CAN_BE_KILLED = hasattr(socket, "send_fds")


@dataclass(slots=True)
class Answer:
    """What the decode process said.

    Attributes:
        said: Facts and notes.
        arrays: Frames and samples, in the order of the job's kind.
    """

    said: dict[str, Any]
    arrays: list[Array] = field(default_factory=list)


def run(job: dict[str, Any], *, ref: str | bytes, blob: bytes | None, limit_s: float, backend: str) -> Answer:
    """Do one job of ``decode_process.answer`` under a time limit.

    Args:
        job: The job, without its limit.
        ref: The reference, for messages.
        blob: The encoded file, if it has no path.
        limit_s: Seconds until the process is killed.
        backend: Who decodes, for messages.

    Raises:
        MmpostError: MMP-D008 for exceptions of a decoder, MMP-D009 too slow, MMP-D083 too much memory, MMP-D084 the
            process died, MMP-E093 it does not start, and all that the job raises.
    """
    about = _About(job["op"], ref, job["origin"], backend, limit_s)
    if not CAN_BE_KILLED:  # Windows: descriptors cannot be sent
        said, arrays = answer(job, blob, np.empty)
        return Answer(said, arrays)
    process = _pool.take()
    reusable = False
    try:
        found = process.run({**job, "limit_s": limit_s}, blob, about)
        reusable = True
        return found
    except MmpostError:
        reusable = process.at_rest
        raise
    finally:  # after Ctrl-C too: an answer that is still under way would go to the next job
        _pool.give_back(process, reusable and process.jobs < MAX_JOBS)


def pid() -> int | None:
    """Process id of the decode process that the next job will use; None while there is none."""
    return _pool.idle[-1].child.pid if _pool.idle else None


def pids() -> list[int]:
    """Process ids of all idle decode processes."""
    return [process.child.pid for process in _pool.idle]


def close() -> None:
    """End the decode processes that are idle; the next job starts another."""
    with _pool.lock:
        idle, _pool.idle = _pool.idle, []
    for process in idle:
        process.close()


class _Pool:
    """The decode processes of this process."""

    def __init__(self) -> None:
        self.empty()

    def empty(self) -> None:
        """Know of no process; the lock is new, since a thread that a fork left behind may hold the old one."""
        self.lock = threading.Lock()
        self.idle: list[_Process] = []  # the one that was used last is the last
        self.busy: set[_Process] = set()

    def take(self) -> _Process:
        """An idle process, or a new one."""
        with self.lock:
            process = self.idle.pop() if self.idle else None
        process = process or _Process()
        with self.lock:
            self.busy.add(process)
        return process

    def give_back(self, process: _Process, reusable: bool) -> None:
        """Keep a process for the next job, or end it."""
        with self.lock:
            self.busy.discard(process)
            if reusable:
                self.idle.append(process)
        if not reusable:
            process.close()


_pool = _Pool()


def _forget() -> None:
    """After a fork: leave the parent's decode processes to the parent."""
    for process in (*_pool.idle, *_pool.busy):
        process.peer.close()
        process.child.returncode = 0  # not ours to wait for
    _pool.empty()


atexit.register(close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@dataclass(frozen=True, slots=True)
class _About:
    """Words for messages."""

    kind: str
    ref: str | bytes
    origin: str
    backend: str
    limit_s: float

    def at(self) -> str:
        return f"{self.origin}: " if self.origin else ""

    def late(self) -> MmpostError:
        what = f"decoding '{shown(self.ref)}' with {self.backend} took longer than {self.limit_s:g} s and was stopped"
        return MmpostError(
            "MMP-D009", f"{self.at()}{what}; tried next: none.", "Raise data.media.decode_timeout, or check the file"
        )

    def died(self, how: str) -> MmpostError:
        what = f"decoding {self.kind} '{shown(self.ref)}' with {self.backend} ended the decode process ({how})."
        return MmpostError("MMP-D084", self.at() + what, "Write the file again with ffmpeg, or leave the row out")

    def memory(self) -> MmpostError:
        what = f"{self.kind} '{shown(self.ref)}' needs more memory to decode than is allowed ({self.backend})."
        return MmpostError("MMP-D083", self.at() + what, "Lower data.media.max_frames, or split the file")

    def failed(self, why: str) -> MmpostError:
        what = f"cannot decode {self.kind} '{shown(self.ref)}': {self.backend}: {why.strip().rstrip('.')}."
        return MmpostError("MMP-D008", self.at() + what, "Other backends: none")


class _Process:
    """A running decode process and our end of its socket."""

    def __init__(self) -> None:
        self.jobs, self.at_rest = 0, True
        self.loaded: set[str] = set()
        self.segment: mmap.mmap | None = None
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.peer, theirs = socket.socketpair()
        root = str(Path(mmpost.__file__).parents[1])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with theirs:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "mmpost.media.decode_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.complaints,
                env={"OMP_NUM_THREADS": "1", **_KEEP_PAGES, **os.environ, "PYTHONPATH": paths},
            )
        try:
            self._receive(time.monotonic() + START_SECONDS)
        except (TimeoutError, ConnectionError) as error:
            why = self._last_words()
            self.close()
            raise MmpostError("MMP-E093", f"the decode process does not start: {why}.", "Run: mmpost doctor") from error

    def run(self, job: dict[str, Any], blob: bytes | None, about: _About) -> Answer:
        """Send a job and wait for its answer."""
        backend = job["ask"]["backend"] if job["op"] == "video" else None
        if backend is not None and backend not in self.loaded:
            self._exchange({"op": "load", "backend": backend, "limit_s": START_SECONDS}, None, about, START_SECONDS)
            self.loaded.add(backend)
        return self._exchange(job, blob, about, about.limit_s)

    def _exchange(self, job: dict[str, Any], blob: bytes | None, about: _About, limit_s: float) -> Answer:
        self.jobs += 1
        self.at_rest = False
        text = json.dumps(job).encode()
        deadline = time.monotonic() + limit_s
        try:
            self.peer.settimeout(limit_s)
            self.peer.sendall(HEAD.pack(len(text), len(blob or b"")) + text + (blob or b""))
            reply = self._receive(deadline)
        except TimeoutError as error:
            raise about.late() from error
        except ConnectionError as error:
            raise about.died(self._end()) from error
        self.at_rest = True
        if "error" in reply.said:
            raise MmpostError(*reply.said["error"])
        if "memory" in reply.said:
            raise about.memory()
        if "failure" in reply.said:
            raise about.failed(reply.said["failure"])
        return reply

    def _receive(self, deadline: float) -> Answer:
        """One message.

        Raises:
            TimeoutError: Nothing, or not all of it, came in time.
            ConnectionError: The process has ended.
        """
        self.peer.settimeout(max(0.001, deadline - time.monotonic()))
        first, descriptors, _, _ = socket.recv_fds(self.peer, FIRST_BYTES, MAX_DESCRIPTORS)
        message = receive(self.peer, first)
        if message is None:
            raise ConnectionError
        text, blob = message
        said = json.loads(text)
        return Answer(said, self._arrays(said.pop("arrays"), blob, descriptors))

    def _end(self) -> str:
        """How the process ended, in words."""
        try:
            code = self.child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its socket is closed"
        if code < 0:
            name = signal.strsignal(-code) or ""
            hint = "; often too little memory" if -code == signal.SIGKILL else ""
            return f"signal {-code}, {name}{hint}"
        return f"exit code {code}: {self._last_words()}"

    def _last_words(self) -> str:
        self.complaints.seek(0, os.SEEK_END)
        self.complaints.seek(max(0, self.complaints.tell() - 2000))
        lines = self.complaints.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip().rstrip(".")[:300] if lines else "it said nothing"

    def close(self) -> None:
        """Kill the process and wait for it."""
        self.peer.close()
        self.child.kill()
        self.child.wait()
        self.complaints.close()

    def _arrays(self, shapes: list[Any], blob: bytes, descriptors: list[int]) -> list[Array]:
        """Copies of what lies in the segment, and views of what came as bytes."""
        for descriptor in descriptors:
            self.segment = mmap.mmap(descriptor, 0)
            os.close(descriptor)
        out, at = [], 0
        for shape, dtype, is_shared in shapes:
            count = math.prod(shape)
            if is_shared and self.segment is not None:
                out.append(np.frombuffer(self.segment, dtype, count).reshape(shape).copy())
            else:
                out.append(np.frombuffer(blob, dtype, count, at).reshape(shape).copy())
                at += count * np.dtype(dtype).itemsize
        if self.segment is not None and len(self.segment) > KEEP_BYTES:
            self.segment = None
        return out
