"""Random numbers by key: the same key gives the same number, any other key an unrelated one."""

import zlib

import numpy as np
import pytest
from scipy.stats import chi2, kstest

from mmpost.core import seeding


def _splitmix(state):
    """The finaliser of splitmix64 with Python's unbounded integers."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_numbers_are_fixed_for_all_time():
    # Another value would change every seeded run of every user.
    assert seeding.key("sampling") == zlib.crc32(b"sampling") == 970651846
    drawn = seeding.uniform(42, "sampling", np.arange(3), 1, 2)
    assert drawn.tolist() == [0.3773180965581673, 0.6916860459966284, 0.23711417915992195]
    for i in range(3):
        state = _splitmix(42 ^ _splitmix(970651846))
        for counter in (i, 1, 2):
            state = _splitmix(state ^ _splitmix(counter))
        assert drawn[i] == (state >> 11) / 2**53


def test_counters_broadcast_and_each_number_stands_alone():
    table = seeding.uniform(3, "a", np.arange(5)[:, None], np.arange(4))
    assert table.shape == (5, 4)
    assert table.dtype == np.float64
    for i in range(5):
        for j in range(4):
            assert float(seeding.uniform(3, "a", i, j)) == table[i, j]
    order = np.array([4, 1, 3])
    assert np.array_equal(seeding.uniform(3, "a", order, 2), table[order, 2])


def test_every_part_of_the_key_matters():
    base = {"seed": 1, "purpose": "a", "counters": (1, 2, 3)}
    others = [
        {"seed": 2},
        {"purpose": "b"},
        {"counters": (2, 2, 3)},
        {"counters": (1, 3, 3)},
        {"counters": (1, 2, 4)},
        {"counters": (2, 1, 3)},
        {"counters": (1, 2)},
        {"counters": (1, 2, 3, 0)},
    ]

    def draw(seed, purpose, counters):
        return float(seeding.uniform(seed, purpose, *counters))

    numbers = [draw(**base)] + [draw(**{**base, **change}) for change in others]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_numbers_are_uniform_along_every_counter(axis):
    counters = [7, 8, 9]
    counters[axis] = np.arange(20_000)
    drawn = seeding.uniform(0, "sampling", *counters)
    assert len(np.unique(drawn)) == 20_000
    assert kstest(drawn, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 4 / np.sqrt(20_000)


def test_neighbouring_seeds_are_unrelated():
    first, second = (seeding.uniform(seed, "sampling", np.arange(40_000)) for seed in (1, 2))
    table = np.bincount((first * 8).astype(int) * 8 + (second * 8).astype(int), minlength=64)
    assert float(((table - 625) ** 2 / 625).sum()) < chi2.ppf(0.999, 63)


def test_large_and_zero_counters_are_fine():
    drawn = seeding.uniform(0, "", np.array([0, 2**31, 2**62], dtype=np.int64))
    assert np.isfinite(drawn).all()
    assert len(np.unique(drawn)) == 3


def test_generators_belong_to_their_key():
    draws = [
        seeding.generator(seed, purpose, *counters).random(4).tolist()
        for seed, purpose, counters in [(1, "a", (0,)), (2, "a", (0,)), (1, "b", (0,)), (1, "a", (2,)), (1, "a", (1,))]
    ]
    assert len({tuple(draw) for draw in draws}) == 5
    assert seeding.generator(1, "a", 1).random(4).tolist() == draws[4]


def test_the_global_streams_are_left_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the point is that nobody touches it
    seeding.uniform(1, "a", 2)
    seeding.generator(1, "a").random(3)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
