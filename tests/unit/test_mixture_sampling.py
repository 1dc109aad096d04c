"""Mixture weights in training: exact in every window, resumable, the same on one process and on many.

Largest remainder per window alone is not exact in the long run, because every window rounds to the same side; the
sampler carries the remainders over, so that after any number of draws every source has the floor or the ceiling of
its share.
"""

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
import torch

from mmpost.core.batch import Encoded
from mmpost.core.sample import Part, Sample, Turn
from mmpost.data.sampler import Sampler
from mmpost.mixture.designs import design
from mmpost.mixture.records import rounded
from mmpost.train.rows import RowStream


def mixtures():
    """Mixtures as designs write them, among them faces and corners."""
    return design([f"s{i}" for i in range(4)], "seeds,dirichlet", 15, seed=3).mixtures


def counts_after(weights, lengths):
    sampler = Sampler([50] * len(weights), weights, seed=0)
    total, found = np.zeros(len(weights), int), []
    for length in lengths:
        for draw in sampler.draw(length):
            total[draw.source] += 1
        found.append(total.copy())
    return found


@pytest.mark.parametrize("weights", mixtures(), ids=str)
def test_every_prefix_has_floor_or_ceiling_of_every_share(weights):
    shares = [Fraction(weight) for weight in weights]
    shares = [share / sum(shares) for share in shares]
    for n, counts in enumerate(counts_after(weights, [1] * 400), 1):
        assert counts.sum() == n
        for count, share in zip(counts, shares, strict=True):
            assert count in (floor(n * share), ceil(n * share))
            assert share > 0 or count == 0


@pytest.mark.parametrize("window", [10, 32, 128])
def test_windows_that_shares_divide_are_exact_each(window):
    parts = np.array([1, 2, 0, window - 3])
    found = np.diff([np.zeros(4, int), *counts_after(rounded(parts / window), [window] * 8)], axis=0)
    # Weights are kept to six digits, which 1/32 and 1/128 exceed by less than one draw in a million.
    assert (np.abs(found - parts) <= (0 if window == 10 else 1)).all()
    assert (found.sum(1) == window).all()


def largest_remainder(n, weights):
    exact = np.array(weights) * n
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: n - counts.sum()]] += 1
    return counts


def test_rounding_every_window_by_itself_would_drift():
    weights = rounded([0.34, 0.33, 0.33])
    alone = largest_remainder(10, weights) * 100
    carried = counts_after(weights, [10] * 100)[-1]
    assert list(alone) == [400, 300, 300]
    assert list(carried) == [340, 330, 330]


@pytest.mark.parametrize("seed", range(5))
def test_shares_hold_for_random_mixtures_over_a_long_run(seed):
    weights = rounded(np.random.default_rng(seed).dirichlet(np.full(6, 0.5)))
    counts = counts_after(weights, [5000])[0]
    assert np.abs(counts - 5000 * np.array(weights)).max() < 1


SOURCES = [
    [Sample(f"{name}{row}", (Turn("user", (Part("text", "?"),)),), {}, f"{name}:{row}", name) for row in range(size)]
    for name, size in (("a", 7), ("b", 20), ("c", 3))
]


def encode(sample):
    ids = torch.tensor([ord(sample.id[0]), int(sample.id[1:])])
    return Encoded(ids=ids, train=torch.ones(2, dtype=torch.bool), positions=torch.arange(2)[None], media={})


def stream(rank, world, count=8):
    weights = rounded([0.2, 0.7, 0.1])
    return RowStream(SOURCES, weights, encode, count=count, rank=rank, world=world, seed=11)


def rows_of(streams):
    return [(drawn.uid, drawn.sample.id) for one in streams for drawn in one.next()]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_draw_together_what_one_draws_alone(world):
    alone, together = [stream(0, 1)], [stream(rank, world) for rank in range(world)]
    for _ in range(20):
        assert rows_of(together) == rows_of(alone)


def test_a_run_goes_on_with_the_same_rows_on_another_number_of_processes():
    alone, two = [stream(0, 1)], [stream(rank, 2) for rank in range(2)]
    for _ in range(7):
        rows_of(alone)
        rows_of(two)
    three = [stream(rank, 3) for rank in range(3)]
    for one in three:
        one.load_state_dict(two[0].state_dict())
    for _ in range(7):
        assert rows_of(three) == rows_of(alone)
