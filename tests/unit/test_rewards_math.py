"""Mathematical answers: what is equal, what is decided without algebra, what hangs, what is missing."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from mmpost.rewards import workers
from mmpost.rewards.mathematics import math

ROOT = Path(__file__).resolve().parents[2]
HANGS = "10^{10^{10}}"


def box(*answers):
    return [rf"\boxed{{{answer}}}" for answer in answers]


def test_equal_expressions_by_hand():
    table = [
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", 1), ("x+1", "1+x", 1), ("(x+1)^2", "x^2+2x+1", 1),
        ("x^2", "x", 0), (r"\{1,2\}", r"\{2,1\}", 1), ("(1,2)", "(2,1)", 0), (r"2\pi", r"\pi", 0),
        (r"\sqrt{4}", "2", 1), (r"\frac{1}{3}", "0.5", 0), ("x=5", "5", 1), (r"\text{red}", r"\pi", 0),
    ]  # fmt: skip
    said, gold, right = zip(*table, strict=True)
    assert math([[]] * len(table), box(*said), solution=list(gold)) == [float(score) for score in right]


def test_numbers_letters_and_equal_texts_need_no_worker():
    table = [
        ("7", "7.0", 1), ("1,234", "1234", 1), ("8", "7", 0), ("1/2", "0.5", 1), (r"\frac12", "0.5", 1), ("B", "B", 1),
        ("(B)", "B", 1), ("b", "B", 1), ("A", "B", 0), (r"\alpha^2", r"\alpha^2", 1), ("5 cm", "5", 1),
    ]  # fmt: skip
    said, gold, right = zip(*table, strict=True)
    before = workers.shared_pool().started
    texts = [*box(*said), "no answer", ""]
    scores = math([[]] * len(texts), texts, solution=[*gold, r"\pi", "x"])
    assert scores == [*(float(score) for score in right), 0.0, 0.0]
    assert workers.shared_pool().started == before


def test_rows_without_a_readable_solution_score_none():
    assert math([[]] * 3, box("x", "x", "3"), solution=[None, "", "3"]) == [None, None, 1.0]


def test_several_right_answers():
    said = box("1+x", "x-1", "3")
    assert math([[]] * 3, said, solution=[["y", "x+1"], ["y", "x+1"], ["x", "3"]]) == [1.0, 0.0, 1.0]


def test_what_hangs_gives_none_and_the_others_their_scores_in_order():
    math([[]], box("1+x"), solution=["x+1"])
    clock = time.perf_counter()
    scores = math([[]] * 4, box("1+x", HANGS, "x", "2+x"), solution=["x+1", "7", "7", "x+2"], item_timeout=1)
    assert time.perf_counter() - clock < 20
    assert scores == [1.0, None, 0.0, 1.0]


def test_an_unknown_comparison_beats_a_wrong_one_but_not_a_right_one():
    assert math([[]] * 2, box("1+x", "1+x"), solution=[[HANGS, "y"], [HANGS, "x+1"]], item_timeout=1) == [None, 1.0]


def test_without_the_library_the_extra_is_named():
    code = """
import sys
sys.modules["math_verify"] = None
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost.rewards import REWARDS
try:
    Catalog("rewards", REWARDS).get("math")
except MmpostError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == (
        "'math' needs math_verify, which is not installed. Run: pip install \"mmpost-toolkit[math]\" [MMP-E010]\n"
    )


def test_sympy_stays_out_of_this_process():
    code = "import sys, mmpost.rewards.mathematics; print('sympy' in sys.modules, 'math_verify' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "False False\n"
