"""Weights spread over processes, several machines, and the launcher: the numbers stay those of one process."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

pytestmark = pytest.mark.slow

LIMIT_S = 300
SHARED = ["model_name_or_path=tiny-qwen2.5-vl", "freeze=[]", "logging_steps=1", "save_steps=2"]
SFT = ["sft", "sft.yaml", *SHARED, "train.batch_size=5", "per_device_train_batch_size=2", "max_steps=4"]
GRPO = [
    *("grpo", "grpo.yaml", *SHARED, "prompts_per_step=4", "num_generations=4", "per_device_train_batch_size=3"),
    *("max_completion_length=6", "max_steps=3", "rewards=[judge.py:vowels]"),
]
FSDP = "train.strategy=fsdp2"
NUMBERS = {"sft": ["loss", "entropy", "grad_norm"], "grpo": ["loss", "surrogate", "entropy", "grad_norm"]}
JUDGE = """
def vowels(prompts, completions, **columns):
    texts = [completion[-1]["content"] for completion in completions]
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in texts]
"""


@pytest.fixture
def mixed(sparse):
    (sparse / "judge.py").write_text(JUDGE)
    return sparse


def command(words, launcher=("-m", "mmpost"), env=None):
    return subprocess.Popen(
        [sys.executable, *launcher, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )


def run(words, processes=1):
    """The command on so many processes; returns what it wrote to standard error."""
    started = command([*words, "--processes", str(processes)])
    _, err = started.communicate(timeout=LIMIT_S)
    assert started.returncode == 0, err
    return err


def records(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def assert_same(folder, other, kind="sft"):
    one, two = records(folder), records(other)
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for here, there in zip(one, two, strict=True):
        for name in NUMBERS[kind]:
            assert there[name] == pytest.approx(here[name], rel=1e-5, abs=1e-5), (name, here["step"])


def weights(folder):
    (file,) = (folder / "final").glob("*.safetensors")
    return load_file(file)


def assert_close_weights(folder, other):
    one, two = weights(folder), weights(other)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name].dtype == value.dtype
        # Adam divides by tiny moments at first, so that rounding shows.
        assert torch.allclose(value, two[name], atol=1e-4), name


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("words", [SFT, GRPO], ids=["sft", "grpo"])
def test_four_processes_equal_one(mixed, words):
    run([*words, "output_dir=runs/one"])
    run([*words, "output_dir=runs/four"], 4)
    assert_same(mixed / "runs/one", mixed / "runs/four", words[0])


def test_the_size_of_a_forward_pass_changes_nothing(mixed):
    for size in (1, 2, 5):
        run([*SFT, f"per_device_train_batch_size={size}", f"output_dir=runs/by{size}"])
    assert_same(mixed / "runs/by5", mixed / "runs/by1")
    assert_same(mixed / "runs/by5", mixed / "runs/by2")


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["model_name_or_path=tiny-qwen3-vl"],
        ["model_name_or_path=tiny-smolvlm", "gradient_checkpointing=true"],
        ["freeze=[vision_tower]"],
    ],
    ids=["qwen2.5", "qwen3", "smolvlm-checkpointing", "frozen-tower"],
)
def test_spread_weights_train_as_whole_ones(mixed, extra):
    words = [*SFT, *extra, "max_steps=3"]
    run([*words, "output_dir=runs/one"])
    run([*words, FSDP, "output_dir=runs/two"], 2)
    assert_same(mixed / "runs/one", mixed / "runs/two")
    assert_close_weights(mixed / "runs/one", mixed / "runs/two")
    names = [{file.name for file in (mixed / "runs" / run / "final").iterdir()} for run in ("one", "two")]
    assert names[0] == names[1]
    _, notes = AutoModelForImageTextToText.from_pretrained(mixed / "runs/two/final", output_loading_info=True)
    assert not any(notes.values())


@pytest.mark.parametrize(
    "extra",
    [[], ["peft.kind=lora", "loss.kl.beta=0.1", "num_iterations=2", "max_steps=4"]],
    ids=["full", "lora-penalty-off-policy"],
)
def test_spread_weights_roll_out_as_whole_ones(mixed, extra):
    run([*GRPO, *extra, "output_dir=runs/one"])
    run([*GRPO, *extra, FSDP, "output_dir=runs/two"], 2)
    assert_same(mixed / "runs/one", mixed / "runs/two", "grpo")
    assert_close_weights(mixed / "runs/one", mixed / "runs/two")


def test_a_spread_run_goes_on_where_it_stopped(mixed):
    run([*SFT, FSDP, "output_dir=runs/whole"], 2)
    for name in ("same", "alone"):
        run([*SFT, FSDP, f"output_dir=runs/{name}"], 2)
        # As after a kill behind the checkpoint of step 2.
        (mixed / "runs" / name / "status.json").unlink()
    run(["resume", "runs/same"], 2)
    whole = [[row[name] for name in NUMBERS["sft"]] for row in records(mixed / "runs/whole")]
    assert [[row[name] for name in NUMBERS["sft"]] for row in records(mixed / "runs/same")] == whole
    final = "final/model.safetensors"
    assert (mixed / "runs/same" / final).read_bytes() == (mixed / "runs/whole" / final).read_bytes()
    # A checkpoint does not know how weights were spread.
    run(["resume", "runs/alone"], 1)
    assert_same(mixed / "runs/whole", mixed / "runs/alone")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeed_trains_and_goes_on_as_one_process_does(mixed, strategy):
    spread = f"train.strategy={strategy}"
    run([*SFT, "output_dir=runs/one"])
    run([*SFT, spread, "output_dir=runs/two"], 2)
    assert_same(mixed / "runs/one", mixed / "runs/two")
    assert_close_weights(mixed / "runs/one", mixed / "runs/two")
    (mixed / "runs/two/status.json").unlink()
    shutil.copytree(mixed / "runs/two", mixed / "runs/alone")
    run(["resume", "runs/two"], 2)
    assert_same(mixed / "runs/one", mixed / "runs/two")
    run(["resume", "runs/alone"], 1)
    assert_same(mixed / "runs/one", mixed / "runs/alone")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeed_rolls_out_as_one_process_does(mixed, strategy):
    words = [*GRPO, "peft.kind=lora", "loss.kl.beta=0.1", "num_iterations=2", "max_steps=4"]
    run([*words, "output_dir=runs/one"])
    run([*words, f"train.strategy={strategy}", "output_dir=runs/two"], 2)
    assert_same(mixed / "runs/one", mixed / "runs/two", "grpo")
    assert_close_weights(mixed / "runs/one", mixed / "runs/two")


def test_two_machines(mixed):
    """Each "machine" has an address of its own on the loopback device."""
    run([*SFT, "output_dir=runs/one"])
    here = {"CUDA_VISIBLE_DEVICES": ""}
    port = free_port()
    words = [*SFT, "output_dir=runs/own", "nproc=1", "nnodes=2", f"master=127.0.0.1:{port}"]
    own = [command([*words, f"node_rank={rank}"], env=here) for rank in (0, 1)]
    errors = [machine.communicate(timeout=LIMIT_S)[1] for machine in own]
    assert [machine.returncode for machine in own] == [0, 0], errors
    assert_same(mixed / "runs/one", mixed / "runs/own")
    port = free_port()
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--master-port={port}"]
    torchrun = [
        command(
            ["-m", "mmpost", *SFT, FSDP, "output_dir=runs/torchrun"],
            [*launcher, f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--local-addr=127.0.0.{rank + 1}"],
            here,
        )
        for rank in (0, 1)
    ]
    errors = [machine.communicate(timeout=LIMIT_S)[1] for machine in torchrun]
    assert [machine.returncode for machine in torchrun] == [0, 0], errors
    assert_same(mixed / "runs/one", mixed / "runs/torchrun")


def test_one_ctrl_c_reaches_all_processes_once(mixed):
    words = [*SFT, "max_steps=500", "save_steps=500", "output_dir=runs/stopped", "--processes", "2"]
    started = command(words)
    metrics = mixed / "runs/stopped/metrics.jsonl"
    until = time.monotonic() + LIMIT_S
    while not (metrics.exists() and '"step": 2' in metrics.read_text()) and time.monotonic() < until:
        time.sleep(0.2)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=LIMIT_S)
    assert started.returncode == 130, err
    (checkpoint,) = (mixed / "runs/stopped/checkpoints").iterdir()
    assert re.fullmatch(r"step-\d{6}", checkpoint.name)
    assert json.loads((mixed / "runs/stopped/status.json").read_text())["status"] == "interrupted"
    assert "Traceback" not in err


def test_a_mistake_is_told_once_with_its_exit_code(mixed):
    for extra, code, text in ((["max_stepz=3"], 2, "[MMP-C001]"), (["max_length=16"], 3, "sft.jsonl:20: 27 tokens")):
        started = command([*SFT, *extra, "output_dir=runs/wrong", "--processes", "2"])
        _, err = started.communicate(timeout=LIMIT_S)
        assert started.returncode == code, err
        assert err.count(text) == 1
        assert "Traceback" not in err
