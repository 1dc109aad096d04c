"""The inside of a worker process: receive (function, arguments), answer, until the input ends.

Runs as a script of its own (see ``workers``), so nothing of the user's main program is imported a second time.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from mmpost.core.catalog import Catalog

# A worker ends after so many items, or when it ever needed so much memory: sympy keeps what it has seen.
MAX_ITEMS = 2000
MAX_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception in a worker, in words.

    Attributes:
        kind: Name of its type.
        text: Its message.
        place: ``file:line`` inside the function's own file, or empty.
    """

    kind: str
    text: str
    place: str


@dataclass(frozen=True, slots=True)
class Reply:
    """One message of a worker.

    Attributes:
        state: ``started`` before an item's clock runs, then ``done`` or ``failed``.
        value: What the function returned.
        failure: Why it did not return.
        retires: The worker takes no further item.
    """

    state: str
    value: Any = None
    failure: Failure | None = None
    retires: bool = False


def main() -> None:
    """Serve until standard input ends. Standard output belongs to the replies; prints of a function are dropped."""
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    functions: dict[str, Callable[..., Any]] = {}
    served = 0
    while True:
        try:
            name, arguments, limit_s = pickle.load(requests)
        except EOFError:
            return
        reply = _serve(functions, name, arguments, limit_s, replies)
        served += 1
        retires = served >= MAX_ITEMS or _peak_bytes() > MAX_BYTES
        _send(replies, Reply(reply.state, reply.value, reply.failure, retires))
        if retires:
            return


def _serve(
    functions: dict[str, Callable[..., Any]], name: str, arguments: tuple[Any, ...], limit_s: float, replies: BinaryIO
) -> Reply:
    function = None
    try:
        if name not in functions:
            functions[name] = load(name)
        function = functions[name]
        _send(replies, Reply("started"))
        _alarm(2 * limit_s + 1)
        value = function(*arguments)
        pickle.dumps(value)
    except BaseException as error:  # a function of the user may raise anything; it is reported in its own words
        return Reply("failed", failure=describe(error, function))
    finally:
        _alarm(0)
    return Reply("done", value)


def load(name: str) -> Callable[..., Any]:
    """The function called ``module:function`` or ``file.py:function``."""
    if ".py:" in name:
        found: Callable[..., Any] = Catalog("rewards", {}).get(name)
        return found
    module, _, attribute = name.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return loaded


def describe(error: BaseException, function: Callable[..., Any] | None) -> Failure:
    """An exception in words, with the last line of the function's own file that it went through."""
    called = inspect.unwrap(function) if function is not None else None
    code = getattr(called, "__code__", None) or getattr(type(called).__call__, "__code__", None)
    places = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if code is not None and frame.filename == code.co_filename
    ]
    return Failure(type(error).__name__, str(error), places[-1] if places else "")


def _alarm(seconds: float) -> None:
    """Let the kernel end this process after ``seconds``; 0 cancels.

    The parent kills a late worker, but a parent that was killed itself cannot, and a regular expression that runs away
    holds the interpreter, so that no thread in here could look for the parent.
    """
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _peak_bytes() -> int:
    try:
        import resource  # noqa: PLC0415 - absent on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _send(replies: BinaryIO, reply: Reply) -> None:
    pickle.dump(reply, replies)
    replies.flush()
