"""Score of a mixture from its weights: mean, linear, the paper's quadratic, Gaussian process.

Every model says how sure it is: ``sd`` is the standard deviation of the expected score, ``noise`` that of a single
run around it. Models are plain numbers (``to_json``), and reading them back gives the same predictions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Protocol, Self

import numpy as np
from scipy.stats import norm as normal
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from mmpost.core.errors import MmpostError
from mmpost.core.seeding import generator

Z95 = 1.959963984540054


MIN_RUNS = 3


class UnderdeterminedWarning(UserWarning):
    """Fewer directions than free parameters: the surface goes through every point and says nothing between them."""


class Predictor(Protocol):
    """What every model can do."""

    name: str
    noise: float

    @staticmethod
    def num_parameters(m: int) -> int:
        """Free parameters for ``m`` sources."""
        ...

    def fit(self, weights: np.ndarray, values: np.ndarray, errors: np.ndarray) -> Self:
        """Learn from mixtures ``[n, m]``, their scores ``[n]`` and the standard errors of the scores ``[n]``."""
        ...

    def predict(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Expected score and its standard deviation, ``[k]`` each, for mixtures ``[k, m]``."""
        ...

    def parameters(self) -> dict[str, Any]:
        """What fitting found, as plain JSON."""
        ...


class Mean:
    """The mean of all runs, whatever the mixture: what every other model must beat."""

    name = "mean"

    def __init__(self) -> None:
        self.noise, self._mean, self._sd = 0.0, 0.0, 0.0

    @staticmethod
    def num_parameters(m: int) -> int:
        """One."""
        return 1

    def fit(self, weights: np.ndarray, values: np.ndarray, errors: np.ndarray) -> Self:
        """Take the mean."""
        self._mean = float(np.mean(values))
        self.noise = float(np.std(values, ddof=1)) if len(values) > 1 else math.inf
        self._sd = self.noise / math.sqrt(len(values))
        return self

    def predict(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same for every mixture."""
        return np.full(len(weights), self._mean), np.full(len(weights), self._sd)

    def parameters(self) -> dict[str, Any]:
        """The mean and its standard deviation."""
        return {"mean": self._mean, "sd": self._sd}


class Linear:
    """Ordinary least squares on the weights; on the simplex they span the constant as well."""

    name = "linear"

    def __init__(self) -> None:
        self.noise = 0.0
        self.coefficients = np.zeros(0)
        self._inverse = np.zeros((0, 0))

    @staticmethod
    def num_parameters(m: int) -> int:
        """One per source."""
        return m

    @staticmethod
    def features(weights: np.ndarray) -> np.ndarray:
        """Columns of the regression, ``[n, features]``."""
        return weights

    def rank(self, weights: np.ndarray) -> int:
        """Free parameters that mixtures ``[n, m]`` fix."""
        return int(np.linalg.matrix_rank(self.features(weights), tol=1e-9))

    def fit(self, weights: np.ndarray, values: np.ndarray, errors: np.ndarray) -> Self:
        """Least squares; the solution of smallest norm where there are several.

        Warns:
            UnderdeterminedWarning: When the mixtures fix fewer than all free parameters: too few of them, the same one
                several times, or all on one line.
        """
        columns = self.features(weights)
        needed, rank = self.num_parameters(weights.shape[1]), self.rank(weights)
        if rank < needed:
            warnings.warn(
                f"{len(values)} runs fix {rank} of the {needed} free parameters: the {self.name} surface is not "
                "determined between them",
                UnderdeterminedWarning,
                stacklevel=2,
            )
        # Redundant columns leave singular values of rounding size, which must not count as directions.
        self.coefficients = np.linalg.pinv(columns, rcond=1e-9) @ values
        self._inverse = np.linalg.pinv(columns.T @ columns, rcond=1e-12, hermitian=True)
        rest = values - columns @ self.coefficients
        free = len(values) - rank
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.inf
        self.noise = math.sqrt(float(rest @ rest) / free) if free > 0 else spread
        return self

    def predict(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The surface and the standard error of it."""
        columns = self.features(weights)
        variance = np.einsum("ij,jk,ik->i", columns, self._inverse, columns)
        return columns @ self.coefficients, self.noise * np.sqrt(np.maximum(variance, 0.0))

    def parameters(self) -> dict[str, Any]:
        """Coefficients."""
        return {"coefficients": self.coefficients.tolist()}


class Quadratic(Linear):
    """The paper's surface: a constant, the weights and all their products, by least squares.

    Its 1 + m + m^2 columns have rank m (m + 1) / 2 on the simplex.
    Source: MoDoMoDo, arXiv 2505.24871, "QuadSurface". ``best_of_splits`` is how the paper picks coefficients; plain
    least squares is our default, because the best of five splits reports a positive R^2 on noise one time in five.
    """

    name = "quadratic"

    @staticmethod
    def num_parameters(m: int) -> int:
        """Rank of the columns on the simplex."""
        return m * (m + 1) // 2

    @staticmethod
    def features(weights: np.ndarray) -> np.ndarray:
        """``[1, w, w (x) w]``, ``[n, 1 + m + m^2]``."""
        products = (weights[:, :, None] * weights[:, None, :]).reshape(len(weights), -1)
        return np.concatenate([np.ones((len(weights), 1)), weights, products], axis=1)


def best_of_splits(weights: np.ndarray, values: np.ndarray, *, seed: int, splits: int = 5) -> tuple[Quadratic, float]:
    """The paper's choice: fit on 80 % of the runs, five times, and keep the fit with the best R^2 on the rest.

    Returns:
        The quadratic and its R^2 on the fifth that was left out, at most 1 and without a lower limit.
    """
    best: tuple[Quadratic, float] | None = None
    held = max(2, round(0.2 * len(values)))
    for split in range(splits):
        order = generator(seed, "mixture/splits", split).permutation(len(values))
        train, test = order[held:], order[:held]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnderdeterminedWarning)
            model = Quadratic().fit(weights[train], values[train], np.zeros(len(train)))
        rest = values[test] - model.predict(weights[test])[0]
        spread = float(((values[test] - values[test].mean()) ** 2).sum())
        r2 = 1 - float(rest @ rest) / spread if spread > 0 else -math.inf
        if best is None or r2 > best[1]:
            best = model, r2
    assert best is not None
    return best


class GaussianProcess:
    """Matern 5/2 over the weights with noise between runs, on top of the known noise of the tests."""

    name = "gp"
    RESTARTS = 3

    def __init__(self) -> None:
        self.noise = 0.0
        self._centre, self._scale = 0.0, 1.0
        self._data: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._model: GaussianProcessRegressor | None = None
        self._theta: list[float] | None = None

    @staticmethod
    def num_parameters(m: int) -> int:
        """Amplitude, length and noise."""
        return 3

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """With amplitude, length and noise of an earlier fit; ``fit`` then only takes the data."""
        model = cls()
        model._theta = [float(value) for value in parameters["log_theta"]]
        return model

    def fit(self, weights: np.ndarray, values: np.ndarray, errors: np.ndarray) -> Self:
        """Maximise the marginal likelihood, from fixed starts."""
        self._centre = float(np.mean(values))
        self._scale = float(np.std(values)) or 1.0
        kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(0.5, (0.05, 10.0), nu=2.5) + WhiteKernel(0.05, (1e-5, 2.0))
        optimiser: str | None = "fmin_l_bfgs_b"
        if self._theta is not None:
            kernel, optimiser = kernel.clone_with_theta(np.array(self._theta)), None
        self._model = GaussianProcessRegressor(
            kernel,
            alpha=np.maximum((errors / self._scale) ** 2, 1e-10),
            optimizer=optimiser,
            n_restarts_optimizer=self.RESTARTS,
            random_state=0,
        )
        with warnings.catch_warnings():
            # A parameter at its bound is an answer, for example "no noise beyond that of the tests".
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._model.fit(weights, (values - self._centre) / self._scale)
        self._data = weights, values, errors
        self._theta = self._model.kernel_.theta.tolist()
        self.noise = math.sqrt(self._model.kernel_.k2.noise_level) * self._scale
        return self

    def predict(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Posterior of the expected score."""
        assert self._model is not None
        mean, sd = self._model.predict(np.asarray(weights), return_std=True)
        # scikit-learn's deviation includes that of a single run, which is reported apart.
        latent = np.sqrt(np.maximum(sd**2 - self._model.kernel_.k2.noise_level, 1e-12))
        return mean * self._scale + self._centre, latent * self._scale

    def believe(self, mixture: np.ndarray) -> GaussianProcess:
        """The same process after a run of ``mixture`` ``[m]`` that came out exactly as expected."""
        assert self._data is not None
        assert self._theta is not None
        weights, values, errors = self._data
        expected = self.predict(mixture[None])[0]
        more = GaussianProcess.from_parameters({"log_theta": self._theta})
        more._keep_scale(self._centre, self._scale)
        return more._condition(
            np.vstack([weights, mixture]), np.append(values, expected), np.append(errors, np.median(errors))
        )

    def _keep_scale(self, centre: float, scale: float) -> None:
        self._centre, self._scale = centre, scale

    def _condition(self, weights: np.ndarray, values: np.ndarray, errors: np.ndarray) -> GaussianProcess:
        """Take data at fixed parameters and fixed units."""
        centre, scale = self._centre, self._scale
        assert self._theta is not None
        kernel = (ConstantKernel() * Matern(nu=2.5) + WhiteKernel()).clone_with_theta(np.array(self._theta))
        alpha = np.maximum((errors / scale) ** 2, 1e-10)
        self._model = GaussianProcessRegressor(kernel, alpha=alpha, optimizer=None)
        self._model.fit(weights, (values - centre) / scale)
        self._data = weights, values, errors
        self.noise = math.sqrt(self._model.kernel_.k2.noise_level) * scale
        return self

    def parameters(self) -> dict[str, Any]:
        """Logarithms of amplitude, length and noise, in units of the scores' spread; the same in words."""
        assert self._model is not None
        kernel = self._model.kernel_
        return {
            "log_theta": self._theta,
            "amplitude": math.sqrt(kernel.k1.k1.constant_value) * self._scale,
            "length": float(kernel.k1.k2.length_scale),
            "run_noise": self.noise,
        }


_MODELS: dict[str, type[Mean] | type[Linear] | type[Quadratic] | type[GaussianProcess]] = {
    "mean": Mean,
    "linear": Linear,
    "quadratic": Quadratic,
    "gp": GaussianProcess,
}


def make(name: str) -> Predictor:
    """A model by name, not fitted.

    Raises:
        MmpostError: MMP-C006 for an unknown name.
    """
    if name not in _MODELS:
        raise MmpostError("MMP-C006", f"unknown name '{name}' among models.", f"Known: {', '.join(_MODELS)}, auto")
    return _MODELS[name]()


def check_enough(runs: int) -> None:
    """Refuse to fit to almost nothing.

    Raises:
        MmpostError: MMP-V020.
    """
    if runs < MIN_RUNS:
        raise MmpostError("MMP-V020", f"a fit needs at least {MIN_RUNS} runs; there are {runs}.", "Run more mixtures.")


def is_determined(name: str, weights: np.ndarray) -> bool:
    """Whether mixtures ``[n, m]`` fix all parameters of a model, with two mixtures to spare.

    Several seeds of one mixture count once: they say nothing about other mixtures.
    """
    model = make(name)
    needed = model.num_parameters(weights.shape[1])
    distinct = np.unique(weights.round(9), axis=0)
    return len(distinct) >= needed + 2 and (not isinstance(model, Linear) or model.rank(distinct) == needed)


def expected_improvement(mean: np.ndarray, sd: np.ndarray, best: float) -> np.ndarray:
    """Expectation of ``max(score - best, 0)`` for normal scores, in the unit of the score.

    Source: Jones, Schonlau and Welch (1998), J. Global Optimization 13, equation 15.
    """
    gain = mean - best
    safe = np.where(sd > 0, sd, 1.0)
    z = gain / safe
    value = gain * normal.cdf(z) + safe * normal.pdf(z)
    return np.where(sd > 0, np.maximum(value, 0.0), np.maximum(gain, 0.0))
