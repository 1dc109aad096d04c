"""Choosing a mixture of three domains of which two interfere: the suggestion beats uniform weights."""

import json
import sys

import pytest

from mmpost.cli.demo_mixture import SOURCES, Plan, demo_mixture


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
