"""Does every preset learn? Held-out accuracy before and after a short run of each, over several seeds.

    python -m benchmarks.methods --out /tmp/methods                  # all presets, seeds 0 1 2
    python -m benchmarks.methods --out /tmp/methods --presets dapo hpt --steps 60

For each seed the embedded task's shipped SFT config makes the starting weights (``sft``). Every preset then trains on
for the same number of optimiser steps, and is compared with its start on the same held-out questions. Presets that
train on demonstrations alone go on with ``mmpost sft``. Finished runs are kept and not repeated.

Presets that use demonstrations or a teacher beside rewards shall beat ``sft`` at equal updates, where that question
arises: with few demonstrations (300, on which the start was trained until its rate was 0) and many prompts whose answer
can be checked (3,000), after twice as many steps. With a one-token label for every prompt nothing beats ``sft`` here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from mmpost.core.catalog import Catalog
from mmpost.core.sample import Sample
from mmpost.eval.stats import over_seeds, paired_bootstrap
from mmpost.train.demos import COLUMN
from mmpost_tasks import TASKS
from mmpost_tasks.export import write_jsonl

TASK = "demo_vqa"
SFT, GRPO = "configs/demo/sft.yaml", "configs/demo/grpo.yaml"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a preset is run here.

    Attributes:
        command: ``sft`` or ``grpo``.
        words: Options beyond the shipped config of the command.
        few: Options where demonstrations are few and it shall beat ``sft``; None for a preset without that claim.
    """

    command: str = "grpo"
    words: tuple[str, ...] = ()
    few: tuple[str, ...] | None = None


# One line each; ratios to an older policy differ from 1 only with several steps per rollout batch.
OFF_POLICY = ("grpo.mini_batches=2",)
DEMONSTRATIONS = ("train.learning_rate=1.0e-3",)
FEW_RATE = 5.0e-4  # of every run where demonstrations are few
PLANS: dict[str, Plan] = {
    "sft": Plan("sft", DEMONSTRATIONS),
    "dft": Plan("sft", DEMONSTRATIONS),
    "asft": Plan("sft", DEMONSTRATIONS),
    # An answer here has one token that is not certain, which pruning of tokens would take away.
    "q_tuning": Plan("sft", ("loss.args.token_ratio=1", *DEMONSTRATIONS)),
    "stochastok": Plan("sft", DEMONSTRATIONS),
    "cings": Plan("sft", DEMONSTRATIONS),
    "reinforce": Plan(),
    "rloo": Plan(),
    "ppo": Plan(words=OFF_POLICY),
    "grpo": Plan(words=OFF_POLICY),
    "dr_grpo": Plan(words=OFF_POLICY),
    "dapo": Plan(words=OFF_POLICY),
    "gspo": Plan(words=OFF_POLICY),
    "cispo": Plan(words=OFF_POLICY),
    "sapo": Plan(words=OFF_POLICY),
    "vespo": Plan(words=OFF_POLICY),
    "bnpo": Plan(words=OFF_POLICY),
    "luspo": Plan(words=OFF_POLICY),
    "gdpo": Plan(words=OFF_POLICY),
    "riskpo": Plan(words=OFF_POLICY),
    "darling": Plan(words=OFF_POLICY),
    "reinforce_ada": Plan(words=OFF_POLICY),
    "noisy": Plan(words=OFF_POLICY),
    "luffy": Plan(words=OFF_POLICY),
    # One prompt in ten has a demonstration, which shall not weigh as much as the completions of all others.
    "hpt": Plan(words=("loss.args.gamma=4", *DEMONSTRATIONS), few=("loss.args.demo_weight=0.1",)),
    "kdrl": Plan(few=()),
}


def train(words: Sequence[str], folder: Path) -> list[float]:
    """One ordinary run in a process of its own with one thread; 1 or 0 per held-out question."""
    file = folder / "eval" / f"{TASK}.samples.jsonl"
    if not file.is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mmpost", *words, f"train.output_dir={folder}"]
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (folder.parent / f"{folder.name}.log").open("w") as log:
            subprocess.run(command, env=quiet, stdout=log, stderr=log, check=True)
    return [json.loads(line)["accuracy"] for line in file.read_text().splitlines()]


def start(out: Path, seed: int) -> list[float]:
    """The common starting weights of a seed."""
    return train(["sft", SFT, f"train.seed={seed}"], out / f"seed-{seed}" / "start")


def teacher(out: Path) -> None:
    """A better model for presets that learn from one: the same, trained five times as long."""
    train(["sft", SFT, "train.seed=0", "train.max_steps=800"], out / "teacher")


def run(out: Path, preset: str, seed: int, steps: int) -> list[float]:
    """One preset from the start of its seed."""
    base, plan = out / f"seed-{seed}", PLANS[preset]
    config = SFT if plan.command == "sft" else GRPO
    words = [plan.command, config, f"train.seed={seed}", f"train.max_steps={steps}", *_method(out, preset)]
    words += [f"model.model_name_or_path={base / 'start' / 'final'}", *plan.words]
    return train(words, base / preset)


def _method(out: Path, preset: str) -> list[str]:
    words = [f"loss.preset={preset}"]
    return [*words, f"loss.teacher={out / 'teacher' / 'final'}"] if preset == "kdrl" else words


# -- few demonstrations, many prompts --------------------------------------------------------------------------------

FEW, MANY, FEW_STEPS = 300, 3000, 240


def few_start(out: Path, seed: int) -> list[float]:
    """Weights that have learnt what the few demonstrations can teach."""
    words = ["sft", SFT, f"train.seed={seed}", f"train.max_steps={FEW_STEPS}", "train.lr_scheduler_type=cosine"]
    return train([*words, _few_demonstrations()], out / f"seed-{seed}" / "few-start")


def few_run(out: Path, preset: str, seed: int, steps: int) -> list[float]:
    """``sft`` on the few demonstrations, or another preset on all prompts, of which the few have one."""
    base, command = out / f"seed-{seed}", "sft" if preset == "sft" else "grpo"
    words = [command, SFT if command == "sft" else GRPO, f"train.seed={seed}", f"train.max_steps={steps}"]
    words += [f"model.model_name_or_path={base / 'few-start' / 'final'}", f"train.learning_rate={FEW_RATE}"]
    words += [*_method(out, preset), *(PLANS[preset].few or ())]
    words.append(_few_demonstrations() if command == "sft" else f"data.train=[{{path: {out / 'few' / 'rows.jsonl'}}}]")
    return train([*words, "train.lr_scheduler_type=constant"], base / f"few-{preset}")


def _few_demonstrations() -> str:
    return f"data.train=[{{path: 'task:{TASK}', split: train, limit: {FEW}}}]"


def few_rows(out: Path) -> None:
    """The prompts as a data file; the first of them bring their demonstration as a column."""
    if not (out / "few" / "rows.jsonl").is_file():
        rows = Catalog("tasks", TASKS).get(TASK).load("train", limit=MANY)
        write_jsonl([_asked(row, i < FEW) for i, row in enumerate(rows)], out / "few")


def _asked(row: Sample, shown: bool) -> Sample:
    prompt = row.prompt()
    columns = {**prompt.columns, COLUMN: row.turns[-1].text} if shown else prompt.columns
    return replace(prompt, columns=columns)


def compare(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> dict[str, object]:
    """Mean accuracies by seed and the paired gain with its intervals."""
    gain, interval = paired_bootstrap([list(b) for b in before], [list(a) for a in after], seed=0)
    by_seed = [sum(a) / len(a) - sum(b) / len(b) for b, a in zip(before, after, strict=True)]
    out: dict[str, object] = {"gain": gain, "ci": list(interval), "by_seed": by_seed}
    if len(by_seed) > 1:
        out["student_ci"] = list(over_seeds(by_seed)[1])
    return out


def record(out: Path, preset: str, seeds: Sequence[int], steps: int, pool: ThreadPoolExecutor) -> dict[str, object]:
    """Run a preset over all seeds and compare it with its start, and with the run that it shall beat."""
    plan = PLANS[preset]
    before = list(pool.map(lambda seed: start(out, seed), seeds))
    if preset == "kdrl":
        teacher(out)
    after = list(pool.map(lambda seed: run(out, preset, seed, steps), seeds))
    line: dict[str, object] = {"preset": preset, "steps": steps, "seeds": list(seeds), **compare(before, after)}
    line["accuracy"] = sum(map(sum, after)) / sum(map(len, after))
    if plan.few is not None:
        few_rows(out)
        list(pool.map(lambda seed: few_start(out, seed), seeds))
        rival = list(pool.map(lambda seed: few_run(out, "sft", seed, 2 * steps), seeds))
        line["over_sft"] = compare(rival, list(pool.map(lambda seed: few_run(out, preset, seed, 2 * steps), seeds)))
    return line


def table(lines: Sequence[Mapping[str, object]]) -> str:
    """Results as a Markdown table."""
    out = ["| preset | accuracy | gain over its start | 95 % interval | by seed |", "|---|---|---|---|---|"]
    for line in lines:
        low, high = line["ci"]  # type: ignore[misc]
        seeds = ", ".join(f"{value:+.3f}" for value in line["by_seed"])  # type: ignore[attr-defined]
        name, accuracy, gain = line["preset"], line["accuracy"], line["gain"]
        out.append(f"| {name} | {accuracy:.3f} | {gain:+.3f} | {low:+.3f} to {high:+.3f} | {seeds} |")
    return "\n".join(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/methods"))
    parser.add_argument("--presets", nargs="*", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    lines = []
    with ThreadPoolExecutor(args.parallel) as pool:
        for preset in args.presets:
            lines.append(record(args.out, preset, args.seeds, args.steps, pool))
            print(json.dumps(lines[-1]), flush=True)
    (args.out / "methods.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(table(lines))


if __name__ == "__main__":
    main()
