"""The demo of label-free training: the share of the labels' gain, readings, and what refuses to start."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from mmpost.cli.demo_upt import Plan
from mmpost.cli.questions import synthesize_first
from mmpost.config.upt import UPTConfig
from mmpost.core.errors import MmpostError
from mmpost.eval.stats import gain_ratio, paired_bootstrap
from mmpost_tasks import demo_vqa


def test_every_stage_of_every_seed_has_a_folder_of_its_own():
    plan = Plan(Path("out"))
    assert len({plan.folder(seed, stage) for seed in plan.seeds for stage in ("sft", "upt")}) == 6


def test_the_share_of_a_gain_is_exact_where_every_row_gains_alike():
    start = [[0.0, 0.5, 0.25], [0.5, 0.0, 0.25]]
    half = [[value + 0.1 for value in run] for run in start]
    whole = [[value + 0.2 for value in run] for run in start]
    share, interval = gain_ratio(start, half, whole, seed=0)
    assert interval is not None
    assert (share, *interval) == pytest.approx((0.5, 0.5, 0.5))


def test_the_share_of_a_gain_is_the_quotient_of_the_gains():
    rng = np.random.default_rng(0)
    start, a, b = rng.random((3, 200)), rng.random((3, 200)) + 0.2, rng.random((3, 200)) + 0.4
    share, interval = gain_ratio(start, a, b, seed=0)
    assert share == pytest.approx(paired_bootstrap(start, a, seed=0)[0] / paired_bootstrap(start, b, seed=0)[0])
    assert interval is not None
    assert interval[0] < share < interval[1]


def test_no_share_of_a_gain_that_is_none():
    assert gain_ratio([[0.5, 0.5]], [[1.0, 1.0]], [[0.5, 0.4]], seed=0) == (None, None)


def test_an_uncertain_gain_may_have_an_infinite_share():
    start, a, b = [[0.0] * 4], [[0.5] * 4], [[1.0, -1.0, 1.0, -0.5]]
    share, interval = gain_ratio(start, a, b, seed=0)
    assert share == pytest.approx(4.0)
    assert interval is not None
    assert interval[1] == math.inf
    assert interval[0] < share


def test_a_reading_says_what_the_answer_follows_from():
    asked = demo_vqa.load("train", limit=400)
    read = demo_vqa.TASK_READING.load("train", limit=400)
    orders = set()
    for plain, row in zip(asked, read, strict=True):
        assert row.turns[0] == plain.turns[0]
        assert row.columns == plain.columns
        said, answer = re.fullmatch(r"(.*)(<answer>.*</answer>)", row.turns[1].text).groups()
        assert answer == plain.turns[1].text
        kind, solution, text = row.columns["kind"], row.columns["solution"], row.turns[0].text
        tiles = dict(re.findall(r"([LMR])(\d)", said))
        orders.add("".join(tiles))
        if kind == "name":
            assert row.columns["choices"]["ABCD".index(solution)] == said
        elif kind == "sum":
            assert sum(map(int, tiles.values())) == int(solution)
        elif kind == "larger":
            assert max(map(int, tiles.values())) == int(solution)
        elif kind == "count":
            assert len(tiles) == 3
            assert sum(map(int, tiles.values())) == int(solution)
        else:
            place = next(
                (letter for letter, word in zip("LMR", ("left", "middle", "right"), strict=True) if word in text), ""
            )
            assert (tiles[place] if place else said) == solution
    assert orders >= {"", "LR", "RL", "LMR", "LRM", "MLR", "MRL", "RLM", "RML"}


def test_a_vote_that_nobody_can_win_is_refused():
    assert UPTConfig(num_generations=4, min_support=4).vote.min_support == 4
    with pytest.raises(MmpostError) as caught:
        UPTConfig(num_generations=4, min_support=5)
    assert str(caught.value) == (
        "vote.min_support: expected at most grpo.num_generations = 4, got 5; no vote is won. "
        "Set vote.min_support=4 or less, or grpo.num_generations=5 or more. [MMP-C004]"
    )


@pytest.mark.parametrize("words", [["--processes", "2"], ["--processes=2"]])
def test_words_about_processes_are_no_options_of_the_questions(words):
    with pytest.raises(MmpostError, match="MMP-R231"):  # and not that the word is unknown
        synthesize_first(["--synthesize-questions", *words, "task:demo_vqa"])


def test_questions_are_not_made_by_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MmpostError, match=r"MMP-R234"):
        synthesize_first(["--synthesize-questions", "output_dir=runs/upt"])
