"""Films through the commands: SFT and GRPO on video files, with rows of text and of pictures among them."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from tests.unit.clips import film

pytest.importorskip("av")

COMMON = """\
model: {model_name_or_path: MODEL, freeze: []}
data:
  train: [{path: KIND.jsonl}]
  media: {fps: 2, max_frames: 6}
"""
SFT = (
    COMMON
    + """\
train: {output_dir: runs/sft, max_steps: 2, batch_size: 4, learning_rate: 1.0e-3, logging_steps: 1}
"""
)
GRPO = (
    COMMON
    + """\
train: {output_dir: runs/grpo, max_steps: 2, per_device_train_batch_size: 8, learning_rate: 1.0e-3, logging_steps: 1}
grpo: {num_generations: 4, prompts_per_step: 2, max_completion_length: 5}
rewards: ["judge.py:vowels"]
"""
)
JUDGE = """\
def vowels(prompts, completions, **columns):
    return [float(sum(c in "aeiou" for c in completion[-1]["content"])) for completion in completions]
"""


@pytest.fixture
def films(tmp_path, monkeypatch):
    """Eight rows: films of unequal length, a picture, text alone."""
    monkeypatch.chdir(tmp_path)
    asked = []
    for i in range(8):
        row = {"messages": [{"role": "user", "content": f"Say {i}."}]}
        if i % 4 == 3:
            Image.fromarray(np.full((40, 60, 3), 30 * i, np.uint8)).save(tmp_path / f"{i}.png")
            row = {"messages": [{"role": "user", "content": "<image>Light or dark?"}], "images": [f"{i}.png"]}
        elif i != 6:
            (tmp_path / f"{i}.mkv").write_bytes(film(10 + 3 * i, i))
            row = {"messages": [{"role": "user", "content": "<video>What happens?"}], "videos": [f"{i}.mkv"]}
        asked.append(row)
    (tmp_path / "grpo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    for i, row in enumerate(asked):
        row["messages"].append({"role": "assistant", "content": "high" if i > 3 else "low"})
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "judge.py").write_text(JUDGE)
    for kind, text, model in (("sft", SFT, "tiny-qwen2.5-vl"), ("grpo", GRPO, "runs/sft/final")):
        (tmp_path / f"{kind}.yaml").write_text(text.replace("MODEL", model).replace("KIND", kind))
    return tmp_path


@pytest.mark.parametrize("model", ["tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-qwen2.5-omni"])
def test_sft_and_grpo_train_on_films(films, mmpost, rows_of, model):
    for kind in ("sft", "grpo"):
        words = [kind, f"{kind}.yaml", *([f"model_name_or_path={model}"] if kind == "sft" else [])]
        done = mmpost(*words)
        assert done.code == 0, done.err
        logged = [row for row in rows_of(films / "runs" / kind / "metrics.jsonl") if "loss" in row]
        assert [row["step"] for row in logged] == [1, 2]
        assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in logged)
    # What was sampled has the log-probability that training gives it.
    assert all(row["logp_gap"] < 1e-4 for row in logged)
