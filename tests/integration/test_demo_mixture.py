"""Choosing a mixture of three domains of which two interfere: the suggestion beats uniform weights."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmpost.cli.demo_mixture import SOURCES, Plan, demo_mixture

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_suggested_mixture_beats_uniform_and_is_close_to_the_best(tmp_path):
    summary = demo_mixture(Plan(tmp_path / "demo"))
    sys.stdout.write(json.dumps(summary, indent=1))
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == summary
    gain = summary["final"]["suggested_minus_uniform"]
    assert gain["ci"][0] > 0
    assert min(gain["by_seed"]) > 0
    # The planted interference: with mix_tops in the mixture, mix_shoes is learned worse.
    shoes = {name: one["mix_shoes"] for name, one in summary["interference"].items()}
    assert shoes["uniform"] < shoes["without mix_tops"]
    assert summary["suggestion"]["weights"]["mix_tops"] < 0.15
    assert summary["predictor"]["gp"]["loo_mae"] < summary["predictor"]["mean"]["loo_mae"]
    regret = summary["regret"]
    assert regret["regret"] < regret["best_of_grid"]["value"] - regret["grid_values"]["median"]
    # The best of many noisy runs is partly luck; a surface fitted to all of them is not.
    assert regret["regret_on_fitted_surface"]["value"] < 0.05
    report = (tmp_path / "demo" / "report.html").read_text()
    assert report.count("<svg") >= 4
    assert all(name in report for name in SOURCES)


SHORT = """
from pathlib import Path
from mmpost.cli.demo_mixture import Plan, demo_mixture
words = ("train.max_steps=1", "train.batch_size=4", "eval.limit=10", "data.train.0.limit=30")
demo_mixture(Plan(Path("{out}"), denominator=2, final_seeds=(1,), final_steps=2, words=words))
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_of_the_demo_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run([sys.executable, "-c", SHORT.format(out=whole)], cwd=ROOT, check=True, timeout=1200)
    chance, lost = random.Random(0), 0
    for attempt in range(5):
        command = [sys.executable, "-c", SHORT.format(out=parts)]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        if attempt == 4:
            assert process.wait(timeout=1200) == 0
            break
        try:
            process.wait(timeout=chance.uniform(3, 22))
        except subprocess.TimeoutExpired:
            # Alone, so that its runs go on without it; or with all of them.
            (os.kill if attempt % 2 else os.killpg)(process.pid, signal.SIGKILL)
            lost += process.wait() == -signal.SIGKILL
    assert lost >= 3
    for name in ("summary.json", "predictor.json", "design.yaml", "suggestion.yaml", "proxies/results.jsonl"):
        # The predictor notes where the runs started from.
        assert (parts / name).read_bytes().replace(b"/parts/", b"/whole/") == (whole / name).read_bytes(), name
    # So short a training scores 0 everywhere; what the models wrote tells them apart.
    answers = sorted(file.relative_to(whole) for file in whole.glob("*/runs/*/eval/*.samples.jsonl"))
    assert len(answers) >= 9 * 3
    for name in answers:
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_demo_that_is_started_again_repeats_nothing(tmp_path):
    plan = Plan(
        tmp_path / "demo",
        denominator=2,
        final_seeds=(1,),
        final_steps=2,
        words=("train.max_steps=1", "train.batch_size=4", "eval.limit=10", "data.train.0.limit=30"),
    )
    first = demo_mixture(plan)
    runs = {file: file.stat().st_mtime_ns for file in plan.out.glob("*/runs/*/metrics.jsonl")}
    assert len(runs) >= 7 + 2  # the seed mixtures, and both final runs
    again = demo_mixture(plan)
    assert {file: file.stat().st_mtime_ns for file in runs} == runs
    assert again == first
