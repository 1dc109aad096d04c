"""Proxy runs: what they are told, that each runs once, and what a suggestion looks like as a configuration."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mmpost.config.load import load
from mmpost.config.run import GRPOConfig, SFTConfig
from mmpost.core.errors import MmpostError
from mmpost.mixture.designs import design
from mmpost.mixture.fit import fit
from mmpost.mixture.processes import Job, Processes
from mmpost.mixture.records import MixtureRecord
from mmpost.mixture.run import open_proxy, read_settings, run
from mmpost.mixture.scores import Target
from mmpost.mixture.suggest import fragment, suggest, write_fragments

PROXY = """
data:
  train:
    - {path: "task:mix_digits", limit: 40}
    - {path: "task:mix_shoes", name: shoes, weight: 5}
train: {max_steps: 3, batch_size: 4}
eval: {tasks: [mix_digits]}
"""


@pytest.fixture
def proxy(tmp_path):
    file = tmp_path / "proxy.yaml"
    file.write_text(PROXY)
    return str(file)


def test_a_run_gets_its_weights_as_ordinary_words(proxy, tmp_path):
    opened = open_proxy(proxy, ["train.learning_rate=1e-4"], ["shoes", "mix_digits"])
    words = opened.command({"shoes": 0.25, "mix_digits": 0.75}, 3, tmp_path / "x")
    assert words[:4] == (sys.executable, "-m", "mmpost", "sft")
    config = load(SFTConfig, [words[4]], words[5:]).config
    assert [source.weight for source in config.data.train] == [0.75, 0.25]
    assert (config.train.seed, config.train.learning_rate) == (3, 1e-4)
    assert config.train.output_dir == str(tmp_path / "x")


def test_rewards_make_it_grpo(proxy):
    opened = open_proxy(proxy, ["rewards=[answer]"], ["shoes"])
    assert isinstance(opened.config, GRPOConfig)
    assert opened.command({}, 0, Path("x"))[3] == "grpo"
    assert opened.rows_per_step == 16


@pytest.mark.parametrize(
    ("words", "sources", "told"),
    [
        ([], ["shoes", "tops"], "has sources mix_digits, shoes, but the design asks for shoes, tops."),
        (["train.max_steps=null"], ["shoes"], "sets no train.max_steps, so that runs would not be equally long."),
        (["eval.tasks=[]"], ["shoes"], "has no eval.tasks to score the runs by."),
        (["data.train.1.name=mix_digits"], ["mix_digits"], "has sources mix_digits, mix_digits, but the design asks"),
    ],
)
def test_a_proxy_that_does_not_fit_is_refused(proxy, words, sources, told):
    with pytest.raises(MmpostError) as caught:
        open_proxy(proxy, words, sources)
    assert told in str(caught.value)
    assert str(caught.value).endswith(
        "Give every source of data.train a name, set train.max_steps and eval.tasks. [MMP-V029]"
    )


def job(tmp_path, name, code):
    folder = tmp_path / name
    return Job(name, (sys.executable, "-c", code), folder, tmp_path / f"{name}.log", tmp_path / f"{name}.lock")


def finished(one):
    return (one.folder / "done").is_file()


COUNT = """
import pathlib, time
folder = pathlib.Path({folder!r})
folder.mkdir(exist_ok=True)
with (folder / "starts").open("a") as file:
    file.write("x")
time.sleep({seconds})
(folder / "done").touch()
"""


def counting(tmp_path, name, seconds=0.0):
    return job(tmp_path, name, COUNT.format(folder=str(tmp_path / name), seconds=seconds))


@pytest.mark.parametrize("slots", [1, 3])
def test_every_job_runs_once_and_failures_do_not_stop_the_others(tmp_path, slots):
    jobs = [counting(tmp_path, f"j{i}") for i in range(3)] + [job(tmp_path, "bad", "raise SystemExit(7)")]
    ended = list(Processes(slots, finished).run([jobs[3], *jobs[:3]]))
    assert {one.name: code for one, code in ended} == {"j0": 0, "j1": 0, "j2": 0, "bad": 7}
    assert [(tmp_path / f"j{i}" / "starts").read_text() for i in range(3)] == ["x"] * 3
    again = list(Processes(slots, finished).run(jobs[:3]))
    assert [code for _, code in again] == [0, 0, 0]
    assert (tmp_path / "j0" / "starts").read_text() == "x"


@pytest.mark.parametrize("slots", [1, 3])
def test_a_job_waits_for_what_it_needs_and_is_given_up_with_it(tmp_path, slots):
    look = "import pathlib, sys; sys.exit(0 if (pathlib.Path({folder!r}) / 'done').is_file() else 5)"
    first = counting(tmp_path, "first", 0.3)
    after = replace(job(tmp_path, "after", look.format(folder=str(first.folder))), needs=("first",))
    bad = job(tmp_path, "bad", "raise SystemExit(7)")
    lost = replace(counting(tmp_path, "lost"), needs=("bad",))
    lost_too = replace(counting(tmp_path, "lost too"), needs=("first", "lost"))
    ended = list(Processes(slots, finished).run([after, first, bad, lost, lost_too]))
    assert {one.name: code for one, code in ended} == {"first": 0, "after": 0, "bad": 7}
    assert not lost.folder.exists()
    assert not lost_too.folder.exists()


def starting(one):
    """A process of its own that runs the job."""
    code = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from mmpost.mixture.processes import Job, Processes
job = Job("j", {one.command!r}, Path({str(one.folder)!r}), Path({str(one.log)!r}), Path({str(one.lock)!r}))
list(Processes(1, lambda j: False).run([job]))
"""
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def test_a_killed_starter_leaves_its_run_and_the_next_one_waits_for_it(tmp_path):
    one = counting(tmp_path, "j", 1.5)
    starter = starting(one)
    while not (tmp_path / "j" / "starts").is_file():
        time.sleep(0.01)
    starter.kill()
    assert starter.wait() == -signal.SIGKILL
    assert not finished(one)
    assert list(Processes(1, finished).run([one])) == [(one, 0)]
    assert finished(one)
    assert (tmp_path / "j" / "starts").read_text() == "x"


def test_an_interrupted_starter_passes_the_signal_on(tmp_path):
    code = f"""
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path({str(tmp_path / "stopped")!r}).touch()
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
pathlib.Path({str(tmp_path / "ready")!r}).touch()
time.sleep(60)
"""
    starter = starting(job(tmp_path, "slow", code))
    while not (tmp_path / "ready").is_file():
        time.sleep(0.01)
    starter.send_signal(signal.SIGINT)
    assert starter.wait(30) != 0
    assert (tmp_path / "stopped").is_file()


def test_an_unknown_or_missing_engine_is_told(proxy, tmp_path):
    opened, made = open_proxy(proxy, [], ["mix_digits", "shoes"]), design(["mix_digits", "shoes"], "singles")
    with pytest.raises(MmpostError, match=r"unknown name 'dask' among engines. Known: processes, ray"):
        run(made, opened, tmp_path / "out", engine="dask")


def test_runs_of_another_proxy_do_not_mix(proxy, tmp_path):
    made = design(["mix_digits", "shoes"], "singles")
    for words in ([], ["train.max_steps=4"]):
        opened = open_proxy(proxy, words, made.sources)
        with pytest.raises(MmpostError) as caught:
            run(made, opened, tmp_path / "out", engine="dask")
    assert str(caught.value) == (
        f"'{tmp_path / 'out'}' holds runs of another proxy configuration; different: config.train.max_steps. "
        "Choose another --out. [MMP-V030]"
    )
    names = [source["name"] for source in read_settings(tmp_path / "out")["sources"]]
    assert names == ["mix_digits", "shoes"]


@pytest.fixture
def fitted(proxy):
    settings = open_proxy(proxy, [], ["mix_digits", "shoes"]).settings(1)
    weights = design(["mix_digits", "shoes"], "seeds,dirichlet", 8).named()
    records = [
        MixtureRecord(row, {"t": {"value": round(0.4 + 0.5 * row["shoes"] * row["mix_digits"], 6), "n": 500}})
        for row in weights
    ]
    return fit(records, Target(), "auto", settings=settings)


def test_a_suggestion_is_a_configuration_of_its_own(fitted, proxy, tmp_path):
    found = suggest(fitted, 2, floor=0.1, strategy="mean")
    files = write_fragments(tmp_path / "s" / "mix.yaml", fitted, found)
    assert [file.name for file in files] == ["mix.yaml", "mix-2.yaml"]
    config = load(SFTConfig, [proxy, files[0]], []).config
    assert [(source.path, source.name, source.limit) for source in config.data.train] == [
        ("task:mix_digits", "mix_digits", 40),
        ("task:mix_shoes", "shoes", None),
    ]
    assert [source.weight for source in config.data.train] == list(found.chosen[0].weights.values())
    assert sum(source.weight for source in config.data.train) == pytest.approx(1)
    text = files[0].read_text()
    low, mean = found.uniform.low, found.uniform.mean
    assert f"#   uniform       {mean:.3f} [{low:.3f}, " in text
    assert yaml.safe_load(text)["data"]["train"][0]["weight"] >= 0.1


def test_a_suggestion_without_settings_names_the_sources(fitted):
    fitted.settings = {}
    assert "path: mix_digits" in fragment(fitted, suggest(fitted, 1))


def test_ray_is_asked_for_by_name(proxy, tmp_path):
    pytest.importorskip("ray", reason="the optional engine is not installed")
    from mmpost.mixture.ray_engine import RayEngine

    jobs = [counting(tmp_path, f"j{i}") for i in range(2)]
    assert {one.name: code for one, code in RayEngine(2, finished).run(jobs)} == {"j0": 0, "j1": 0}
    assert json.dumps(sorted(os.listdir(tmp_path / "j0"))) == '["done", "starts"]'
