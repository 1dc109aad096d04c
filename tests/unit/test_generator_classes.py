"""Class numbers and names: what a user may write, and lists that do not agree."""

import pytest

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.generator.classes import numbers_of, require_same_names

NAMES = ("ant", "bee", "cow, brown", "3")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("bee", [1]),
        ("ant, 4,bee", [0, 4, 1]),
        ("cow, brown", [2]),
        ("2", [2]),
        # The fourth class is called 3, so 3 means that one; it is the same number here.
        ("3,0", [3, 0]),
    ],
)
def test_names_and_numbers(text, numbers):
    assert numbers_of(text, NAMES, 5) == numbers


def test_a_name_goes_before_a_number():
    assert numbers_of("1,0", ("1", "0"), 2) == [0, 1]


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("dog", NAMES, "--classes dog is no class. Known: ant, bee, cow, brown, 3 [MMP-C117]"),
        ("dog", (), "--classes dog is no class. This generator's classes have no names: write numbers such as 3,7, or "
                    "all [MMP-C117]"),
        ("-1", NAMES, "--classes -1 is no class. Known: ant, bee, cow, brown, 3 [MMP-C117]"),
        ("5", NAMES, "class 5 is outside 0 to 4. Choose one of these [MMP-C105]"),
    ],
)  # fmt: skip
def test_what_is_no_class(text, names, message):
    with pytest.raises(MmpostError) as caught:
        numbers_of(text, names, 5)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("mine", "theirs", "words"),
    [
        (("a", "b"), ("b", "a"), "2 against 2, class 0 is 'a' against 'b'"),
        (("a", "b"), ("a", "b", "c"), "2 against 3, class 2 is missing against 'c'"),
    ],
)
def test_lists_that_differ(mine, theirs, words):
    with pytest.raises(MmpostError) as caught:
        require_same_names(mine, theirs, owner="the generator", other="the images")
    assert str(caught.value) == (
        f"the generator and the images have other classes: {words}. "
        "Give images with the same class folders as those that the codes were made of [MMP-C119]"
    )


@pytest.mark.parametrize("nothing", [(), ("0", "1", "2")])
def test_lists_without_names_agree_with_all(nothing):
    require_same_names(nothing, ("a",), owner="x", other="y")
    require_same_names(("a",), nothing, owner="x", other="y")
