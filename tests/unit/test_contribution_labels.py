"""Rules of the contribution filter against tables worked out by hand, scipy, and simulated voters."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from mmpost.contribution.labels import (
    Votes,
    answered,
    chances,
    difference,
    fisher_tail,
    habits,
    paper,
    record,
    robust,
    tail,
    tally,
)
from mmpost.core.sample import Part, Sample, Turn

RIGHT, WRONG = Votes(1, 1), Votes(0, 1)


@pytest.mark.parametrize("pattern", list(itertools.product([0, 1], repeat=3)))
def test_paper_rule_is_two_of_three(pattern):
    label = paper([RIGHT if one else WRONG for one in pattern])
    assert label == ("weak" if sum(pattern) >= 2 else "strong")


@pytest.mark.parametrize(
    ("votes", "label"),
    [
        ([RIGHT], "weak"),
        ([WRONG], "strong"),
        ([RIGHT, WRONG], "strong"),
        ([RIGHT, RIGHT], "weak"),
        # Several votes of a model are its majority; half is none.
        ([Votes(2, 4)], "strong"),
        ([Votes(3, 4)], "weak"),
        ([Votes(4, 4), Votes(1, 4), Votes(3, 4)], "weak"),
        ([Votes(4, 4), Votes(2, 4), Votes(2, 4)], "strong"),
    ],
)
def test_paper_rule_for_other_numbers(votes, label):
    assert paper(votes) == label


@pytest.mark.parametrize("asked", [1, 4, 12])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_tail_of_equal_chances_is_scipys(asked, p):
    for right in range(asked + 1):
        assert tail(right, [(asked, p)]) == pytest.approx(stats.binom.sf(right - 1, asked, p), abs=1e-12)


def test_tail_of_different_chances_is_that_of_all_outcomes():
    guesses = [(2, 0.25), (3, 0.5), (1, 0.9)]
    each = [p for asked, p in guesses for _ in range(asked)]
    for right in range(7):
        exact = sum(
            math.prod(p if hit else 1 - p for p, hit in zip(each, outcome, strict=True))
            for outcome in itertools.product([0, 1], repeat=6)
            if sum(outcome) >= right
        )
        assert tail(right, guesses) == pytest.approx(exact)


@pytest.mark.parametrize("table", [(4, 4, 0, 4), (3, 4, 1, 4), (0, 4, 4, 4), (8, 12, 2, 4), (2, 3, 2, 5)])
def test_fisher_tail_is_scipys(table):
    right, asked, other_right, other_asked = table
    expected = stats.fisher_exact(
        [[right, asked - right], [other_right, other_asked - other_right]], alternative="greater"
    ).pvalue
    assert fisher_tail(Votes(right, asked), Votes(other_right, other_asked)) == pytest.approx(expected)


def test_difference_is_newcombes_example():
    # Newcombe 1998, table II, contrast (a) 56/70 - 48/80, method 10: 0.0524 to 0.3339.
    assert difference(Votes(56, 70), Votes(48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize(
    ("votes", "chance", "expected"),
    [
        ([Votes(4, 4)], 0.25, True),  # p = 0.004
        ([Votes(3, 4)], 0.25, True),  # p = 0.051, but three quarters of the votes of every model
        ([Votes(2, 4)], 0.25, False),
        ([Votes(1, 4)], 0.05, False),  # p = 0.185
        ([Votes(2, 4)], 0.05, True),  # p = 0.014
        # 6 of 12 at one quarter has p = 0.054, 7 of 12 has 0.014; no model is sure.
        ([Votes(2, 4), Votes(2, 4), Votes(2, 4)], 0.25, False),
        ([Votes(3, 4), Votes(2, 4), Votes(2, 4)], 0.25, True),
        # Two sure models of three, far from 5 % where chance is a half: 6 of 12 has p = 0.61.
        ([Votes(3, 4), Votes(3, 4), Votes(0, 4)], 0.5, True),
        ([Votes(3, 4), Votes(2, 4), Votes(1, 4)], 0.5, False),
        ([Votes(0, 0)], 0.25, False),
    ],
)
def test_answered(votes, chance, expected):
    assert answered([[(one, chance)] for one in votes]) is expected


@pytest.mark.parametrize(
    ("full", "bare", "label"),
    [
        (4, {"silence": 4, "none": 4}, "weak"),
        (4, {"silence": 4, "none": 1}, "weak"),  # 5 of 8: p = 0.027
        (4, {"silence": 2, "none": 2}, "strong"),  # 4 of 8: p = 0.114
        (4, {"silence": 0, "none": 0}, "strong"),
        (2, {"silence": 1, "none": 0}, "strong"),
        (1, {"silence": 0, "none": 0}, "hard"),
        (0, {"silence": 2, "none": 2}, "hard"),  # p = C(8,4) / C(12,4) = 0.14
    ],
)
def test_robust_rule(full, bare, label):
    votes = {name: [Votes(right, 4)] for name, right in bare.items()}
    assert robust([Votes(full, 4)], votes, 0.25) == label


def test_better_without_is_harmful():
    # 6 of 12 without against 0 of 12 with: p = C(12,6) / C(24,6) = 0.007; by chance of one half nothing is known.
    assert robust([Votes(0, 12)], {"none": [Votes(6, 12)]}, 0.5) == "harmful"
    assert robust([Votes(4, 12)], {"none": [Votes(6, 12)]}, 0.5) == "hard"


def test_a_fixed_answer_to_silence_is_no_knowledge():
    """All of silence is answered as this row is, nothing is known without sound: 5 of 8 by chance."""
    votes = {"silence": [Votes(4, 4)], "none": [Votes(1, 4)]}
    assert robust([Votes(4, 4)], votes, 0.25) == "weak"
    assert robust([Votes(4, 4)], votes, 0.25, {"silence": [0.9], "none": [0.25]}) == "strong"
    # Whoever also knows it without any sound, knows it: 8 of 8.
    votes = {"silence": [Votes(4, 4)], "none": [Votes(4, 4)]}
    assert robust([Votes(4, 4)], votes, 0.25, {"silence": [0.9], "none": [0.25]}) == "weak"


def test_habits_count_what_is_said():
    rows = [row(1, "a"), row(2, "b"), row(3, "c")]
    assert habits(rows, ["A", "a ", "b"]) == [2 / 3, 1 / 3, 0.0]


def test_rows_without_a_score_have_no_label():
    assert robust([Votes(0, 0)], {"silence": [Votes(0, 0)]}, 0.25) == "unscored"


def labels_of_guessers(rng, rows, k):
    """Votes without the medium of three models that guess among four options."""
    guess = rng.random((rows, 3, k)) < 0.25
    return [[Votes(int(one.sum()), k) for one in row] for row in guess]


def test_planted_world():
    """Guessing voters make the paper's rule call 15.6 % of strong rows weak; four votes each make it under 3 %."""
    rng = np.random.default_rng(0)
    strong = 4000
    expected = 3 * 0.25**2 * 0.75 + 0.25**3
    assert expected == pytest.approx(0.156, abs=5e-4)
    by_paper = np.mean([paper(votes) == "weak" for votes in labels_of_guessers(rng, strong, 1)])
    assert abs(by_paper - expected) < 4 * math.sqrt(expected * (1 - expected) / strong)
    by_robust = np.mean([answered([[(v, 0.25)] for v in votes]) for votes in labels_of_guessers(rng, strong, 4)])
    assert by_robust < 0.03
    # Models that know nine answers of ten.
    know = rng.random((strong, 3, 4)) < 0.9
    found = [answered([[(Votes(int(one.sum()), 4), 0.25)] for one in row]) for row in know]
    assert np.mean(found) > 0.95


def row(number, solution, **columns):
    turns = (Turn("user", (Part("text", "?"),)),)
    return Sample(str(number), turns, {"solution": solution, **columns}, f"rows.jsonl:{number}")


def test_chance_is_that_of_the_options_or_of_the_most_usual_answer():
    rows = [row(1, "a", options=["a", "b"]), row(2, "A "), row(3, "b", choices=list("abcd")), row(4, "c")]
    assert chances(rows) == [(2, 0.5), (None, 0.5), (4, 0.25), (None, 0.25)]


def test_a_record_counts_by_hand():
    votes = {
        "one": {
            "with": {"right": [1, 1, 1, None]},
            "silence": {"right": [0, 1, 0, 0]},
            "none": {"right": [0, 0, 0, 0]},
        },
        "two": {"with": {"right": [1, 0, 1, 1]}, "silence": {"right": [1, 0, 0, 0]}, "none": {"right": [0, 0, 1, 0]}},
    }
    assert tally(votes["one"])["with"] == Votes(3, 3)
    found = record(row(1, "a"), votes, ["none", "silence"], 4, 0.25)
    assert found["with"] == pytest.approx(6 / 7)
    assert found["without"] == pytest.approx(3 / 16)
    assert found["by_null"] == {"none": 1 / 8, "silence": 2 / 8}
    assert found["contribution"] == pytest.approx(6 / 7 - 3 / 16)
    assert found["corrected"] == pytest.approx((6 / 7 - 3 / 16) / 0.75)
    assert (found["paper"], found["robust"]) == ("strong", "strong")


def test_renaming_options_changes_nothing():
    """The label depends on which votes are right alone."""
    votes = {"m": {"with": {"right": [1] * 4}, "silence": {"right": [1, 0, 0, 1]}}}
    a = record(row(1, "a", options=["a", "b"]), votes, ["silence"], 2, 0.5)
    b = record(row(1, "b", options=["b", "a"]), votes, ["silence"], 2, 0.5)
    assert {key: a[key] for key in a if key != "solution"} == {key: b[key] for key in b if key != "solution"}
