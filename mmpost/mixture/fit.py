"""Fit a predictor, say how good it is on runs that it has not seen, and keep it in a file of plain numbers."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from mmpost.core.errors import MmpostError
from mmpost.core.files import write_whole
from mmpost.mixture import MODELS
from mmpost.mixture.predict import (
    Z95,
    GaussianProcess,
    Predictor,
    UnderdeterminedWarning,
    check_enough,
    is_determined,
    make,
)
from mmpost.mixture.records import MixtureRecord, matrix
from mmpost.mixture.scores import Target, measured

PREDICTOR = "predictor.json"
SCHEMA = 1
SAME = 1e-9  # weights that differ by less are one mixture


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a model predicts each run from all the others.

    Attributes:
        mae: Mean absolute error, in the unit of the score.
        r2: 1 minus the error's variance over the scores'; negative when the mean predicts better.
        spearman: Rank correlation of prediction and measurement; 0 when one of them is constant.
        coverage: Share of runs inside their 95 % interval.
        predicted: Prediction per run.
        sd: Standard deviation of a run around it: of the expected score, of runs and of the test together.
    """

    mae: float
    r2: float
    spearman: float
    coverage: float
    predicted: list[float]
    sd: list[float]

    def to_json(self, *, points: bool = True) -> dict[str, Any]:
        """Figures; ``points`` adds the prediction of every run."""
        out: dict[str, Any] = {
            "loo_mae": self.mae,
            "loo_r2": self.r2,
            "spearman": self.spearman,
            "coverage": self.coverage,
        }
        return {**out, "predicted": self.predicted, "sd": self.sd} if points else out


def leave_one_out(name: str, weights: np.ndarray, values: np.ndarray, errors: np.ndarray) -> Quality:
    """Predict every run from those of other mixtures, hyper-parameters fitted again each time.

    Runs of the same mixture with another seed are left out with it: they would give its score away.

    Args:
        name: Model.
        weights: Mixtures ``[n, m]``, n at least 2.
        values: Scores ``[n]``.
        errors: Standard errors of the scores ``[n]``.
    """
    predicted, sds = np.zeros(len(values)), np.zeros(len(values))
    for run in range(len(values)):
        rest = np.abs(weights - weights[run]).max(axis=1) > SAME
        if not rest.any():
            rest = np.arange(len(values)) != run
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnderdeterminedWarning)
            model = make(name).fit(weights[rest], values[rest], errors[rest])
        mean, sd = model.predict(weights[run : run + 1])
        predicted[run] = mean[0]
        # The noise of least squares is measured around the surface, so it holds the noise of the test already.
        test = errors[run] if name == "gp" else 0.0
        sds[run] = math.sqrt(sd[0] ** 2 + model.noise**2 + test**2)
    rest_sum = float(((values - predicted) ** 2).sum())
    spread = float(((values - values.mean()) ** 2).sum())
    constant = np.ptp(predicted) < 1e-12 or np.ptp(values) < 1e-12
    return Quality(
        mae=float(np.abs(values - predicted).mean()),
        r2=1 - rest_sum / spread if spread > 0 else 0.0,
        spearman=0.0 if constant or name == "mean" else float(spearmanr(predicted, values).statistic),
        coverage=float((np.abs(values - predicted) <= Z95 * sds).mean()),
        predicted=predicted.tolist(),
        sd=sds.tolist(),
    )


@dataclass(slots=True)
class Fit:
    """A fitted predictor and what it was fitted to.

    Attributes:
        sources: Names, in the order of the weights.
        target: What is predicted.
        model: Name of the chosen model.
        predictor: The model.
        weights: Mixtures ``[n, m]``.
        values: Scores ``[n]``.
        errors: Standard errors of the scores ``[n]``.
        quality: Leave-one-out figures by model, of every model that could be fitted.
        signal: False when no model beats the mean by more than a standard error.
        settings: What ``mmpost mixture run`` noted about the runs.
    """

    sources: tuple[str, ...]
    target: Target
    model: str
    predictor: Predictor
    weights: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    quality: dict[str, Quality]
    signal: bool
    settings: dict[str, Any] = field(default_factory=dict)

    def named(self, weights: np.ndarray) -> dict[str, float]:
        """A mixture ``[m]`` as weight by source."""
        return dict(zip(self.sources, map(float, weights), strict=True))

    def as_model(self, name: str) -> Predictor:
        """The chosen predictor, or another model on the same runs."""
        if name == self.model:
            return self.predictor
        return make(name).fit(self.weights, self.values, self.errors)


def fit(
    records: Sequence[MixtureRecord],
    target: Target,
    model: str = "auto",
    *,
    settings: dict[str, Any] | None = None,
) -> Fit:
    """Fit one model, or with ``auto`` the one with the smallest leave-one-out error of those that are determined.

    Runs of one mixture with several seeds are single points; the Gaussian process takes their spread as noise.

    Warns:
        UnderdeterminedWarning: For a least-squares model that the runs do not determine.

    Raises:
        MmpostError: MMP-V020 for fewer than 3 runs, MMP-V027 for an unknown target, MMP-C006 for an unknown model.
    """
    weights = matrix(records)
    values, errors = (np.array(column) for column in measured(records, target))
    if model != "auto":
        make(model)
    check_enough(len(values))
    enough = [name for name in MODELS if is_determined(name, weights)] or ["mean"]
    judged = dict.fromkeys(["mean", *enough, *([] if model == "auto" else [model])])
    quality = {name: leave_one_out(name, weights, values, errors) for name in MODELS if name in judged}
    best = min(enough, key=lambda name: quality[name].mae)
    chosen = best if model == "auto" else model
    signal = chosen != "mean" and _beats_mean(quality[chosen], quality["mean"], weights, values)
    if model == "auto" and not signal:
        chosen = "mean"
    predictor = make(chosen).fit(weights, values, errors)
    sources = tuple(records[0].weights)
    return Fit(sources, target, chosen, predictor, weights, values, errors, quality, signal, settings or {})


def _beats_mean(quality: Quality, mean: Quality, weights: np.ndarray, values: np.ndarray) -> bool:
    """Smaller errors by more than one standard error of the difference, mixture by mixture."""
    gain = np.abs(values - np.array(mean.predicted)) - np.abs(values - np.array(quality.predicted))
    place = np.unique((weights / SAME).round(), axis=0, return_inverse=True)[1].reshape(-1)
    gain = np.bincount(place, gain) / np.bincount(place)
    return bool(len(gain) > 2 and gain.mean() > gain.std(ddof=1) / math.sqrt(len(gain)))


def write_fit(path: Path, fitted: Fit) -> None:
    """Write predictor.json."""
    content = {
        "schema": SCHEMA,
        "sources": list(fitted.sources),
        "target": fitted.target.to_json(),
        "model": fitted.model,
        "signal": fitted.signal,
        "parameters": {**fitted.predictor.parameters(), "noise": fitted.predictor.noise},
        "quality": {name: q.to_json() for name, q in fitted.quality.items()},
        "runs": [
            {"weights": row, "value": value, "error": error}
            for row, value, error in zip(
                fitted.weights.tolist(), fitted.values.tolist(), fitted.errors.tolist(), strict=True
            )
        ],
        "settings": fitted.settings,
    }
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_fit(path: Path) -> Fit:
    """Read predictor.json (or its folder); the model predicts as it did when it was written.

    Raises:
        MmpostError: MMP-V028 for a file that is no predictor.
    """
    file = path / PREDICTOR if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema is not {SCHEMA}")
        runs = content["runs"]
        weights = np.array([run["weights"] for run in runs], dtype=np.float64)
        values, errors = (np.array([run[key] for run in runs], dtype=np.float64) for key in ("value", "error"))
        name = content["model"]
        model = GaussianProcess.from_parameters(content["parameters"]) if name == "gp" else make(name)
        quality = {
            key: Quality(q["loo_mae"], q["loo_r2"], q["spearman"], q["coverage"], q["predicted"], q["sd"])
            for key, q in content["quality"].items()
        }
        target = Target.from_json(content["target"])
        sources = tuple(content["sources"])
    except OSError as error:
        raise MmpostError("MMP-V028", f"no predictor '{file}'.", "Run mmpost mixture fit FOLDER.") from error
    except (ValueError, KeyError, TypeError) as error:
        what = f"'{file}' is no predictor ({error})."
        raise MmpostError("MMP-V028", what, "Run mmpost mixture fit again.") from error
    predictor = model.fit(weights, values, errors)
    signal, settings = bool(content["signal"]), content.get("settings", {})
    return Fit(sources, target, name, predictor, weights, values, errors, quality, signal, settings)
