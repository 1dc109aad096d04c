"""Guards of the vote on streams of metrics, and what the log says of votes beside labels."""

import numpy as np
import pytest

from mmpost.rewards.equality import Equality
from mmpost.train.diagnose import Diagnosis
from mmpost.train.votes import Vote, gold_texts, summary, votes_of

HEALTHY = {
    "vote/agreement": 0.6,
    "vote/entropy": 0.7,
    "vote/unparsed": 0.02,
    "vote/same_answer": 0.2,
    "vote/accuracy/pseudo_labels": 0.7,
    "completion_length": 100.0,
}


def codes(*phases):
    """Findings over phases of (steps, changes), with a reward that is never constant."""
    diagnosis, found = Diagnosis({}, half=False, max_grad_norm=0), []
    for steps, changes in phases:
        for _ in range(steps):
            step = {**HEALTHY, **{name.replace("__", "/"): value for name, value in changes.items()}}
            found += diagnosis.feed(step)
    return found


def test_a_healthy_vote_raises_no_finding():
    rng = np.random.default_rng(0)
    diagnosis = Diagnosis({}, half=False, max_grad_norm=0)
    for step in range(200):
        share = step / 200
        values = {
            "vote/agreement": 0.5 + 0.35 * share,
            "vote/entropy": 0.9 - 0.5 * share,
            "vote/unparsed": 0.05,
            "vote/same_answer": 0.25,
            "vote/accuracy/pseudo_labels": 0.6 + 0.2 * share,
            "completion_length": 100 - 20 * share,
        }
        assert diagnosis.feed({name: value * rng.uniform(0.95, 1.05) for name, value in values.items()}) == []


@pytest.mark.parametrize(
    ("code", "changes", "words"),
    [
        ("MMP-R221", {"vote__agreement": 0.99}, "99 % of the completions agree with the majority"),
        ("MMP-R221", {"vote__agreement": 0.15}, "the largest class has 15 % of the completions"),
        ("MMP-R222", {"vote__same_answer": 0.7}, " of the questions have the same pseudo-label: the policy"),
        (
            "MMP-R222",
            {"vote__same_answer": 0.7, "vote__agreement": 0.9},
            " of the questions have the same pseudo-label while agreement rose from 0.60 to 0.",
        ),
        ("MMP-R223", {"vote__unparsed": 0.6}, " of the completions of 5 steps hold no answer"),
        (
            "MMP-R224",
            {"vote__entropy": 0.05, "completion_length": 20.0},
            "the entropy of the votes fell from 0.7 to 0.",
        ),
        (
            "MMP-R225",
            {"vote__agreement": 0.8, "vote__accuracy__pseudo_labels": 0.5},
            "agreement rose from 0.60 to 0.",
        ),
    ],
)
def test_each_collapse_is_told_once_in_words(code, changes, words):
    found = [finding for finding in codes((20, {}), (30, changes)) if finding.code == code]
    assert len(found) == 1
    assert words in found[0].words
    assert str(found[0]).endswith(f"[{code}]")
    assert found[0].advice[0].isupper()


def test_a_collapse_that_goes_and_comes_again_is_told_again():
    bad = {"vote__unparsed": 0.6}
    assert [finding.code for finding in codes((9, {}), (9, bad), (9, {}), (9, bad))] == ["MMP-R223"] * 2


def test_high_entropy_with_short_texts_is_no_collapse_and_neither_is_the_reverse():
    assert codes((20, {}), (30, {"vote__entropy": 0.05})) == []
    found = codes((20, {}), (30, {"completion_length": 20.0}))
    assert "MMP-R224" not in [finding.code for finding in found]


def vote(label, answers, gold=()):
    return Vote(label, tuple(answers), 0.5, 0.7, tuple(gold), Equality())


def test_summary_by_hand():
    votes = [
        vote("3", ["3", "3", "4", None], ["3"]),
        vote("bag", ["bag", "The bag", "coat", "coat"], ["coat"]),
        vote(None, ["1", "2", None, None], ["1"]),
        vote("3", ["3.0", "3", "3", "7"]),
    ]
    found = summary(votes)
    assert found["unparsed"] == 3 / 16
    assert found["labelled"] == 3 / 4
    assert found["same_answer"] == 2 / 3
    # Of the rows with a label and a pseudo-label: 1 of 2 pseudo-labels, and 2/4 and 2/4 of the completions.
    assert found["accuracy"] == {"pseudo_labels": 0.5, "completions": 0.5}
    assert found["agreement"] == 0.5
    assert summary([]) == {}
    assert "accuracy" not in summary([vote("3", ["3", "3"])])


@pytest.mark.parametrize(
    ("gold", "texts"),
    [
        (None, []),
        (3, ["3"]),
        (["cat", "kitten", None], ["cat", "kitten"]),
        ([1, 2, 3, 4], ["[1, 2, 3, 4]"]),
        ([[1, 2, 3, 4]], ["[[1, 2, 3, 4]]"]),
    ],
)
def test_labels_as_texts(gold, texts):
    assert gold_texts(gold) == texts


def test_boxes_are_compared_with_labels_by_overlap():
    boxed = Vote("[0, 0, 10, 10]", ("[0, 0, 10, 10]", "[40, 0, 50, 10]"), 0.5, 0.7, ("[1, 0, 11, 10]",), Equality())
    assert summary([boxed])["accuracy"] == {"pseudo_labels": 1.0, "completions": 0.5}


def test_votes_are_found_among_the_notes_and_labels_in_the_named_columns():
    note = {"label": "3", "answers": ("3", "3"), "agreement": 1.0, "entropy": 0.0, "equality": Equality()}
    found = votes_of({"majority_vote": note, "mine": {"x": 1}}, {"gold": "3", "solution": "4"}, ["gold", "aliases"])
    assert [(one.label, one.gold) for one in found] == [("3", ("3",))]
