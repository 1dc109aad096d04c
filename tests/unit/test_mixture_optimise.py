"""The best mixture against a fine grid, limits, and proposals."""

import sys

import numpy as np
import pytest

from mmpost.core.errors import MmpostError
from mmpost.mixture.designs import design, lattice
from mmpost.mixture.fit import fit
from mmpost.mixture.optimise import Limits, maximise, optimum, pool, propose
from mmpost.mixture.predict import GaussianProcess, Linear, Quadratic, expected_improvement
from mmpost.mixture.records import MixtureRecord
from mmpost.mixture.scores import Target
from mmpost.mixture.suggest import suggest


def surface(seed):
    """A random quadratic of three sources."""
    beta = np.random.default_rng(seed).normal(0, 1, 13)
    return lambda w: Quadratic.features(w) @ beta


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_the_optimum_is_that_of_a_fine_grid(seed, floor):
    value = surface(seed)
    best = maximise(value, Limits.floor(3, floor), seed=0)
    grid = floor + (1 - 3 * floor) * lattice(3, 400)
    assert best.sum() == pytest.approx(1, abs=1e-9)
    assert best.min() >= floor - 1e-9
    gap = value(grid).max() - value(best[None])[0]
    # A grid of steps of 1/400 may miss the top, but not the other way round.
    assert gap <= 1e-6


def test_the_optimum_of_a_line_is_a_corner_and_floors_are_kept():
    model = Linear().fit(np.eye(4), np.array([0.1, 0.7, 0.3, 0.2]), np.zeros(4))
    np.testing.assert_allclose(optimum(model, Limits.floor(4)), [0, 1, 0, 0], atol=1e-9)
    np.testing.assert_allclose(optimum(model, Limits.floor(4, 0.05)), [0.05, 0.85, 0.05, 0.05], atol=1e-9)


def test_upper_limits_are_kept():
    model = Linear().fit(np.eye(3), np.array([0.1, 0.7, 0.3]), np.zeros(3))
    limits = Limits(np.zeros(3), np.array([1.0, 0.4, 0.5]))
    np.testing.assert_allclose(optimum(model, limits), [0.1, 0.4, 0.5], atol=1e-6)


@pytest.mark.parametrize("floor", [0.0, 0.05])
@pytest.mark.parametrize("m", [2, 3, 5])
def test_candidates_are_mixtures_within_the_limits_and_reach_every_face(m, floor):
    limits = Limits.floor(m, floor)
    found = pool(limits, seed=1, count=6000)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-9)
    assert limits.contains(found).all()
    used = {tuple(row) for row in found > floor + 1e-12}
    assert len(used) == 2**m - 1


def test_impossible_floors_are_told():
    with pytest.raises(MmpostError) as caught:
        Limits.floor(3, 0.4)
    assert str(caught.value) == (
        "no mixture has weights between [0.4, 0.4, 0.4] and [1, 1, 1]. Lower --floor; floors add up to 1 at most. "
        "[MMP-V025]"
    )


@pytest.fixture(scope="module")
def process():
    weights = np.array(design("abc", "seeds,dirichlet", 11, seed=1).mixtures)
    values = 0.5 + 0.3 * weights[:, 0] * weights[:, 1] - 0.2 * weights[:, 2]
    return GaussianProcess().fit(weights, values, np.full(len(values), 0.01)), weights


def test_proposals_are_different_within_limits_and_the_same_every_time(process):
    model, weights = process
    limits = Limits.floor(3, 0.02)
    for strategy in ("ei", "mean"):
        found = propose(model, weights, limits, 4, strategy=strategy, seed=5)
        again = propose(model, weights, limits, 4, strategy=strategy, seed=5)
        rows = np.array([proposal.weights for proposal in found])
        np.testing.assert_array_equal(rows, [proposal.weights for proposal in again])
        assert limits.contains(rows).all()
        gaps = np.abs(rows[:, None] - rows[None]).max(-1)[np.triu_indices(4, 1)]
        assert gaps.min() > 0.01
    assert found[0].mean == max(proposal.mean for proposal in found)


def test_the_first_proposal_has_the_largest_improvement_of_all_candidates(process):
    model, weights = process
    limits = Limits.floor(3)
    best = propose(model, weights, limits, 1)[0]
    top = float(model.predict(weights)[0].max())
    assert best.gain >= expected_improvement(*model.predict(pool(limits, seed=9)), top).max() - 1e-6


def test_unknown_strategies_are_named(process):
    with pytest.raises(MmpostError, match=r"unknown name 'ucb' among strategies. Known: ei, mean .MMP-C006"):
        propose(*process, Limits.floor(3), 1, strategy="ucb")


@pytest.mark.slow
def test_expected_improvement_beats_the_best_seed_on_random_surfaces():
    """A short form of the study in the specification: five sources, eleven seeds and six runs more."""
    regrets = {"seeds": [], "ei": []}
    for trial in range(4):
        rng = np.random.default_rng(trial)
        beta = np.concatenate([[0.45], rng.normal(0, 0.05, 5), rng.normal(0, 0.08, 25)])
        truth = lambda w, beta=beta: Quadratic.features(w) @ beta  # noqa: E731
        weights = np.array(design("abcde", "seeds").mixtures)
        values = truth(weights) + rng.normal(0, 0.003, len(weights))
        best = truth(maximise(truth, Limits.floor(5), seed=0)[None])[0]
        regrets["seeds"].append(best - truth(weights[[np.argmax(values)]])[0])
        for _ in range(6):
            model = GaussianProcess().fit(weights, values, np.full(len(values), 0.003))
            row = propose(model, weights, Limits.floor(5), 1)[0].weights
            weights, values = np.vstack([weights, row]), np.append(values, truth(row[None]) + rng.normal(0, 0.003))
        model = GaussianProcess().fit(weights, values, np.full(len(values), 0.003))
        regrets["ei"].append(best - truth(optimum(model, Limits.floor(5))[None])[0])
    sys.stdout.write(f"median regret: {regrets}\n")
    assert np.median(regrets["ei"]) < np.median(regrets["seeds"])


def test_suggestions_stand_beside_uniform(tmp_path):
    weights = design("abc", "seeds,dirichlet", 12).named()
    records = [
        MixtureRecord(row, {"t": {"value": 0.3 + 0.4 * row["a"] * row["b"] / 0.25, "n": 1000}}) for row in weights
    ]
    found = suggest(fit(records, Target(), "auto"), 3, strategy="mean")
    assert found.uniform.weights == {"a": 0.333334, "b": 0.333333, "c": 0.333333}
    first = found.chosen[0]
    assert first.low < first.mean < first.high
    assert first.mean > found.uniform.mean
    assert abs(first.weights["a"] - 0.5) < 0.08
