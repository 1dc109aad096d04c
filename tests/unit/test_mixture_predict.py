"""Predictors against closed forms, expected improvement against its integral, and files that keep them."""

import json

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm as normal

from mmpost.core.errors import MmpostError
from mmpost.mixture.fit import Fit, fit, leave_one_out, read_fit, write_fit
from mmpost.mixture.optimise import Limits, optimum
from mmpost.mixture.predict import (
    GaussianProcess,
    Linear,
    Quadratic,
    UnderdeterminedWarning,
    expected_improvement,
    is_determined,
    make,
)
from mmpost.mixture.predictor import MixturePredictor
from mmpost.mixture.records import MixtureRecord, rounded
from mmpost.mixture.scores import Target


def simplex(n, m, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(m), size=n)


def scheffe(weights):
    """``w_i`` and ``w_i w_j``: the quadratics on the simplex without a redundant column."""
    i, j = np.triu_indices(weights.shape[1], 1)
    return np.concatenate([weights, weights[:, i] * weights[:, j]], axis=1)


def records(weights, values, n=400):
    return [
        MixtureRecord(
            dict(zip("abcde", rounded(row), strict=False)), {"task": {"value": float(np.round(value, 6)), "n": n}}
        )
        for row, value in zip(weights, values, strict=True)
    ]


@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_quadratic_columns_have_the_rank_of_the_quadratics_on_the_simplex(m):
    weights = simplex(500, m)
    for columns in (Quadratic.features(weights), scheffe(weights)):
        assert np.linalg.matrix_rank(columns, tol=1e-9) == m * (m + 1) // 2 == Quadratic.num_parameters(m)


@pytest.mark.parametrize("m", [2, 3, 5])
def test_quadratic_is_least_squares_in_closed_form(m):
    weights, fresh = simplex(40, m), simplex(30, m, 1)
    values = np.sin(5 * weights[:, 0]) + np.random.default_rng(2).normal(0, 0.1, 40)
    model = Quadratic().fit(weights, values, np.zeros(40))
    columns, new = scheffe(weights), scheffe(fresh)
    inverse = np.linalg.inv(columns.T @ columns)
    beta = inverse @ columns.T @ values
    rest = values - columns @ beta
    noise = np.sqrt(rest @ rest / (40 - columns.shape[1]))
    mean, sd = model.predict(fresh)
    np.testing.assert_allclose(mean, new @ beta, atol=1e-8)
    np.testing.assert_allclose(sd, noise * np.sqrt(np.einsum("ij,jk,ik->i", new, inverse, new)), rtol=1e-6)
    assert model.noise == pytest.approx(noise)


def test_linear_is_least_squares_in_closed_form():
    weights = simplex(20, 4)
    values = weights @ [0.1, 0.4, 0.2, 0.9] + np.random.default_rng(0).normal(0, 0.05, 20)
    beta = np.linalg.solve(weights.T @ weights, weights.T @ values)
    np.testing.assert_allclose(Linear().fit(weights, values, np.zeros(20)).coefficients, beta, atol=1e-10)


def test_a_noiseless_quadratic_is_recovered_with_its_optimum():
    def surface(w):
        return 0.4 + 0.6 * w[:, 0] * w[:, 1] - 0.3 * w[:, 2] + 0.1 * w[:, 1] ** 2

    weights = simplex(16, 5)
    model = Quadratic().fit(weights, surface(weights), np.zeros(16))
    best = optimum(model, Limits.floor(5))
    truth = surface(np.array([[x, 1 - x, 0, 0, 0] for x in np.linspace(0, 1, 10_001)])).max()
    assert truth - surface(best[None])[0] < 1e-3


def test_few_runs_are_told():
    with pytest.warns(UnderdeterminedWarning, match="4 runs fix 4 of the 6 free parameters: the quadratic surface"):
        Quadratic().fit(simplex(4, 3), np.arange(4.0), np.zeros(4))
    with pytest.warns(UnderdeterminedWarning, match="fix 5 of the 6"):
        found = fit(records(simplex(5, 3), np.linspace(0.2, 0.6, 5)), Target(), "quadratic")
    assert found.model == "quadratic"
    with pytest.raises(MmpostError) as caught:
        fit(records(simplex(2, 3), np.array([0.2, 0.6])), Target())
    assert str(caught.value) == "a fit needs at least 3 runs; there are 2. Run more mixtures. [MMP-V020]"


def test_seeds_of_one_mixture_and_mixtures_on_a_line_determine_nothing():
    few = simplex(4, 3)
    twice = np.concatenate([few, few])
    assert len(twice) == Quadratic.num_parameters(3) + 2
    with pytest.warns(UnderdeterminedWarning, match="8 runs fix 4 of the 6"):
        Quadratic().fit(twice, np.arange(8.0), np.zeros(8))
    line = np.stack([np.linspace(0, 1, 9), 1 - np.linspace(0, 1, 9), np.zeros(9)], axis=1)
    with pytest.warns(UnderdeterminedWarning, match="9 runs fix 3 of the 6"):
        Quadratic().fit(line, np.arange(9.0), np.zeros(9))
    chosen = fit(records(line, 0.5 + 0.1 * line[:, 0]), Target())
    assert "quadratic" not in chosen.quality
    assert "linear" not in chosen.quality
    assert is_determined("quadratic", simplex(8, 3))
    assert not is_determined("quadratic", simplex(7, 3))


@pytest.mark.parametrize(("mean", "sd", "best"), [(0.5, 0.1, 0.6), (0.7, 0.05, 0.6), (0.1, 0.3, 0.9), (0.6, 1.0, 0.6)])
def test_expected_improvement_is_its_integral(mean, sd, best):
    integral = quad(lambda y: (y - best) * normal.pdf(y, mean, sd), best, mean + 12 * sd, epsabs=1e-13)[0]
    assert expected_improvement(np.array([mean]), np.array([sd]), best)[0] == pytest.approx(integral, abs=1e-10)


def test_expected_improvement_without_uncertainty_is_the_gain():
    found = expected_improvement(np.array([0.4, 0.7]), np.zeros(2), 0.6)
    np.testing.assert_allclose(found, [0.0, 0.1])


def test_gaussian_process_passes_through_exact_scores_and_doubts_elsewhere():
    weights = simplex(12, 3)
    values = 0.5 + 0.3 * np.sin(4 * weights[:, 0])
    model = GaussianProcess().fit(weights, values, np.zeros(12))
    mean, sd = model.predict(weights)
    np.testing.assert_allclose(mean, values, atol=0.01)
    assert model.predict(np.eye(3))[1].max() > 2 * np.median(sd)


def test_gaussian_process_trusts_noisy_scores_less():
    weights, rng = simplex(12, 3), np.random.default_rng(0)
    values = weights[:, 0] + rng.normal(0, 0.2, 12)
    theta = {"log_theta": [0.0, 0.0, -6.0]}
    exact = GaussianProcess.from_parameters(theta).fit(weights, values, np.full(12, 0.001))
    noisy = GaussianProcess.from_parameters(theta).fit(weights, values, np.full(12, 0.3))
    rest = [np.abs(model.predict(weights)[0] - values).mean() for model in (exact, noisy)]
    assert rest[0] < rest[1]
    assert exact.predict(weights)[1].mean() < noisy.predict(weights)[1].mean()


def test_gaussian_process_is_conditioning_of_a_normal():
    weights, fresh = simplex(6, 3), simplex(4, 3, 1)
    values, errors = weights[:, 0] ** 2, np.full(6, 0.05)
    model = GaussianProcess.from_parameters({"log_theta": [np.log(1.5), np.log(0.7), np.log(0.02)]})
    mean, sd = model.fit(weights, values, errors).predict(fresh)

    def kernel(a, b):
        d = np.sqrt(5) * np.linalg.norm(a[:, None] - b[None], axis=-1) / 0.7
        return 1.5 * (1 + d + d**2 / 3) * np.exp(-d)

    centre, scale = values.mean(), values.std()
    inverse = np.linalg.inv(kernel(weights, weights) + np.diag(0.02 + (errors / scale) ** 2))
    across = kernel(fresh, weights)
    np.testing.assert_allclose(mean, centre + scale * across @ inverse @ ((values - centre) / scale), atol=1e-8)
    variance = np.diag(kernel(fresh, fresh) - across @ inverse @ across.T)
    np.testing.assert_allclose(sd, scale * np.sqrt(variance), atol=1e-8)


def test_a_believed_run_leaves_the_mean_and_lowers_the_doubt():
    weights = simplex(10, 3)
    model = GaussianProcess().fit(weights, weights[:, 0] * weights[:, 1], np.full(10, 0.01))
    place = np.array([0.0, 0.0, 1.0])
    more = model.believe(place)
    np.testing.assert_allclose(more.predict(weights)[0], model.predict(weights)[0], atol=0.005)
    assert more.predict(place[None])[1][0] < 0.7 * model.predict(place[None])[1][0]


def test_leave_one_out_never_sees_the_run():
    weights = simplex(9, 3)
    values = weights[:, 0].copy()
    before = leave_one_out("linear", weights, values, np.zeros(9)).predicted
    values[4] += 100
    after = leave_one_out("linear", weights, values, np.zeros(9)).predicted
    assert after[4] == pytest.approx(before[4])
    assert after[3] != pytest.approx(before[3])


def test_mean_predicts_from_the_others_alone():
    quality = leave_one_out("mean", simplex(4, 3), np.array([0.0, 0.0, 0.0, 1.0]), np.zeros(4))
    np.testing.assert_allclose(quality.predicted, [1 / 3, 1 / 3, 1 / 3, 0])
    assert quality.mae == pytest.approx(0.5)


@pytest.fixture(scope="module")
def fitted():
    weights = simplex(14, 3)
    values = 0.3 + 0.4 * weights[:, 0] + 0.5 * weights[:, 0] * weights[:, 1]
    return fit(records(weights, values), Target(), "auto")


def test_auto_takes_the_smallest_error_and_finds_the_signal(fitted):
    assert fitted.signal
    assert fitted.model == min(fitted.quality, key=lambda name: fitted.quality[name].mae) == "quadratic"
    assert fitted.quality["quadratic"].spearman > 0.9
    assert fitted.quality["gp"].mae < fitted.quality["mean"].mae


@pytest.mark.parametrize("model", ["mean", "linear", "quadratic", "gp"])
def test_a_predictor_file_predicts_the_same(tmp_path, fitted, model):
    fresh = simplex(20, 3, 7)
    one = Fit(**{name: getattr(fitted, name) for name in Fit.__slots__})
    one.model, one.predictor = model, make(model).fit(fitted.weights, fitted.values, fitted.errors)
    write_fit(tmp_path / "predictor.json", one)
    again = read_fit(tmp_path)
    for here, there in zip(one.predictor.predict(fresh), again.predictor.predict(fresh), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-9, atol=1e-12)
    assert again.predictor.noise == pytest.approx(one.predictor.noise, rel=1e-9)
    write_fit(tmp_path / "again.json", again)
    assert (
        json.loads((tmp_path / "again.json").read_text())["quality"]
        == json.loads((tmp_path / "predictor.json").read_text())["quality"]
    )


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema": 2}', '{"schema": 1, "runs": 3}'])
def test_a_damaged_predictor_file_is_refused(tmp_path, text):
    (tmp_path / "predictor.json").write_text(text)
    with pytest.raises(MmpostError, match=r"is no predictor.*Run mmpost mixture fit again.*MMP-V028"):
        read_fit(tmp_path)
    with pytest.raises(MmpostError, match=r"no predictor '.*nowhere'.*MMP-V028"):
        read_fit(tmp_path / "nowhere")


def test_unknown_models_and_targets_are_named():
    found = records(simplex(6, 3), np.linspace(0.2, 0.6, 6))
    with pytest.raises(MmpostError, match=r"unknown name 'cubic' among models. Known: mean, linear, quadratic, gp, "):
        fit(found, Target(), "cubic")
    with pytest.raises(MmpostError, match=r"no score 'other' in the runs. Known targets: eval.mean.*eval.task. .*V027"):
        fit(found, Target("eval.other"))
    with pytest.raises(MmpostError, match=r"target 'eval.out' has no tests. Name them with --out-tasks a,b.*V027"):
        fit(found, Target("eval.out"))


def test_the_same_from_python(tmp_path):
    weights = simplex(12, 3)
    found = records(weights, 0.3 + 0.4 * weights[:, 1])
    one = MixturePredictor.fit(found)
    mean, (low, high) = one.predict({"c": 0.0, "b": 1.0, "a": 0.0})
    assert low <= mean <= high
    assert mean == pytest.approx(0.7, abs=0.02)
    one.save(tmp_path / "predictor.json")
    again = MixturePredictor.load(tmp_path)
    mixture = {"a": 0.2, "b": 0.3, "c": 0.5}
    assert again.predict(mixture)[0] == pytest.approx(one.predict(mixture)[0], rel=1e-9)
    assert again.predict(mixture)[1] == pytest.approx(one.predict(mixture)[1], rel=1e-9)
    assert one.suggest(2, strategy="mean")[0].weights["b"] > 0.9
    with pytest.raises(MmpostError, match=r"a mixture of a, b is none of a, b, c. Name all sources. .MMP-V021"):
        one.predict({"a": 0.5, "b": 0.5})


def test_runs_of_one_mixture_do_not_give_each_other_away():
    rng = np.random.default_rng(0)
    mixtures = rng.dirichlet(np.ones(3), 11)
    # The score of a mixture is noise that says nothing about others; seeds of a mixture agree.
    values = np.repeat(rng.normal(0.5, 0.03, 11), 3) + rng.normal(0, 0.003, 33)
    weights = np.repeat(mixtures, 3, axis=0)
    mean = leave_one_out("mean", weights, values, np.full(33, 0.003))
    gaussian = leave_one_out("gp", weights, values, np.full(33, 0.003))
    assert gaussian.mae > 0.8 * mean.mae
