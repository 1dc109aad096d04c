"""When two answers mean the same: laws of the relation, classes, boxes by their overlap."""

import itertools

import numpy as np
import pytest

from mmpost.rewards.equality import Equality, plain, similarity
from mmpost.rewards.geometry import overlaps
from mmpost.rewards.majority_vote import majority_vote

ANSWERS = [
    *(
        "7",
        "7.0",
        "7 cm",
        "0.5",
        "1/2",
        "\\frac{1}{2}",
        "50%",
        "50",
        "B",
        "(B)",
        "b",
        "B. bag",
        "the bag",
        "A bag.",
        "Bag",
    ),
    *("", "x", "X", "[1, 2, 3, 4]", "[1, 2, 3, 5]", "[9, 9, 12, 12]", "(1,2),(3,4)", "C. elegans", "C. albicans"),
]
KINDS = ("auto", "number", "choice", "text", "boxes")


@pytest.mark.parametrize("kind", KINDS)
def test_equality_is_reflexive_and_symmetric(kind):
    rule = Equality(kind)
    pairs = list(itertools.product(ANSWERS, repeat=2))
    found = dict(zip(pairs, rule.pairs(pairs), strict=True))
    assert all(found[one, one] for one in ANSWERS)
    assert all(found[one, two] == found[two, one] for one, two in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_an_equivalence_and_do_not_depend_on_the_order(kind):
    rng = np.random.default_rng(0)
    rule = Equality(kind)
    for _ in range(30):
        group = [ANSWERS[i] if i < len(ANSWERS) else None for i in rng.integers(0, len(ANSWERS) + 3, 8)]
        order = rng.permutation(8)
        (straight,) = rule.classes([group])
        (turned,) = rule.classes([[group[i] for i in order]])
        assert [name is None for name in straight] == [answer is None for answer in group]
        for i, j in itertools.combinations(range(8), 2):
            at_i, at_j = order[i], order[j]
            together = straight[at_i] is not None and straight[at_i] == straight[at_j]
            assert together == (turned[i] is not None and turned[i] == turned[j])
        # The name of a class is the place of its first member.
        assert all(name is None or straight[name] == name for name in straight)
        assert all(name is None or name <= place for place, name in enumerate(straight))


@pytest.mark.parametrize(
    ("kind", "one", "two", "equal"),
    [
        ("auto", "1,234", "1234", True),
        ("auto", "5 cm", "5 m", False),
        ("auto", "the Bag.", "bag", True),
        ("auto", "bag", "coat", False),
        ("auto", "B. bag", "B", True),
        ("auto", "C. elegans", "C. albicans", False),
        ("auto", "[0, 0, 10, 10]", "(1,0),(10,10)", True),
        ("number", "7 apples", "7", False),
        ("choice", "b", "(B) coat", True),
        ("text", "A bag!", "the bag", True),
        ("text", "!", "?", False),
    ],
)
def test_pairs_by_hand(kind, one, two, equal):
    assert Equality(kind).pairs([(one, two), (two, one)]) == [equal, equal]


def test_mathematics_is_compared_as_such():
    pytest.importorskip("math_verify")
    asked = [("\\frac{\\sqrt{2}}{2}", "1/\\sqrt{2}"), ("x^2+2x+1", "(x+1)^2"), ("x+1", "x-1"), ("2\\pi", "6.283")]
    for kind in ("auto", "math"):
        assert Equality(kind).pairs(asked) == [True, True, False, False], kind
    assert Equality("math").classes([["(x+1)^2", None, "x^2+2x+1", "7", "1+2x+x^2"]]) == [[0, None, 0, 3, 0]]


def test_words_without_articles_and_punctuation():
    assert plain("The  red, bag!") == ("red", "bag")
    assert plain("a") == ("a",)
    assert plain("?!") == ("?", "!")


def test_similarity_of_sets_of_boxes():
    rng = np.random.default_rng(0)
    for _ in range(50):
        corners = rng.uniform(0, 10, (2, 3, 2))
        sets = [np.concatenate([c, c + rng.uniform(0.1, 5, (3, 2))], axis=1) for c in corners]
        first, second = sets[0], sets[1][: rng.integers(1, 4)]
        value = similarity(first, second)
        assert value == pytest.approx(similarity(second, first))
        assert 0 <= value <= 1
        assert similarity(first, first[::-1]) == pytest.approx(1.0)
        best = max(
            sum(overlaps(first, second)[row, col] for col, row in enumerate(rows))
            for rows in itertools.permutations(range(3), len(second))
        )
        assert value == pytest.approx(best / 3)
    assert similarity(np.zeros((0, 4)), first) == 0.0


def vote(texts, **options):
    count = len(texts)
    return majority_vote([None] * count, texts, group=[0] * count, uid=[0] * count, mean_logp=[-1.0] * count, **options)


@pytest.mark.parametrize("kind", ["auto", "boxes"])
def test_boxes_vote_by_overlap_and_the_medoid_wins(kind):
    texts = [f"<answer>[{x}, 0, {x + 10}, 10]</answer>" for x in (0, 1, 2, 40)]
    assert vote(texts, kind=kind) == [1.0, 1.0, 1.0, 0.0]
    # A chain: each overlaps enough with the next one, the ends not with each other. The middle one is the label.
    chain = [f"<answer>[{x}, 0, {x + 10}, 10]</answer>" for x in (0, 3, 6, 9, 12)]
    assert vote(chain, kind=kind) == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert vote([*chain, "no box"], kind=kind)[-1] == 0.0
    assert vote(texts, kind=kind, iou=0.9) == [None] * 4


def test_a_higher_iou_never_joins_more():
    rng = np.random.default_rng(1)
    texts = [str([round(v, 1) for v in (x, y, x + w, y + w)]) for x, y, w in rng.uniform(1, 9, (12, 3))]
    sizes = [len(set(Equality("boxes", iou=iou).classes([texts])[0])) for iou in (0.05, 0.2, 0.5, 0.8, 1.0)]
    assert sizes == sorted(sizes)


def test_answers_of_another_kind_do_not_vote():
    assert vote(["\\boxed{7}", "\\boxed{seven}", "\\boxed{seven}", "\\boxed{7.0}"], kind="number") == [1, 0, 0, 1]
    assert vote(["\\boxed{B}", "\\boxed{bag}", "\\boxed{bag}", "\\boxed{(B)}"], kind="choice") == [1, 0, 0, 1]
    assert vote(["\\boxed{bag}", "\\boxed{The bag}", "\\boxed{coat}"], kind="text") == [1, 1, 0]


CONTRADICT = [
    ("-x", "x"), ("-b", "b"), ("x>2", "x<2"), ("x ≥ 2", "x ≤ 2"), ("a<b", "a>b"), ("5!", "5"), ("(0,1)", "[0,1]"),
    ("(0,1]", "[0,1)"), ("|x|", "x"), ("p & q", "p | q"), ("2, 3", "2.3"), ("-$5", "$5"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "two"), CONTRADICT)
def test_signs_that_change_the_meaning_are_no_punctuation(one, two):
    assert Equality().pairs([(one, two)]) == [False]
