"""Which rows need their sound, picture or video: the filter of ``mmpost data contribution``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpost.api.data import Data
from mmpost.api.rollouts import Progress, fingerprint, model_fingerprint, rows_of
from mmpost.config.schema import MediaSection, RewardSpec
from mmpost.contribution import labels, nulls, report
from mmpost.contribution.rows import write_rows
from mmpost.contribution.run import ENGINES, JOURNALS, Voter, Work, run
from mmpost.contribution.score import Plan
from mmpost.core.errors import MmpostError
from mmpost.core.files import write_whole
from mmpost.core.sample import Kind, Sample
from mmpost.models.load import LoadedModel
from mmpost.rewards.score import check_columns, resolve
from mmpost.rollout.generate import Sampling

SCORES, SUMMARY, REPORT = "scores.jsonl", "summary.json", "report.html"


@dataclass(frozen=True, slots=True)
class Engine:
    """Who works.

    Attributes:
        processes: How many processes, or Ray actors.
        name: ``processes`` or ``ray``.
        threads: CPU threads of each; part of what decides the last bits.
        devices: Devices that processes take in turn; empty: CUDA where there is one.
    """

    processes: int = 1
    name: str = "processes"
    threads: int = 1
    devices: tuple[str, ...] = ()


def contribution(
    data: Sequence[Data],
    models: Sequence[str | LoadedModel],
    out: Path,
    *,
    modality: Kind = "audio",
    null: str = "silence",
    k: int = 4,
    rule: str = "robust",
    reward: str = "answer",
    sampling: Sampling,
    batch_size: int = 256,
    media: MediaSection | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask models about every row with its media and without, and split the rows by what they need.

    Writes ``scores.jsonl``, ``weak.jsonl``, ``strong.jsonl``, ``other.jsonl`` (rows that are neither), ``report.html``
    and ``summary.json`` into the folder. The same call after a kill goes on where it was.

    Args:
        data: Sources.
        models: Names or folders of the voters, or one open model.
        out: Folder.
        modality: What is taken away.
        null: What comes in its place: names between commas, or ``all``; see ``mmpost.contribution.nulls``.
        k: Votes of each model, with the medium and for each null.
        rule: ``robust`` or ``paper``; which labels decide the files. Both stand in ``scores.jsonl``.
        reward: Verifier that says what is right: ``answer``, ``choice``, ``exact``, ``number`` and so on.
        sampling: How answers are drawn; temperature 0 is greedy.
        batch_size: Answers decoded together.
        media: How media are decoded.
        engine: Who works; default this process.
        progress: Called with blocks done and blocks in all.

    Returns:
        The summary.

    Raises:
        MmpostError: MMP-C004 and MMP-C006 for unknown names, MMP-D060 and MMP-D061 for rows without media, MMP-R226,
            MMP-R227, MMP-R233 and MMP-R240, and what models, data and the verifier raise.
    """
    engine = engine or Engine()
    _check(modality, rule, engine.name, models)
    rows = rows_of(data)
    nulls.require_media(rows, modality)
    rewards = resolve([RewardSpec(name=reward)])
    check_columns(rewards, rows)
    plan = Plan(modality, nulls.parse(null, modality), k, reward, sampling, batch_size)
    names = [model if isinstance(model, str) else model.name for model in models]
    voters = tuple(Voter(name, model_fingerprint(name)) for name in names)
    work = Work(
        rows, fingerprint(rows), voters, plan, media or MediaSection(), out.resolve() / JOURNALS, engine.threads
    )
    opened = {place: model for place, model in enumerate(models) if not isinstance(model, str)}
    votes = run(
        work,
        processes=engine.processes,
        engine=engine.name,
        devices=engine.devices,
        opened=opened,
        progress=progress,
    )
    return _write(out, rows, names, votes, plan, rule)


def _check(modality: str, rule: str, engine: str, models: Sequence[Any]) -> None:
    for name, known, kind in (
        (modality, nulls.MODALITIES, "modalities"),
        (rule, labels.RULES, "rules"),
        (engine, ENGINES, "engines"),
    ):
        if name not in known:
            raise MmpostError("MMP-C006", f"unknown name '{name}' among {kind}.", f"Known: {', '.join(known)}")
    if not models:
        raise MmpostError("MMP-C004", "no model is asked.", "Give --model NAME, once for every voter.")
    names = [model if isinstance(model, str) else model.name for model in models]
    if len(set(names)) < len(names):
        raise MmpostError("MMP-C004", f"a model is given twice: {', '.join(names)}.", "Ask each model once.")


def _write(
    out: Path,
    rows: Sequence[Sample],
    names: Sequence[str],
    votes: Sequence[Sequence[dict[str, Any]]],
    plan: Plan,
    rule: str,
) -> dict[str, Any]:
    null_names = [null.name for null in plan.nulls]
    habits = {
        null: [labels.habits(rows, [one[null]["answer"] for one in each]) for each in votes] for null in null_names
    }
    records = [
        labels.record(
            row,
            {name: votes[m][i] for m, name in enumerate(names)},
            null_names,
            *chance,
            {null: [one[i] for one in each] for null, each in habits.items()},
        )
        for i, (row, chance) in enumerate(zip(rows, labels.chances(rows), strict=True))
    ]
    write_whole(out / SCORES, "".join(json.dumps(one, ensure_ascii=False, default=str) + "\n" for one in records))
    found = report.summary(records, modality=plan.modality, models=names, nulls=null_names, rule=rule)
    for file, wanted in (("weak", {"weak"}), ("strong", {"strong"}), ("other", {"hard", "harmful", "unscored"})):
        chosen = [
            dataclasses.replace(row, columns={**row.columns, "contribution": _short(record, rule)})
            for row, record in zip(rows, records, strict=True)
            if record[rule] in wanted
        ]
        write_rows(chosen, out / f"{file}.jsonl")
    report.write_report(out / REPORT, found, records, rows)
    write_whole(out / SUMMARY, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def _short(record: dict[str, Any], rule: str) -> dict[str, Any]:
    """What a row of the split says about itself."""
    return {"label": record[rule], **{key: record[key] for key in ("with", "without", "contribution")}}
