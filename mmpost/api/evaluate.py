"""Accuracy of a model on tasks, with intervals, and beside it what is left without sound or picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpost.api.model import load_model
from mmpost.config.schema import RewardSpec
from mmpost.contribution import nulls
from mmpost.core.catalog import Catalog
from mmpost.core.sample import Kind, Sample
from mmpost.eval import harness
from mmpost.models.load import LoadedModel
from mmpost.rewards.score import resolve
from mmpost.runs.folder import RunFolder
from mmpost_tasks import TASKS

EVAL_SPLIT = "heldout"
# What replaces the media of rows with sound or video in every evaluation. Pictures are replaced only where it is asked
# for: their rows are most of all, and would cost three times as much.
ABLATIONS = ("silence", "none")
ALWAYS: tuple[Kind, ...] = ("audio", "video")


@dataclass(frozen=True, slots=True)
class Results:
    """Results by task name.

    Attributes:
        results: Schema 1 results.
        samples: One record per row, by task.
    """

    results: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]

    def table(self) -> str:
        """Accuracies as text."""
        lines = [f"{'task':<24}{'group':<12}{'n':>6}  {'accuracy':>8}  95 % interval"]
        for task, result in self.results.items():
            rows = [("all", result["metrics"]["accuracy"]), *result["by_group"].items()]
            for name, share in rows:
                low, high = share["ci"]
                lines.append(f"{task:<24}{name:<12}{share['n']:>6}  {share['value']:>8.3f}  [{low:.3f}, {high:.3f}]")
        return "\n".join([*lines, *self._without()])

    def _without(self) -> list[str]:
        """Accuracies with and without each kind of medium."""
        lines: list[str] = []
        for task, result in self.results.items():
            for kind, by_null in result.get("ablations", {}).items():
                for null, found in by_null.items():
                    if not lines:
                        head = f"{'':<24}{'instead':<18}{'n':>6}  {'with':>8}{'without':>9}{'gap':>8}  95 % interval"
                        lines += ["", head]
                    low, high = found["difference"]["ci"]
                    shares = f"{found['with']['value']:>8.3f}{found['without']['value']:>9.3f}"
                    gap = f"{found['difference']['value']:>+8.3f}  [{low:+.3f}, {high:+.3f}]"
                    lines.append(f"{task:<24}{f'{kind}: {null}':<18}{found['without']['n']:>6}  {shares}{gap}")
        return lines

    def save(self, path: str | Path) -> Path:
        """Write all results as one JSON file."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(self.results, indent=1, ensure_ascii=False) + "\n")
        return target

    def save_samples(self, folder: Path, name: str | None = None) -> None:
        """Write ``eval/TASK.json`` and the samples with thumbnails into a run folder.

        Args:
            folder: The run folder.
            name: File name for a single task instead of the task's own.
        """
        for task, result in self.results.items():
            RunFolder(folder).write_eval(name or task, result, self.samples[task])


def evaluate(
    model: str | LoadedModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    progress: Callable[[int, int], None] | None = None,
    ablations: Sequence[str] | None = None,
) -> Results:
    """Answer held-out rows greedily and score them, with their media and without.

    Args:
        model: Name, folder, or an open model.
        tasks: Task names.
        limit: Rows per task.
        batch_size: Prompts decoded together.
        max_new_tokens: Length limit of an answer.
        progress: Called with rows done and rows in all.
        ablations: What replaces the media for the second accuracy, see ``mmpost.contribution.nulls``; an empty list
            for none. Default: silence (or a blank film) and nothing at all, for sound and video.

    Raises:
        MmpostError: MMP-C004 for an unknown ablation, MMP-C006 for an unknown task, MMP-E030 for a model that cannot
            be opened.
    """
    found = {name: Catalog("tasks", TASKS).get(name) for name in tasks}
    opened = load_model(model, peft=None) if isinstance(model, str) else model
    results: dict[str, dict[str, Any]] = {}
    samples: dict[str, list[dict[str, Any]]] = {}
    for name, task in found.items():
        rows = task.load(EVAL_SPLIT, limit=limit)
        (metric,) = resolve([RewardSpec(name=task.rewards[0])])
        results[name], samples[name] = harness.evaluate(
            opened,
            rows,
            metric,
            task=task.name,
            version=str(task.version),
            group_by=task.group_by,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
            ablations=_replaced(opened, rows, ablations),
        )
    return Results(results, samples)


def _replaced(
    model: LoadedModel, rows: Sequence[Sample], ablations: Sequence[str] | None
) -> dict[tuple[Kind, str], dict[int, Sample]]:
    """The rows without their media, by kind and replacement."""
    found: dict[tuple[Kind, str], dict[int, Sample]] = {}
    kinds = nulls.MODALITIES if ablations is not None else ALWAYS
    wanted = ABLATIONS if ablations is None else tuple(ablations)
    for kind in kinds:
        places = [place for place, row in enumerate(rows) if row.media(kind)]
        if not places or not wanted:
            continue
        replace = nulls.Replacer(rows, kind, section=model.adapter.section, seed=0)
        for null in nulls.parse(",".join(wanted), kind):
            found[kind, null.name] = {place: replace(place, null) for place in places}
    return found
