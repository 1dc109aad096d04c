"""Boxes, points, JSON, contained text, patterns, lengths, form: hand values and laws."""

import itertools
import json

import numpy as np
import pytest

from mmpost.rewards.form import think_tags
from mmpost.rewards.geometry import boxes, f1, overlaps, points
from mmpost.rewards.json_answer import json as json_reward
from mmpost.rewards.length import length, repeated_share, repetition, soft_overlong
from mmpost.rewards.reasoning import PHRASES, reasoning_pattern
from mmpost.rewards.text import contains, regex


def one(function, text, **columns):
    """Score of one completion, its columns given as single values where they are lists per row."""
    (score,) = function([[]], [[{"role": "assistant", "content": text}]], **columns)
    return score


# -- boxes and points ------------------------------------------------------------------------------------------------

A, B = [0, 0, 10, 10], [20, 20, 40, 40]


@pytest.mark.parametrize(
    ("text", "gold", "score"),
    [
        ("[0, 0, 10, 10], [20, 20, 40, 40]", [A, B], 1.0),
        ("[20,20,40,40] and [0,0,10,10]", [A, B], 1.0),
        ("[0, 0, 10, 10]", [A, B], 2 / 3),
        ("[0, 0, 10, 10] [0, 0, 10, 10]", [A], 2 / 3),
        ("[0, 0, 10, 10] [0, 0, 10, 10]", [A, B], 0.5),
        ("[0, 0, 10, 10]" * 9, [A], 0.2),
        ("nothing", [A], 0.0),
        ("", [], 1.0),
        ("[0, 0, 10, 10]", [], 0.0),
        ("(0,0),(10,10)", [A], 1.0),
        ("<|box_start|>(0,0),(10,10)<|box_end|>", [A], 1.0),
        ("[10, 10, 0, 0]", [A], 1.0),
        ("[0, 0, 10, 5]", [A], 1.0),
        ("[0, 0, 10, 4.9]", [A], 0.0),
        ("[0, 0, 0, 0]", [[0, 0, 0, 0]], 0.0),
        ("first [0, 0, 10, 10], no: <answer>[20, 20, 40, 40]</answer>", [B], 1.0),
        (r'<answer>[{"bbox_2d": [20, 20, 40, 40], "label": "x"}]</answer>', [B], 1.0),
        ("[0, 0, 10, 10]", A, 1.0),
        ("[0, 0, 10, 10]", "[[0, 0, 10, 10]]", 1.0),
        ("", "[]", 1.0),
        ("[0, 0, 10, 10]", None, None),
    ],
)
def test_boxes_by_hand(text, gold, score):
    assert one(boxes, text, solution=[gold]) == (None if score is None else pytest.approx(score))


def test_several_thresholds_are_averaged():
    # IoU of the answer is 0.7.
    assert one(boxes, "[0, 0, 10, 7]", solution=[[A]], iou=[0.5, 0.6, 0.8, 0.9]) == 0.5


@pytest.mark.parametrize("gold", ["3", [[1, 2, 3]], [[1, 2, 3, float("nan")]], "red", [["a", "b", "c", "d"]], 5])
def test_a_solution_without_boxes_is_an_error_not_a_zero(gold):
    with pytest.raises(ValueError, match=r"expected a list of \[x1, y1, x2, y2\]$"):
        one(boxes, "[0, 0, 10, 10]", solution=[gold])


@pytest.mark.parametrize("iou", [0, -1, 1.5, []])
def test_a_threshold_out_of_range_is_refused(iou):
    with pytest.raises(ValueError, match="expected values in"):
        one(boxes, "[0, 0, 10, 10]", solution=[[A]], iou=iou)


def test_f1_is_that_of_the_best_permutation():
    generator = np.random.default_rng(0)
    for _ in range(200):
        rows, columns = generator.integers(0, 6, 2)
        right = generator.random((rows, columns)) < 0.4
        wide = right if rows <= columns else right.T
        best = max(
            sum(wide[i, j] for i, j in enumerate(order))
            for order in itertools.permutations(range(wide.shape[1]), wide.shape[0])
        )
        assert f1(right) == (2 * best / (rows + columns) if rows + columns else 1.0)
        assert f1(right) == f1(right.T) == f1(right[generator.permutation(rows)])


def test_overlaps_equal_those_of_counted_pixels():
    generator = np.random.default_rng(1)
    corners = generator.integers(0, 12, (2, 8, 2, 2))
    first, second = (np.concatenate([c.min(axis=1), c.max(axis=1)], axis=1).astype(float) for c in corners)

    def pixels(box):
        grid = np.zeros((12, 12), dtype=bool)
        grid[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
        return grid

    for i, j in itertools.product(range(8), range(8)):
        mine, other = pixels(first[i]), pixels(second[j])
        union = (mine | other).sum()
        expected = (mine & other).sum() / union if union else 0.0
        assert overlaps(first, second)[i, j] == pytest.approx(expected)
    assert np.array_equal(overlaps(first, second).T, overlaps(second, first))


@pytest.mark.parametrize(
    ("text", "gold", "distance", "score"),
    [
        ("(5, 5)", [A], 0, 1.0),
        ("(10, 10)", [A], 0, 1.0),
        ("(11, 5)", [A], 0, 0.0),
        ("(11, 5)", [A], 1, 1.0),
        ("(5, 5) (6, 6)", [A], 0, 2 / 3),
        ("(5, 5) (30, 30)", [A, B], 0, 1.0),
        ("[3, 4]", [[0, 0]], 5, 1.0),
        ("[3, 4]", [[0, 0]], 4.9, 0.0),
        ('<point x="3" y="4"/>', [[3, 4]], 0, 1.0),
        ("[3, 4]", [3, 4], 0, 1.0),
        ("[3, 4]", "(3, 4)", 0, 1.0),
        ("none", [[3, 4]], 0, 0.0),
        ("none", [], 0, 1.0),
        ("[3, 4]", None, 0, None),
    ],
)
def test_points_by_hand(text, gold, distance, score):
    found = one(points, text, solution=[gold], distance=distance)
    assert found == (None if score is None else pytest.approx(score))


# -- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"a": 1}', 1), ('{"a": 1, "b": 2}', 1), ('{"b": 1}', 0), ("[1]", 0), ("{", 0), ("", 0), ("a: 1", 0),
        ('so: {"a": 1}', 0), ('so <answer>{"a": 1}</answer>', 1), ('so\n```json\n{"a": 1}\n```\ndone', 1),
        ('```\n{"b": 1}\n```\n```\n{"a": 1}\n```', 1), ('```\n{"a": 1}\n```\n```\n{"b": 1}\n```', 0),
        ('{"a": NaN}', 0), ('{"a": Infinity}', 0), ("[" * 100_000, 0), ('{"a": ' + "9" * 5000 + "}", 0),
    ],
)  # fmt: skip
def test_json_with_a_required_key(text, score):
    assert one(json_reward, text, required=["a"]) == score


def test_without_a_schema_any_json_counts():
    assert [one(json_reward, text) for text in ("[1]", "3", "null", '"x"', "x")] == [1, 1, 1, 1, 0]


SCHEMA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 3},
        "kind": {"enum": ["a", 1, None]},
        "n": {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
        "x": {"type": "number"},
        "yes": {"type": "boolean", "const": True},
        "list": {"type": "array", "minItems": 1, "maxItems": 2, "items": {"type": "object", "required": ["k"]}},
    },
}


@pytest.mark.parametrize(
    ("value", "score"),
    [
        ({"name": "ab"}, 1), ({}, 0), ({"name": ""}, 0), ({"name": "abcd"}, 0), ({"name": 1}, 0),
        ({"name": "a", "z": 1}, 0), ({"name": "a", "kind": "a"}, 1), ({"name": "a", "kind": None}, 1),
        ({"name": "a", "kind": True}, 0), ({"name": "a", "kind": "b"}, 0), ({"name": "a", "n": 9}, 1),
        ({"name": "a", "n": 10}, 0), ({"name": "a", "n": -1}, 0), ({"name": "a", "n": 1.0}, 1),
        ({"name": "a", "n": 1.5}, 0), ({"name": "a", "n": None}, 1), ({"name": "a", "n": True}, 0),
        ({"name": "a", "x": True}, 0), ({"name": "a", "x": 1.5}, 1), ({"name": "a", "yes": True}, 1),
        ({"name": "a", "yes": 1}, 0), ({"name": "a", "list": []}, 0), ({"name": "a", "list": [{"k": 1}]}, 1),
        ({"name": "a", "list": [{"k": 1}, {}]}, 0), ({"name": "a", "list": [{"k": 1}] * 3}, 0),
    ],
)  # fmt: skip
def test_json_schema_word_by_word(value, score):
    assert one(json_reward, json.dumps(value), schema=SCHEMA) == score


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"a": {"pattern": "x"}}}, "schema word 'pattern' is not supported"),
        ({"items": {"anyOf": []}}, "schema word 'anyOf' is not supported"),
        ({"type": "text"}, "schema type 'text' is unknown"),
        ({"additionalProperties": {}}, "with true or false only"),
    ],
)
def test_what_a_schema_cannot_check_is_refused(schema, words):
    with pytest.raises(ValueError, match=words):
        one(json_reward, "{}", schema=schema)


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gold", "options", "score"),
    [
        ("A Cat sleeps", "cat", {}, 1), ("category", "cat", {}, 0), ("category", "cat", {"whole_words": False}, 1),
        ("a dog", ["cat", "dog"], {}, 1), ("a dog", ["cat", "dog"], {"how": "all"}, 0),
        ("dog, cat", ["cat", "dog"], {"how": "all"}, 1), ("red  and\nblue", "red and blue", {}, 1),
        ("cat <answer>dog</answer>", "cat", {"where": "answer"}, 0), ("dog", "dog", {"where": "answer"}, 0),
        ("c++ (new)", "c++", {}, 1), ("x", None, {}, None), ("x", "", {}, None), ("x", [], {}, None),
    ],
)  # fmt: skip
def test_contained_text(text, gold, options, score):
    assert one(contains, text, solution=[gold], **options) == score


def test_patterns_may_come_as_an_option_or_as_a_column():
    said = ["ab", "b", "xab"]
    assert regex([[]] * 3, said, pattern="^a") == [1.0, 0.0, 0.0]
    assert regex([[]] * 3, said, pattern="a?b", full=True) == [1.0, 1.0, 0.0]
    assert regex([[]] * 3, said, pattern=["a", None, "^a"]) == [1.0, None, 0.0]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think><answer>b</answer>", 1), (" <think>\na\n</think>\n\n<answer> b </answer>\n", 1),
        ("<think></think><answer>b</answer>", 0), ("<think>a</think><answer> </answer>", 0), ("<answer>b</answer>", 0),
        ("<think>a</think>b", 0), ("<think>a</think>c<answer>b</answer>", 0),
        ("x<think>a</think><answer>b</answer>", 0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0), ("<answer>b</answer><think>a</think>", 0),
        ("<think>a <answer>c</answer></think><answer>b</answer>", 0),
    ],
)  # fmt: skip
def test_form_of_thinking(text, score):
    assert one(think_tags, text) == score


# -- length and repetition -------------------------------------------------------------------------------------------


def test_soft_overlong_by_hand():
    lengths = [0, 1, 79, 80, 81, 85, 90, 99, 100, 101, 500]
    expected = [0, 0, 0, 0, -0.05, -0.25, -0.5, -0.95, -1, -1, -1]
    ids = [list(range(n)) for n in lengths]
    assert soft_overlong([], [], completion_ids=ids, max_length=100, buffer=20) == pytest.approx(expected)
    with pytest.raises(ValueError, match="expected 1 to max_length, which is 100"):
        soft_overlong([], [], completion_ids=ids, max_length=100, buffer=0)


def test_length_counts_both_ends():
    ids = [[0] * n for n in (0, 1, 2, 3, 4)]
    assert length([], [], completion_ids=ids, minimum=1, maximum=3) == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_repeated_share_by_hand():
    assert repeated_share("abcd", 2) == 0.0
    assert repeated_share("aaaa", 1) == 0.75
    assert repeated_share("ababa", 2) == 0.5
    assert repeated_share("ab", 3) == repeated_share("", 1) == 0.0
    with pytest.raises(ValueError, match="at least 1"):
        repeated_share("ab", 0)


def test_repetition_counts_tokens_and_without_them_words():
    assert repetition([], [""], completion_ids=[[1, 1, 1, 1]], ngram=1) == [-0.75]
    assert repetition([], ["a a a a"], ngram=1) == [-0.75]


def test_reasoning_pattern_by_hand():
    def of(text, **options):
        return one(reasoning_pattern, text, **options)

    assert of("") == 0.0
    assert of("First we add. Then, therefore, we wait.") == pytest.approx(4 / 20)
    assert of("thence nextdoor") == 0.0
    assert of(" . ".join(PHRASES)) == 1.0
    assert of(" . ".join(PHRASES) + " user: hi") == 0.0
    share = 1 - 1 / 21
    assert of("then " * 40, enough=1) == pytest.approx(1 - share)
