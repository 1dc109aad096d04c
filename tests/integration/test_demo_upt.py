"""Learning without labels over three seeds: the vote gains, at least half of what labels gain; random labels do not."""

import json
import os
import sys

import pytest
import torch

from mmpost.cli.demo_upt import demo_upt


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_votes_gain_half_of_what_labels_gain_and_random_ones_nothing(tmp_path):
    torch.set_num_threads(os.cpu_count() or 1)  # the other tests run with one
    summary = demo_upt(tmp_path / "demo", [0, 1, 2])
    sys.stdout.write(json.dumps(summary, indent=1))
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == summary
    for name in ("sft", "grpo", "upt", "random_vote"):
        low, high = summary[name]["ci"]
        assert low <= summary[name]["accuracy"] <= high
    assert summary["upt_minus_sft"]["ci"][0] > 0
    assert summary["share_of_grpo"] >= 0.5
    assert summary["random_vote_minus_sft"]["ci"][0] <= 0
    assert summary["random_vote_minus_sft"]["mean"] < summary["upt_minus_sft"]["ci"][0]
    page = (tmp_path / "demo" / "report.html").read_text()
    assert all(title in page for title in ("Vote agreement", "Vote entropy", "Pseudo-labels against labels"))
