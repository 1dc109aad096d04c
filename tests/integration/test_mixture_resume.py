"""``mmpost mixture`` from design to suggestion; killed however often, it ends with the same files."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

PROXY = """
model: {model_name_or_path: tiny-qwen2.5-vl}
data:
  verify: none
  train:
    - {path: "task:mix_digits", limit: 20, name: digits}
    - {path: "task:mix_shoes", limit: 20, name: shoes}
train: {max_steps: 12, batch_size: 4, save_steps: 3, logging_steps: 1, learning_rate: 1.0e-3}
eval: {tasks: [mix_digits], limit: 6, max_new_tokens: 4}
"""
GRPO = """
grpo: {prompts_per_step: 4, num_generations: 2, max_completion_length: 4}
rewards: [{name: "judge.py:vowels", sources: [digits]}, {name: "judge.py:letters", sources: [shoes]}, format]
"""
# Scores that differ between the completions of a model that knows nothing yet.
JUDGE = """
def _share(completions, wanted):
    texts = [completion[-1]["content"] for completion in completions]
    return [sum(letter in wanted for letter in text) / (1 + len(text)) for text in texts]

def vowels(prompts, completions, **columns):
    return _share(completions, "aeiou")

def letters(prompts, completions, **columns):
    return _share(completions, "rstln")
"""
RUN = ["mixture", "run", "design.yaml", "--config", "proxy.yaml"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "proxy.yaml").write_text(PROXY)
    (tmp_path / "judge.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def results(out):
    return (out / "results.jsonl").read_text()


@pytest.mark.slow
def test_from_design_to_a_configuration(mmpost, folder):
    designed = mmpost("mixture", "design", "--sources", "digits,shoes", "--n", "5", "--scheme", "seeds,simplex")
    assert designed.code == 0
    assert designed.out == "5 mixtures: design.yaml\n"
    assert mmpost(*RUN, "--out", "m", "train.max_steps=3").code == 0
    again = mmpost(*RUN, "--out", "m", "train.max_steps=3")
    assert "5 of 5 runs are there already" in again.err
    assert len(results(folder / "m").splitlines()) == 5
    fitted = mmpost("mixture", "fit", "m", "--target", "eval.mean")
    assert fitted.code == 0
    assert "of 5 runs, each predicted from the others" in fitted.out
    suggested = mmpost("mixture", "suggest", "m", "--n", "2", "--floor", "0.1", "--design", "next.yaml")
    assert suggested.code == 0
    sources = yaml.safe_load(suggested.out)["data"]["train"]
    assert [source["name"] for source in sources] == ["digits", "shoes"]
    assert sum(source["weight"] for source in sources) == pytest.approx(1)
    assert len(yaml.safe_load((folder / "next.yaml").read_text())["mixtures"]) == 2
    reported = mmpost("mixture", "report", "m")
    assert reported.out == "m/report.html\n"
    assert "<svg" in (folder / "m" / "report.html").read_text()
    (folder / "suggestion.yaml").write_text(suggested.out)
    trained = mmpost("sft", "proxy.yaml", "suggestion.yaml", "train.max_steps=1", "output_dir=runs/x")
    assert trained.code == 0


@pytest.mark.slow
def test_a_failing_run_is_told_with_its_last_words(mmpost, folder):
    (folder / "proxy.yaml").write_text(PROXY.replace("task:mix_shoes", "task:nothing"))
    mmpost("mixture", "design", "--sources", "digits,shoes", "--scheme", "uniform")
    failed = mmpost(*RUN, "--out", "m")
    assert failed.code == 7
    assert "1 of 1 proxy runs failed; m-" in failed.err
    assert "ended with exit code 2: unknown name 'nothing' among tasks." in failed.err
    assert failed.err.endswith("the same command runs what is missing. [MMP-V024]\n")
    assert not (folder / "m" / "results.jsonl").exists()


def kill_at_random(words, out, *, kills, seed, whole_group):
    """Start the command again and again; all but the last start are killed at a random moment."""
    chance, killed = random.Random(seed), 0
    for attempt in range(kills + 1):
        process = subprocess.Popen(
            [sys.executable, "-m", "mmpost", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if attempt == kills:
            _, err = process.communicate(timeout=900)
            assert process.returncode == 0, err
            return killed
        # Moments are counted in written lines, so that a slow machine is killed at the same places.
        wanted = lines(out) + chance.randint(1, 14)
        while process.poll() is None and lines(out) < wanted:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        if whole_group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        process.stderr.close()
        killed += process.returncode == -signal.SIGKILL
    raise AssertionError("unreachable")


def lines(out):
    return sum(file.read_text().count("\n") for file in out.glob("runs/m-*-s0/metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("whole_group", [True, False], ids=["with-its-runs", "alone"])
@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_kills_at_random_moments_change_nothing(mmpost, folder, method, whole_group):
    (folder / "proxy.yaml").write_text(PROXY + (GRPO if method == "grpo" else ""))
    assert mmpost("mixture", "design", "--sources", "digits,shoes", "--scheme", "seeds").code == 0
    assert mmpost(*RUN, "--out", "whole").code == 0
    words = [*RUN, "--out", "parts", "--jobs", "2"]
    killed = kill_at_random(words, folder / "parts", kills=4, seed=len(method), whole_group=whole_group)
    assert killed >= 2, "the runs were too short to be killed"
    assert results(folder / "parts") == results(folder / "whole")
    for one in (folder / "whole" / "runs").glob("m-*-s0"):
        here, there = (
            [json.loads(line) for line in (place / "runs" / one.name / "metrics.jsonl").read_text().splitlines()]
            for place in (folder / "whole", folder / "parts")
        )
        # Every step once: neither lost nor done by two processes.
        assert [row["step"] for row in there] == [row["step"] for row in here]
        for before, after in zip(here, there, strict=True):
            assert {k: v for k, v in before.items() if k not in ("time", "phase_s")} == {
                k: v for k, v in after.items() if k not in ("time", "phase_s")
            }
    for out in ("whole", "parts"):
        assert mmpost("mixture", "fit", out, "--model", "mean").code == 0
    assert (folder / "whole" / "predictor.json").read_bytes() == (folder / "parts" / "predictor.json").read_bytes()
