"""The same from Python: ``MixturePredictor.fit("runs/mixture").suggest(n=5)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmpost.core.errors import MmpostError
from mmpost.mixture.fit import Fit, fit, read_fit, write_fit
from mmpost.mixture.predict import Z95
from mmpost.mixture.records import MixtureRecord, check_simplex, read_records
from mmpost.mixture.run import read_settings
from mmpost.mixture.scores import Target
from mmpost.mixture.suggest import Suggestion, suggest


class MixturePredictor:
    """Scores of mixtures, learned from proxy runs.

    Attributes:
        fitted: Runs, model and its quality on runs that it has not seen.
    """

    def __init__(self, fitted: Fit) -> None:
        self.fitted = fitted

    @classmethod
    def fit(
        cls, runs: str | Path | Sequence[MixtureRecord], target: str | Target = "eval.mean", *, model: str = "auto"
    ) -> MixturePredictor:
        """Fit to a folder of ``mmpost mixture run`` or to records; see ``mmpost.mixture.fit.fit``."""
        wanted = Target(target) if isinstance(target, str) else target
        if isinstance(runs, str | Path):
            return cls(fit(read_records(Path(runs)), wanted, model, settings=read_settings(Path(runs))))
        return cls(fit(list(runs), wanted, model))

    @classmethod
    def load(cls, path: str | Path) -> MixturePredictor:
        """Read predictor.json or its folder."""
        return cls(read_fit(Path(path)))

    def save(self, path: str | Path) -> None:
        """Write predictor.json."""
        write_fit(Path(path), self.fitted)

    def predict(self, weights: Mapping[str, float]) -> tuple[float, tuple[float, float]]:
        """Expected score of a mixture and its 95 % interval.

        Raises:
            MmpostError: MMP-V021 for what is no mixture of the sources.
        """
        if set(weights) != set(self.fitted.sources):
            names = ", ".join(self.fitted.sources)
            raise MmpostError("MMP-V021", f"a mixture of {', '.join(weights)} is none of {names}.", "Name all sources.")
        row = [weights[name] for name in self.fitted.sources]
        check_simplex(row, self.fitted.sources)
        mean, sd = (float(part[0]) for part in self.fitted.predictor.predict(np.array([row])))
        return mean, (mean - Z95 * sd, mean + Z95 * sd)

    def suggest(self, n: int = 5, *, floor: float = 0.0, strategy: str = "ei", seed: int = 0) -> list[Suggestion]:
        """Mixtures that are worth a run, or with ``strategy="mean"`` worth training with."""
        return suggest(self.fitted, n, floor=floor, strategy=strategy, seed=seed).chosen
