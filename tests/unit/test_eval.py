"""Intervals against closed forms and simulation, and the harness against a count by hand."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from mmpost.config.schema import RewardSpec
from mmpost.core.sample import Sample
from mmpost.eval.harness import evaluate
from mmpost.eval.stats import over_seeds, paired_bootstrap, wilson
from mmpost.rewards.score import Reward

# -- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 30, 200, 10_000])
def test_wilson_is_scipys(n):
    for successes in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        expected = scipy_stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
        low, high = wilson(successes, n)
        assert low == pytest.approx(expected.low, abs=1e-12)
        assert high == pytest.approx(expected.high, abs=1e-12)
        assert 0 <= low <= successes / n <= high <= 1


def test_wilson_of_nothing_is_everything():
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_covers_as_often_as_it_says():
    for n, p in [(30, 0.5), (100, 0.1), (400, 0.9)]:
        weights = scipy_stats.binom.pmf(np.arange(n + 1), n, p)
        covered = [low <= p <= high for low, high in (wilson(k, n) for k in range(n + 1))]
        assert 0.93 < float(weights[covered].sum()) < 0.97


@pytest.mark.parametrize("n", [2, 3, 5, 11, 12, 13, 20, 60])
def test_student_interval_is_scipys(n):
    values = np.random.default_rng(n).normal(size=n)
    mean, (low, high) = over_seeds(values.tolist())
    expected = scipy_stats.t.interval(0.95, n - 1, loc=values.mean(), scale=values.std(ddof=1) / math.sqrt(n))
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("n", [2, 3, 5, 12, 20])
def test_student_interval_covers_as_often_as_it_says(n):
    rng = np.random.default_rng(0)
    trials = 4000
    hits = 0
    for values in rng.normal(1.0, 2.0, size=(trials, n)):
        _, (low, high) = over_seeds(values)
        hits += low <= 1.0 <= high
    assert abs(hits / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


def test_bootstrap_covers_the_true_difference():
    # P(0.6 U + 0.4 V < 0.6) with U, V uniform: U < (0.6 - 0.4 V) / 0.6 = 1 - 2/3 V, on average 2/3.
    difference = 2 / 3 - 0.5
    rng = np.random.default_rng(1)
    trials, n, hits = 150, 120, 0
    for trial in range(trials):
        shared = rng.random(n)
        a, b = (shared < 0.5).astype(float), (0.6 * shared + 0.4 * rng.random(n) < 0.6).astype(float)
        _, (low, high) = paired_bootstrap([a], [b], seed=trial)
        hits += low <= difference <= high
    assert 0.90 < hits / trials < 0.99


def test_bootstrap_is_about_the_pairs():
    rng = np.random.default_rng(2)
    a = rng.integers(0, 2, 200).astype(float)
    mean, (low, high) = paired_bootstrap([a], [a], seed=0)
    assert (mean, low, high) == (0.0, 0.0, 0.0)
    b = a.copy()
    b[:20] = 1 - b[:20]
    mean, (low, high) = paired_bootstrap([a], [b], seed=0)
    assert mean == pytest.approx(float((b - a).mean()))
    assert low <= mean <= high
    # Twenty rows differ, so the interval is that of twenty flips, far narrower than that of two unpaired shares.
    assert high - low < 2 * 1.96 * math.sqrt(20) / 200 * 1.1
    assert paired_bootstrap([a], [b], seed=0) == paired_bootstrap([a], [b], seed=0)
    assert paired_bootstrap([a], [b], seed=1)[1] != paired_bootstrap([a], [b[::-1]], seed=0)[1]


def test_bootstrap_and_student_agree_on_many_rows():
    difference = np.random.default_rng(3).normal(0.1, 1.0, 2000)
    _, ours = paired_bootstrap([np.zeros(2000)], [difference], seed=0)
    expected = scipy_stats.t.interval(0.95, 1999, loc=difference.mean(), scale=difference.std(ddof=1) / math.sqrt(2000))
    assert ours == pytest.approx(expected, abs=0.004)


def test_bootstrap_over_several_runs_spans_their_differences():
    """Two runs whose gains differ: the interval reaches from one to the other, wider than rows alone would make it."""
    gains = np.zeros((2, 1000))
    gains[0, :100] = 1  # +0.1 and +0.3
    gains[1, :300] = 1
    mean, (low, high) = paired_bootstrap(np.zeros((2, 1000)), gains, seed=0)
    assert mean == pytest.approx(0.2)
    assert low < 0.12
    assert high > 0.28


# -- the harness -----------------------------------------------------------------------------------------------------


def _ends_in(prompts, completions, *, letters, **columns):
    """Whether the completion holds one of the letters; None where the row names none."""
    return [
        None if wanted is None else float(any(letter in said[0]["content"] for letter in wanted))
        for said, wanted in zip(completions, letters, strict=True)
    ]


def _rows(mixed_rows):
    return [
        Sample(row.id, row.turns, {"letters": "aeiou" if i % 2 else "xyzqk", "kind": f"k{i % 2}", "solution": f"s{i}"})
        for i, row in enumerate(mixed_rows[:4])
    ] + [Sample("none", mixed_rows[4].turns, {"letters": None, "kind": "k0"})]


def test_evaluation_is_greedy_counted_and_kept(tiny_model, mixed_rows, family):
    rows = _rows(mixed_rows)
    metric = Reward("vowel", _ends_in, RewardSpec(name="vowel"))
    seen = []
    result, records = evaluate(
        tiny_model,
        rows,
        metric,
        task="toy",
        version="1",
        group_by="kind",
        batch_size=2,
        max_new_tokens=6,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert [record["row_id"] for record in records] == [row.id for row in rows]
    assert [record["doc_id"] for record in records] == list(range(5))
    judged = [record for record in records if record["accuracy"] is not None]
    assert len(judged) == result["n"] == 4
    right = sum(
        any(letter in record["resps"][0] for letter in row.columns["letters"])
        for record, row in zip(records[:4], rows[:4], strict=True)
    )
    accuracy = result["metrics"]["accuracy"]
    assert accuracy["value"] == right / 4
    assert accuracy["ci"] == list(wilson(right, 4))
    assert accuracy["unparsed"] == 4  # random weights answer in no known form
    assert sorted(result["by_group"]) == ["k0", "k1"]
    assert sum(group["value"] * group["n"] for group in result["by_group"].values()) == pytest.approx(right)
    assert [group["n"] for group in result["by_group"].values()] == [2, 2]
    assert result["task"] == {"name": "toy", "version": "1"}
    assert result["schema"] == 1
    for record, row in zip(records, rows, strict=True):
        # The answer of the row is the target and never part of the question.
        assert record["input"] == "\n".join(said.text for said in row.turns[:-1])
        assert len(record["media"]) == len(row.media())
        assert record["target"] == row.columns.get("solution")
        assert record["truncated"] in (True, False)
    again, same = evaluate(tiny_model, rows, metric, task="toy", version="1", batch_size=5, max_new_tokens=6)
    assert [record["resps"] for record in same] == [record["resps"] for record in records]
    assert again["metrics"]["accuracy"]["value"] == accuracy["value"]
    assert again["by_group"] == {}
