"""A run that is interrupted, however often and however rudely, ends with the same bytes as one that is not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

SHARED = ["model_name_or_path=tiny-qwen2.5-vl", "logging_steps=1", "save_steps=2", "sample_steps=3"]
SFT = ["sft", "sft.yaml", *SHARED, "train.batch_size=4", "per_device_train_batch_size=2", "weight_decay=0.01"]
LORA = [*SFT, "peft.kind=lora", "peft.lora_dropout=0.2", "learning_rate=0.01"]
GRPO = [
    *("grpo", "grpo.yaml", *SHARED, "prompts_per_step=4", "num_generations=4", "max_completion_length=6"),
    *("mini_batches=2", "num_iterations=2", "loss.kl.beta=0.05", "rewards=[judge.py:vowels]"),
]


@pytest.fixture
def judged(project, judge):
    judge('sum(letter in "aeiou" for letter in text) / (1 + len(text))')
    return project


def lines_of(folder):
    """Training records without what the clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("time", "phase_s")} for row in rows]


def assert_same(run, whole, steps):
    """Equal weights to the byte, every step logged once, equal values and samples."""
    for file in (whole / "final").glob("*.safetensors"):
        assert (run / "final" / file.name).read_bytes() == file.read_bytes(), file.name
    assert [row["step"] for row in lines_of(run)] == list(range(1, steps + 1))
    assert lines_of(run) == lines_of(whole)
    names = {file.name for file in (whole / "samples").glob("*.jsonl")}
    assert names == {file.name for file in (run / "samples").glob("*.jsonl")}
    assert all((run / "samples" / name).read_bytes() == (whole / "samples" / name).read_bytes() for name in names)
    assert json.loads((run / "status.json").read_text())["status"] == "finished"


def interrupt_after(steps, metrics):
    """Send Ctrl-C to this process once ``steps`` steps are logged."""

    def watch():
        for _ in range(6000):
            if metrics.is_file() and metrics.read_text().count("\n") >= steps:
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_ctrl_c_writes_a_checkpoint_and_the_same_command_goes_on(mmpost, project):
    steps = 14
    words = [*LORA, f"max_steps={steps}"]
    assert mmpost(*words, "output_dir=runs/whole").code == 0
    run = project / "runs" / "parts"
    watcher = interrupt_after(3, run / "metrics.jsonl")
    stopped = mmpost(*words, "output_dir=runs/parts")
    watcher.join()
    assert stopped.code == 130
    assert stopped.err.endswith("interrupted; a checkpoint is written. Run the same command again to go on.\n")
    assert json.loads((run / "status.json").read_text())["status"] == "interrupted"
    assert (run / "report.html").is_file()
    done = len(lines_of(run))
    assert 3 <= done < steps
    last = run / "checkpoints" / f"step-{done:06d}"
    assert (last / "trainer_state" / "state.json").is_file()
    # What kills at the worst moments leave: a checkpoint that was not yet moved, and lines of steps that are lost.
    shutil.copytree(last, run / "checkpoints" / f"partial-step-{done + 2:06d}")
    shutil.copytree(last, run / "checkpoints" / f"step-{done + 4:06d}", ignore=lambda *_: ["state.json"])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {done + 1}, "loss": 1.0}}\n{{"step": {done + 2}, "lo')
    again = mmpost("resume", run) if done % 2 else mmpost(*words, "output_dir=runs/parts")
    assert again.code == 0
    assert f"continuing from {last.name}" in again.err
    assert_same(run, project / "runs" / "whole", steps)
    assert not list((run / "checkpoints").glob("partial-*"))


def test_grpo_goes_on_after_its_reward_failed(mmpost, judged):
    steps = 12
    words = [*GRPO, f"max_steps={steps}"]
    assert mmpost(*words, "output_dir=runs/whole").code == 0
    run = judged / "runs" / "parts"
    # Four updates and two calls of the reward per rollout batch: this is the second half of the third batch.
    (judged / "trip").write_text("6")
    stopped = mmpost(*words, "output_dir=runs/parts")
    assert stopped.code == 6
    assert "raised RuntimeError: tripped" in stopped.err
    assert json.loads((run / "status.json").read_text())["status"] == "failed"
    assert len(lines_of(run)) == 8
    again = mmpost(*words, "output_dir=runs/parts")
    assert again.code == 0
    assert "continuing from step-000008" in again.err
    assert_same(run, judged / "runs" / "whole", steps)
    records = lines_of(run)
    assert any(record["kl"] > 0 for record in records)
    # Rewards belong to the rollout; later passes over it log only what they compute.
    assert ["reward" in record for record in records[:4]] == [True, True, False, False]
    samples = (run / "samples" / "step-000003.jsonl").read_text().splitlines()
    assert samples, "samples of a later pass are those of its rollout"


def test_evaluation_is_logged_once_whenever_the_run_stops(mmpost, judged):
    words = [*GRPO, "max_steps=12", "eval.tasks=[demo_vqa]", "eval.eval_steps=4", "eval.limit=2"]
    words += ["eval.max_new_tokens=2"]
    (judged / "trip").write_text("6")
    assert mmpost(*words).code == 6
    assert mmpost(*words).code == 0
    records = [json.loads(line) for line in (judged / "runs/grpo/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval" in record] == [4, 8, 12]


def kill_until_done(words, folder, *, kills, seed):
    """Start the command again and again; all but the last start are killed at a random moment of the training."""
    chance = random.Random(seed)
    metrics = folder / "metrics.jsonl"
    lost = 0
    for attempt in range(kills + 1):
        process = subprocess.Popen(
            [sys.executable, "-m", "mmpost", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if attempt == kills:
            _, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
            return lost
        before = metrics.read_text() if metrics.is_file() else ""
        # A resumed run first cuts the log back, so any change of the file means that it is at work.
        while process.poll() is None and (metrics.read_text() if metrics.is_file() else "") == before:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.4))
        process.kill()
        process.communicate()
        lost += process.returncode == -signal.SIGKILL
    raise AssertionError("unreachable")


@pytest.mark.slow
@pytest.mark.parametrize("words", [SFT, LORA, GRPO], ids=["sft", "lora-dropout", "grpo"])
def test_kills_at_random_moments_change_nothing(mmpost, judged, words):
    steps = 40
    words = [*words, f"max_steps={steps}"]
    assert mmpost(*words, "output_dir=runs/whole").code == 0
    run = judged / "runs" / "parts"
    lost = kill_until_done([*words, "output_dir=runs/parts"], run, kills=4, seed=len(words))
    assert lost >= 3, "the runs were too short to be killed"
    assert_same(run, judged / "runs" / "whole", steps)
