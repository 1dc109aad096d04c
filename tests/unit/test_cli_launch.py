"""Words about processes, and the order in which children end."""

import subprocess
import sys
import time

import pytest

from mmpost.cli import launch
from mmpost.cli.launch import Launch
from mmpost.core.errors import MmpostError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a.yaml", "train.seed=1"], None),
        (["--gpus", "4"], Launch(4, "gpus")),
        (["--gpus=4"], Launch(4, "gpus")),
        (["--processes", "2"], Launch(2, "processes")),
        (["nproc=8", "nnodes=2", "node_rank=1", "master=host:29501"], Launch(8, "nproc", 2, 1, "host:29501")),
        (["--gpus", "8", "nnodes=2", "node_rank=0", "master=host"], Launch(8, "gpus", 2, 0, "host")),
    ],
)
def test_words_about_processes_are_taken_out(words, expected):
    found, rest = launch.split(["rows.jsonl", *words, "max_steps=3"])
    assert found == expected
    kept = words if expected is None else []
    assert rest == ["rows.jsonl", *kept, "max_steps=3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "two"], "gpus: expected a whole number from 1 on, got 'two'. Write for example --gpus 2."),
        (["--gpus"], "gpus: expected a whole number from 1 on, got ''. Write for example --gpus 2."),
        (["nproc=0"], "nproc: expected a whole number from 1 on, got '0'. Write for example nproc=2."),
        (["--gpus", "2", "--gpus", "2"], "'--gpus' is given twice. Leave one of them out."),
        (
            ["--gpus", "2", "nproc=2"],
            "cannot tell the number of processes from: --gpus, nproc. Give one of --gpus, --processes, nproc.",
        ),
        (
            ["nnodes=2"],
            "cannot tell the number of processes from: nnodes. Give one of --gpus, --processes, nproc.",
        ),
        (
            ["nproc=1", "nnodes=2", "node_rank=0"],
            "nnodes=2 needs node_rank and master. Add, on each machine: node_rank=NUMBER master=HOST:PORT, where HOST "
            "is the machine with number 0.",
        ),
        (
            ["nproc=1", "nnodes=2", "node_rank=2", "master=h:1"],
            "node_rank=2 with nnodes=2. Number the machines from 0 to 1.",
        ),
    ],
)
def test_a_wrong_word_is_told(words, message):
    with pytest.raises(MmpostError) as caught:
        launch.split(words)
    assert str(caught.value) == f"{message} [MMP-C060]"
    assert caught.value.exit_code == 2


def test_gpus_on_a_machine_without_any(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(MmpostError) as caught:
        launch.needed(Launch(2, "gpus"))
    assert str(caught.value) == (
        "--gpus 2, but this machine shows no CUDA device. To run on the CPU: --processes 2 [MMP-E040]"
    )
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(MmpostError, match=r"nproc 2, but this machine shows 1 CUDA device. At most: nproc 1"):
        launch.needed(Launch(2, "nproc"))


def test_nothing_is_started_inside_a_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launch.needed(Launch(2, "processes"))
    assert not launch.needed(Launch(1, "processes"))
    assert launch.needed(Launch(1, "processes", 2, 0, "h:1"))
    monkeypatch.setenv("RANK", "0")
    assert not launch.needed(Launch(2, "processes"))


def children(*programs):
    return [subprocess.Popen([sys.executable, "-S", "-c", program]) for program in programs]


def test_the_code_of_the_one_that_failed_is_kept_and_the_others_are_ended(monkeypatch):
    monkeypatch.setattr(launch, "GRACE_S", 0.2)
    started = children("import time; time.sleep(60)", "raise SystemExit(3)")
    clock = time.monotonic()
    assert launch._wait(started) == 3
    assert time.monotonic() - clock < 20
    assert started[0].returncode == -15


def test_one_that_does_not_hear_is_killed(monkeypatch):
    monkeypatch.setattr(launch, "KILL_S", 0.3)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    started = [
        subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read(); raise SystemExit(4)"], stdin=-1),
        subprocess.Popen([sys.executable, "-S", "-c", deaf], stdout=-1),
    ]
    assert started[1].stdout.readline()
    started[0].stdin.close()
    assert launch._wait(started) == 4
    assert started[1].returncode == -9


def test_an_interrupted_process_does_not_end_the_others():
    started = children("raise SystemExit(130)", "import time; time.sleep(0.5); raise SystemExit(130)")
    assert launch._wait(started) == 130
    assert [child.returncode for child in started] == [130, 130]


def test_a_signal_is_a_failure():
    assert launch._wait(children("import os; os.kill(os.getpid(), 9)")) == 137
