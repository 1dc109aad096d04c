"""``mmpost upt``: labels reach no reward, votes go together with other methods, kills change nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

SHARED = ["model_name_or_path=tiny-qwen2.5-vl", "logging_steps=1", "sample_steps=1", "prompts_per_step=4"]
GRPO = ["grpo", "grpo.yaml", *SHARED, "num_generations=4", "max_completion_length=6"]
UPT = ["upt", "grpo.yaml", *SHARED, "num_generations=4", "max_completion_length=6", "top_p=1.0", "temperature=1.0"]

# A random model writes no answers; here the number of its vowels is the answer, so that votes are close and vary.
VOTED = '''
from mmpost.rewards.call import judges_groups
from mmpost.rewards.majority_vote import majority_vote

@judges_groups
def voted(prompts, completions, *, group, uid, mean_logp, **columns):
    assert not set(columns) - {"completion_ids"}, columns
    texts = [completion[-1]["content"] for completion in completions]
    said = [f"\\\\boxed{{{sum(letter in 'aeiou' for letter in text) // 2}}}" for text in texts]
    return majority_vote(prompts, said, group=group, uid=uid, mean_logp=mean_logp)

def curious(prompts, completions, **columns):
    """Would follow the label if it could see one."""
    texts = [completion[-1]["content"] for completion in completions]
    return [len(set(text) & set("".join(map(str, columns.get("solution", ["xyz"]))))) / 9 for text in texts]
'''


@pytest.fixture
def voting(project):
    (project / "judge.py").write_text(VOTED)
    return project


def relabel(file, label):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "solution": label(i)}) + "\n" for i, row in enumerate(rows)))


def weights(folder):
    return {file.name: file.read_bytes() for file in (folder / "final").glob("*.safetensors")}


def records(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("time", "phase_s")} for row in rows]


def test_labels_change_no_weight(mmpost, voting):
    """Three runs on the same questions with the data's labels, other labels, and none."""
    words = [*UPT, "max_steps=2", "rewards=[judge.py:voted, judge.py:curious]"]
    labelled = mmpost(*words, "output_dir=runs/a")
    assert labelled.code == 0, labelled.err
    relabel(voting / "grpo.jsonl", lambda i: f"wrong {i}")
    assert mmpost(*words, "output_dir=runs/b").code == 0
    rows = [json.loads(line) for line in (voting / "grpo.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("solution")
    (voting / "grpo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert mmpost(*words, "output_dir=runs/c").code == 0
    first, *others = (weights(voting / "runs" / name) for name in "abc")
    assert first
    assert all(other == first for other in others)
    # The log does look at them: with labels there is an accuracy, without there is none.
    logs = [records(voting / "runs" / name)[0] for name in "abc"]
    assert ["accuracy" in log["vote"] for log in logs] == [True, True, False]
    assert [log["reward"] for log in logs] == [logs[0]["reward"]] * 3
    assert logs[0]["reward"]["by_name"]["curious"] > 0
    # With labels in sight the same reward does train another policy.
    sighted = ["grpo", *UPT[1:], "max_steps=2", "rewards=[judge.py:voted, judge.py:curious]"]
    relabel(voting / "grpo.jsonl", lambda i: "qjkw")
    assert mmpost(*sighted, "output_dir=runs/d", "loss.preset=upt").code == 0
    assert records(voting / "runs" / "d")[0]["reward"]["by_name"]["curious"] != logs[0]["reward"]["by_name"]["curious"]


@pytest.mark.parametrize(
    "words",
    [
        ["loss.preset=darling", "loss.args.partition=answer"],
        ["loss.preset=reinforce_ada", "loss.args={per_round: 4, rounds: 3}"],
        ["loss.preset=riskpo", "loss.args={bundle: 2}"],
        ["loss.preset=noisy", "loss.args={rate: 0.4}"],
        ["loss.preset=dapo", "loss.args={max_rounds: 3}"],
    ],
    ids=lambda words: words[0].rpartition("=")[2],
)
def test_votes_go_together_with_other_methods(mmpost, voting, words):
    done = mmpost(*GRPO, *words, "max_steps=2", "rewards=[judge.py:voted]", "output_dir=runs/it")
    assert done.code == 0, done.err
    logs = records(voting / "runs" / "it")
    for log in logs:
        assert 0 < log["vote"]["agreement"] <= 1
        assert log["reward"]["by_name"]["voted"] == pytest.approx(log["reward"]["total"])
    assert any(log["grad_norm"] > 0 for log in logs)
    samples = (voting / "runs/it/samples/step-000001.jsonl").read_text().splitlines()
    assert any(json.loads(line).get("pseudo_label") is not None for line in samples)


def test_a_reward_that_needs_labels_is_refused(mmpost, project):
    refused = mmpost(*UPT, "rewards=[answer]")
    assert refused.code == 6
    assert refused.err == (
        "reward 'answer' needs the column 'solution', but mmpost upt trains without labels. "
        "Leave it out, or train with labels: mmpost grpo. [MMP-R220]\n"
    )


def test_rows_with_answers_are_asked_without_them(mmpost, project):
    """Rows of supervised training are questions, too; and a run of upt goes on as one."""
    words = ["upt", "sft.jsonl", *SHARED, "num_generations=4", "max_completion_length=4", "save_steps=1"]
    done = mmpost(*words, "max_steps=2", "output_dir=runs/it")
    assert done.code == 0, done.err
    assert "vote:" in (project / "runs/it/config.yaml").read_text()
    again = mmpost("resume", "runs/it")
    assert again.code == 0
    assert "already finished" in again.err


def test_help_has_the_section_of_the_vote(mmpost):
    shown = mmpost("upt", "--help", "vote")
    assert shown.code == 0
    assert all(name in shown.out for name in ("variant", "ties", "min_support", "labels"))


def kill_until_done(words, watched, *, kills, seed):
    """Start the command again and again; all but the last start are killed shortly after a file has changed."""
    chance, lost = random.Random(seed), 0
    for attempt in range(kills + 1):
        process = subprocess.Popen(
            [sys.executable, "-m", "mmpost", *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if attempt == kills:
            _, err = process.communicate(timeout=600)
            assert process.returncode == 0, err.decode()
            return lost
        before = watched.read_bytes() if watched.is_file() else b""
        while process.poll() is None and (watched.read_bytes() if watched.is_file() else b"") == before:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.4))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        lost += process.returncode == -signal.SIGKILL
    raise AssertionError("unreachable")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_of_a_run_change_nothing(mmpost, voting):
    words = [*UPT, "max_steps=30", "save_steps=2", "rewards=[judge.py:voted]"]
    assert mmpost(*words, "output_dir=runs/whole").code == 0
    run = voting / "runs" / "parts"
    assert kill_until_done([*words, "output_dir=runs/parts"], run / "metrics.jsonl", kills=4, seed=0) >= 3
    assert weights(run) == weights(voting / "runs" / "whole")
    assert records(run) == records(voting / "runs" / "whole")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", ["filter", "synthesize"])
def test_kills_of_data_commands_change_nothing(mmpost, voting, command):
    lines = (voting / "grpo.jsonl").read_text().splitlines()
    rows = [{**json.loads(lines[i % len(lines)]), "id": f"row-{i}"} for i in range(320)]
    (voting / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", command, "many.jsonl", "--model", "tiny-qwen2.5-vl", "--max-new-tokens", "12"]
    if command == "filter":
        words += ["--reward", "judge.py:curious", "--keep", "mixed"]
    else:
        words += ["--min-words", "0", "--low", "0", "--high", "1", "--mode", "in_context"]
    assert mmpost(*words, "--out", "whole/rows.jsonl").code == 0
    parts = voting / "parts" / "rows.jsonl"
    lost = kill_until_done([*words, "--out", parts], parts.with_name("rows.rollouts.jsonl"), kills=4, seed=1)
    assert lost >= 3
    for name in ("rows.jsonl", "rows.rollouts.jsonl"):
        assert (parts.parent / name).read_bytes() == (voting / "whole" / name).read_bytes()
