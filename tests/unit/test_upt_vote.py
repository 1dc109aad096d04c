"""The vote against an independent implementation over every vector of answers, and the hand table of the contract."""

import itertools
import math

import numpy as np
import pytest

from mmpost.config.schema import RewardSpec
from mmpost.core.rollout import Group, Rollout
from mmpost.core.sample import Part, Sample, Turn
from mmpost.rewards import vote
from mmpost.rewards.majority_vote import majority_vote
from mmpost.rewards.score import resolve, score

ANSWERS = ("3", "x", None)
VECTORS = list(itertools.product(ANSWERS, repeat=6))
# Powers of two: no two different sets of completions are equally likely on average.
LOGPS = [-(2.0**-k) for k in (1, 4, 2, 6, 3, 5)]


def completion(answer):
    return "nothing to see" if answer is None else f"so it is \\boxed{{{answer}}}"


def ask(vectors, logps=None, **options):
    """Scores of groups, cut into the groups again."""
    size = len(vectors[0])
    texts = [completion(answer) for vector in vectors for answer in vector]
    scores = majority_vote(
        [None] * len(texts),
        texts,
        group=[i for i in range(len(vectors)) for _ in range(size)],
        uid=[i for i in range(len(vectors)) for _ in range(size)],
        mean_logp=(logps or [-1.0] * size) * len(vectors),
        **options,
    )
    return [scores[i : i + size] for i in range(0, len(scores), size)]


def by_hand(vector, logps, ties, min_support):
    """Written from the definition, without classes and without the module under test."""
    sizes = {answer: sum(one == answer for one in vector) for answer in ANSWERS if answer in vector and answer}
    best = [answer for answer in sizes if sizes[answer] == max(sizes.values())]
    if not best or sizes[best[0]] < min_support:
        return [None] * len(vector)
    if len(best) == 2:
        if ties == "skip":
            return [None] * len(vector)
        means = [np.mean([lp for one, lp in zip(vector, logps, strict=True) if one == answer]) for answer in best]
        seen = sorted(best, key=vector.index)
        best = seen[:1] if ties == "first" or means[0] == means[1] else [best[int(np.argmax(means))]]
    return [float(one == best[0]) for one in vector]


@pytest.mark.parametrize("ties", ["likelier", "first", "skip"])
@pytest.mark.parametrize("min_support", [1, 2, 4])
def test_paper_vote_of_all_729_vectors(ties, min_support):
    found = ask(VECTORS, LOGPS, ties=ties, min_support=min_support)
    assert found == [by_hand(vector, LOGPS, ties, min_support) for vector in VECTORS]


def test_released_vote_of_all_729_vectors():
    for vector, scores in zip(VECTORS, ask(VECTORS, LOGPS, variant="released"), strict=True):
        said = ["None" if answer is None else answer for answer in vector]
        top = max(said.count(one) for one in said)
        majority = next(one for one in said if said.count(one) == top)
        assert scores == [float(one == majority) for one in said]


@pytest.mark.parametrize("variant", ["paper", "random", "released"])
def test_a_permutation_of_the_completions_permutes_the_scores(variant):
    rng = np.random.default_rng(0)
    for vector in VECTORS[::7]:
        sizes = sorted(vector.count(one) for one in set(vector))
        if variant == "released" and len(sizes) > 1 and sizes[-1] == sizes[-2]:
            continue  # the declared tie rule looks at the order
        order = rng.permutation(6)
        mixed, logps = [vector[i] for i in order], [LOGPS[i] for i in order]
        if variant == "random":
            # Which class is drawn depends on the order; that one wins wherever the vote has a winner does not.
            for scores, said in (
                (ask([vector], variant=variant)[0], vector),
                (ask([mixed], variant=variant)[0], mixed),
            ):
                won = {one for one, value in zip(said, scores, strict=True) if value == 1.0}
                assert len(won) == (1 if max(map(vector.count, {*vector} - {None}), default=0) >= 2 else 0)
            continue
        straight, turned = ask([vector], LOGPS, variant=variant)[0], ask([mixed], logps, variant=variant)[0]
        assert turned == [straight[i] for i in order]


HAND = [
    (["7", "7", "8"], [1, 1, 0], [1, 1, 0]),
    (["None", "None", "7", "None"], [1, 1, 0, 1], [1, 1, 0, 1]),
    ([None, None, "7", None], [1, 1, 0, 1], [None] * 4),
    (["1/2", "\\frac12", "0.5", "3"], [1, 1, 1, 0], [1, 1, 1, 0]),
    (["3", "1/2", "0.5", "3"], [1, 0, 0, 1], [1, 0, 0, 1]),
    (["1", "2", "3"], [1, 0, 0], [None] * 3),
    (["B", "b", "(B)"], [1, 1, 1], [1, 1, 1]),
    (["50%", "0.5"], [1, 0], [None] * 2),
    (["5 cm", "5"], [1, 1], [1, 1]),
]


@pytest.mark.parametrize(("vector", "released", "paper"), HAND)
def test_hand_table_in_both_variants(vector, released, paper):
    assert ask([vector], variant="released")[0] == released
    assert ask([vector])[0] == paper


def test_hand_table_where_a_tie_is_broken_by_likelihood():
    vector = ["3", "1/2", "0.5", "3"]
    assert ask([vector], [-2.0, -1.0, -1.0, -2.0])[0] == [0, 1, 1, 0]
    assert ask([vector], ties="skip")[0] == [None] * 4
    assert ask([["50%", "0.5"]], percent=True)[0] == [1, 1]


def test_unknown_likelihoods_are_the_least_likely():
    assert vote.winner([0, 1], [None, -9.0], min_support=1) == 1
    assert vote.winner([0, 1], [math.nan, None], min_support=1) == 0


def test_the_random_label_is_even_over_classes_and_keyed_by_the_prompt():
    classes = [0, 0, 0, 0, 4, None]
    drawn = [vote.random_class(classes, seed=3, uid=uid) for uid in range(4000)]
    assert drawn == [vote.random_class(classes, seed=3, uid=uid) for uid in range(4000)]
    assert abs(drawn.count(4) / 4000 - 0.5) < 4 * math.sqrt(0.25 / 4000)
    assert vote.random_class([None, None], seed=3, uid=0) is None


def test_statistics_of_a_vote():
    classes = [0, 0, 2, None]
    assert vote.agreement(classes) == 0.5
    assert vote.entropy(classes) == pytest.approx(-(2 / 3) * math.log(2 / 3) - math.log(1 / 3) / 3)
    assert vote.entropy([0, 0]) == 0.0
    assert vote.entropy([None]) == 0.0
    assert vote.agreement([None, None]) == 0.0


def test_a_vote_is_as_good_as_the_binomial_says():
    """For p above one half a vote beats a single answer, below it loses: the pseudo-label of two kinds of answers."""
    rng = np.random.default_rng(0)
    for p in (0.35, 0.65):
        rows = rng.random((4000, 5)) < p
        classes = [[0 if flag == row[0] else int(np.argmax(row != row[0])) for flag in row] for row in rows]
        right = [row[vote.winner(names, [0.0] * 5)] for row, names in zip(rows, classes, strict=True)]
        exact = sum(math.comb(5, k) * p**k * (1 - p) ** (5 - k) for k in (3, 4, 5))
        assert abs(np.mean(right) - exact) < 4 * math.sqrt(exact * (1 - exact) / 4000)
        assert (exact > p) == (p > 0.5)


def rollout(answer, logp=-1.0):
    return Rollout(np.array([1, 2]), np.array([logp, logp], np.float32), completion(answer), truncated=False)


def prompt(**columns):
    return Sample("row", (Turn("user", (Part("text", "how many?"),)),), columns)


def scored(columns, answers=("3", "3", "4"), names=("majority_vote",)):
    group = Group(prompt(**columns), [rollout(answer) for answer in answers], 0)
    score([group], resolve([RewardSpec(name=name) for name in names]))
    return [r.score for r in group.rollouts], group


def test_no_column_of_the_data_reaches_the_vote():
    """The same completions beside every kind of label give the same scores, bit for bit."""
    plain = scored({})[0]
    assert plain == [1.0, 1.0, 0.0]
    for gold in ("4", "3", ["4"], None, {"a": 1}, [1, 2, 3, 4]):
        columns = {"solution": gold, "aliases": gold, "group": gold, "uid": gold, "mean_logp": gold, "label": gold}
        found, group = scored(columns)
        assert found == plain
        assert group.notes["majority_vote"]["label"] == "3"


def test_later_completions_are_judged_together_with_the_earlier_ones():
    rewards = resolve([RewardSpec(name="majority_vote")])
    old = [rollout("4"), rollout("4"), rollout("3")]
    first = Group(prompt(), old, 0)
    score([first], rewards)
    assert [r.score for r in old] == [1.0, 1.0, 0.0]
    new = Group(prompt(), [rollout("3"), rollout("3")], 0)
    score([new], rewards, earlier=[old])
    assert [r.score for r in [*old, *new.rollouts]] == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert new.notes["majority_vote"]["agreement"] == 0.6


def test_groups_are_told_apart_by_their_place():
    rewards = resolve([RewardSpec(name="majority_vote")])
    groups = [Group(prompt(), [rollout(a), rollout(b)], 0) for a, b in (("1", "1"), ("2", "3"), ("4", "4"))]
    score(groups, rewards)
    assert [[r.score for r in group.rollouts] for group in groups] == [[1.0, 1.0], [None, None], [1.0, 1.0]]
    assert [group.notes["majority_vote"]["label"] for group in groups] == ["1", None, "4"]
