"""Random numbers by key instead of by stream.

Every draw is a pure function of (seed, purpose, counters). Results therefore depend neither on the batch a row
shared, nor on the number of processes, nor on whether the run was interrupted.
"""

from __future__ import annotations

import zlib

import numpy as np

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def _mix(state: np.ndarray) -> np.ndarray:
    """One round of the splitmix64 finaliser; a bijection of 64-bit words that passes BigCrush as a counter RNG."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (state ^ (state >> np.uint64(31))) & _MASK


def key(purpose: str) -> int:
    """Stable number of a purpose such as ``"sampling"``."""
    return zlib.crc32(purpose.encode())


def uniform(seed: int, purpose: str, *counters: int | np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) for each combination of broadcast counters.

    Args:
        seed: Seed of the run.
        purpose: Who draws, for example ``"sampling"``.
        counters: Integers or integer arrays that broadcast against each other.

    Returns:
        Array of the broadcast shape; 53 random bits each.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(seed, dtype=np.uint64) ^ _mix(np.asarray(key(purpose), dtype=np.uint64)))
        for counter in counters:
            state = _mix(state ^ _mix(np.asarray(counter).astype(np.uint64)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A numpy generator that belongs to one purpose and one set of counters."""
    # The number of counters is part of the key: numpy pads with zeros, so (s, p) and (s, p, 0) would be one stream.
    words = [seed, key(purpose), len(counters), *counters]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
