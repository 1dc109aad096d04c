"""Credit and selection of the methods that look at whole groups and steps, against numbers worked out by hand."""

import json
import warnings

import numpy as np
import pytest

from mmpost.algos import dapo, darling, hpt, luffy, noisy, q_tuning, reinforce_ada, riskpo
from mmpost.config.schema import GrpoSection
from mmpost.core.rollout import Group, Rollout
from mmpost.core.sample import Sample
from mmpost.train.advantages import Group as GroupAdvantage
from mmpost.train.draw import Dynamic
from mmpost.train.method import Scored


def _group(scores, texts=None, lengths=None, uid=0):
    texts = texts or [""] * len(scores)
    lengths = lengths or [1] * len(scores)
    rollouts = [
        Rollout(np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.float32), text, False, {}, score)
        for score, text, length in zip(scores, texts, lengths, strict=True)
    ]
    return Group(Sample("row", ()), rollouts, uid)


def _scored(scores, uid=0, **more):
    return Scored(uid, "", tuple(scores), (1,) * len(scores), (False,) * len(scores), **more)


# -- DAPO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "off"), [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (500, -1.0)]
)
def test_soft_overlong_punishment(length, off):
    shape = dapo.Overlong(share=0.2).bind(GrpoSection(max_completion_length=100))
    assert shape(_group([1.0, None], lengths=[length, length])) == [pytest.approx(1.0 + off), None]
    half = dapo.Overlong(share=0.2, penalty=0.5).bind(GrpoSection(max_completion_length=100))
    assert half(_group([0.0], lengths=[length])) == [pytest.approx(off / 2)]


def test_each_switch_of_dapo_changes_one_thing():
    whole = dapo.preset()
    assert isinstance(whole.draw, Dynamic)
    assert (whole.rollout.aggregate, whole.rollout.stabilise[0].epsilon, whole.rollout.stabilise[0].high) == (
        "token",
        0.2,
        0.28,
    )
    assert whole.shape == (dapo.Overlong(0.2, 1.0),)
    assert type(dapo.preset(dynamic=False).draw).__name__ == "Draw"
    assert dapo.preset(dynamic=False).shape == whole.shape
    assert dapo.preset(penalty=0).shape == ()
    assert dapo.preset(penalty=0).draw == whole.draw
    assert dapo.preset(epsilon_high=None).rollout.stabilise[0].high == 0.2
    assert dapo.preset(carry=True).draw == Dynamic(carry=True)


# -- gates and joint groups ------------------------------------------------------------------------------------------


def test_hpt_gates_by_the_number_of_right_answers():
    def gated(**constants):
        gate = hpt.preset(**constants).gate
        return [gate(_scored([0.0] * 8, positive=p)) for p in range(9)]

    assert gated() == [True] + [False] * 8
    assert gated(gamma=2) == [True] * 3 + [False] * 6
    assert gated(gamma=8) == [True] * 9
    assert gated(gamma=-1) == [False] * 9


def test_luffy_takes_statistics_over_completions_and_demonstration():
    method = luffy.preset()
    # Rewards 1, 0, 0 of completions and 1 of the demonstration: mean 1/2, standard deviation 1/sqrt(3).
    (credit,) = method.advantage([_scored([1.0, 0.0, 0.0, 1.0])], {})
    side = 0.5 / (np.sqrt(1 / 3) + 1e-4)
    assert credit == pytest.approx([side, -side, -side, side])
    assert method.joins
    assert method.gate is None
    (plain,) = luffy.preset(std=False).advantage([_scored([1.0, 0.0, 0.0, 1.0])], {})
    assert plain == pytest.approx([0.5, -0.5, -0.5, 0.5])


# -- Reinforce-Ada ---------------------------------------------------------------------------------------------------


def test_reinforce_ada_measures_from_all_that_were_drawn():
    method = reinforce_ada.preset()
    (credit,) = method.advantage([_scored([1.0, 1.0, 0.0, 0.0], drawn=32, positive=3)], {})
    assert credit == pytest.approx([0.90625, 0.90625, -0.09375, -0.09375], abs=1e-12)
    assert (method.draw.threshold, method.draw.rounds, method.draw.per_round) == (0.7, 4, 8)


# -- RiskPO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("natural", "expected"),
    [(True, [-5, -2, -4 / 3, -2 / 3, 0, 0]), (False, [-3, 0, 2 / 3, 4 / 3, 2, 2])],
)
def test_risk_of_papers(natural, expected):
    risk = riskpo.Risk(natural=natural)
    assert risk.of_papers(np.arange(6.0), 1.0, 4.0) == pytest.approx(expected, abs=1e-9)


def test_a_bundle_is_scored_paper_by_paper_and_credit_goes_back():
    # Two questions of two completions: papers score (2, 0) * 1 with a bundle of 2.
    groups = [_scored([1.0, 0.0], 3), _scored([1.0, 0.0], 7)]
    state = {"low": 0.5, "high": 1.5}
    risk = riskpo.Risk(bundle=2, credit="uniform")
    first, second = risk(groups, state)
    good, bad = risk.of_papers(np.array([2.0, 0.0]), 0.5, 1.5)
    assert first == pytest.approx([good, bad])
    assert second == pytest.approx([good, bad])
    # One of two papers is below either quantile.
    assert (state["low"], state["high"]) == pytest.approx((0.5 + 0.1 * (0.2 - 0.5), 1.5 + 0.1 * (0.8 - 0.5)))


@pytest.mark.parametrize(
    ("credit", "shares"),
    [
        ("uniform", [[1, 1], [1, 1]]),
        ("score", [[0.5, 1.5], [1.5, 1.5]]),
        ("std", [[1 / (0.5 + 1e-6)] * 2, [1e6] * 2]),
        # Deviations: (0.5, 0) in the first paper, (-0.5, 0) in the second.
        ("sum_mean", [[1, 1], [0, 0]]),
        ("sum_mean_safe", [[1, 0.5], [0, 0.5]]),
    ],
)
def test_shares_of_credit(credit, shares):
    rewards = np.array([[1.0, 0.0], [0.0, 0.0]])
    found, _ = riskpo.Risk(bundle=2, credit=credit)._shares(rewards)
    assert found == pytest.approx(np.array(shares, dtype=float))


def test_the_signed_sum_turns_credit_round_and_the_safe_one_does_not():
    # Group means .9 and .2; in the first paper the first question is right and the second wrong.
    first = [1.0] * 9 + [0.0]
    second = [0.0] * 8 + [1.0] * 2
    rewards = np.array([first, second])
    released, _ = riskpo.Risk(bundle=2, credit="sum_mean")._shares(rewards)
    assert released[:, 0] == pytest.approx([-1.0, 2.0])
    safe, evenly = riskpo.Risk(bundle=2)._shares(rewards)
    assert safe[:, 0] == pytest.approx([0.5, 0.5])
    # Papers 1 to 8 (right, wrong) and 10 (wrong, right: off by -0.9 and 0.8) fall back, paper 9 (both right) does not.
    assert evenly == 9
    assert (safe[:, 8] > 0).all()


def test_questions_that_are_left_over_make_a_scaled_bundle():
    risk = riskpo.Risk(bundle=5, credit="uniform")
    groups = [_scored([1.0, 0.0], uid) for uid in range(7)]
    state = {"low": 1.0, "high": 4.0}
    credit = risk(groups, state)
    # Both bundles' papers have the scores 5 and 0.
    assert np.stack(credit) == pytest.approx(np.tile([2.0, -3.0], (7, 1)))
    assert state["log"]["left_over"] == 2


def test_a_completion_without_a_score_does_not_train_and_its_paper_is_scaled():
    groups = [_scored([1.0, None]), _scored([1.0, 1.0]), _scored([None, None])]
    credit = riskpo.Risk(bundle=3, credit="uniform")(groups, {"low": 1.0, "high": 2.0})
    assert np.isnan(credit[0]).tolist() == [False, True]
    assert np.isnan(credit[2]).all()
    assert credit[1][0] == credit[1][1] == credit[0][0]


@pytest.mark.parametrize("seed", range(5))
def test_quantiles_are_tracked(seed):
    random = np.random.default_rng(seed)
    risk, state = riskpo.Risk(bundle=1, credit="uniform"), {}
    for _ in range(500):
        risk([_scored(random.random(40))], state)
    assert state["low"] == pytest.approx(0.2, abs=0.05)
    assert state["high"] == pytest.approx(0.8, abs=0.05)
    # It is what a checkpoint keeps.
    assert json.loads(json.dumps(state)) == state


def test_the_natural_baseline_only_suppresses_and_says_so():
    with pytest.warns(UserWarning, match="nothing is reinforced"):
        method = riskpo.preset(natural=True, credit="uniform")
    random = np.random.default_rng(0)
    credit = method.advantage([_scored((random.random(8) < 0.5).astype(float), uid) for uid in range(20)], {})
    assert np.concatenate(credit).max() <= 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        riskpo.preset()


# -- DARLING ---------------------------------------------------------------------------------------------------------


def test_diversity_multiplies_quality():
    group = _group([1.0, 1.0, 1.0, 0.0], ["a b", "A  b", "something else", "no"])
    shape = darling.Diverse(darling.same_exact)
    assert shape(group) == pytest.approx([2 / 3, 2 / 3, 1, 0])
    (credit,) = darling.preset().advantage([_scored(shape(group))], {})
    assert credit == pytest.approx([0.0833, 0.0833, 0.4167, -0.5833], abs=1e-4)


def test_clusters_are_transitive():
    pairs = {("a", "b"), ("b", "c")}
    found = darling.clusters(["a", "d", "c", "b"], lambda one, two: (one, two) in pairs or (two, one) in pairs)
    assert found[0] == found[2] == found[3] != found[1]


def test_saying_the_same_is_worth_a_tenth_and_teaches_nothing():
    shape = darling.Diverse(darling.same_exact)
    scores = shape(_group([1.0] * 4, ["same"] * 4))
    assert scores == pytest.approx([0.1] * 4)
    (credit,) = darling.preset().advantage([_scored(scores)], {})
    assert credit == pytest.approx([0.0] * 4)


def test_repetition_is_never_rewarded_where_quality_is_negative():
    scores = darling.Diverse(darling.same_exact)(_group([-1.0, -1.0, -1.0, -2.0], ["x", "x", "y", "z"]))
    assert scores[0] == scores[1] < scores[2]
    assert scores[3] == 0


def test_completions_without_a_score_do_not_count_as_company():
    assert darling.Diverse(darling.same_exact)(_group([1.0, 1.0, None], ["x", "y", "x"])) == [1.0, 1.0, None]


def test_only_right_answers_can_be_compared():
    shape = darling.Diverse(darling.same_exact, correct_only=True)
    assert shape(_group([1.0, 1.0, 0.0, 0.0], ["x", "y", "x", "x"])) == [1.0, 1.0, 0.0, 0.0]


def test_partitions():
    assert darling.same_ngram("the red cat", "a red cat")  # 2 of 4 words
    assert not darling.same_ngram("the red cat", "one blue dog")
    long = "first we add the numbers and then we halve the sum"
    assert darling.same_ngram(long, long.replace("first", "now"))
    assert not darling.same_ngram(long, " ".join(reversed(long.split())))
    assert darling.same_answer("so <answer>0.5</answer>", "it is <answer>1/2</answer>")
    assert not darling.same_answer("nothing", "nothing")


def test_a_partition_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text("def same(a, b):\n    return a[0] == b[0]\n")
    method = darling.preset(partition=f"{tmp_path}/mine.py:same")
    assert method.shape[0](_group([1.0, 1.0, 1.0], ["ab", "ac", "b"])) == pytest.approx([0.5, 0.5, 1.0])


# -- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["group", "row"])
def test_flips_have_their_rate_and_their_level(level):
    shape = noisy.Flip(0.3, level)
    flips = np.array([shape(_group([0.0, 0.0], uid=uid)) for uid in range(10_000)])
    together = (flips[:, 0] == flips[:, 1]).mean()
    count = 10_000 if level == "group" else 20_000
    assert abs(flips.mean() - 0.3) < 4 * np.sqrt(0.21 / count)
    assert together == 1 if level == "group" else abs(together - 0.58) < 4 * np.sqrt(0.58 * 0.42 / 10_000)
    assert shape(_group([0.0, 1.0, None], uid=5)) == shape(_group([0.0, 1.0, None], uid=5))
    assert noisy.Flip(1.0)(_group([0.25, None])) == [0.75, None]
    assert noisy.Flip(0.0)(_group([0.25, None])) == [0.25, None]


def test_a_flipped_group_has_exactly_the_opposite_advantages():
    scores = [1.0, 0.0, 0.0, 1.0, 0.0]
    clean, turned = GroupAdvantage()([_scored(scores), _scored(noisy.Flip(1.0)(_group(scores)))], {})
    assert clean == pytest.approx(-turned, abs=1e-15)


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.5])
def test_noise_scales_the_mean_update(rate):
    # A bandit with two arms of equal chance, the second of which is right; the score function is +-1/2.
    random = np.random.default_rng(7)
    arms = random.integers(0, 2, (20_000, 4)).astype(float)
    shape = noisy.Flip(rate)

    def updates(scores):
        credit = GroupAdvantage(std=False)([_scored(row) for row in scores], {})
        return (np.stack(credit) * (arms - 0.5)).mean(axis=1)

    clean = updates(arms)
    noise = updates([shape(_group(list(row), uid=uid)) for uid, row in enumerate(arms)])
    off = noise - (1 - 2 * rate) * clean
    assert abs(off.mean()) < 4 * off.std() / np.sqrt(len(off))
    assert clean.mean() > 0.15


# -- Q-Tuning --------------------------------------------------------------------------------------------------------

# Twelve rows: perplexity 1 to 12, entropies so that 12 and 11 are sure and wrong, 1 and 2 unsure and right.
ERROR = np.arange(1.0, 13.0)
DOUBT = np.array([12.0, 11.0, 5.0, 5.1, 5.2, 5.3, 5.4, 5.5, 5.6, 5.7, 0.5, 0.4])


def test_quadrants_of_a_batch():
    wrong, right = q_tuning.quadrants(ERROR, DOUBT, 0.2)
    assert np.flatnonzero(wrong).tolist() == [10, 11]
    assert np.flatnonzero(right).tolist() == [0, 1]


def test_a_third_of_the_rows_are_the_corners():
    wrong, right = q_tuning.choose(ERROR, DOUBT, 1 / 3)
    assert np.flatnonzero(wrong).tolist() == [10, 11]
    assert np.flatnonzero(right).tolist() == [0, 1]


def test_rows_fill_up_by_the_distance_of_error_and_doubt():
    wrong, right = q_tuning.choose(ERROR, DOUBT, 0.5)
    # |ppl - H| of rows 2 to 9: 2, 1.1, .2, .7, 1.6, 2.5, 3.4, 4.3. Largest: rows 9 and 8, more wrong than unsure.
    assert np.flatnonzero(wrong).tolist() == [8, 9, 10, 11]
    assert np.flatnonzero(right).tolist() == [0, 1]


def test_token_scores_see_their_neighbours():
    logp = -np.log([1.0, 4.0, 2.0])
    assert q_tuning.token_scores(logp, 0.5) == pytest.approx([0.5 + 0.5 * 5, 2 + 0.5 * 3, 1 + 0.5 * 6])
    assert q_tuning.token_scores(logp, 0.0) == pytest.approx([1, 4, 2])


def _table(sizes=(10,) * 12):
    """Rows whose perplexity and entropy are those above; each has one token that stands out."""
    logp = []
    for error, size in zip(ERROR, sizes, strict=True):
        values = np.full(size, -np.log(error))
        values[3] -= 1.0
        logp.append(values + 1.0 / size)
    return {"logp": logp, "entropy": [np.full(size, d) for d, size in zip(DOUBT, sizes, strict=True)]}


def test_pruning_keeps_calibration_rows_whole_and_takes_the_worst_tokens_of_misconceptions():
    masks = q_tuning.Prune(1 / 3, 0.75)(_table())
    assert [int(mask.sum()) for mask in masks] == [10, 10, 0, 0, 0, 0, 0, 0, 0, 0, 5, 5]
    # Budget: 120 / 3 * 0.75 = 30 tokens, 20 of them whole rows; the token that stands out and its neighbours go.
    assert not masks[10][2:5].any()
    assert not masks[11][2:5].any()


def test_all_of_the_data_is_supervised_fine_tuning():
    masks = q_tuning.Prune(1.0, 1.0)(_table())
    assert all(mask.all() for mask in masks)


def test_few_rows_are_warned_about():
    table = {"logp": [np.array([-1.0])] * 7, "entropy": [np.array([1.0])] * 7}
    with pytest.warns(UserWarning, match="7 rows mean little"):
        q_tuning.Prune()(table)
    assert q_tuning.Prune()({"logp": [], "entropy": []}) == []
