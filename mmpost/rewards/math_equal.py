"""The comparison that ``mathematics`` gives to worker processes. Imports sympy; nobody else should."""

from __future__ import annotations

import logging

from math_verify import parse, verify  # type: ignore[import-untyped]

# It warns once per process that its time limits are off; they are, and ``workers`` keeps the limit.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def equal(gold: str, answer: str) -> bool | None:
    """Whether ``answer`` equals ``gold`` as mathematics; None when ``gold`` cannot be read.

    Args:
        gold: LaTeX or text without ``$``. It comes first: math-verify treats the two differently.
        answer: The same.
    """
    right = parse(f"${gold}$", parsing_timeout=None)
    if not right:
        return None
    said = parse(f"${answer}$", parsing_timeout=None)
    return bool(verify(right, said, timeout_seconds=None))
