"""First light: a small vision-language model from random weights through SFT to GRPO, on real pictures.

Every stage is an ordinary command of this package with a shipped config; this module only chains them and compares.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mmpost.api.evaluate import Results, evaluate
from mmpost.api.training import Training
from mmpost.config.load import load, resolved_yaml
from mmpost.config.run import GRPOConfig, SFTConfig
from mmpost.core.errors import MmpostError
from mmpost.eval.stats import over_seeds, paired_bootstrap, wilson
from mmpost.models.load import load as open_model
from mmpost.runs.report import Stage, write_staged_report

TASK = "demo_vqa"
SFT_CONFIG, GRPO_CONFIG = "configs/demo/sft.yaml", "configs/demo/grpo.yaml"
STAGES = ("init", "sft", "grpo", "control")
NOTES = (
    "Supervised fine-tuning is deliberately short, so that reinforcement learning has room to improve; more SFT steps "
    "improve this model, too. This page shows that both stages work, not that one beats the other.",
    "Accuracy is exact match on held-out questions whose pictures were never seen in training.",
)


@dataclass(slots=True)
class StageResult:
    """One stage of one seed.

    Attributes:
        scores: 1 or 0 per held-out row.
        seconds: Training, or evaluation alone for ``init``.
        folder: Run folder; None for ``init``.
        eval_file: Result file, with samples beside it.
    """

    scores: list[float]
    seconds: float
    folder: Path | None
    eval_file: Path


def first_light(out: Path, seeds: list[int], *, control: bool = False) -> dict[str, Any]:
    """Run the demo and write ``summary.json`` and ``report.html``.

    Args:
        out: Folder; ``sft`` and ``grpo`` in it are the runs of the first seed.
        seeds: One chain of stages per seed.
        control: Also train with rewards shuffled inside each group, which must not help.

    Returns:
        The summary.
    """
    clock = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    chains: list[dict[str, StageResult]] = []
    params = 0
    for index, seed in enumerate(seeds):
        base = out if index == 0 else out / f"seed-{seed}"
        chain, params = _chain(base, seed, control)
        chains.append(chain)
    summary = _summary(chains, seeds, params, time.perf_counter() - clock)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    stages = [Stage(name, stage.folder, stage.eval_file) for name, stage in chains[0].items()]
    report = write_staged_report(
        stages, out / "report.html", title="mmpost: first light", summary=summary, notes=list(NOTES)
    )
    _print(summary, report)
    return summary


def _chain(base: Path, seed: int, control: bool) -> tuple[dict[str, StageResult], int]:
    """All stages of one seed."""
    chain: dict[str, StageResult] = {}
    sft_words = [f"train.output_dir={base / 'sft'}", f"train.seed={seed}"]
    config = load(SFTConfig, [SFT_CONFIG], sft_words).config
    _say(f"seed {seed}, stage init: {config.model.model_name_or_path} before any training")
    model = open_model(config.model, peft=None, media=config.data.media, seed=seed)
    clock = time.perf_counter()
    section = config.eval
    results = evaluate(
        model, [TASK], batch_size=section.per_device_eval_batch_size, max_new_tokens=section.max_new_tokens
    )
    init = base / "init"
    shutil.rmtree(init, ignore_errors=True)
    results.save_samples(init)
    chain["init"] = StageResult(_scores(results), time.perf_counter() - clock, None, init / "eval" / f"{TASK}.json")
    chain["sft"] = _stage(SFTConfig, SFT_CONFIG, sft_words, base / "sft", seed)
    start = f"model.model_name_or_path={base / 'sft' / 'final'}"
    names = ["grpo", "control"] if control else ["grpo"]
    for name in names:
        words = [f"train.output_dir={base / name}", f"train.seed={seed}", start]
        words += ["grpo.shuffle_rewards=true"] if name == "control" else []
        chain[name] = _stage(GRPOConfig, GRPO_CONFIG, words, base / name, seed)
    return chain, model.policy.num_parameters()


def _stage(
    config_class: type[SFTConfig] | type[GRPOConfig],
    config: str,
    words: list[str],
    folder: Path,
    seed: int,
    *,
    task: str = TASK,
) -> StageResult:
    """One training run with its scores, continued if it was interrupted, taken as it is if it was finished."""
    loaded = load(config_class, [config], words)
    _say(f"seed {seed}, stage {folder.name}: mmpost {config_class.command} {config} {' '.join(words)}")
    command = ["mmpost", config_class.command, config, *words]
    try:
        Training(loaded.config, command=command, config_yaml=resolved_yaml(loaded)).run()
    except MmpostError as error:
        if error.code != "MMP-E021":
            raise
        again = f"Delete '{folder}' to run the demo again from the start."
        raise MmpostError(error.code, error.what, again) from error
    file = folder / "eval" / f"{task}.json"
    rows = [json.loads(line) for line in file.with_suffix(".samples.jsonl").read_text().splitlines()]
    last = json.loads([line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"time"' in line][-1])
    return StageResult([row["accuracy"] for row in rows], last["time"], folder, file)


def _scores(results: Results) -> list[float]:
    return [record["accuracy"] for record in results.samples[TASK]]


def _summary(chains: list[dict[str, StageResult]], seeds: list[int], params: int, seconds: float) -> dict[str, Any]:
    """Accuracies per stage, and the paired gain of reinforcement learning.

    Wilson interval of the mean accuracy per stage; paired bootstrap over seeds and held-out rows for the gain, and for
    several seeds Student's interval over their gains beside it (``student_ci``).
    """
    n = len(chains[0]["init"].scores)
    stages = []
    for name in [name for name in STAGES if name in chains[0]]:
        accuracy = float(np.mean([np.mean(chain[name].scores) for chain in chains]))
        stages.append(
            {
                "name": name,
                "accuracy": accuracy,
                "ci": list(wilson(accuracy * n, n)),
                "seconds": round(float(np.mean([chain[name].seconds for chain in chains])), 1),
                "by_seed": [float(np.mean(chain[name].scores)) for chain in chains],
            }
        )
    summary = {
        "task": TASK,
        "model_params": params,
        "n_eval": n,
        "seeds": seeds,
        "stages": stages,
        "grpo_minus_sft": _gain(chains, "grpo"),
        "seconds": round(seconds, 1),
    }
    if "control" in chains[0]:
        summary["control_minus_sft"] = _gain(chains, "control")
    return summary


def _gain(chains: list[dict[str, StageResult]], name: str) -> dict[str, Any]:
    before, after = [chain["sft"].scores for chain in chains], [chain[name].scores for chain in chains]
    mean, interval = paired_bootstrap(before, after, seed=0)
    by_seed = [float(np.mean(b) - np.mean(a)) for a, b in zip(before, after, strict=True)]
    gain = {"mean": mean, "ci": list(interval), "by_seed": by_seed}
    if len(chains) > 1:
        gain["student_ci"] = list(over_seeds(by_seed)[1])
    return gain


def _say(text: str) -> None:
    sys.stderr.write(f"\n== {text}\n")
    sys.stderr.flush()


def _print(summary: dict[str, Any], report: Path) -> None:
    table = Table(title=f"{summary['task']}: {summary['n_eval']} held-out questions, seeds {summary['seeds']}")
    for column in ("stage", "accuracy", "95 % interval", "seconds"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in summary["stages"]:
        low, high = stage["ci"]
        table.add_row(stage["name"], f"{stage['accuracy']:.3f}", f"{low:.3f} to {high:.3f}", f"{stage['seconds']:.0f}")
    console = Console()
    console.print(table)
    for key in ("grpo_minus_sft", "control_minus_sft"):
        if key in summary:
            low, high = summary[key]["ci"]
            console.print(f"{key.replace('_', ' ')}: {summary[key]['mean']:+.3f}  [{low:+.3f}, {high:+.3f}]")
    console.print(f"{summary['seconds']:.0f} s in all. Report: {report}")
