"""Rewards of time against brute force and against values worked out by hand."""

import itertools

import numpy as np
import pytest

from mmpost.core.seeding import generator
from mmpost.rewards.temporal import (
    interval_overlaps,
    ordering,
    read_intervals,
    seconds,
    temporal_iou,
    time_point,
    tubes,
)


def one(reward, said, gold, **options):
    (score,) = reward([None], [said], solution=[gold], **options)
    return score


@pytest.mark.parametrize(
    "text",
    [
        "1.0 to 2.5",
        "1.0 - 2.5",
        "1.0\u20132.5",
        "1-2.5",
        "[1.0, 2.5]",
        "(1.0; 2.5)",
        "from 1 s until 2.5 seconds",
        "between 1.0 s and 2.5 s.",
        "0:01 to 0:02.5",
        "00:00:01 -> 00:00:02.5",
        "1.0s-2.5s",
    ],
)
def test_an_interval_is_read_in_every_form(text):
    assert read_intervals(text).tolist() == [[1.0, 2.5]]
    assert one(temporal_iou, f"<think>5 to 9</think><answer>{text}</answer>", [1.0, 2.5]) == 1.0


@pytest.mark.parametrize("text", ["-1.0 to 2", "[1, -2]", "1.0", "", "to 2", "one to two", "1.2.3 to 4"])
def test_what_is_no_interval_scores_0(text):
    assert one(temporal_iou, f"<answer>{text}</answer>", [1.0, 2.5]) == 0.0


def test_minutes_and_hours_are_seconds():
    assert [seconds(text) for text in ("7", "7.25", "1:05.5", "1:02:05")] == [7.0, 7.25, 65.5, 3725.0]
    assert read_intervals("1:02:05 to 1:02:10").tolist() == [[3725.0, 3730.0]]


def test_the_overlap_is_that_of_counted_ticks():
    rng = generator(0, "test_temporal")
    for _ in range(200):
        first, second = (np.sort(rng.integers(0, 30, (3, 2)), axis=1) for _ in range(2))
        expected = np.zeros((3, 3))
        for i, j in itertools.product(range(3), range(3)):
            ticks = [set(range(*row)) for row in (first[i].tolist(), second[j].tolist())]
            union = len(ticks[0] | ticks[1])
            expected[i, j] = len(ticks[0] & ticks[1]) / union if union else 0.0
        found = interval_overlaps(first.astype(float), second.astype(float))
        assert np.abs(found - expected).max() < 1e-12


def test_several_intervals_are_matched_as_well_as_any_assignment_can():
    rng = generator(1, "test_temporal")
    for _ in range(100):
        counts = rng.integers(1, 4, 2)
        spans = [np.sort(rng.choice(40, (n, 2), replace=True), axis=1) for n in counts]
        said, gold = ([[int(a), int(b) + 1] for a, b in some] for some in spans)
        overlap = interval_overlaps(np.array(said, float), np.array(gold, float))
        if len(said) > len(gold):
            overlap = overlap.T
        best = max(
            sum(overlap[i, j] for i, j in enumerate(chosen))
            for chosen in itertools.permutations(range(overlap.shape[1]), len(overlap))
        )
        text = ", ".join(f"[{a}, {b}]" for a, b in said)
        assert one(temporal_iou, text, gold) == pytest.approx(2 * best / (len(said) + len(gold)))


def test_intervals_by_hand():
    assert one(temporal_iou, "2 to 6", [4, 8]) == pytest.approx(1 / 3)
    assert one(temporal_iou, "0 to 1", [4, 8]) == 0.0
    assert one(temporal_iou, "8 to 4", [4, 8]) == 0.0  # turned round
    assert one(temporal_iou, "4 to 8, 4 to 8", [4, 8]) == pytest.approx(2 / 3)  # said twice
    assert one(temporal_iou, "4 to 8, 9 to 2", [4, 8]) == pytest.approx(2 / 3)  # nonsense is still said
    # The hull of the two would be right; half of it is not.
    assert one(temporal_iou, "0 to 10", [[0, 2], [8, 10]]) == pytest.approx(2 * 0.2 / 3)
    assert one(temporal_iou, "1:00 to 1:30", "60 - 90") == 1.0
    assert one(temporal_iou, "2 to 6", [4, 8], threshold=0.3) == 1.0
    assert one(temporal_iou, "2 to 6", [4, 8], threshold=0.4) == 0.0
    assert one(temporal_iou, "2 to 6", None) is None


def test_a_shift_can_only_lower_the_overlap():
    shifted = [one(temporal_iou, f"{4 + d / 4} to {8 + d / 4}", [4, 8]) for d in range(20)]
    assert shifted[0] == 1.0
    assert shifted == sorted(shifted, reverse=True)
    assert shifted[16:] == [0.0] * 4


@pytest.mark.parametrize("gold", [[3, 3], [4, 2], "soon", [], [1, 2, 3], [1, float("nan")], {"a": 1}])
def test_a_solution_that_is_no_interval_is_refused(gold):
    with pytest.raises(ValueError, match="expected"):
        one(temporal_iou, "1 to 2", gold)


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        one(temporal_iou, "1 to 2", [1, 2], threshold=threshold)


@pytest.mark.parametrize(
    ("said", "gold", "score"),
    [
        ("2.5", [2, 3], 1.0),
        ("at 0:02 s", [2, 3], 1.0),
        ("3.01", [2, 3], 0.0),
        ("7", [[2, 3], [6, 8]], 1.0),
        ("2 to 3", [2, 3], 0.0),
        ("", [2, 3], 0.0),
        ("2.5", 2.5, 1.0),
        ("2.5", "0:02.5", 1.0),
        ("2.5", "2 to 3", 1.0),
        ("2.5", None, None),
    ],
)
def test_a_moment_lies_in_its_interval(said, gold, score):
    assert one(time_point, f"<answer>{said}</answer>", gold) == score


def test_a_tolerance_widens_both_ends():
    found = [one(time_point, f"{t / 10}", [2, 3], tolerance=0.5) for t in (14, 15, 35, 36)]
    assert found == [0.0, 1.0, 1.0, 0.0]


def test_orders_agree_with_counted_pairs():
    items = ["run", "jump", "fall", "rest"]
    for order in itertools.permutations(items):
        wrong = sum(order.index(a) > order.index(b) for a, b in itertools.combinations(items, 2))
        text = "<answer>" + ", ".join(order) + "</answer>"
        assert one(ordering, text, items) == pytest.approx(1 - wrong / 6)
        assert one(ordering, text, items, measure="exact") == float(list(order) == items)
        common = max(
            len(some)
            for size in range(1, 5)
            for some in itertools.combinations(items, size)
            if [name for name in order if name in some] == list(some)
        )
        assert one(ordering, text, items, measure="subsequence") == common / 4
    assert one(ordering, "jump, run, fall, rest", items) == pytest.approx(1 - 2 / (4 * 3))  # neighbours exchanged


@pytest.mark.parametrize(
    ("said", "gold", "score"),
    [
        ("B > A > C", ["b", "a", "c"], 1.0),
        ("BAC", "B, A, C", 1.0),
        ("[B, A, C]", "BAC"[:1] + ", A, C", 1.0),
        ("red then green then blue", ["Red", "Green", "Blue"], 1.0),
        ("A, B", ["A", "B", "C"], 0.0),
        ("A, B, B", ["A", "B", "C"], 0.0),
        ("A, B, C, D", ["A", "B", "C"], 0.0),
        ("", ["A", "B"], 0.0),
        ("A, B", None, None),
    ],
)
def test_orders_in_words(said, gold, score):
    assert one(ordering, f"<answer>{said}</answer>", gold) == score


@pytest.mark.parametrize("gold", [["A"], ["A", "a"], []])
def test_an_order_of_one_item_is_refused(gold):
    with pytest.raises(ValueError, match="two different items"):
        one(ordering, "A", gold)
    with pytest.raises(ValueError, match="measure"):
        one(ordering, "A, B", ["A", "B"], measure="tau")


def test_a_still_box_over_the_right_times_has_its_own_overlap():
    gold = {str(t): [0, 0, 10, 10] for t in range(4)}
    said = "\n".join(f"{t}: [0, 0, 10, 5]" for t in range(4))
    assert one(tubes, said, gold) == pytest.approx(0.5)


def test_tubes_by_hand():
    gold = [[1.0, 0, 0, 2, 2], [1.5, 0, 0, 2, 4], [2.0, 0, 0, 1, 1]]
    # IoU 1 and 1/2 at two of three times.
    assert one(tubes, '{"1.0": [0, 0, 2, 2], "1.5": [0, 0, 2, 2]}', gold) == pytest.approx(1.5 / 3)
    # One second later only 2.0 is shared, with IoU 1/4, and 2.5 is one time more.
    assert one(tubes, "2.0: [0,0,2,2], 2.5: [0,0,2,2]", gold) == pytest.approx(0.25 / 4)
    # A time named again costs.
    assert one(tubes, "1.0: [0,0,2,2], 1.0: [0,0,2,2]", gold) == pytest.approx(1 / 4)
    assert one(tubes, "0:01 = (0,0,2,2)", "1.0: [0,0,2,2]") == 1.0
    assert one(tubes, "nothing", gold) == 0.0
    assert one(tubes, "nothing", None) is None


def test_tubes_are_the_temporal_overlap_times_the_mean_box_overlap():
    rng = generator(2, "test_temporal")
    for _ in range(50):
        times = [sorted(rng.choice(10, int(rng.integers(1, 8)), replace=False).tolist()) for _ in range(2)]
        corner = [{t: rng.integers(0, 5, 2).tolist() for t in some} for some in times]
        text = "; ".join(f"{t}: [{x}, {y}, {x + 4}, {y + 4}]" for t, (x, y) in corner[0].items())
        gold = {str(t): [x, y, x + 4, y + 4] for t, (x, y) in corner[1].items()}
        total, both = 0.0, set(times[0]) & set(times[1])
        for t in both:
            wide, high = (max(0, 4 - abs(a - b)) for a, b in zip(corner[0][t], corner[1][t], strict=True))
            total += wide * high / (32 - wide * high)
        assert one(tubes, text, gold) == pytest.approx(total / len(set(times[0]) | set(times[1])))


@pytest.mark.parametrize("gold", [{}, "no box", [[1, 2, 3]], [[1, 5, 5, 0, 0]]])
def test_a_solution_that_is_no_tube_is_refused(gold):
    with pytest.raises(ValueError, match="expected"):
        one(tubes, "1: [0,0,1,1]", gold)


@pytest.mark.parametrize("reward", [temporal_iou, time_point, tubes])
def test_any_text_gets_a_finite_score_quickly(reward):
    rng = generator(3, "test_temporal")
    letters = list("0123456789.:,-[](){}<>/ tosand\u2013\n\"'")
    gold = {"temporal_iou": [1, 2], "time_point": [1, 2], "tubes": {"1": [0, 0, 1, 1]}}[reward.__name__]
    texts = ["".join(rng.choice(letters, 40)) for _ in range(300)] + ["1:" * 20000, "1 to " * 20000, "9" * 60000]
    scores = reward([None] * len(texts), texts, solution=[gold] * len(texts))
    assert all(0.0 <= score <= 1.0 for score in scores)
