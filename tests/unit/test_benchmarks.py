"""The harness of the comparisons with TRL, and the equality of both trainers' gradients."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import grpo_vs_trl, lockstep, model, report, rows, sft_vs_trl
from benchmarks.lockstep import Run
from benchmarks.trainers import SEED, Job, mmpost_trainer, reward

ROOT = Path(__file__).resolve().parents[2]
SECONDS = [1.0, 1.5, 0.9, 1.1, 1.2, 4.0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    model.build(folder, "tiny")
    return folder


@dataclass(frozen=True)
class ToyJob:
    folder: str
    steps: int
    megabytes: int = 0
    fails: bool = False
    device: str = "cpu"


def toy(job, gate):
    """A trainer that writes down its turns and holds memory for the length of a step."""
    gate.open()
    for _ in range(job.steps):
        if job.fails:
            raise ValueError("the toy broke")
        with (Path(job.folder).parent / "turns").open("a") as out:
            out.write(Path(job.folder).name)
        held = bytearray(job.megabytes << 20)
        del held
        gate.step()


def test_ratio_of_a_trainer_with_itself_is_one():
    assert lockstep.ratio(SECONDS, SECONDS) == (1.0, 1.0, 1.0)


def test_ratio_scales_with_the_other_trainers_time():
    value, low, high = lockstep.ratio(SECONDS, [3 * s for s in SECONDS])
    assert value == pytest.approx(3)
    assert (low, high) == (pytest.approx(3), pytest.approx(3))


def test_interval_holds_the_ratio_and_widens_with_noise():
    steady = lockstep.ratio([1.0, 1.01, 0.99, 1.0, 1.02, 0.98], [2.0] * 6)
    noisy = lockstep.ratio([1.0, 1.5, 0.5, 1.2, 0.7, 1.0], [2.0] * 6)
    assert steady[1] <= steady[0] <= steady[2]
    assert noisy[2] - noisy[1] > 3 * (steady[2] - steady[1])


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [1.0, 2.0]), ([], [])])
def test_ratio_needs_the_same_rounds(ours, theirs):
    with pytest.raises(ValueError, match=f"{len(ours)} of our steps but {len(theirs)} of theirs"):
        lockstep.ratio(ours, theirs)


def test_trainers_take_turns_in_reversed_order_and_memory_is_their_own(tmp_path):
    racers = {name: (toy, ToyJob(str(tmp_path / name), steps=4, megabytes=mb)) for name, mb in (("A", 0), ("B", 96))}
    runs = lockstep.race(racers, rounds=3, warmup=1, together=True)
    assert (tmp_path / "turns").read_text() == "ABBAABBA"
    assert [len(run.seconds) for run in runs.values()] == [3, 3]
    assert runs["B"].peak - runs["A"].peak == pytest.approx(96 << 20, rel=0.2)


def test_one_at_a_time_keeps_trainers_apart(tmp_path):
    racers = {name: (toy, ToyJob(str(tmp_path / name), steps=2)) for name in "AB"}
    lockstep.race(racers, rounds=2, warmup=0, together=False)
    assert (tmp_path / "turns").read_text() == "AABB"


def test_failure_of_a_trainer_is_told_with_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)A failed:.*ValueError: the toy broke"):
        lockstep.race({"A": (toy, ToyJob(str(tmp_path / "A"), steps=1, fails=True))}, rounds=1, warmup=0, together=True)


def test_cases_cover_the_promised_grid():
    assert len(grpo_vs_trl.CASES) == 18
    assert {c.image_tokens for c in grpo_vs_trl.CASES.values()} == {64, 256, 1024}
    assert {c.generations for c in grpo_vs_trl.CASES.values()} == {8, 16}
    assert {c.completion for c in grpo_vs_trl.CASES.values()} == {32, 128, 256}
    assert set(grpo_vs_trl.QUICK) <= set(grpo_vs_trl.CASES)
    assert set(sft_vs_trl.QUICK) <= set(sft_vs_trl.CASES)


@pytest.mark.parametrize("tokens", [16, 64, 1024])
def test_picture_becomes_the_wanted_number_of_tokens(weights, tmp_path, tokens):
    from transformers import AutoProcessor

    (row,) = rows.write(tmp_path, [model.image_edge(tokens)])
    processor = AutoProcessor.from_pretrained(weights)
    grid = processor.image_processor([Image.open(row.image)], return_tensors="pt")["image_grid_thw"]
    assert int(grid.prod()) // 4 == tokens


def test_edge_of_an_impossible_number_of_tokens():
    with pytest.raises(ValueError, match="50 image tokens are not a square number"):
        model.image_edge(50)


def test_rewards_depend_on_ids_and_do_not_tie():
    completions = [[1, 2, 3], [3, 2, 1], [1, 2], [1, 2, 3]]
    scores = reward(completions, prompts=None)
    assert scores[0] == scores[3]
    assert len(set(scores[:3])) == 3
    assert all(0 <= score < 1 for score in scores)


def test_trl_gets_the_rows_in_the_order_in_which_mmpost_draws_them(weights, tmp_path):
    drawn = rows.write(tmp_path / "pictures", [28] * 6, words=[(i, 0) for i in range(6)])
    job = Job(str(tmp_path), str(weights), tuple(drawn), steps=3, mmpost={"sample_steps": 1, "samples": 2})
    run = mmpost_trainer(job).train()
    records = [json.loads(line) for file in sorted(run.rglob("*.jsonl")) for line in file.read_text().splitlines()]
    seen = [record["prompt"] for record in records if "prompt" in record]
    assert seen == [row.question for row in rows.in_drawing_order(drawn, SEED)]
    assert seen != [row.question for row in drawn]


def test_record_has_the_promised_keys():
    runs = {"mmpost": Run([1.0, 1.2], 50), "trl": Run([2.0, 2.4], 100), "trl_no_ckpt": Run([1.5, 1.8], 200)}
    line = report.record("x", runs, {"device": "cpu"})
    assert (line["case"], line["mmpost_s"], line["trl_s"], line["steps"]) == ("x", 1.1, 2.2, 2)
    assert (line["ratio"], line["ratio_low"], line["ratio_high"]) == (
        2.0,
        pytest.approx(2, rel=0.3),
        pytest.approx(2, rel=0.3),
    )
    assert (line["peak_mem_ratio"], line["peak_mem_ratio_no_ckpt"]) == (0.5, 0.25)
    assert (line["trl_no_ckpt_s"], line["ratio_no_ckpt"]) == (1.65, 1.5)
    assert json.loads(json.dumps(line)) == line


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_loss_and_gradient_are_those_of_trl_on_the_same_rollouts(weights, tmp_path, loss_type):
    pytest.importorskip("trl")
    from benchmarks import agreement

    result = agreement.compare(tmp_path, weights, loss_type, agreement.PAIRS[loss_type])
    assert result.same_parameters
    assert result.parameters > 100
    assert len(set(result.lengths)) > 3
    assert result.mmpost_loss == pytest.approx(result.trl_loss, abs=1e-6)
    assert result.gradient_relative < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("script", "case"), [("grpo_vs_trl", "i64-g8-c32"), ("sft_vs_trl", "small-pictures")])
def test_script_writes_one_line_per_case(tmp_path, script, case):
    pytest.importorskip("trl")
    out = tmp_path / "lines.jsonl"
    command = [sys.executable, f"benchmarks/{script}.py", "--cases", case, "--steps", "2", "--warmup", "1"]
    subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=300
    )
    (line,) = [json.loads(text) for text in out.read_text().splitlines()]
    assert line["case"] == case
    assert line["steps"] == 2
    assert min(line["mmpost_s"], line["trl_s"], line["ratio"], line["peak_mem_ratio"]) > 0
