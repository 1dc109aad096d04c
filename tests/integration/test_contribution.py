"""The contribution filter as a command: the same files whoever does the work and however often it is killed."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mmpost.contribution import run as module
from mmpost.media import wav

pytest.importorskip("soundfile")
ROWS = 70
NAMES = ("scores.jsonl", "weak.jsonl", "strong.jsonl", "other.jsonl", "summary.json", "report.html")


@pytest.fixture
def questions(tmp_path, monkeypatch):
    """Short tones with questions; half the files are referred to by path, the columns hold what is right."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sounds").mkdir()
    lines = []
    for number in range(ROWS):
        wave = 0.3 * np.sin(2 * np.pi * (150 + 20 * number) * np.arange(1600) / 16000)
        (tmp_path / "sounds" / f"{number}.wav").write_bytes(wav.encode(wave, 16000))
        row = {"id": f"q{number}", "question": "<audio>High?", "audios": [f"sounds/{number}.wav"], "answer": "e"}
        lines.append({**row, "solution": "eaton"[number % 5]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # One vowel is right: an untrained model says some of everything.
    judge = "def vowel(prompts, completions, *, solution, **columns):\n"
    judge += "    return [float(s in c[-1]['content']) for c, s in zip(completions, solution)]\n"
    (tmp_path / "judge.py").write_text(judge)
    return tmp_path


TWO = ("--model", "tiny-audio-flamingo-3")


def words(out, *more):
    command = ["audio-filter", "rows.jsonl", "--model", "tiny-qwen2-audio", "--null", "silence,shuffle", "--k", "2"]
    return [*command, "--max-new-tokens", "6", "--reward", "judge.py:vowel", "--out", str(out), *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES}


def votes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "votes").glob("*.jsonl"))}


def test_the_command_splits_and_training_reads_the_parts(questions, mmpost, rows_of):
    done = mmpost(*words("out", "--rule", "paper"))
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == "70 rows, audio"
    found = json.loads((questions / "out" / "summary.json").read_text())
    assert sum(found["labels"]["robust"].values()) == ROWS
    scores = rows_of(questions / "out" / "scores.jsonl")
    assert [row["id"] for row in scores] == [f"q{number}" for number in range(ROWS)]
    shares = [np.mean(row["models"]["tiny-qwen2-audio"]["with"]["right"]) for row in scores]
    assert found["accuracy"]["with"]["value"] == pytest.approx(np.mean(shares))
    assert 0 < np.mean(shares) < 1
    page = (questions / "out" / "report.html").read_text()
    assert "0.wav" in page
    # Another rule asks no model again.
    before = votes(questions / "out")
    again = mmpost(*words("out", "--rule", "robust", "--json"))
    assert again.code == 0, again.err
    assert json.loads(again.out)["labels"] == found["labels"]
    assert votes(questions / "out") == before
    again = mmpost(*words("out", "--rule", "paper"))
    for name in ("sft", "grpo"):
        config = ["model_name_or_path=tiny-qwen2-audio", "max_steps=1", f"output_dir=runs/{name}"]
        config += ["rewards=[judge.py:vowel]", "num_generations=2", "prompts_per_step=2", "max_completion_length=4"][
            : 4 if name == "grpo" else 0
        ]
        done = mmpost(name, "out/strong.jsonl", *config)
        assert done.code == 0, done.err


def test_data_contribution_is_the_same_command(questions, mmpost):
    done = mmpost("data", "contribution", *words("out", "--limit", "2", "--modality", "image")[1:])
    assert done.code == 3
    assert "2 of 2 rows have no image" in done.err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_write_the_same_bytes(questions, mmpost, monkeypatch):
    assert mmpost(*words("one", *TWO)).code == 0
    assert mmpost(*words("two", *TWO, "--processes", "2")).code == 0
    # Two models and two blocks, the second one smaller: both processes had work.
    assert module.PIECE * module.BLOCK < ROWS
    assert len(votes(questions / "two")) == 4
    assert contents(questions / "one") == contents(questions / "two")
    assert votes(questions / "one") == votes(questions / "two")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_writes_the_same_bytes(questions, mmpost):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs ray")
    assert mmpost(*words("one")).code == 0
    done = subprocess.run([sys.executable, "-m", "mmpost", *words("ray", "--engine", "ray")], check=False)
    assert done.returncode == 0
    assert contents(questions / "one") == contents(questions / "ray")
    assert votes(questions / "one") == votes(questions / "ray")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_killed_at_random_points_the_filter_repeats_and_loses_nothing(questions, mmpost, processes):
    assert mmpost(*words("whole", *TWO)).code == 0
    rng = random.Random(int(processes))
    command = [sys.executable, "-m", "mmpost", *words("killed", *TWO, "--processes", processes)]
    seen: dict[str, bytes] = {}
    for _ in range(5):
        # Somewhere after one or two more lines of the journals, so that every start gets on.
        wanted = sum(data.count(b"\n") for data in seen.values()) + rng.randint(1, 2)
        process = subprocess.Popen(command, start_new_session=True)
        while (
            process.poll() is None and sum(data.count(b"\n") for data in votes(questions / "killed").values()) < wanted
        ):
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 0.8))
        if process.poll() is None:
            # With its own processes, or some of them would do the rest.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for name, data in votes(questions / "killed").items():
            whole = data[: data.rfind(b"\n") + 1]
            # Nothing that was finished changes.
            assert whole.startswith(seen.get(name, b""))
            seen[name] = whole
    assert subprocess.run(command, check=False).returncode == 0
    assert contents(questions / "killed") == contents(questions / "whole")
    assert votes(questions / "killed") == votes(questions / "whole")
