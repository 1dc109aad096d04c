"""Does the text look like reasoning: key phrases without repetition, whether or not the answer is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mmpost.rewards.extract import text_of
from mmpost.rewards.length import repeated_share

# Phrases people use when they plan, derive, doubt and check.
PHRASES = (
    "first", "second", "next", "then", "finally", "we need to", "we know", "given that", "we are asked", "let me",
    "let's", "let us", "suppose", "assume", "consider", "recall", "note that", "notice that", "observe that",
    "because", "since", "so that", "therefore", "thus", "hence", "it follows", "which means", "this implies",
    "in other words", "for example", "for instance", "if we", "in that case", "otherwise", "on the other hand",
    "however", "but wait", "wait", "actually", "maybe", "perhaps", "alternatively", "another way", "instead",
    "to check", "let me check", "double-check", "verify", "to be sure", "is that right", "makes sense", "try again",
    "mistake", "step by step", "putting it together", "in total", "we get", "we find", "we have", "the answer",
    "in conclusion", "to sum up", "in the image", "in the picture", "looking at", "i can see", "on the left",
    "on the right", "compared with", "count",
)  # fmt: skip


def reasoning_pattern(
    prompts: list[Any],
    completions: list[Any],
    *,
    phrases: Sequence[str] = PHRASES,
    enough: int = 20,
    ngram: int = 20,
    **columns: list[Any],
) -> list[float | None]:
    """``clip(min(1, different phrases / enough) - share of repeated n-grams - turns of a made-up user, 0, 1)``.

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings.
        phrases: What is looked for, as whole words without case.
        enough: Different phrases that give the full score.
        ngram: Words per n-gram.
        columns: Other columns; not read.

    Source: RPR of arXiv 2505.22653. Differs: the list of phrases is our own.
    """
    patterns = [re.compile(rf"(?<!\w){re.escape(phrase.casefold())}(?!\w)") for phrase in phrases]
    scores: list[float | None] = []
    for completion in completions:
        text = text_of(completion).casefold()
        different = sum(pattern.search(text) is not None for pattern in patterns)
        score = min(1.0, different / enough) - repeated_share(text.split(), ngram) - text.count("user: ")
        scores.append(min(1.0, max(0.0, score)))
    return scores
