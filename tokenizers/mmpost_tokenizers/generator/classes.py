"""Classes by number and by name: whether two lists of names agree, and which numbers a user means."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmpost.core.errors import MmpostError


def check_classes(class_ids: Tensor, count: int) -> None:
    """Refuse class numbers outside [0, count).

    Raises:
        MmpostError: MMP-C105.
    """
    bad = class_ids[(class_ids < 0) | (class_ids >= count)]
    if len(bad):
        raise MmpostError(
            "MMP-C105",
            f"class {int(bad[0])} is outside 0 to {count - 1}.",
            "Give labelled images, and a generator with as many classes as there are labels",
        )


def require_same_names(mine: Sequence[str], theirs: Sequence[str], *, owner: str, other: str) -> None:
    """Refuse two lists of class names that differ: number 3 would be another class in each.

    Lists without names, and those that only repeat the numbers 0, 1, 2, ..., say nothing and agree with all.

    Args:
        mine: Names of the first thing.
        theirs: Names of the second.
        owner: What the first thing is, with an article.
        other: What the second thing is.

    Raises:
        MmpostError: MMP-C119, with the first class that differs.
    """
    if _unnamed(mine) or _unnamed(theirs) or list(mine) == list(theirs):
        return
    for number in range(max(len(mine), len(theirs))):
        first, second = (repr(names[number]) if number < len(names) else "missing" for names in (mine, theirs))
        if first != second:
            break
    raise MmpostError(
        "MMP-C119",
        f"{owner} and {other} have other classes: {len(mine)} against {len(theirs)}, class {number} is {first} against "
        f"{second}.",
        "Give images with the same class folders as those that the codes were made of",
    )


def numbers_of(text: str, names: Sequence[str], count: int) -> list[int]:
    """Class numbers that a user asks for.

    Args:
        text: ``all``, or names or numbers, separated by commas. A name goes before a number that is written the same.
        names: Of the classes; may be empty.
        count: Number of classes.

    Raises:
        MmpostError: MMP-C117 for something that is neither, MMP-C105 for a number that is no class.
    """
    if text == "all":
        return list(range(count))
    # A name may hold a comma itself.
    words = [text] if text in names else [word.strip() for word in text.split(",")]
    return [_number(word, names, count) for word in words]


def _number(word: str, names: Sequence[str], count: int) -> int:
    if word in names:
        return list(names).index(word)
    if not word.isdecimal():
        known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        fix = (
            f"Known: {known}" if names else "This generator's classes have no names: write numbers such as 3,7, or all"
        )
        raise MmpostError("MMP-C117", f"--classes {word} is no class.", fix)
    if int(word) >= count:
        raise MmpostError("MMP-C105", f"class {word} is outside 0 to {count - 1}.", "Choose one of these")
    return int(word)


def _unnamed(names: Sequence[str]) -> bool:
    return all(name == str(number) for number, name in enumerate(names))
