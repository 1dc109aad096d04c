"""First light over three seeds: GRPO with real rewards improves on SFT, with shuffled ones it does not."""

import json
import os
import sys

import pytest
import torch

from mmpost.cli.demo import first_light


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_grpo_improves_on_sft_and_shuffled_rewards_do_not(tmp_path):
    torch.set_num_threads(os.cpu_count() or 1)  # the other tests run with one
    summary = first_light(tmp_path / "demo", [0, 1, 2], control=True)
    sys.stdout.write(json.dumps(summary, indent=1))
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == summary
    accuracy = {stage["name"]: stage["accuracy"] for stage in summary["stages"]}
    assert accuracy["init"] < accuracy["sft"] < accuracy["grpo"]
    assert summary["grpo_minus_sft"]["ci"][0] > 0
    assert summary["grpo_minus_sft"]["mean"] >= 0.05
    # The control keeps everything but the match between completion and reward.
    assert summary["control_minus_sft"]["ci"][0] <= 0
    assert summary["control_minus_sft"]["mean"] < summary["grpo_minus_sft"]["ci"][0]
    assert (tmp_path / "demo" / "report.html").is_file()
