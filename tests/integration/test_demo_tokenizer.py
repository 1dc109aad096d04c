"""The claims of ``make demo-tokenizer`` over three seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mmpost.cli import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SEEDS = (0, 1, 2)
KINDS = ("baseline", "perturbed")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the demo, run once for all tests of this file."""
    folder = tmp_path_factory.mktemp("demo") / "tokenizer"
    assert run(["tokenizer", "demo", "--out", str(folder), "--seeds", ",".join(map(str, SEEDS))]) == 0
    return folder


@pytest.fixture(scope="module")
def summary(out: Path) -> dict[str, Any]:
    """Its summary."""
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def test_summary_and_report_are_there(summary: dict[str, Any], out: Path) -> None:
    for kind in KINDS:
        assert {"rfd", "pfd", "usage"} <= summary[kind].keys()
        assert summary[kind]["usage"] > 0.8
        assert summary[kind]["perplexity"] > 100
    assert {"pair_loss_before", "pair_loss_after"} <= summary["posttrain"].keys()
    assert {"levels", "error"} <= summary["bridge"].keys()
    text = (out / "report.html").read_text()
    for expected in ("Without perturbation", "perturbed: 90% of tokens", "TokenBridge", "post-trained decoder"):
        assert expected in text, expected
    # No score of these features may be called what only Inception's may.
    assert "fid" not in json.dumps(summary["by_seed"]).lower()


def test_perturbation_makes_tokenizers_robust_in_each_pair(summary: dict[str, Any]) -> None:
    pairs = [(chain["baseline"], chain["perturbed"]) for chain in summary["by_seed"]]
    assert len(pairs) == len(SEEDS)
    for base, perturbed in pairs:
        assert base["extractor"] == perturbed["extractor"]
        assert perturbed["pfd"] < base["pfd"]


def test_perturbation_costs_no_rfd(summary: dict[str, Any]) -> None:
    """The 95 % interval of the mean ratio over seeds lies between 0.7 and 1.1.

    The paper's rFID gets a little worse (0.91 to 1.02). At this size and beta 0.5 it gets better (measured: 0.85,
    interval 0.79 to 0.91, while the squared error rises by 8 %), so "within a tenth" can hold on one side only.
    """
    logs = np.log([chain["perturbed"]["rfd"] / chain["baseline"]["rfd"] for chain in summary["by_seed"]])
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    low, high = np.exp(logs.mean() - half), np.exp(logs.mean() + half)
    assert 0.7 < low < high < 1.1, (low, high)


def test_share_of_changed_tokens(summary: dict[str, Any]) -> None:
    assert len({chain["changed"]["share"] for chain in summary["by_seed"]}) == len(SEEDS)
    for chain in summary["by_seed"]:
        found = chain["changed"]
        assert abs(found["share"] - found["expected"]) < found["half_width_99"]


def test_generator_predicts_codes_and_shows_classes(summary: dict[str, Any]) -> None:
    for chain in summary["by_seed"]:
        found = chain["generator"]
        assert found["held_out_nll"] < found["unigram_nll"] < found["uniform_nll"]
        assert found["class_accuracy"] > 0.2


def test_held_out_pair_loss_falls(summary: dict[str, Any]) -> None:
    for chain in summary["by_seed"]:
        found = chain["posttrain"]
        # Of images that did not choose the step.
        assert found["pair_loss_after"] < found["pair_loss_before"]
        assert found["pair_loss_last"] < found["pair_loss_before"]
        assert found["held_out_select"] + found["held_out_report"] == chain["baseline"]["images"]


def test_post_training_leaves_the_codes_alone(out: Path) -> None:
    from mmpost_tokenizers.generator.identity import token_hash
    from mmpost_tokenizers.session import open_tokenizer

    before, after = open_tokenizer(out / "perturbed"), open_tokenizer(out / "posttrain")
    assert token_hash(before) == token_hash(after)
    assert not before.decoder.conv_out.weight.equal(after.decoder.conv_out.weight)


def test_bridge_error_falls_with_every_level_and_order_helps(summary: dict[str, Any]) -> None:
    for chain in summary["by_seed"]:
        errors = [chain["bridge"]["by_levels"][str(levels)]["error"] for levels in (4, 8, 16, 32, 64)]
        assert errors == sorted(errors, reverse=True)
        assert len(set(errors)) == 5
        heads = chain["bridge"]["heads"]
        assert heads["autoregressive"] < heads["independent"]


def test_a_second_call_finds_every_stage_done(summary: dict[str, Any], out: Path) -> None:
    assert run(["tokenizer", "demo", "--out", str(out), "--seeds", ",".join(map(str, SEEDS))]) == 0
    again = json.loads((out / "summary.json").read_text())
    assert again["by_seed"] == summary["by_seed"]
    assert again["seconds"] < summary["seconds"] / 2
