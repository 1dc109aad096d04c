"""Which questions need ears: the contribution filter on planted rows, and what training on its split gives.

A small audio language model is trained from random weights on questions about real sounds. The filter then asks it
about new questions, half of which give their answer away in words, and has to find out which. From the same weights
three pairs of runs of equal length go out: SFT on weak rows and GRPO on strong ones, SFT on a mix and GRPO on strong
ones, and SFT and GRPO on rows of both kinds. Every stage is an ordinary command of this package; this module only
chains them and compares.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

TASK = "demo_audio"
CONFIGS = "configs/demo_audio"
POOL = 384
VOTES = 4
NULLS = "silence,none"
ARMS = {"weak_to_strong": "weak-to-strong", "mixed_to_strong": "mixed-to-strong", "all_data": "mixed-to-mixed"}
NOTES = (
    "The planted truth: rows of kind hint give their answer away in words, rows of kind listen do not. Balanced "
    "accuracy is the mean of the shares of both kinds that the filter labels so.",
    "Held-out questions are about recordings that were never heard in training. Accuracy without audio is that of the "
    "same questions with the sound left out; chance is 25 % on rows that need ears.",
    "The three pairs of runs start from the same weights and take equally many steps. Their differences here say that "
    "the recipes run, not which of them suits a large model: the question kinds are two, and the model is tiny.",
)


def register(app: typer.Typer) -> None:
    """Put the command into the tree."""
    app.command("demo-audio")(command)


def command(
    out: Annotated[Path, typer.Option(help="folder for runs, summary.json and report.html")] = Path("runs/demo-audio"),
    seeds: Annotated[str, typer.Option(help="comma-separated seeds")] = "0",
    train: Annotated[bool, typer.Option(help="also train the recipes on the split")] = True,
) -> None:
    """Which questions need ears: the contribution filter and its recipes on real sounds."""
    from mmpost.cli.words import numbers

    demo_audio(out, numbers(seeds, "--seeds"), train=train)


def demo_audio(out: Path, seeds: Sequence[int], *, train: bool = True) -> dict[str, Any]:
    """Run the demo and write ``summary.json`` and ``report.html``.

    Args:
        out: Folder; what is in it already is continued, or taken as it is.
        seeds: One chain of stages per seed.
        train: Whether the recipes are trained too, after the filter.

    Returns:
        The summary.
    """
    from mmpost.cli.mixture import say
    from mmpost.core.files import write_whole

    clock = time.perf_counter()
    filters, evals = [], []
    for seed in seeds:
        folder = out / f"seed-{seed}"
        say(f"== seed {seed}: base model")
        _base(folder / "base", seed)
        say(f"== seed {seed}: filter")
        filters.append(_filter(folder, seed))
        found = {"base": folder / "base"}
        for arm, recipe in ARMS.items() if train else ():
            say(f"== seed {seed}: {recipe}")
            _recipe(recipe, folder, folder / recipe, seed)
            found[arm] = folder / recipe / "grpo"
        evals.append(found)
    summary: dict[str, Any] = {
        "task": TASK,
        "seeds": list(seeds),
        "filter": _filter_summary(filters),
        **{arm: _accuracies([found[arm] for found in evals]) for arm in evals[0]},
        "seconds": round(time.perf_counter() - clock, 1),
    }
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    report = _report(out, summary)
    _print(summary, report)
    return summary


def _base(folder: Path, seed: int) -> None:
    from mmpost.api.training import Training
    from mmpost.config.load import load, resolved_yaml
    from mmpost.config.run import SFTConfig

    config, words = f"{CONFIGS}/base.yaml", [f"train.output_dir={folder}", f"train.seed={seed}"]
    loaded = load(SFTConfig, [config], words)
    Training(loaded.config, command=["mmpost", "sft", config, *words], config_yaml=resolved_yaml(loaded)).run()


def _filter(folder: Path, seed: int) -> dict[str, Any]:
    """Ask the base model about the pool, and compare the labels with the planted kinds."""
    from mmpost.api.contribution import SCORES, Engine, contribution
    from mmpost.api.data import open_source
    from mmpost.cli.questions import show
    from mmpost.config.schema import DataSection, Source
    from mmpost.rollout.generate import Sampling

    pool = open_source(Source(path=f"task:{TASK}", split="pool", limit=POOL), DataSection(), seed=seed)
    out = folder / "filtered"
    found = contribution(
        [pool],
        [str(folder / "base" / "final")],
        out,
        null=NULLS,
        k=VOTES,
        sampling=Sampling(12, 1.0, seed=seed),
        engine=Engine(processes=2),
        progress=show("the votes"),
    )
    records = [json.loads(line) for line in (out / SCORES).read_text().splitlines()]
    planted = [row.columns["kind"] == "hint" for row in pool]
    return {
        "summary": found,
        **{rule: _shares(planted, [one[rule] == "weak" for one in records]) for rule in ("robust", "paper")},
    }


def _shares(planted: Sequence[bool], found: Sequence[bool]) -> dict[str, Any]:
    """Shares of planted weak and strong rows that are labelled so, and their mean."""
    weak = [label for truth, label in zip(planted, found, strict=True) if truth]
    strong = [not label for truth, label in zip(planted, found, strict=True) if not truth]
    shares = {"weak_found": sum(weak) / len(weak), "strong_found": sum(strong) / len(strong)}
    # Each row's part of the balanced accuracy, whose mean that is; for its interval.
    parts = {True: len(found) / len(weak) / 2, False: len(found) / len(strong) / 2}
    rows = [parts[truth] * (truth == label) for truth, label in zip(planted, found, strict=True)]
    return {**shares, "balanced_accuracy": sum(shares.values()) / 2, "rows": rows}


def _recipe(name: str, folder: Path, out: Path, seed: int) -> None:
    from mmpost.api.recipe import TwoStages, run_recipe

    run_recipe(name, folder / "filtered", out, TwoStages(CONFIGS, str(folder / "base" / "final"), seed))


def _filter_summary(filters: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of the robust rule, and beside them those of the paper's."""

    def mean(rule: str, name: str) -> float:
        return sum(one[rule][name] for one in filters) / len(filters)

    names = ("balanced_accuracy", "weak_found", "strong_found")
    rows = [one["robust"]["rows"] for one in filters]
    return {
        **{name: mean("robust", name) for name in names},
        "ci": _interval([[0.0] * POOL for _ in rows], rows)["ci"],
        "by_seed": [one["robust"]["balanced_accuracy"] for one in filters],
        "rows": POOL,
        "null": NULLS,
        "votes": VOTES,
        "paper_rule": {
            **{name: mean("paper", name) for name in names},
            "by_seed": [one["paper"]["balanced_accuracy"] for one in filters],
        },
        "labels": [one["summary"]["labels"]["robust"] for one in filters],
        "accuracy": [one["summary"]["accuracy"] for one in filters],
    }


def _accuracies(folders: Sequence[Path]) -> dict[str, Any]:
    """Held-out accuracy with and without sound, over seeds and rows, all and those that need ears."""
    runs = []
    for folder in folders:
        lines = (folder / "eval" / f"{TASK}.samples.jsonl").read_text().splitlines()
        runs.append([json.loads(line) for line in lines])
    out: dict[str, Any] = {}
    for kind, suffix in ((None, ""), ("listen", "_listen")):
        kept = [[row for row in run if kind is None or row["group"] == kind] for run in runs]
        heard = [[row["accuracy"] for row in run] for run in kept]
        silent = [[row["ablations"]["audio:none"]["accuracy"] for row in run] for run in kept]
        zeros = [[0.0] * len(run) for run in kept]
        out[f"accuracy_with_audio{suffix}"] = _interval(zeros, heard)
        out[f"accuracy_without_audio{suffix}"] = _interval(zeros, silent)
        out[f"gap{suffix}"] = _interval(silent, heard)
    return out


def _interval(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> dict[str, Any]:
    from mmpost.eval.stats import paired_bootstrap

    value, interval = paired_bootstrap(first, second, seed=0)
    return {"value": value, "ci": list(interval), "n": len(second[0]), "by_seed": [sum(r) / len(r) for r in second]}


def _report(out: Path, summary: dict[str, Any]) -> Path:
    from mmpost.runs.page import Drawing, Paragraph, Section, Table, Tiles, write_page

    found = summary["filter"]
    arms = [arm for arm in ("base", *ARMS) if arm in summary]
    tiles = [
        ("balanced accuracy of the filter", f"{found['balanced_accuracy']:.3f}"),
        ("weak rows found", f"{found['weak_found']:.3f}"),
        ("strong rows found", f"{found['strong_found']:.3f}"),
        ("the paper's rule, one model", f"{found['paper_rule']['balanced_accuracy']:.3f}"),
    ]
    drawings = [
        Drawing(_bars(summary, arms, key), f"Questions that need ears, {words} sound", "bars with 95 % intervals")
        for key, words in (("accuracy_with_audio_listen", "with"), ("accuracy_without_audio_listen", "without"))
    ]
    headings = ["", "all, with", "all, without", "needs ears, with", "needs ears, without"]
    keys = ["accuracy_with_audio", "accuracy_without_audio"]
    body = [[arm, *(_cell(summary[arm][key + part]) for part in ("", "_listen") for key in keys)] for arm in arms]
    pages = [
        [str(seed), f"seed-{seed}/filtered/report.html", *(f"seed-{seed}/{one}/grpo/report.html" for one in names)]
        for names in [[recipe for arm, recipe in ARMS.items() if arm in summary]]
        for seed in summary["seeds"]
    ]
    reports = Table(["seed", "filter", *(recipe for arm, recipe in ARMS.items() if arm in summary)], pages)
    sections = [
        Section("Filter", [Tiles(tiles), Paragraph(NOTES[0])]),
        Section("Recipes", [*drawings, Table(headings, body), *map(Paragraph, NOTES[1:])]),
        Section("Reports of the stages", [reports]),
    ]
    subtitle = f"seeds {', '.join(map(str, summary['seeds']))}"
    return write_page(
        out / "report.html", title="mmpost: which questions need ears", sections=sections, subtitle=subtitle
    )


def _bars(summary: dict[str, Any], arms: Sequence[str], key: str) -> str:
    from mmpost.runs.svg import Bar, bar_chart

    bars = [Bar(arm, summary[arm][key]["value"], *summary[arm][key]["ci"]) for arm in arms]
    return bar_chart(bars, title=key.replace("_", " "), high=1.0)


def _cell(found: dict[str, Any]) -> str:
    low, high = found["ci"]
    return f"{found['value']:.3f} [{low:.3f}, {high:.3f}]"


def _print(summary: dict[str, Any], report: Path) -> None:
    found = summary["filter"]
    lines = [
        f"filter: balanced accuracy {found['balanced_accuracy']:.3f} (weak {found['weak_found']:.3f}, strong "
        f"{found['strong_found']:.3f}); by seed {', '.join(f'{one:.3f}' for one in found['by_seed'])}; the paper's "
        f"rule with one model {found['paper_rule']['balanced_accuracy']:.3f}",
        f"{'':<18}{'with audio':<24}{'without audio':<24}{'needs ears, with':<24}needs ears, without",
    ]
    for arm in [arm for arm in ("base", *ARMS) if arm in summary]:
        keys = [key + part for part in ("", "_listen") for key in ("accuracy_with_audio", "accuracy_without_audio")]
        lines.append(f"{arm:<18}" + "".join(f"{_cell(summary[arm][key]):<24}" for key in keys).rstrip())
    lines.append(f"{summary['seconds']:.0f} s in all. Report: {report}")
    sys.stdout.write("\n".join(lines) + "\n")
