"""Learning without labels over three seeds: the vote gains, less than labels; random pseudo-labels do not."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from mmpost.cli.demo_upt import demo_upt

SHORT = ("train.max_steps=4", "train.save_steps=2", "train.warmup_steps=1", "train.logging_steps=1", "eval.limit=10")
COMMAND = f"""
from pathlib import Path
from mmpost.cli.demo_upt import demo_upt
demo_upt(Path("parts"), [0, 1], words={SHORT}, rows=10)
"""


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_votes_gain_and_random_labels_do_not(tmp_path):
    summary = demo_upt(tmp_path / "demo", [0, 1, 2])
    sys.stdout.write(json.dumps(summary, indent=1))
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == summary
    for name in ("sft", "grpo", "upt", "random_vote"):
        low, high = summary[name]["ci"]
        assert low <= summary[name]["accuracy"] <= high
    assert summary["upt_minus_sft"]["ci"][0] > 0
    assert summary["grpo_minus_sft"]["ci"][0] > 0
    assert summary["recovered"]["share"] == pytest.approx(
        summary["upt_minus_sft"]["mean"] / summary["grpo_minus_sft"]["mean"]
    )
    assert summary["recovered"]["share"] >= 0.5
    assert summary["random_vote_minus_sft"]["ci"][0] <= 0
    assert summary["random_vote_minus_sft"]["ci"][1] < summary["upt_minus_sft"]["mean"]
    page = (tmp_path / "demo" / "report.html").read_text()
    assert all(title in page for title in ("Vote agreement", "Vote entropy", "Pseudo-labels against labels"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_of_the_demo_change_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo_upt(tmp_path / "whole", [0, 1], words=SHORT, rows=10)
    chance, lost = random.Random(0), 0
    for attempt in range(5):
        process = subprocess.Popen([sys.executable, "-c", COMMAND], start_new_session=True)
        if attempt == 4:
            assert process.wait(timeout=600) == 0
            break
        try:
            process.wait(timeout=chance.uniform(3, 25))
        except subprocess.TimeoutExpired:
            # Alone, so that its runs go on without it; or with all of them.
            (os.kill if attempt % 2 else os.killpg)(process.pid, signal.SIGKILL)
            lost += process.wait() == -signal.SIGKILL
        time.sleep(0.2)
    assert lost >= 2
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert (parts / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
    stages = [folder.relative_to(whole) for folder in whole.glob("seed-*/*") if folder.name != "logs"]
    assert len(stages) == 2 * 4
    for stage in stages:
        for name in ("model.safetensors", "config.json"):
            assert (parts / stage / "final" / name).read_bytes() == (whole / stage / "final" / name).read_bytes()
        scores = [json.loads((base / stage / "eval" / "drawn.json").read_text())["scores"] for base in (parts, whole)]
        assert scores[0] == scores[1]
