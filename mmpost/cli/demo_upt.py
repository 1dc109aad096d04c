"""Learning without labels: what the majority vote gains on a checkpoint, beside labels and beside random labels.

From one supervised checkpoint three runs of equal length go out, all on questions whose pictures nobody has seen
before: GRPO, which alone gets their labels; UPT; and UPT whose pseudo-labels are drawn at random from the answers of
the group. Every stage is an ordinary run of this package; this module only chains them, two side by side with one
thread each, and compares.

The checkpoint is that of ``mmpost demo`` after three times as many steps (``configs/demo/upt_start.yaml``): below one
half a vote amplifies errors, and the 160 steps of ``mmpost demo`` end near 0.34, at chance on two of five kinds of
questions.

Both runs of UPT train the gains of the last norm alone, GRPO all weights; arXiv 2505.22453 trains all weights in both.
With all weights wrong majorities spread to other questions here (``docs/upt.md``).

What is compared is the probability of a right answer when one is drawn from the policy at temperature 1, that of the
training, on held-out questions: it is what all three runs are meant to raise. The majority of many draws of a one-word
answer is the most likely word, which greedy decoding finds as well; so the vote can bring draws up to the accuracy of
the most likely answer, and not that accuracy itself. arXiv 2505.22453 draws at 0.2; the accuracy of the most likely
answer, to which that is close, stands beside it and is not expected to rise.

Settings were chosen on seeds 7 and 8, on 500 to 800 rows of ``unlabelled`` behind those that are trained on, see
``docs/upt.md``.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mmpost.core.errors import MmpostError
from mmpost.core.files import write_whole

if TYPE_CHECKING:
    from mmpost.cli.demo import StageResult
    from mmpost.config.load import Loaded
    from mmpost.config.run import GRPOConfig, SFTConfig
    from mmpost.mixture.processes import Job

TASK = "demo_vqa"
# Configuration and further words of each stage; the first is the start of the others.
STAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "sft": ("sft", "configs/demo/upt_start.yaml", ()),
    "grpo": ("grpo", "configs/demo/upt_grpo.yaml", ()),
    "upt": ("upt", "configs/demo/upt.yaml", ()),
    "random_vote": ("upt", "configs/demo/upt.yaml", ("vote.variant=random",)),
}
ARMS = tuple(STAGES)[1:]
DRAWS = 4
DRAWN = "drawn.json"
SECONDS = "seconds.json"
NOTES = (
    "Accuracy is the probability of a right answer when one is drawn at the temperature of the training, estimated "
    f"from {DRAWS} draws per held-out question. greedy_accuracy in summary.json is that of the most likely answer.",
    "Labels of the unlabelled rows are looked at for the curves of pseudo-labels alone; no reward of UPT gets them.",
    "random_vote is the control: the same run with a pseudo-label drawn from the answers that the group has.",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the demo runs.

    Attributes:
        out: Folder; ``seed-N/sft``, ``grpo``, ``upt`` and ``random_vote`` in it are runs.
        seeds: One chain of stages per seed.
        jobs: Runs at once, one thread each.
        words: KEY=VALUE words for all runs, for tests of the demo itself.
        rows: Held-out questions that are drawn for; None for all.
    """

    out: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 2
    words: tuple[str, ...] = ()
    rows: int | None = None

    def folder(self, seed: int, stage: str) -> Path:
        """Run folder of a stage."""
        return self.out / f"seed-{seed}" / stage


def demo_upt(
    out: Path, seeds: list[int], *, jobs: int = 2, words: tuple[str, ...] = (), rows: int | None = None
) -> dict[str, Any]:
    """Run the demo and write ``summary.json`` and ``report.html``.

    Runs that are there already are continued, or taken as they are; the summary depends on the work alone, not on when
    it was interrupted. Seconds stand in a file of their own.

    Args:
        out: See ``Plan``; so the others.
        seeds: See ``Plan``.
        jobs: See ``Plan``.
        words: See ``Plan``.
        rows: See ``Plan``.

    Returns:
        The summary.

    Raises:
        MmpostError: MMP-T000 when a stage fails; its own message is repeated.
    """
    from mmpost.runs.report import Stage, write_staged_report

    seeds = list(dict.fromkeys(seeds))
    plan = Plan(out, tuple(seeds), jobs, words, rows)
    clock = time.monotonic()
    _run(plan, [(seed, "sft") for seed in seeds] + [(seed, arm) for seed in seeds for arm in ARMS])
    chains = [{stage: _result(plan, seed, stage) for stage in STAGES} for seed in seeds]
    summary = summarise(chains, seeds)
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_whole(out / SECONDS, f"{time.monotonic() - clock:.1f}\n")
    stages = [Stage(name, stage.folder, stage.eval_file) for name, stage in chains[0].items()]
    title = "mmpost: learning without labels"
    report = write_staged_report(stages, out / "report.html", title=title, summary=summary, notes=list(NOTES))
    _print(summary, report, time.monotonic() - clock)
    return summary


def _run(plan: Plan, stages: list[tuple[int, str]]) -> None:
    """Stages side by side, each in a process of its own."""
    from mmpost.mixture.processes import Job, Processes

    jobs, prints = [], {}
    for seed, stage in stages:
        folder = plan.folder(seed, stage)
        beside = folder.parent / "logs"
        command = [sys.executable, "-m", "mmpost.cli.demo_upt", "--stage", stage, "--seed", str(seed)]
        command += ["--out", str(plan.out), *([] if plan.rows is None else ["--rows", str(plan.rows)]), *plan.words]
        prints[folder] = _fingerprint(plan, seed, stage)
        log, lock = beside / f"{stage}.log", beside / f"{stage}.lock"
        needs = () if stage == "sft" else (f"sft, seed {seed}",)
        one_thread = {"OMP_NUM_THREADS": "1"}
        jobs.append(Job(f"{stage}, seed {seed}", tuple(command), folder, log, lock, one_thread, needs))

    def is_done(job: Job) -> bool:
        file = job.folder / "eval" / DRAWN
        # After a change of the configuration the run itself says that its folder belongs to another one.
        return file.is_file() and json.loads(file.read_text())["work"] == prints[job.folder]

    for job, code in Processes(plan.jobs, is_done).run(jobs):
        if code:
            lines = job.log.read_text(errors="replace").strip().splitlines() if job.log.is_file() else []
            last = lines[-1] if lines else f"exit code {code}"
            raise MmpostError("MMP-T000", f"{job.name} failed: {last}", f"Its output is in '{job.log}'.")
        sys.stderr.write(f"== done: {job.name}\n")
        sys.stderr.flush()


def _fingerprint(plan: Plan, seed: int, stage: str) -> str:
    """What decides the scores of a stage."""
    text = f"{_loaded(plan, seed, stage).config.to_yaml()}{DRAWS} {plan.rows}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _loaded(plan: Plan, seed: int, stage: str) -> Loaded[SFTConfig | GRPOConfig]:
    from mmpost.config.load import load
    from mmpost.mixture.run import COMMANDS

    command, file, _ = STAGES[stage]
    return load(COMMANDS[command], [file], _words(plan, seed, stage))


def _words(plan: Plan, seed: int, stage: str) -> list[str]:
    """Words behind the configuration file."""
    folder = plan.folder(seed, stage)
    words = [f"train.output_dir={folder}", f"train.seed={seed}", "log.progress=none", *STAGES[stage][2], *plan.words]
    if stage != "sft":
        words.append(f"model.model_name_or_path={plan.folder(seed, 'sft') / 'final'}")
    return words


def run_stage(plan: Plan, seed: int, stage: str) -> None:
    """One training run and its draws: what a process of the demo does."""
    from mmpost.api.training import Training
    from mmpost.config.load import resolved_yaml

    command, file, _ = STAGES[stage]
    folder, loaded = plan.folder(seed, stage), _loaded(plan, seed, stage)
    line = ["mmpost", command, file, *_words(plan, seed, stage)]
    Training(loaded.config, command=line, config_yaml=resolved_yaml(loaded)).run()
    found = {"work": _fingerprint(plan, seed, stage), "scores": _drawn(folder / "final", plan.rows)}
    write_whole(folder / "eval" / DRAWN, json.dumps(found) + "\n")


def _drawn(model_folder: Path, limit: int | None) -> list[float]:
    """Share of right answers among ``DRAWS`` of each held-out question, drawn as in the training of ``upt``."""
    from mmpost.api.model import load_model
    from mmpost.api.rollouts import ask
    from mmpost.config.load import load
    from mmpost.config.schema import RewardSpec
    from mmpost.config.upt import UPTConfig
    from mmpost.core.catalog import Catalog
    from mmpost.rewards.score import resolve, score
    from mmpost.rollout.generate import Sampling
    from mmpost_tasks import TASKS

    task = Catalog("tasks", TASKS).get(TASK)
    section = load(UPTConfig, [STAGES["upt"][1]], []).config.grpo
    rows = task.load("heldout", limit=limit)
    sampling = Sampling(section.max_completion_length, section.temperature, section.top_p, seed=0)
    model = load_model(str(model_folder), peft=None)
    groups = ask(model, rows, uids=range(len(rows)), n=DRAWS, sampling=sampling, batch_size=512)
    score(groups, resolve([RewardSpec(name=task.rewards[0])]))
    return [float(np.mean([rollout.score for rollout in group.rollouts])) for group in groups]


def _result(plan: Plan, seed: int, stage: str) -> StageResult:
    from mmpost.cli.demo import StageResult

    folder = plan.folder(seed, stage)
    scores = json.loads((folder / "eval" / DRAWN).read_text())["scores"]
    return StageResult(scores, 0.0, folder, folder / "eval" / f"{TASK}.json")


def _greedy(stage: StageResult) -> float:
    lines = stage.eval_file.with_suffix(".samples.jsonl").read_text().splitlines()
    return float(np.mean([json.loads(line)["accuracy"] for line in lines]))


def summarise(chains: list[dict[str, StageResult]], seeds: list[int]) -> dict[str, Any]:
    """Accuracies by stage, gains over the start by paired bootstrap, and the share of the labels' gain.

    Args:
        chains: Stages by name, per seed.
        seeds: Of the chains.
    """
    from mmpost.cli.demo import _gain
    from mmpost.eval.stats import gain_ratio, wilson

    n = len(chains[0]["sft"].scores)
    stages: list[dict[str, Any]] = []
    for name in STAGES:
        accuracy = float(np.mean([np.mean(chain[name].scores) for chain in chains]))
        greedy = [_greedy(chain[name]) for chain in chains]
        stages.append(
            {
                "name": name,
                "accuracy": accuracy,
                "ci": list(wilson(accuracy * n, n)),
                "by_seed": [float(np.mean(chain[name].scores)) for chain in chains],
                "greedy_accuracy": float(np.mean(greedy)),
                "greedy_by_seed": greedy,
            }
        )
    start, labels, votes = ([chain[name].scores for chain in chains] for name in ("sft", "grpo", "upt"))
    share, interval = gain_ratio(start, votes, labels, seed=0)
    return {
        "task": TASK,
        "n_eval": n,
        "draws": DRAWS,
        "seeds": list(seeds),
        **{stage["name"]: {key: stage[key] for key in stage if key != "name"} for stage in stages},
        **{f"{name}_minus_sft": _gain(chains, name) for name in ARMS},
        # null for an end without bound, which JSON cannot write.
        "recovered": {"share": share, "ci": interval and [end if math.isfinite(end) else None for end in interval]},
        "stages": stages,
    }


def _print(summary: dict[str, Any], report: Path, seconds: float) -> None:
    table = Table(title=f"{summary['task']}: {summary['n_eval']} held-out questions, seeds {summary['seeds']}")
    for column in ("stage", "accuracy", "95 % interval", "greedy", "minus sft", "95 % interval"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in summary["stages"]:
        low, high = stage["ci"]
        gain = summary.get(f"{stage['name']}_minus_sft")
        row = [stage["name"], f"{stage['accuracy']:.3f}", f"{low:.3f} to {high:.3f}", f"{stage['greedy_accuracy']:.3f}"]
        if gain is not None:
            row += [f"{gain['mean']:+.3f}", f"{gain['ci'][0]:+.3f} to {gain['ci'][1]:+.3f}"]
        table.add_row(*row)
    console = Console()
    console.print(table)
    found = summary["recovered"]
    if found["share"] is None:
        console.print("labels gained nothing here, so there is no share of their gain.")
    else:
        low, high = ("no bound" if end is None else f"{end:.0%}" for end in found["ci"])
        console.print(f"the vote gains {found['share']:.0%} of what labels gain ({low} to {high}).")
    console.print(f"{seconds:.0f} s. Report: {report}")


def main() -> None:
    """One stage, as ``demo_upt`` starts it."""
    parser = argparse.ArgumentParser(prog="python -m mmpost.cli.demo_upt", description="one stage of the demo")
    parser.add_argument("--stage", choices=list(STAGES), required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        plan = Plan(options.out, words=tuple(options.words), rows=options.rows)
        run_stage(plan, options.seed, options.stage)
    except MmpostError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(error.exit_code) from error
    finally:
        gc.freeze()  # else leaving takes a second and a half


if __name__ == "__main__":
    main()
