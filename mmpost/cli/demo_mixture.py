"""``make demo-mixture``: choose a mixture of three interfering domains by short runs, and see whether it was right.

Every run is an ordinary command of this package with a shipped config; this module chains the stages and compares.
Each stage takes what an earlier start has left, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpost.cli.mixture import quality_table, say
from mmpost.core.files import write_whole

if TYPE_CHECKING:
    from mmpost.mixture.designs import Design
    from mmpost.mixture.fit import Fit
    from mmpost.mixture.records import MixtureRecord
    from mmpost.mixture.run import Proxy

START, PROXY = "configs/demo_mixture/start.yaml", "configs/demo_mixture/proxy.yaml"
SOURCES = ("mix_digits", "mix_shoes", "mix_tops")
# As COCO in the paper, mix_tops is a source without a test of its own in the target.
TARGET_TASKS = ("mix_digits", "mix_shoes")
ROUNDS, PER_ROUND = 3, 2
NOTES = (
    "mix_shoes and mix_tops ask the same words about the same kind of pictures and mean different answers: that is the "
    "planted interference. The target is the mean accuracy of mix_digits and mix_shoes on held-out rows.",
    "Regret compares the suggested mixture with the best of all mixtures on a lattice, at the length of a proxy run. "
    "The best of many noisy runs is partly luck, so the regret on a surface fitted to all runs stands beside it.",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the demo runs.

    Attributes:
        out: Folder.
        jobs: Runs at once.
        denominator: The dense grid has weights in steps of 1 over it.
        final_seeds: Seeds of the final runs, suggested and uniform each.
        final_steps: Their length.
        words: KEY=VALUE words for all runs, for tests of the demo itself.
    """

    out: Path
    jobs: int = 2
    denominator: int = 5
    final_seeds: tuple[int, ...] = (1, 2, 3)
    final_steps: int = 120
    words: tuple[str, ...] = ()


def demo_mixture(plan: Plan) -> dict[str, Any]:
    """Run the demo and write ``summary.json`` and ``report.html``.

    Returns:
        The summary.
    """
    from mmpost.mixture.designs import Design, design, lattice, write_design
    from mmpost.mixture.fit import PREDICTOR, write_fit
    from mmpost.mixture.records import rounded
    from mmpost.mixture.report import write_mixture_report
    from mmpost.mixture.run import open_proxy
    from mmpost.mixture.suggest import suggest, write_fragments
    from mmpost.runs.page import Paragraph

    clock = _Clock(plan.out / "seconds.json")
    start = _start(plan)
    proxy = open_proxy(PROXY, [f"model.model_name_or_path={start}", *plan.words], SOURCES)
    made = design(SOURCES, "seeds")
    for number in range(ROUNDS + 1):
        say(f"== round {number}: {len(made.mixtures)} mixtures")
        write_design(plan.out / "design.yaml", made)
        records = _run(plan, made, proxy, plan.out / "proxies")
        fitted = _fit(records, made, plan.out / "proxies")
        if number < ROUNDS:
            more = suggest(fitted, PER_ROUND, strategy="ei").chosen
            mixtures = made.mixtures + tuple(tuple(one.weights.values()) for one in more)
            made = Design(made.sources, tuple(dict.fromkeys(mixtures)), "seeds, then expected improvement")
    write_fit(plan.out / PREDICTOR, fitted)
    sys.stdout.write(quality_table(fitted))
    found = suggest(fitted, 3, strategy="mean")
    write_fragments(plan.out / "suggestion.yaml", fitted, found)
    chosen = tuple(found.chosen[0].weights.values())

    points = tuple(tuple(rounded(row)) for row in lattice(len(SOURCES), plan.denominator))
    grid = Design(SOURCES, tuple(dict.fromkeys([chosen, *points])), f"suggestion and lattice {plan.denominator}")
    say(f"== the suggestion and a grid of {len(points)} mixtures, to compare with")
    everything = _run(plan, grid, proxy, plan.out / "proxies")
    even = tuple(rounded([1.0] * len(SOURCES)))
    say(f"== suggested against uniform, {plan.final_steps} steps, seeds {plan.final_seeds}")
    final = open_proxy(PROXY, [*proxy.overrides, f"train.max_steps={plan.final_steps}"], SOURCES)
    pair = Design(SOURCES, (chosen, even), "suggested and uniform")
    finals = _run(plan, pair, final, plan.out / "final", seeds=plan.final_seeds)

    summary = {
        "sources": list(SOURCES),
        "target": f"mean accuracy of {' and '.join(TARGET_TASKS)}, held out",
        "runs": {"design": len(made.mixtures), "grid": len(points), "final": len(finals)},
        "suggestion": found.chosen[0].to_json(),
        "uniform_predicted": found.uniform.to_json(),
        "predictor": {name: quality.to_json(points=False) for name, quality in fitted.quality.items()},
        "interference": _interference(everything),
        "regret": _regret(plan, everything, grid, chosen),
        "final": _final(plan, finals, chosen, even),
    }
    write_whole(plan.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    head = [*_head(summary), *(Paragraph(note) for note in NOTES)]
    chosen_records = _of(records, made)
    report = plan.out / "report.html"
    write_mixture_report(report, fitted, chosen_records, found, title="mmpost: choosing a mixture", head=head)
    _print(summary, report, clock.stop())
    return summary


class _Clock:
    """Seconds over all starts of the demo, in a file of their own: the summary depends on the work alone."""

    def __init__(self, file: Path) -> None:
        self.file, self.begun = file, time.monotonic()
        file.parent.mkdir(parents=True, exist_ok=True)
        self.before = float(json.loads(file.read_text())) if file.is_file() else 0.0

    def stop(self) -> float:
        total = round(self.before + time.monotonic() - self.begun, 1)
        self.file.write_text(f"{total}\n")
        return total


def _start(plan: Plan) -> Path:
    """Weights that all proxies start from."""
    folder = plan.out / "start"
    command = ["sft", START, f"train.output_dir={folder}", "log.progress=none", *plan.words]
    say(f"== start: mmpost {' '.join(command)}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "mmpost", *command], env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return folder / "final"


def _run(plan: Plan, made: Design, proxy: Proxy, out: Path, *, seeds: Sequence[int] = (0,)) -> list[MixtureRecord]:
    from mmpost.mixture.run import run

    records = run(made, proxy, out, jobs=plan.jobs, seeds=seeds, say=say)
    # Weights of proxy runs are never used again.
    for folder in (out / "runs").glob("m-*-s*/"):
        for name in ("checkpoints", "final"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return records


def _of(records: Sequence[MixtureRecord], made: Design) -> list[MixtureRecord]:
    """Records of a design, in its order: later stages add runs to the folder, which must not change what is fitted."""
    found = {tuple(record.weights.values()): record for record in records}
    return [found[mixture] for mixture in made.mixtures]


def _fit(records: Sequence[MixtureRecord], made: Design, folder: Path) -> Fit:
    from mmpost.mixture.fit import fit
    from mmpost.mixture.run import read_settings
    from mmpost.mixture.scores import Target

    return fit(_of(records, made), Target(tasks=TARGET_TASKS), "gp", settings=read_settings(folder))


def _rows(out: Path, weights: Sequence[float], seed: int) -> list[float]:
    """Held-out answers of one run, 1 or 0, tests one after the other."""
    from mmpost.mixture.records import run_name

    folder = out / "runs" / run_name(dict(zip(SOURCES, weights, strict=True)), seed) / "eval"
    lines = [line for task in TARGET_TASKS for line in (folder / f"{task}.samples.jsonl").read_text().splitlines()]
    return [float(json.loads(line)["accuracy"]) for line in lines]


def _value(record: MixtureRecord) -> float:
    return sum(record.scores[task]["value"] for task in TARGET_TASKS) / len(TARGET_TASKS)


def _interference(records: Sequence[MixtureRecord]) -> dict[str, Any]:
    """What mix_tops does to mix_shoes at an equal share of digits and shoes."""
    from mmpost.mixture.scores import standard_error

    out = {}
    for name in ("without mix_tops", "uniform"):
        record = next(record for record in records if record.label == name and record.seed == 0)
        score = record.scores["mix_shoes"]
        half = 1.96 * standard_error(score)
        out[name] = {"mix_shoes": score["value"], "ci": [score["value"] - half, score["value"] + half]}
    return out


def _regret(plan: Plan, records: Sequence[MixtureRecord], grid: Design, chosen: tuple[float, ...]) -> dict[str, Any]:
    from mmpost.eval.stats import paired_bootstrap
    from mmpost.mixture.predict import Z95

    known = _of(records, grid)
    mine, others = known[0], known[1:]
    best = max(others, key=_value)
    out = plan.out / "proxies"
    rows = [_rows(out, chosen, 0)], [_rows(out, tuple(best.weights.values()), 0)]
    mean, interval = paired_bootstrap(*rows, seed=0)
    whole = _fit(records, grid, out)
    surface, sd = whole.predictor.predict(whole.weights)
    top = int(surface[1:].argmax()) + 1
    half = Z95 * float((sd[0] ** 2 + sd[top] ** 2) ** 0.5)
    smooth = float(surface[top] - surface[0])
    values = sorted(_value(record) for record in others)
    return {
        "suggested": _value(mine),
        "best_of_grid": {"weights": dict(best.weights), "value": _value(best)},
        "regret": mean,
        "ci": list(interval),
        "regret_on_fitted_surface": {"value": smooth, "ci": [smooth - half, smooth + half]},
        "grid_values": {"lowest": values[0], "median": values[len(values) // 2], "highest": values[-1]},
        "rank_among_grid": 1 + sum(value > _value(mine) for value in values),
    }


def _final(
    plan: Plan, records: Sequence[MixtureRecord], chosen: tuple[float, ...], even: tuple[float, ...]
) -> dict[str, Any]:
    from mmpost.eval.stats import over_seeds, paired_bootstrap, wilson

    out: dict[str, Any] = {"steps": plan.final_steps, "seeds": list(plan.final_seeds)}
    rows = {}
    for name, weights in (("suggested", chosen), ("uniform", even)):
        rows[name] = [_rows(plan.out / "final", weights, seed) for seed in plan.final_seeds]
        means = [sum(run) / len(run) for run in rows[name]]
        mine = [record for record in records if tuple(record.weights.values()) == weights]
        tasks = {task: sum(record.scores[task]["value"] for record in mine) / len(mine) for task in SOURCES}
        n, mean = len(rows[name][0]), sum(means) / len(means)
        out[name] = {"accuracy": mean, "ci": list(wilson(mean * n, n)), "by_seed": means, "by_task": tasks}
    mean, interval = paired_bootstrap(rows["uniform"], rows["suggested"], seed=0)
    gains = [a - b for a, b in zip(out["suggested"]["by_seed"], out["uniform"]["by_seed"], strict=True)]
    out["suggested_minus_uniform"] = {"mean": mean, "ci": list(interval), "by_seed": gains}
    if len(gains) > 1:
        out["suggested_minus_uniform"]["student_ci"] = list(over_seeds(gains)[1])
    return out


def _head(summary: dict[str, Any]) -> list[Any]:
    """Headline figures of the page."""
    from mmpost.runs.page import Drawing, Tiles
    from mmpost.runs.svg import Bar, bar_chart

    final, regret = summary["final"], summary["regret"]
    gain, models = final["suggested_minus_uniform"], summary["predictor"]
    low, high = (f"{100 * end:+.1f}" for end in gain["ci"])
    tiles = [
        ("suggested minus uniform, final runs", f"{100 * gain['mean']:+.1f} points [{low}, {high}]"),
        ("regret against the grid's best", f"{100 * regret['regret']:+.1f} points"),
        ("error of the Gaussian process", f"{models['gp']['loo_mae']:.3f}"),
        ("error of the mean", f"{models['mean']['loo_mae']:.3f}"),
    ]
    bars = []
    for name in ("suggested", "uniform"):
        low_end, high_end = final[name]["ci"]
        bars.append(Bar(name, final[name]["accuracy"], low_end, high_end, f"seeds {final['seeds']}"))
    drawing = bar_chart(bars, title="Final runs", high=1.0)
    return [Tiles(tiles), Drawing(drawing, f"Final runs of {final['steps']} steps", "bars with 95 % intervals")]


def _print(summary: dict[str, Any], report: Path, seconds: float) -> None:
    final, regret = summary["final"], summary["regret"]
    gain = final["suggested_minus_uniform"]
    weights = ", ".join(f"{name} {value:.3f}" for name, value in summary["suggestion"]["weights"].items())
    lines = [
        f"suggested: {weights}",
        f"final runs: suggested {final['suggested']['accuracy']:.3f}, uniform {final['uniform']['accuracy']:.3f}, "
        f"difference {gain['mean']:+.3f} [{gain['ci'][0]:+.3f}, {gain['ci'][1]:+.3f}]",
        f"regret: {regret['regret']:+.3f} [{regret['ci'][0]:+.3f}, {regret['ci'][1]:+.3f}] against the best of "
        f"{summary['runs']['grid']} mixtures",
        f"{seconds:.0f} s in all. Report: {report}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    """Command line of ``make demo-mixture``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-mixture"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    options = parser.parse_args()
    demo_mixture(Plan(options.out, options.jobs))


if __name__ == "__main__":
    main()
