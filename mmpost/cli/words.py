"""Lists on the command line."""

from __future__ import annotations

from mmpost.core.errors import MmpostError


def words(text: str) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers between commas, none of them negative.

    Raises:
        MmpostError: MMP-C004.
    """
    try:
        found = [int(word) for word in words(text)]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise MmpostError("MMP-C004", f"{option} {text!r}: expected whole numbers between commas.", "Write 0,1,2.")
    return found
