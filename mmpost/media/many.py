"""Decode several media at once, each in a decode process of its own."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
MOST = 4  # more decoders than this rarely keep up with one reader


def in_order(work: Iterable[Callable[[], T]], processes: int = 0) -> Iterator[T]:
    """What each piece of work returns, in order; the next pieces are under way meanwhile.

    Threads wait for the decode processes, of which there are as many as threads that ask (``limits``).

    Args:
        work: Functions that decode; an exception comes up at its place in the order.
        processes: Pieces at once; 0 for one per core, at most 4.
    """
    count = processes or min(MOST, os.cpu_count() or 1)
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="decode") as threads:
        try:
            for one in work:
                waiting.append(threads.submit(one))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
