"""Two processes do what one does: the same losses and rewards, no hang, and one message when something is wrong."""

import json
import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

LIMIT_S = 240
SHARED = ["model_name_or_path=tiny-qwen2.5-vl", "freeze=[]", "logging_steps=1", "save_steps=3"]
SFT = ["sft", "sft.yaml", *SHARED, "train.batch_size=5", "per_device_train_batch_size=2", "max_steps=7"]
GRPO = [
    *("grpo", "grpo.yaml", *SHARED, "prompts_per_step=3", "num_generations=4", "per_device_train_batch_size=3"),
    *("max_completion_length=6", "max_steps=5", "rewards=[judge.py:vowels]"),
]
JUDGE = """
import os

def vowels(prompts, completions, **columns):
    if os.path.exists("trip") and os.environ.get("RANK") == "1":
        raise RuntimeError("tripped")
    texts = [completion[-1]["content"] for completion in completions]
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in texts]
"""


@pytest.fixture
def mixed(sparse):
    (sparse / "judge.py").write_text(JUDGE)
    return sparse


def launch(words, *, processes=2):
    """The command under torch's launcher, as (exit code, standard error)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "mmpost", *words],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    return done.returncode, done.stderr


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal_records(one, two, names):
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for here, there in zip(one, two, strict=True):
        for name in names:
            assert there[name] == pytest.approx(here[name], rel=1e-5, abs=1e-5), (name, here["step"])


@pytest.mark.parametrize("extra", [[], ["peft.kind=lora"]], ids=["full", "lora"])
def test_sft_on_two_processes_equals_one(mmpost, mixed, extra):
    assert mmpost(*SFT, *extra, "output_dir=runs/one").code == 0
    code, err = launch([*SFT, *extra, "output_dir=runs/two"])
    assert code == 0, err
    one, two = records(mixed / "runs/one"), records(mixed / "runs/two")
    assert_equal_records(one, two, ["loss", "entropy", "grad_norm", "tokens_total", "epoch", "lr"])
    # Progress is that of the first process alone.
    assert err.count("step    7/7") == 1
    assert json.loads((mixed / "runs/two/env.json").read_text())["processes"] == 2
    assert {file.name for file in (mixed / "runs/two/final").iterdir()} == {
        file.name for file in (mixed / "runs/one/final").iterdir()
    }


def test_grpo_on_two_processes_equals_one(mmpost, mixed):
    assert mmpost(*GRPO, "output_dir=runs/one").code == 0
    code, err = launch([*GRPO, "output_dir=runs/two"])
    assert code == 0, err
    one, two = records(mixed / "runs/one"), records(mixed / "runs/two")
    assert_equal_records(one, two, ["loss", "surrogate", "entropy", "grad_norm", "zero_spread", "completion_length"])
    rewards = [[row["reward"]["total"], row["reward"]["std_within"]] for row in one]
    assert [[row["reward"]["total"], row["reward"]["std_within"]] for row in two] == [
        pytest.approx(values, rel=1e-5, abs=1e-5) for values in rewards
    ]
    assert any(std > 0 for _, std in rewards)


def test_an_error_of_every_process_is_told_once(mixed, tmp_path, monkeypatch):
    # Both processes also find no tiny model in the cache and build it at the same time.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cold"))
    code, err = launch([*SFT, "max_length=16"])
    assert code != 0
    assert err.count("[MMP-D014]") == 20
    # The launcher has a traceback of its own for a process that failed; before it there is none.
    assert "Traceback" not in err.split("torch/distributed")[0].rsplit("Traceback", 1)[0]
    (built,) = (tmp_path / "cold" / "mmpost" / "tiny").iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in built.iterdir()}


def test_an_error_of_one_process_is_told_and_ends_all(mixed):
    (mixed / "trip").touch()
    code, err = launch(GRPO)
    assert code != 0
    assert err.count("reward 'vowels' raised RuntimeError: tripped") == 1
    assert "[MMP-R120]" in err
    assert "another process of this run has ended; its own message says why. [MMP-T003]" in err
    assert not (mixed / "crash.txt").exists()


def test_two_processes_go_on_where_they_stopped(mmpost, mixed):
    words = [*SFT, "peft.kind=lora", "peft.lora_dropout=0.1"]
    assert launch([*words, "output_dir=runs/whole"])[0] == 0
    assert launch([*words, "output_dir=runs/parts"])[0] == 0
    folder = mixed / "runs/parts"
    # As after a kill behind the checkpoint of step 3.
    for file in ("status.json", "checkpoints/step-000006/trainer_state/state.json"):
        (folder / file).unlink()
    assert launch([*words, "output_dir=runs/parts"])[0] == 0
    names = ["loss", "grad_norm", "step", "epoch"]
    whole = [[row[name] for name in names] for row in records(mixed / "runs/whole")]
    assert [[row[name] for name in names] for row in records(folder)] == whole
    final = "final/adapter_model.safetensors"
    assert (folder / final).read_bytes() == (mixed / "runs/whole" / final).read_bytes()
