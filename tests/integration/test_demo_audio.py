"""The demo of sounds: the filter finds the planted rows over three seeds, and the recipes train on its split."""

import json
import os
import sys

import pytest
import torch

from mmpost.cli.demo_audio import ARMS, _accuracies, _shares, demo_audio

pytest.importorskip("soundfile")


def test_balanced_accuracy_by_hand():
    planted = [True, True, True, True, False, False]
    found = [True, True, True, False, True, False]
    shares = _shares(planted, found)
    rows = shares.pop("rows")
    assert shares == {"weak_found": 0.75, "strong_found": 0.5, "balanced_accuracy": 0.625}
    assert rows == [0.75, 0.75, 0.75, 0.0, 0.0, 1.5]
    assert sum(rows) / len(rows) == 0.625


def test_accuracies_by_hand(tmp_path):
    rows = [
        {"group": group, "accuracy": with_, "ablations": {"audio:none": {"accuracy": without}}}
        for group, with_, without in [
            ("hint", 1.0, 1.0),
            ("listen", 1.0, 0.0),
            ("listen", 0.0, 0.0),
            ("hint", 1.0, 0.0),
        ]
    ]
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "demo_audio.samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = _accuracies([tmp_path])
    assert found["accuracy_with_audio"]["value"] == 0.75
    assert found["accuracy_without_audio"]["value"] == 0.25
    assert found["gap"]["value"] == 0.5
    assert found["accuracy_with_audio_listen"]["value"] == 0.5
    assert found["accuracy_without_audio_listen"] == {"value": 0.0, "ci": [0.0, 0.0], "n": 2, "by_seed": [0.0]}
    low, high = found["gap"]["ci"]
    assert 0.0 <= low < 0.5 < high <= 1.0


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_filter_finds_the_planted_rows_and_the_recipes_train(tmp_path):
    torch.set_num_threads(os.cpu_count() or 1)  # the other tests run with one
    out = tmp_path / "demo"
    planted = demo_audio(out, [0, 1, 2], train=False)
    sys.stdout.write(json.dumps(planted, indent=1))
    assert planted["filter"]["balanced_accuracy"] >= 0.9
    assert planted["filter"]["ci"][0] >= 0.9
    assert min(planted["filter"]["by_seed"]) >= 0.85
    # A model that guesses where it does not know is what the paper's rule with one model takes for knowledge.
    assert planted["filter"]["balanced_accuracy"] > planted["filter"]["paper_rule"]["balanced_accuracy"]
    summary = demo_audio(out, [0])
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["filter"]["by_seed"][0] == planted["filter"]["by_seed"][0]
    for arm in ("base", *ARMS):
        found = summary[arm]
        for key in ("accuracy_with_audio", "accuracy_without_audio"):
            low, high = found[key]["ci"]
            assert low <= found[key]["value"] <= high
        # They listen: sounds that were never heard in training, chance is one quarter.
        assert found["gap_listen"]["ci"][0] > 0.2
        assert found["accuracy_without_audio_listen"]["value"] < 0.35
    assert (out / "report.html").is_file()
