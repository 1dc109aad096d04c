"""Credit from scores, by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mmpost.train.advantages import ADVANTAGES, AllDrawn, NormThenSum, Reward
from mmpost.train.method import Scored


def _scored(*groups, **facts):
    return [Scored(i, "", tuple(g), (1,) * len(g), (False,) * len(g), **facts) for i, g in enumerate(groups)]


def test_credit_by_hand():
    def made(name, *groups, **facts):
        return [a.tolist() for a in ADVANTAGES[name]()(_scored(*groups, **facts), {})]

    third = 2 / 3
    assert made("rloo", (1, 0, 0, 1))[0] == pytest.approx([third, -third, -third, third])
    assert made("ones", (0.0, None)) == [[1.0, pytest.approx(math.nan, nan_ok=True)]]
    assert made("group_nostd", (0.1,) * 7, (1, 0)) == [[0.0] * 7, [0.5, -0.5]]
    spread = np.std([1, 0, 2, 2], ddof=1) + 1e-4
    assert made("batch_std", (1, 0), (2, 2))[0] == pytest.approx([0.5 / spread, -0.5 / spread])
    ada = AllDrawn()(_scored((1, 0, 0, 0), drawn=32, positive=3), {})[0]
    assert ada.tolist() == pytest.approx([0.90625] + [-0.09375] * 3)
    state = {}
    running = Reward(memory=0.5)
    assert running(_scored((1, 0)), state)[0].tolist() == [1.0, 0.0]
    assert running(_scored((1, 1)), state)[0].tolist() == [0.75, 0.75]
    assert state == {"baseline": 0.625}


def test_rewards_are_standardised_before_they_are_summed():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 3, 4))
    weights = (2.0, 0.5)
    groups = [
        Scored(
            i,
            "",
            tuple(first[i] + second[i]),
            (1,) * 4,
            (False,) * 4,
            components=(tuple(first[i]), tuple(second[i])),
            weights=weights,
        )
        for i in range(3)
    ]
    total = sum(
        w * (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-4)
        for w, r in zip(weights, (first, second), strict=True)
    )
    expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(NormThenSum()(groups, {}), expected)
    # A reward of another scale counts as before.
    scaled = [replace(g, components=(tuple(1000 * x for x in g.components[0]), g.components[1])) for g in groups]
    np.testing.assert_allclose(NormThenSum()(scaled, {}), expected, atol=1e-3)
