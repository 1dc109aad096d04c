"""Does every preset learn? Held-out accuracy before and after a short run of each, over several seeds.

    python -m benchmarks.methods --out /tmp/methods                  # all presets, seeds 0 1 2
    python -m benchmarks.methods --out /tmp/methods --presets dapo hpt --steps 60

For each seed the embedded task's shipped SFT config makes the starting weights (``sft``). Every preset then trains on
for the same number of optimiser steps, and is compared with its start on the same held-out questions. Presets that
train on demonstrations alone go on with ``mmpost sft``. ``sft`` itself is the rival of those that use
demonstrations or a teacher beside rewards; in this task, whose answers are one token, it is a rival that they only
equal (docs/performance.md). Finished runs are kept and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mmpost.eval.stats import over_seeds, paired_bootstrap

TASK = "demo_vqa"
SFT, GRPO = "configs/demo/sft.yaml", "configs/demo/grpo.yaml"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a preset is run here.

    Attributes:
        command: ``sft`` or ``grpo``.
        words: Options beyond the shipped config of the command.
        against: Run of the same seed and number of steps that it is compared with; None for its start alone.
    """

    command: str = "grpo"
    words: tuple[str, ...] = ()
    against: str | None = None


# One line each; ratios to an older policy differ from 1 only with several steps per rollout batch.
OFF_POLICY = ("grpo.mini_batches=2",)
DEMONSTRATIONS = ("train.learning_rate=1.0e-3",)
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
    "hpt": Plan(words=("loss.args.gamma=4", *DEMONSTRATIONS), against="sft"),
    "kdrl": Plan(against="sft"),
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
    words = [plan.command, config, f"train.seed={seed}", f"train.max_steps={steps}", f"loss.preset={preset}"]
    words += [f"model.model_name_or_path={base / 'start' / 'final'}", *plan.words]
    if preset == "kdrl":
        words.append(f"loss.teacher={out / 'teacher' / 'final'}")
    return train(words, base / preset)


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
    if plan.against is not None:
        rival = list(pool.map(lambda seed: run(out, str(plan.against), seed, steps), seeds))
        line[f"over_{plan.against}"] = compare(rival, after)
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
