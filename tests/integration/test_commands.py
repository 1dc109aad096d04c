"""The commands of a first session, from ``mmpost init`` to a report, on the smallest model."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmpost.cli import run
from mmpost.config.load import load
from mmpost.config.run import GRPOConfig, SFTConfig

SMALL = ["model_name_or_path=tiny-qwen2.5-vl", "train.batch_size=4", "logging_steps=1", "sample_steps=2"]
SFT = ["sft", "sft.yaml", *SMALL, "max_steps=3"]
GRPO = ["grpo", "grpo.yaml", "logging_steps=1", "max_steps=2", "prompts_per_step=2", "max_completion_length=6"]


@pytest.fixture(scope="module")
def session(example, tmp_path_factory):
    """An SFT run, a GRPO run on its weights, and a LoRA run."""
    folder = tmp_path_factory.mktemp("session") / "project"
    shutil.copytree(example, folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run(SFT) == 0
        assert run(GRPO) == 0
        assert run([*SFT, "peft.kind=lora", "peft.r=4", "output_dir=runs/lora", "learning_rate=0.05"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def there(session, monkeypatch):
    monkeypatch.chdir(session)
    return session


@pytest.mark.parametrize(
    ("kind", "files", "commands"),
    [
        ("sft", {"sft.jsonl", "sft.yaml", "images", "README.md"}, ["data check", "sft sft.yaml", "eval"]),
        ("grpo", {"grpo.jsonl", "grpo.yaml", "reward.py", "images", "README.md"}, ["grpo grpo.yaml", "eval"]),
        ("eval", {"README.md"}, ["eval"]),
        (
            "all",
            {"sft.jsonl", "sft.yaml", "grpo.jsonl", "grpo.yaml", "reward.py", "images", "README.md"},
            ["data check", "sft sft.yaml", "grpo grpo.yaml", "eval"],
        ),
    ],
)
def test_init_writes_a_project_and_says_what_to_do(mmpost, tmp_path, kind, files, commands):
    done = mmpost("init", tmp_path / "new", "--kind", kind)
    assert done.code == 0
    assert {entry.name for entry in (tmp_path / "new").iterdir()} == files
    told = done.out.splitlines()
    assert told[1] == f"cd {tmp_path / 'new'}"
    assert [line.removeprefix("mmpost ").startswith(words) for line, words in zip(told[2:], commands, strict=True)]
    assert all(line in (tmp_path / "new" / "README.md").read_text() for line in told[2:])


def test_init_leaves_a_folder_with_files_alone(mmpost, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = mmpost("init", tmp_path)
    assert (done.code, done.out) == (4, "")
    assert done.err == f"'{tmp_path}' is not empty. Name a new folder. [MMP-E024]\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_data_check_of_good_rows(mmpost, there):
    done = mmpost("data", "check", "sft.jsonl", "--for", "sft", "--deep", "--model", "runs/sft/final")
    assert (done.code, done.err) == (0, "")
    assert "20 rows, 0 bad" in done.out
    assert "image tokens" in done.out


def test_data_check_exits_3_and_its_json_is_all_of_stdout(mmpost, project):
    rows = (project / "sft.jsonl").read_text().splitlines()
    rows[4] = rows[4].replace("images/", "nowhere/")
    (project / "bad.jsonl").write_text("\n".join(rows))
    done = mmpost("data", "check", "bad.jsonl", "--json")
    assert done.code == 3
    found = json.loads(done.out)
    assert found["total"]["by_code"] == {"MMP-D007": 1}
    assert [fault["code"] for fault in found["faults"]] == ["MMP-D007"]
    counted = mmpost("data", "check", "bad.jsonl", "--model", "tiny-qwen2.5-vl")
    assert counted.code == 3
    assert counted.err.count("[MMP-D007]") == 1


def test_run_folder_explains_itself(there, rows_of):
    for name, steps in (("sft", 3), ("grpo", 2)):
        folder = there / "runs" / name
        assert (folder / "command.txt").read_text().startswith(f"mmpost {name} {name}.yaml ")
        env = json.loads((folder / "env.json").read_text())
        assert env["processes"] == 1
        assert env["trainable_params"] == env["params"] > 200_000
        assert json.loads((folder / "status.json").read_text())["status"] == "finished"
        assert json.loads((folder / "data_manifest.json").read_text())[0]["rows"] == 20
        records = rows_of(folder / "metrics.jsonl")
        assert [record["step"] for record in records] == list(range(1, steps + 1))
        assert all(np.isfinite(record["loss"]) and record["lr"] > 0 for record in records)
        samples = rows_of(folder / "samples" / "step-000002.jsonl")
        assert samples
        assert all((folder / item["thumb"]).is_file() for row in samples for item in row["media"])
    assert set(records[0]["reward"]["by_name"]) == {"answer", "format", "brevity"}
    assert {"rewards", "advantage", "truncated", "solution", "completion"} <= set(samples[0])


def test_report_needs_nothing_from_the_net(there):
    text = (there / "runs" / "grpo" / "report.html").read_text()
    assert "runs/sft/final" in text
    assert "<svg" in text
    # Names of formats such as http://www.w3.org/2000/svg are no resources; src, href, url() and @import are.
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?https?:|@import""", text)


def test_written_config_is_valid_input_with_the_same_meaning(there):
    for name, config_class in (("sft", SFTConfig), ("grpo", GRPOConfig)):
        again = load(config_class, [there / "runs" / name / "config.yaml"], []).config
        assert again.train.max_steps == {"sft": 3, "grpo": 2}[name]
        assert config_class.from_yaml(there / "runs" / name / "config.yaml").diff(again) == {}


def test_final_weights_open_with_plain_transformers_and_have_moved(there):
    start = AutoModelForImageTextToText.from_pretrained(there / "runs" / "sft" / "final")
    model = AutoModelForImageTextToText.from_pretrained(there / "runs" / "grpo" / "final")
    processor = AutoProcessor.from_pretrained(there / "runs" / "grpo" / "final")
    moved = [
        name
        for (name, weight), before in zip(model.named_parameters(), start.parameters(), strict=True)
        if not torch.equal(weight, before)
    ]
    assert len(moved) > 0.9 * len(list(model.parameters()))
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.new("RGB", (56, 56))], return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


def test_lora_folder_opens_with_plain_transformers(there):
    folder = there / "runs" / "lora" / "final"
    saved = load_file(folder / "adapter_model.safetensors")
    assert all(weight.abs().sum() > 0 for name, weight in saved.items() if "lora_B" in name)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    AutoProcessor.from_pretrained(folder)
    opened = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    assert len(opened) == len(saved)
    total = sum(weight.abs().sum() for weight in saved.values())
    torch.testing.assert_close(sum(weight.abs().sum() for weight in opened.values()), total)


def test_eval_prints_one_json_object_and_nothing_else(mmpost, there):
    words = ["demo_vqa", "--model", "runs/lora/final", "--limit", "5", "--max-new-tokens", "4"]
    done = mmpost("eval", *words, "--json", "--out", "scores")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert result["n"] == 5
    low, high = result["metrics"]["accuracy"]["ci"]
    assert 0 <= low <= result["metrics"]["accuracy"]["value"] <= high <= 1
    assert json.loads((there / "scores" / "eval" / "demo_vqa.json").read_text())["n"] == 5
    table = mmpost("eval", *words)
    assert table.code == 0
    assert "demo_vqa" in table.out


def test_runs_browser(mmpost, there):
    listed = mmpost("runs", "list")
    assert listed.code == 0
    assert all(name in listed.out for name in ("sft", "grpo", "lora", "finished"))
    shown = mmpost("runs", "show", "runs/grpo")
    assert shown.code == 0
    assert "mmpost grpo grpo.yaml" in shown.out
    compared = mmpost("runs", "compare", "runs/sft", "runs/lora")
    assert compared.code == 0
    assert "learning_rate" in compared.out
    written = mmpost("runs", "report", "runs/sft", "--out", there / "again.html")
    assert (written.code, written.out) == (0, f"{there / 'again.html'}\n")
    assert "<svg" in (there / "again.html").read_text()
    assert mmpost("runs", "show", "images").code == 4


def test_a_finished_run_is_not_run_again(mmpost, there):
    weights = there / "runs" / "sft" / "final" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    for words in (SFT, ["resume", "runs/sft"]):
        done = mmpost(*words)
        assert done.code == 0
        assert done.err.startswith("this run was already finished: runs/sft/final")
    assert weights.stat().st_mtime_ns == before


def test_doctor_tries_every_decoder(mmpost):
    found = json.loads(mmpost("doctor", "--json").out)["decoders"]
    works = {finding["name"]: finding["works"] for finding in found}
    assert works["images"]
    assert works["sound"]
    assert works["pyav"]
    assert all(finding["fix"] for finding in found if not finding["works"])
    assert mmpost("doctor").out.count("\n") >= len(found)


def test_version(mmpost):
    assert mmpost("version").out.splitlines()[0] == f"mmpost {importlib.metadata.version('mmpost-toolkit')}"
    assert set(json.loads(mmpost("version", "--json").out)) == {
        *("mmpost", "python", "torch", "transformers", "accelerate", "peft")
    }


def test_own_rows_train_after_one_edited_path(mmpost, project):
    (project / "mine").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for index in range(20):
        pixels = rng.integers(0, 256, (40 + index, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(project / "mine" / f"{index}.jpg")
        question = {"role": "user", "content": "<image>How tall is it?"}
        answer = {"role": "assistant", "content": f"{40 + index} pixels"}
        rows.append({"messages": [question, answer], "images": [f"mine/{index}.jpg"]})
    (project / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = project / "sft.yaml"
    config.write_text(config.read_text().replace("path: sft.jsonl", "path: mine.jsonl"))
    done = mmpost("sft", "sft.yaml", "model_name_or_path=tiny-qwen2.5-vl", "max_steps=2", "train.batch_size=2")
    assert done.code == 0
    assert json.loads((project / "runs/sft/data_manifest.json").read_text())[0]["name"] == "mine"


@pytest.mark.slow
def test_first_session_finishes_offline_within_two_minutes(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    clock = time.monotonic()

    def mmpost(words, cwd):
        command = [sys.executable, "-m", "mmpost", *words.split()]
        return subprocess.run(
            command, cwd=cwd, env=os.environ | offline, check=True, timeout=300, capture_output=True, text=True
        )

    mmpost("init first", tmp_path)
    told = mmpost("sft sft.yaml", tmp_path / "first").stderr
    assert time.monotonic() - clock < 120
    assert (tmp_path / "first/runs/sft/report.html").is_file()
    # One line per event in a pipe: no bars of the libraries, no warnings.
    assert all(line.startswith(("sft ", "no CUDA", "step ", "final ", "report", "done")) for line in told.splitlines())
    mmpost("eval demo_vqa --model runs/sft/final --limit 3 --json", tmp_path / "first")
