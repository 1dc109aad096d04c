"""Sounds through the commands: SFT and GRPO on WAV files, with rows of text alone among them."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from mmpost.config.schema import ModelSection
from mmpost.models.load import load

soundfile = pytest.importorskip("soundfile")

SFT = """\
model: {model_name_or_path: tiny-qwen2-audio, freeze: []}
data:
  train: [{path: sft.jsonl}]
train: {output_dir: runs/sft, max_steps: 2, batch_size: 4, learning_rate: 1.0e-3, logging_steps: 1}
"""
GRPO = """\
model: {model_name_or_path: runs/sft/final, freeze: []}
data:
  train: [{path: grpo.jsonl, media_root: sounds}]
train: {output_dir: runs/grpo, max_steps: 2, per_device_train_batch_size: 8, learning_rate: 1.0e-3, logging_steps: 1}
grpo: {num_generations: 4, prompts_per_step: 2, max_completion_length: 5}
rewards: ["judge.py:vowels"]
"""
JUDGE = """\
def vowels(prompts, completions, **columns):
    return [float(sum(c in "aeiou" for c in completion[-1]["content"])) for completion in completions]
"""


def tone(path, hertz, seconds, rate=16000):
    wave = 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    soundfile.write(path, wave.astype(np.float32), rate)


@pytest.fixture
def sounds(tmp_path, monkeypatch):
    """Eight rows in both spellings: a mark with the ``audios`` column, and a part of type audio; two without sound."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sounds").mkdir()
    asked, answered = [], []
    for i in range(8):
        tone(tmp_path / "sounds" / f"{i}.wav", 200 + 100 * i, 0.2 + 0.2 * i, rate=(8000, 16000, 44100)[i % 3])
        if i % 4 == 3:
            question = {"messages": [{"role": "user", "content": f"Say {i}."}]}
        elif i % 2:
            parts = [{"type": "audio", "audio": f"{i}.wav"}, {"type": "text", "text": "High or low?"}]
            question = {"messages": [{"role": "user", "content": parts}]}
        else:
            question = {"messages": [{"role": "user", "content": "<audio>High or low?"}], "audios": [f"{i}.wav"]}
        asked.append(question)
        text = json.dumps(question).replace(f'"{i}.wav"', f'"sounds/{i}.wav"')
        row = json.loads(text)
        row["messages"].append({"role": "assistant", "content": "high" if i > 3 else "low"})
        answered.append(row)
    for name, rows in (("grpo", asked), ("sft", answered)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sft.yaml").write_text(SFT)
    (tmp_path / "grpo.yaml").write_text(GRPO)
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


@pytest.mark.parametrize("model", ["tiny-qwen2-audio", "tiny-audio-flamingo-3"])
def test_sft_and_grpo_train_on_sounds(sounds, mmpost, rows_of, model):
    done = mmpost("sft", "sft.yaml", f"model_name_or_path={model}")
    assert done.code == 0, done.err
    done = mmpost("grpo", "grpo.yaml")
    assert done.code == 0, done.err
    for run in ("sft", "grpo"):
        logged = [row for row in rows_of(sounds / "runs" / run / "metrics.jsonl") if "loss" in row]
        assert [row["step"] for row in logged] == [1, 2]
        assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in logged)
    # What was sampled has the log-probability that training gives it.
    assert all(row["logp_gap"] < 1e-4 for row in logged)
    before, after = (load_file(sounds / "runs" / run / "final" / "model.safetensors") for run in ("sft", "grpo"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("audio_tower" in name for name in changed)
    assert "model.audio_tower.embed_positions.weight" not in changed
    assert AutoProcessor.from_pretrained(sounds / "runs" / "grpo" / "final").feature_extractor.chunk_length == 2


def test_lora_trains_the_language_model_and_is_read_back(sounds, mmpost):
    done = mmpost("sft", "sft.yaml", "peft.kind=lora", "peft.r=2", "output_dir=runs/lora")
    assert done.code == 0, done.err
    section = ModelSection(model_name_or_path=str(sounds / "runs" / "lora" / "final"))
    model = load(section, peft=None, device=torch.device("cpu"))
    names = [name for name, _ in model.policy.named_parameters() if "lora" in name]
    assert names
    assert all("language_model" in name for name in names)


@pytest.mark.parametrize(("seconds", "code"), [(3.0, "MMP-D011"), (0.01, "MMP-D081")])
def test_a_sound_outside_the_window_stops_before_training(sounds, mmpost, seconds, code):
    tone(sounds / "sounds" / "0.wav", 300, seconds)
    done = mmpost("sft", "sft.yaml")
    assert done.code != 0
    assert f"[{code}]" in done.err
    assert "sft.jsonl:1" in done.err


def test_a_cut_file_is_named_by_data_check(sounds, mmpost):
    whole = (sounds / "sounds" / "2.wav").read_bytes()
    (sounds / "sounds" / "2.wav").write_bytes(whole[: len(whole) // 2])
    done = mmpost("data", "check", "sft.jsonl", "--deep")
    assert done.code != 0
    assert "[MMP-D080]" in done.out + done.err


def test_a_vision_model_refuses_the_rows(sounds, mmpost):
    done = mmpost("sft", "sft.yaml", "model_name_or_path=tiny-qwen2.5-vl")
    assert done.code != 0
    assert "has a part of kind audio, but the model (qwen2_5_vl) takes text and image, video" in done.err
