"""Does the completion have the form that was asked for; 1.0 or 0.0 per completion."""

from __future__ import annotations

import re
from typing import Any

from mmpost.rewards.extract import last_boxed, text_of

_ONE_ANSWER = re.compile(r"(?:(?!</?answer>).)*<answer>\s*(?!</?answer>)\S(?:(?!</?answer>).)*</answer>\s*", re.DOTALL)
_INSIDE = r"\s*(?!</?(?:think|answer)>)\S(?:(?!</?(?:think|answer)>).)*"
_THINK = re.compile(rf"\s*<think>{_INSIDE}</think>\s*<answer>{_INSIDE}</answer>\s*", re.DOTALL)


def answer_tags(prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float | None]:
    """1 if the text ends in exactly one non-empty ``<answer>...</answer>``."""
    return [float(_ONE_ANSWER.fullmatch(text_of(completion)) is not None) for completion in completions]


def boxed(prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float | None]:
    r"""1 if the text holds a non-empty ``\boxed{...}``."""
    return [float(bool((last_boxed(text_of(completion)) or "").strip())) for completion in completions]


def think_tags(prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float | None]:
    """1 if the text is one ``<think>...</think>`` and one ``<answer>...</answer>``, neither empty, and nothing else."""
    return [float(_THINK.fullmatch(text_of(completion)) is not None) for completion in completions]
