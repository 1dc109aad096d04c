"""The distance of engine and trainer as counts that add up."""

import math

import numpy as np
import pytest
import torch

from mmpost.train.mismatch import GAP_BINS, gap_counts, gap_quantile
from mmpost.train.positions import Positions


def _positions(logp, engine):
    count = len(logp)
    logp = torch.as_tensor(logp)
    engine = None if engine is None else torch.as_tensor(engine)
    zeros = torch.zeros(count, dtype=torch.long)
    return Positions(logp, logp, logp, zeros, torch.tensor([count]), engine=engine)


def _counts(gaps):
    logp = -torch.rand(len(gaps), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    signs = torch.where(torch.arange(len(gaps)) % 2 == 0, 1.0, -1.0)
    p = _positions(logp, logp + signs * torch.as_tensor(gaps))
    return gap_counts(p, torch.ones(len(gaps), dtype=torch.bool))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_quantiles_are_those_of_the_sorted_values(share):
    gaps = np.exp(np.random.default_rng(1).normal(-8, 3, 5000)).clip(1e-8, 90)
    exact = np.sort(gaps)[math.ceil(share * len(gaps)) - 1]
    # Micro-batches add up.
    counts = sum(_counts(part) for part in np.array_split(gaps, 7))
    found = gap_quantile(counts.tolist(), share)
    assert exact * (1 - 1e-6) <= found <= exact * 1.06


def test_one_bad_token_in_fifty_shows_in_the_tail_and_not_in_the_middle():
    counts = _counts([0.7 if i % 50 == 0 else 1e-6 for i in range(1000)]).tolist()
    assert 0.7 <= gap_quantile(counts, 0.99) <= 0.742
    assert gap_quantile(counts, 0.97) <= 1.06e-6


def test_ends_of_the_range():
    assert gap_quantile(_counts([0.0, 0.0]).tolist(), 0.99) == 0.0
    assert gap_quantile(_counts([1e6]).tolist(), 0.99) == pytest.approx(100)
    lost = gap_counts(_positions([math.nan, -math.inf], [-1.0, -1.0]), torch.ones(2, dtype=torch.bool))
    assert gap_quantile(lost.tolist(), 0.01) == pytest.approx(100)
    assert math.isnan(gap_quantile([0.0] * GAP_BINS, 0.99))


def test_what_is_no_comparison_is_not_counted():
    p = _positions([-1.0, -1.0, -1.0, -1.0], [-1.5, math.nan, -math.inf, -3.0])
    counts = gap_counts(p, torch.tensor([True, True, True, False]))
    assert counts.sum() == 1
    assert 0.5 <= gap_quantile(counts.tolist(), 1.0) <= 0.53
    assert gap_counts(_positions([-1.0], None), torch.tensor([True])).tolist() == [0.0] * GAP_BINS
