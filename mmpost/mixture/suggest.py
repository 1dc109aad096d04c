"""Suggested mixtures as weights of ``data.train``, with what to expect of them and of uniform weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmpost.config.dump import inline
from mmpost.core.files import write_whole
from mmpost.mixture.fit import Fit
from mmpost.mixture.optimise import Limits, propose
from mmpost.mixture.predict import Z95
from mmpost.mixture.records import rounded


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A mixture and what is expected of it.

    Attributes:
        weights: Weight by source.
        mean: Expected score.
        low: Lower end of the 95 % interval of the expected score.
        high: Upper end.
        gain: Expected improvement over the best mixture so far; 0 unless that is how it was chosen.
    """

    weights: dict[str, float]
    mean: float
    low: float
    high: float
    gain: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """For summaries."""
        return {"weights": self.weights, "mean": self.mean, "ci": [self.low, self.high], "gain": self.gain}


@dataclass(frozen=True, slots=True)
class Suggestions:
    """Mixtures, best first, and uniform weights for comparison.

    Attributes:
        chosen: The mixtures.
        uniform: What the same model expects of equal weights.
        best_tried: What it expects of the best mixture that was run.
        model: Model that was asked.
        is_settled: Nothing is left to gain that would show above the noise of a single run.
    """

    chosen: list[Suggestion]
    uniform: Suggestion
    best_tried: Suggestion
    model: str
    is_settled: bool


def suggest(
    fitted: Fit, n: int = 5, *, floor: float = 0.0, strategy: str = "ei", model: str = "gp", seed: int = 0
) -> Suggestions:
    """Mixtures that are worth a run.

    Args:
        fitted: Runs and predictor.
        n: How many, at least 1.
        floor: Smallest weight of every source.
        strategy: ``ei`` for the next proxy runs, ``mean`` for the mixture to train with.
        model: Model to ask; ``auto`` is the one that was fitted.
        seed: Of the candidates.

    Raises:
        MmpostError: MMP-V025 for impossible floors.
    """
    name = fitted.model if model == "auto" else model
    predictor, m = fitted.as_model(name), len(fitted.sources)
    limits = Limits.floor(m, floor)
    proposals = propose(predictor, fitted.weights, limits, n, strategy=strategy, seed=seed)

    def expected(weights: np.ndarray, gain: float = 0.0) -> Suggestion:
        row = np.array(rounded(weights))
        mean, sd = (float(part[0]) for part in predictor.predict(row[None]))
        return Suggestion(fitted.named(row), mean, mean - Z95 * sd, mean + Z95 * sd, gain)

    tried = fitted.weights[int(np.argmax(predictor.predict(fitted.weights)[0]))]
    chosen = [expected(proposal.weights, proposal.gain) for proposal in proposals]
    settled = strategy == "ei" and proposals[0].gain < 0.5 * predictor.noise
    return Suggestions(chosen, expected(np.ones(m)), expected(tried), name, settled)


def fragment(fitted: Fit, found: Suggestions, index: int = 0) -> str:
    """One of the suggestions as YAML that any training command takes behind its own configuration."""
    name = fitted.target.name
    lines = [
        f"# Mixture suggested by mmpost: {name} as {found.model} predicts it from {len(fitted.values)} runs.",
        "# Use: mmpost sft YOUR.yaml THIS_FILE",
    ]
    if not fitted.signal:
        lines.append(f"# No signal: no model predicts {name} better than its mean; these runs tell no mixtures apart.")
    rows = [(f"suggestion {k + 1}", one) for k, one in enumerate(found.chosen)]
    for title, one in [*rows, ("best so far", found.best_tried), ("uniform", found.uniform)]:
        mark = " <- below" if one is found.chosen[index] else ""
        shares = ", ".join(f"{key} {value:.3f}" for key, value in one.weights.items())
        lines.append(f"#   {title:<13} {one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]  {shares}{mark}")
    if found.is_settled:
        lines.append("# The expected gain is below half the noise of a run: more proxy runs are not worth their cost.")
    lines += ["data:", "  train:"]
    known = {source["name"]: source for source in fitted.settings.get("sources", [])}
    for key, weight in found.chosen[index].weights.items():
        source = {**known.get(key, {"path": key, "name": key}), "weight": weight}
        lines.append(f"    - {inline(source)}")
    return "\n".join(lines) + "\n"


def write_fragments(out: Path, fitted: Fit, found: Suggestions) -> list[Path]:
    """Write the first suggestion to ``out`` and the others beside it as ``NAME-2.yaml`` and so on."""
    files = []
    for index in range(len(found.chosen)):
        file = out if index == 0 else out.with_name(f"{out.stem}-{index + 1}{out.suffix}")
        write_whole(file, fragment(fitted, found, index))
        files.append(file)
    return files
