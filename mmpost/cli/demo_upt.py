"""Learning without labels: what the majority vote gains on a checkpoint, beside labels and beside random labels.

From one supervised checkpoint three runs of equal length go out: GRPO with the labels of the training rows, UPT on
questions whose pictures nobody has labelled, and UPT whose pseudo-labels are drawn at random from the answers of the
group. Every stage is an ordinary command of this package; this module only chains them and compares.

What is compared is the probability of a right answer when one is drawn from the policy at the temperature of the
training, on held-out questions: it is what all three runs are meant to raise. The accuracy of the most likely answer
stands beside it. The answers of this task have one word, and the vote over many draws of one word is the most likely
word: a vote cannot know better than greedy decoding here, which it could where many ways of reasoning lead to one
answer.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mmpost.config.load import load
from mmpost.config.run import GRPOConfig, SFTConfig
from mmpost.config.upt import UPTConfig
from mmpost.eval.stats import wilson
from mmpost.runs.report import Stage, write_staged_report

if TYPE_CHECKING:
    from mmpost.cli.demo import StageResult

TASK = "demo_vqa"
SFT_CONFIG, GRPO_CONFIG, UPT_CONFIG = "configs/demo/sft.yaml", "configs/demo/grpo.yaml", "configs/demo/upt.yaml"
# Below one half a vote amplifies errors; the 160 steps of ``mmpost demo`` end there.
START_STEPS = 480
ARMS: dict[str, tuple[type[GRPOConfig], str, tuple[str, ...]]] = {
    "grpo": (GRPOConfig, GRPO_CONFIG, ("rewards=[answer]",)),
    "upt": (UPTConfig, UPT_CONFIG, ()),
    "random_vote": (UPTConfig, UPT_CONFIG, ("vote.variant=random",)),
}
# The same for all three, so that they differ in the reward and the rows alone.
SHARED = ("max_steps", "learning_rate", "warmup_steps")
SHARED_ROLLOUTS = ("num_generations", "prompts_per_step", "temperature", "top_p")
DRAWS = 8
NOTES = (
    "Accuracy is the probability of a right answer when one is drawn at the temperature of the training, estimated "
    f"from {DRAWS} draws per held-out question. greedy_accuracy in summary.json is that of the most likely answer.",
    "The labels of the unlabelled rows are looked at for the curves of pseudo-labels alone; no reward gets them.",
    "random_vote is the control: the same run with a pseudo-label drawn from the answers that the group has.",
)


def demo_upt(out: Path, seeds: list[int]) -> dict[str, Any]:
    """Run the demo and write ``summary.json`` and ``report.html``.

    Args:
        out: Folder; ``sft``, ``grpo``, ``upt`` and ``random_vote`` in it are the runs of the first seed. Runs that are
            there already are continued, or taken as they are.
        seeds: One chain of stages per seed.

    Returns:
        The summary.
    """
    clock = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    chains, greedy = [], []
    for index, seed in enumerate(seeds):
        found = _chain(out if index == 0 else out / f"seed-{seed}", seed)
        greedy.append({name: float(np.mean(stage.scores)) for name, stage in found.items()})
        for stage in found.values():
            assert stage.folder is not None
            stage.scores = _drawn(stage.folder)
        chains.append(found)
    summary = _summary(chains, greedy, seeds, time.perf_counter() - clock)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    stages = [Stage(name, stage.folder, stage.eval_file) for name, stage in chains[0].items()]
    title = "mmpost: learning without labels"
    report = write_staged_report(stages, out / "report.html", title=title, summary=summary, notes=list(NOTES))
    _print(summary, report)
    return summary


def _chain(base: Path, seed: int) -> dict[str, StageResult]:
    """All stages of one seed, with the scores of the most likely answers."""
    from mmpost.cli.demo import _stage

    words = [f"train.output_dir={base / 'sft'}", f"train.seed={seed}", f"train.max_steps={START_STEPS}"]
    chain = {"sft": _stage(SFTConfig, SFT_CONFIG, words, base / "sft", seed)}
    shared = load(UPTConfig, [UPT_CONFIG], []).config
    equal = [f"train.{name}={getattr(shared.train, name)}" for name in SHARED]
    equal += [f"grpo.{name}={getattr(shared.grpo, name)}" for name in SHARED_ROLLOUTS]
    equal += [f"loss.kl.beta={shared.loss.kl.beta}"]
    for name, (config_class, config, own) in ARMS.items():
        words = [f"train.output_dir={base / name}", f"train.seed={seed}", *equal, *own]
        words.append(f"model.model_name_or_path={base / 'sft' / 'final'}")
        chain[name] = _stage(config_class, config, words, base / name, seed)
    return chain


def _drawn(folder: Path) -> list[float]:
    """Share of right answers among ``DRAWS`` of each held-out question; kept in the run folder."""
    from mmpost.api.model import load_model
    from mmpost.api.rollouts import ask
    from mmpost.config.schema import RewardSpec
    from mmpost.core.catalog import Catalog
    from mmpost.rewards.score import resolve, score
    from mmpost.rollout.generate import Sampling
    from mmpost_tasks import TASKS

    file = folder / "eval" / "drawn.json"
    if file.is_file():
        found: list[float] = json.loads(file.read_text())
        return found
    task = Catalog("tasks", TASKS).get(TASK)
    config = load(UPTConfig, [UPT_CONFIG], []).config
    model = load_model(str(folder / "final"), peft=None)
    rows = task.load("heldout")
    sampling = Sampling(config.grpo.max_completion_length, config.grpo.temperature, config.grpo.top_p, seed=0)
    groups = ask(model, rows, uids=range(len(rows)), n=DRAWS, sampling=sampling, batch_size=512)
    score(groups, resolve([RewardSpec(name=task.rewards[0])]))
    scores = [float(np.mean([rollout.score for rollout in group.rollouts])) for group in groups]
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(scores) + "\n")
    partial.replace(file)
    return scores


def _summary(
    chains: list[dict[str, StageResult]], greedy: list[dict[str, float]], seeds: list[int], seconds: float
) -> dict[str, Any]:
    """Accuracies by stage, gains over the start by paired bootstrap, and the share of the labels' gain."""
    from mmpost.cli.demo import _gain

    n = len(chains[0]["sft"].scores)
    stages: list[dict[str, Any]] = []
    for name in chains[0]:
        accuracy = float(np.mean([np.mean(chain[name].scores) for chain in chains]))
        stages.append(
            {
                "name": name,
                "accuracy": accuracy,
                "ci": list(wilson(accuracy * n, n)),
                "by_seed": [float(np.mean(chain[name].scores)) for chain in chains],
                "greedy_accuracy": float(np.mean([found[name] for found in greedy])),
                "greedy_by_seed": [found[name] for found in greedy],
                "seconds": round(float(np.mean([chain[name].seconds for chain in chains])), 1),
            }
        )
    gains = {f"{name}_minus_sft": _gain(chains, name) for name in ARMS}
    labels = gains["grpo_minus_sft"]["mean"]
    return {
        "task": TASK,
        "n_eval": n,
        "seeds": seeds,
        **{stage["name"]: {key: stage[key] for key in stage if key != "name"} for stage in stages},
        **gains,
        "share_of_grpo": gains["upt_minus_sft"]["mean"] / labels if labels else None,
        "stages": stages,
        "seconds": round(seconds, 1),
    }


def _print(summary: dict[str, Any], report: Path) -> None:
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
    if summary["share_of_grpo"] is not None:
        console.print(f"the vote gains {summary['share_of_grpo']:.0%} of what labels gain.")
    console.print(f"{summary['seconds']:.0f} s in all. Report: {report}")
