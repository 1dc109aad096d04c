"""The published table of MoDoMoDo, and every number that follows from it."""

import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from mmpost.mixture.fit import fit, leave_one_out
from mmpost.mixture.heuristics import alpha, coli, heuristics, norm
from mmpost.mixture.optimise import Limits, optimum, paper_candidates
from mmpost.mixture.predict import Quadratic, UnderdeterminedWarning, best_of_splits
from mmpost.mixture.records import MixtureRecord, rounded
from mmpost.mixture.scores import Target, weighted

TABLE = json.loads((Path(__file__).parents[1] / "fixtures" / "modomodo_table2.json").read_text())
SOURCES, SIZES, RUNS = TABLE["sources"], TABLE["sizes"], TABLE["runs"]
SEEDS = [key for key in RUNS if key != "base"]


def mixture(key):
    return [1 / len(key) if str(number) in key else 0.0 for number in range(1, 6)]


MEMBER = np.array([[float(w > 0) for w in mixture(key)] for key in SEEDS])
WEIGHTS = np.array([mixture(key) for key in SEEDS])
IN, OUT = (np.array([RUNS[key][side] for key in SEEDS]) for side in ("in", "out"))


@pytest.fixture
def records():
    """The seed runs as our records."""
    return [
        MixtureRecord(
            dict(zip(SOURCES, rounded(mixture(key)), strict=True)),
            {test: {"value": value, "n": SIZES[test]} for test, value in RUNS[key]["scores"].items()},
        )
        for key in SEEDS
    ]


@pytest.mark.parametrize("key", RUNS)
def test_in_and_out_scores_follow_from_the_tests(key):
    run = RUNS[key]
    assert weighted(run["scores"], SIZES, TABLE["in_tests"]) == pytest.approx(run["in"], abs=1e-4)
    assert weighted(run["scores"], SIZES, TABLE["out_tests"]) == pytest.approx(run["out"], abs=1e-4)


def test_targets_weight_tests_as_the_paper_does(records):
    record = records[SEEDS.index("12345")]
    tasks = tuple(TABLE["in_tests"]), tuple(TABLE["out_tests"])
    assert Target("eval.in", tasks[0])(record.scores)[0] == pytest.approx(0.5638, abs=1e-4)
    assert Target("eval.out", (), tasks[1])(record.scores)[0] == pytest.approx(0.4609, abs=1e-4)
    both = Target("eval.in_out", *tasks, in_weight=0.25)(record.scores)[0]
    assert both == pytest.approx(0.25 * 0.5638 + 0.75 * 0.4609, abs=1e-4)
    assert Target("eval.mean", tasks=tasks[0])(record.scores)[0] == pytest.approx((0.4778 + 0.5737 + 0.6991) / 3)


def test_weighting_tests_alike_turns_the_winner_round():
    without_coco = np.mean([RUNS["2345"]["scores"][test] for test in TABLE["out_tests"]])
    assert without_coco == pytest.approx(0.4854, abs=1e-4)
    assert max(RUNS, key=lambda key: RUNS[key]["out"]) == "2345"
    assert RUNS["2345"]["out"] > TABLE["heuristic_out"]["steps_2000"]["Norm"]


def test_norm_weights():
    found = norm(np.array([RUNS[key]["out"] for key in ("2345", "1345", "1245", "1235", "1234")]))
    np.testing.assert_allclose(found, TABLE["derived"]["norm"], atol=1e-4)
    assert found.max() / found.min() <= 2 + 1e-9


def test_coli_weights_and_that_their_correction_does_nothing_here():
    found, factors = coli(MEMBER, OUT)
    np.testing.assert_allclose(found, TABLE["derived"]["coli"], atol=1e-4)
    np.testing.assert_allclose(factors, TABLE["derived"]["coli_factor"], atol=1e-4)


@pytest.mark.parametrize(("name", "share"), [("A_in", 1.0), ("A_bal", 0.5), ("A_out", 0.0)])
def test_alpha_weights(name, share):
    found = alpha(MEMBER, IN, OUT, share, alpha_single=TABLE["derived"]["alpha_single"])
    # The specification gives three digits.
    np.testing.assert_allclose(found, TABLE["derived"][name], atol=6e-4)


def test_heuristics_from_records(records):
    target = Target("eval.out", (), tuple(TABLE["out_tests"]))
    found = heuristics(records, {record.label: target(record.scores)[0] for record in records})
    np.testing.assert_allclose(list(found["norm"].values()), TABLE["derived"]["norm"], atol=2e-4)
    np.testing.assert_allclose(list(found["coli"].values()), TABLE["derived"]["coli"], atol=2e-4)


def test_statistics_of_the_groups_of_runs():
    heuristic = list(
        itertools.chain.from_iterable(
            group.values() if isinstance(group, dict) else group for group in TABLE["heuristic_out"].values()
        )
    )
    groups = {"seed": OUT, "heuristic": np.array(heuristic), "model": np.array(TABLE["model_out"])}
    for name, values in groups.items():
        found = [values.mean(), np.median(values), values.min(), values.max(), values.std(ddof=1)]
        np.testing.assert_allclose(found, TABLE["derived"]["groups"][name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("model", ["mean", "linear", "quadratic"])
def test_leave_one_out_of_the_seed_runs(model):
    quality = leave_one_out(model, WEIGHTS, OUT, np.zeros(11))
    r2, mae = TABLE["derived"]["loo"][model]
    assert quality.r2 == pytest.approx(r2, rel=0.02)
    assert quality.mae == pytest.approx(mae, rel=0.02)


def test_the_paper_s_surface_is_not_determined_by_its_seed_runs():
    with pytest.warns(UnderdeterminedWarning, match="11 runs fix 10 of the 15 free parameters"):
        surface = Quadratic().fit(WEIGHTS, OUT, np.zeros(11))
    # It interpolates: a tenth of the table's digits is left.
    rest = OUT - surface.predict(WEIGHTS)[0]
    assert 1 - rest @ rest / ((OUT - OUT.mean()) ** 2).sum() > 0.89


def test_auto_says_that_the_seed_runs_carry_no_signal(records):
    target = Target("eval.out", (), tuple(TABLE["out_tests"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnderdeterminedWarning)
        found = fit(records, target, "auto")
    assert found.model == "mean"
    assert not found.signal
    assert "quadratic" not in found.quality
    assert found.quality["gp"].mae > 0.95 * found.quality["mean"].mae


def test_the_best_of_five_splits_certifies_noise():
    weights = np.random.default_rng(0).dirichlet(np.ones(5), size=31)
    positive = 0
    for trial in range(60):
        noise = np.random.default_rng(1000 + trial).standard_normal(31)
        positive += best_of_splits(weights, noise, seed=trial)[1] > 0
    assert 0.05 < positive / 60 < 0.45


def test_the_paper_s_candidates_are_mixtures_and_worse_than_the_optimum():
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(3), size=20)
    surface = Quadratic().fit(weights, weights @ [0.2, 0.5, 0.1] + 0.4 * weights[:, 0] * weights[:, 1], np.zeros(20))
    found = paper_candidates(surface, weights, 10, seed=0)
    assert found.shape == (10, 3)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1)
    best = optimum(surface, Limits.floor(3))
    assert surface.predict(best[None])[0] >= surface.predict(found)[0].max() - 1e-9
