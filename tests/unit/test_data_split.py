from collections import Counter

import pytest

from mmpost.core.errors import MmpostError
from mmpost.data.split import by_key

SHARES = {"train": 0.8, "val": 0.05, "test": 0.15}
KEYS = [f"image-{i}" for i in range(20000)]


def test_shares_are_kept():
    counts = Counter(by_key(key, SHARES) for key in KEYS)
    for name, share in SHARES.items():
        # Four standard deviations of a binomial count.
        assert abs(counts[name] - share * len(KEYS)) < 4 * (share * (1 - share) * len(KEYS)) ** 0.5


def test_only_ratios_count_and_order_does_not():
    other = {"test": 15, "train": 80, "val": 5}
    assert all(by_key(key, SHARES) == by_key(key, other) for key in KEYS[:2000])


def test_the_assignment_is_the_same_on_every_machine():
    assert [by_key(key, {"a": 1, "b": 1}) for key in ("x", "y", "z", "", "ü", "image-7")] == [
        "a",
        "b",
        "a",
        "b",
        "a",
        "b",
    ]


def test_a_share_of_zero_gets_nothing():
    assert {by_key(key, {"a": 0, "b": 1, "z": 0}) for key in KEYS[:500]} == {"b"}


def test_moving_an_edge_moves_only_the_keys_beside_it():
    before = [by_key(key, {"a": 0.5, "b": 0.5}) for key in KEYS]
    after = [by_key(key, {"a": 0.6, "b": 0.4}) for key in KEYS]
    changes = {(old, new) for old, new in zip(before, after, strict=True) if old != new}
    assert changes == {("b", "a")}


@pytest.mark.parametrize("shares", [{}, {"a": 0.0}, {"a": 1.0, "b": -0.5}, {"a": float("nan")}])
def test_wrong_shares(shares):
    with pytest.raises(MmpostError) as caught:
        by_key("x", shares)
    assert str(caught.value) == f"split shares must be ≥ 0 and not all 0; got {shares} [MMP-D038]"
