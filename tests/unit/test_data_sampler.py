import json
from fractions import Fraction

import numpy as np
import pytest

from mmpost.core.errors import MmpostError
from mmpost.data.sampler import Draw, Sampler


def random_mixture(seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, 9))
    sizes = rng.integers(1, 30, size=k).tolist()
    kind = rng.integers(3)
    if kind == 0:
        weights = rng.random(k).tolist()
    elif kind == 1:
        weights = rng.integers(0, 5, size=k).astype(float).tolist()
    else:
        weights = np.exp(4 * rng.standard_normal(k)).tolist()
    weights[int(rng.integers(k))] += 0.5
    return sizes, weights


def shares(weights):
    exact = [Fraction(weight) for weight in weights]
    return [weight / sum(exact) for weight in exact]


@pytest.mark.parametrize("seed", range(80))
def test_counts_stay_within_one_of_the_weights_after_every_draw(seed):
    sizes, weights = random_mixture(seed)
    wanted, counts = shares(weights), [0] * len(sizes)
    for n, draw in enumerate(Sampler(sizes, weights, seed=seed).draw(250), 1):
        counts[draw.source] += 1
        assert all(abs(n * share - count) < 1 for share, count in zip(wanted, counts, strict=True))


def test_largest_deficit_would_break_the_law_that_holds_here():
    # The rule that suggests itself misses by more than one for these weights, hence the deadlines.
    weights = [23, 10, 31, 1, 29, 6, 1, 29]
    wanted = shares(weights)

    def worst(sources):
        counts, worst = [0] * len(weights), Fraction(0)
        for n, source in enumerate(sources, 1):
            counts[source] += 1
            worst = max(worst, *(abs(n * share - count) for share, count in zip(wanted, counts, strict=True)))
        return worst

    greedy, counts = [], [0] * len(weights)
    for n in range(1, 131):
        chosen = max(range(len(weights)), key=lambda s: (n * wanted[s] - counts[s], -s))
        counts[chosen] += 1
        greedy.append(chosen)
    assert worst(greedy) >= 1
    assert worst(draw.source for draw in Sampler([1] * 8, weights, seed=0).draw(130)) < 1


@pytest.mark.parametrize("seed", range(40))
def test_every_row_comes_exactly_once_per_epoch(seed):
    sizes, weights = random_mixture(seed)
    rows = {}
    for draw in Sampler(sizes, weights, seed=seed).draw(600):
        rows.setdefault((draw.source, draw.epoch), []).append(draw.row)
    last = {source: max(epoch for s, epoch in rows if s == source) for source, _ in rows}
    for (source, epoch), seen in rows.items():
        assert len(seen) == len(set(seen))
        assert set(seen) <= set(range(sizes[source]))
        if epoch < last[source]:
            assert len(seen) == sizes[source]


@pytest.mark.parametrize("seed", range(40))
def test_chunking_and_resuming_change_nothing(seed):
    sizes, weights = random_mixture(seed)
    rng = np.random.default_rng(seed)
    whole = Sampler(sizes, weights, seed=seed).draw(300)
    parts, sampler = [], Sampler(sizes, weights, seed=seed)
    while len(parts) < 300:
        parts += sampler.draw(int(rng.integers(0, 40)))
        assert sampler.position == len(parts)
        if rng.integers(2):
            state = json.loads(json.dumps(sampler.state_dict()))
            sampler = Sampler(sizes, weights, seed=seed)
            sampler.load_state_dict(state)
    assert parts[:300] == whole


def test_state_does_not_grow_and_is_a_copy():
    sampler = Sampler([10, 20], [1, 2], seed=1)
    start = sampler.state_dict()
    sampler.draw(1000)
    assert start == Sampler([10, 20], [1, 2], seed=1).state_dict()
    assert len(json.dumps(sampler.state_dict())) < len(json.dumps(start)) + 10
    assert all(len(order) <= 20 for _, order in sampler._orders.values())


def test_the_sequence_is_the_same_on_every_machine():
    assert Sampler([3, 4], [1, 3], seed=7).draw(8) == [
        Draw(*draw) for draw in [(1, 3, 0), (1, 2, 0), (0, 2, 0), (1, 1, 0), (1, 0, 0), (1, 2, 1), (0, 0, 0), (1, 3, 1)]
    ]


def test_seed_and_epoch_change_the_order():
    orders = {
        tuple(draw.row for draw in Sampler([50], [1], seed=seed).draw(100)[start : start + 50])
        for seed in range(5)
        for start in (0, 50)
    }
    assert len(orders) == 10


def test_sources_of_weight_zero_may_be_empty_and_are_never_drawn():
    assert {draw.source for draw in Sampler([0, 2, 5], [0, 1, 0], seed=0).draw(50)} == {1}


def test_proportions_stay_exact_after_very_many_draws():
    sampler = Sampler([3, 3, 3], [0.1, 0.2, 0.7], seed=0)
    far = 10**15
    drawn = [int(far * share) for share in shares([0.1, 0.2, 0.7])]
    drawn[2] += far - sum(drawn)
    sampler.load_state_dict({**sampler.state_dict(), "drawn": drawn})
    for draw in sampler.draw(300):
        drawn[draw.source] += 1
        n = sum(drawn)
        assert all(abs(n * w - c) < 1 for w, c in zip(shares([0.1, 0.2, 0.7]), drawn, strict=True))


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -0.5], [1.0, float("nan")], [1.0, float("inf")]])
def test_d020(weights):
    with pytest.raises(MmpostError) as caught:
        Sampler([1, 1], weights, seed=0)
    assert str(caught.value) == f"mixture weights must be ≥ 0 and not all 0; got {weights} [MMP-D020]"


def test_a_drawn_source_without_rows():
    with pytest.raises(MmpostError) as caught:
        Sampler([4, 0], [1, 2.0], seed=0)
    assert str(caught.value) == "source 2 of 2 has weight 2.0 but no rows [MMP-D029]"


def test_a_state_of_other_data_is_refused():
    state = Sampler([4, 5], [1, 1], seed=0).state_dict()
    with pytest.raises(MmpostError) as caught:
        Sampler([4, 6], [1, 1], seed=0).load_state_dict(state)
    assert str(caught.value) == (
        "the data are not those of the saved state: sizes were [4, 5] and are [4, 6]. "
        "Resume with the same sources and seed, or start a new run [MMP-D036]"
    )
