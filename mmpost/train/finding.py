"""A finding of the diagnosis."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that the user may want to act on.

    Attributes:
        code: ``MMP-R2`` and two digits.
        words: What is seen, with its numbers.
        advice: What to do about it, as an imperative.
    """

    code: str
    words: str
    advice: str

    def __str__(self) -> str:
        return f"{self.words} {self.advice} [{self.code}]"


def percent(share: float) -> str:
    """A share in [0, 1] as people write it."""
    return f"{100 * share:.0f} %"
