"""The inside of the decode process: receive one job, answer, until the socket closes.

A process of its own, since decoders are C code that may crash, ask for all memory, or hang while holding the
interpreter; then only this process ends. Runs as ``python -m mmpost.media.decode_process FD``.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mmpost.core.errors import MmpostError
from mmpost.media.backends import clip, frames, sound
from mmpost.media.backends.sound_rules import Want
from mmpost.media.backends.source import MediaFile

HEAD = struct.Struct("<QQ")  # bytes of JSON, bytes of blob
FIRST_BYTES = 1 << 16  # of one message; most fit, and every system call counts for short clips
INLINE_BYTES = 1 << 16  # smaller arrays travel through the socket, larger ones in shared memory
KEEP_BYTES = 1 << 28
MEMORY_BYTES = 4 << 30  # address space that one job may take beyond what the libraries take
Array = npt.NDArray[Any]
Share = Callable[[tuple[int, ...], str], Array]


def answer(job: dict[str, Any], blob: bytes | None, share: Share) -> tuple[dict[str, Any], list[Array]]:
    """Do one job.

    Args:
        job: ``op`` (``audio``, ``video`` or ``load``), ``path``, ``name``, ``origin`` and the options of the op.
        blob: The encoded file, if it has no path.
        share: Gives memory that the other side can see.

    Returns:
        What can be said in JSON, and the arrays.

    Raises:
        MmpostError: As ``sound.decode`` and ``clip.decode``.
    """
    if job["op"] == "load":
        frames.backend(job["backend"])
        return {}, []
    file = MediaFile(job["op"], job["name"], job["origin"], job["path"], blob)
    if job["op"] == "audio":
        heard = sound.decode(file, Want(**job["want"]), share)
        return {"sound": heard.facts, "notes": heard.notes}, [heard.samples]
    ask = dict(job["ask"])
    ask["sound"] = Want(**ask["sound"]) if ask["sound"] is not None else None
    arrays: list[Array] = []

    def allocate(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        arrays.append(share(shape, "u1"))
        return arrays[0]

    seen = clip.decode(file, clip.Ask(**ask), allocate)
    out: dict[str, Any] = {"video": seen.facts, "notes": seen.notes}
    if seen.sound is not None:
        out |= {"sound": seen.sound.facts, "notes": seen.notes + seen.sound.notes}
        arrays.append(seen.sound.samples)
    return out, arrays


def main() -> None:
    """Serve the socket whose descriptor is the first argument."""
    peer = socket.socket(fileno=int(sys.argv[1]))
    # Ctrl-C reaches the whole process group; the training process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Server(peer).serve()


class Server:
    """One end of the socket."""

    def __init__(self, peer: socket.socket) -> None:
        self.peer = peer
        # Pages that both sides have already are several times cheaper than new ones, so the segment stays.
        self.segment: mmap.mmap | None = None
        self.fresh: int | None = None  # descriptor of a segment that the other side does not have yet
        self.shared: int | None = None  # address of the array in it

    def serve(self) -> None:
        """Answer jobs until the other side closes."""
        self._reply({"pid": os.getpid()}, [])
        while True:
            message = receive(self.peer, self.peer.recv(FIRST_BYTES))
            if message is None:
                return
            text, blob = message
            job = json.loads(text)
            self._serve_one(job, bytes(blob) if job.get("path") is None else None)

    def _serve_one(self, job: dict[str, Any], blob: bytes | None) -> None:
        _alarm(2 * job["limit_s"] + 1)
        try:
            if job["op"] != "load":
                limit_memory(job.get("memory_bytes", MEMORY_BYTES))
            said, arrays = answer(job, blob, self._share)
        except MmpostError as error:
            self._reply({"error": [error.code, error.what, error.fix]}, [])
        except MemoryError:
            self._reply({"memory": True}, [])
        except OSError as error:
            lacks = error.errno == errno.ENOMEM  # of mmap
            self._reply({"memory": True} if lacks else {"failure": f"{type(error).__name__}: {error}"}, [])
        except Exception as error:  # a decoder may raise anything; it is reported in its own words
            self._reply({"failure": f"{type(error).__name__}: {error}"}, [])
        else:
            self._reply(said, arrays)
        finally:
            limit_memory(None)
            _alarm(0)
            self._clear()

    def _share(self, shape: tuple[int, ...], dtype: str) -> Array:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size < INLINE_BYTES:
            return np.empty(shape, dtype)
        if self.segment is None or len(self.segment) < size:
            self.segment, self.fresh = new_segment(size)
        array = np.frombuffer(self.segment, dtype, math.prod(shape)).reshape(shape)
        self.shared = array.ctypes.data
        return array

    def _reply(self, said: dict[str, Any], arrays: list[Array]) -> None:
        """Send what was said; one large array lies in the segment, others go as bytes."""
        if self.shared is None and len(arrays) == 1 and arrays[0].nbytes >= INLINE_BYTES:
            place = self._share(arrays[0].shape, arrays[0].dtype.str)
            place[...] = arrays[0]
            arrays = [place]
        parts = [np.ascontiguousarray(array).tobytes() for array in arrays if array.ctypes.data != self.shared]
        said["arrays"] = [[list(array.shape), array.dtype.str, array.ctypes.data == self.shared] for array in arrays]
        text, blob = json.dumps(said).encode(), b"".join(parts)
        descriptors = [] if self.fresh is None else [self.fresh]
        whole = HEAD.pack(len(text), len(blob)) + text + blob
        sent = socket.send_fds(self.peer, [whole], descriptors)
        if sent < len(whole):
            self.peer.sendall(memoryview(whole)[sent:])

    def _clear(self) -> None:
        """Keep the segment for the next job, unless it is very large."""
        if self.fresh is not None:
            os.close(self.fresh)
        self.fresh = self.shared = None
        if self.segment is not None and len(self.segment) > KEEP_BYTES:
            self.segment = None


def receive(peer: socket.socket, first: bytes) -> tuple[bytes, bytes] | None:
    """JSON and blob of the message that begins with ``first``, or None when the other side has closed.

    Each side waits for the other's answer, so nothing of a next message can be in ``first``.
    """
    if len(first) < HEAD.size:
        return None
    size, extra = HEAD.unpack(first[: HEAD.size])
    out = bytearray(size + extra)
    at = len(first) - HEAD.size
    out[:at] = first[HEAD.size :]
    view = memoryview(out)
    while at < len(out):
        got = peer.recv_into(view[at:])
        if got == 0:
            return None
        at += got
    return bytes(view[:size]), bytes(view[size:])


def new_segment(size: int) -> tuple[mmap.mmap, int]:
    """Memory without a name, which the kernel frees with its last user, and its descriptor."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("mmpost-frames")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return mmap.mmap(descriptor, size), descriptor


def limit_memory(extra: int | None) -> None:
    """Let this process take ``extra`` bytes of address space more than it has; None lifts the limit.

    Works where the kernel keeps the limit (Linux); elsewhere only the limits of each format protect.
    """
    try:
        import resource  # noqa: PLC0415 - absent on Windows

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = hard
        if extra is not None:
            with open("/proc/self/statm", "rb", buffering=0) as file:
                limit = int(file.read().split()[0]) * resource.getpagesize() + extra
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ImportError, OSError, ValueError):
        return


def _alarm(seconds: float) -> None:
    """Let the kernel end this process after ``seconds``; 0 cancels.

    The training process kills a late decode, but one that was killed itself cannot.
    """
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    main()
