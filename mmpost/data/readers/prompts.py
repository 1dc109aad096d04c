"""Rows with one question: prompt-only rows for RL, and question-answer pairs.

A pair keeps its answer as a column too, so that a reward can read it after the assistant turn is taken off.
In rows without any mark the media come before the question. verl rows get their ``reward_model.ground_truth``
as ``solution``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmpost.core.sample import Sample
from mmpost.data.readers.messages import MEDIA_NAMES
from mmpost.data.readers.row import Reader, Row, finish, no_conversation
from mmpost.data.readers.turns import read_turns

# Question column to answer column. The first one that a row has decides.
PAIRS = {"prompt": "completion", "instruction": "output", "query": "response", "question": "answer"}


def _recognise(row: Row) -> bool:
    return any(row.has(question) for question in PAIRS)


def _read(row: Row) -> Sample | None:
    """Sample of a prompt-only row or a pair."""
    question = next((name for name in PAIRS if row.has(name)), None)
    if question is None:
        row.faults.append(no_conversation(row))
        return None
    messages = [*_history(row), *_question(row, question), *_answer(row, PAIRS[question])]
    if row.faults:
        return None
    turns = read_turns(row, messages, column=question, media_first=True)
    used = {question, "history"} | MEDIA_NAMES | ({"input"} if question == "instruction" else set())
    sample = finish(row, turns, used)
    return _with_ground_truth(sample)


def _question(row: Row, name: str) -> list[Any]:
    value = row.values[name]
    if isinstance(value, str):
        extra = row.values.get("input") if name == "instruction" else None
        return [{"role": "user", "content": f"{value}\n{extra}" if extra else value}]
    if name == "prompt" and isinstance(value, list | tuple) and value:
        return list(value)
    row.wrong_shape(f"'{name}'", value, "a text or a list of messages" if name == "prompt" else "a text")
    return []


def _answer(row: Row, name: str) -> list[Any]:
    """Assistant messages of a pair; an answer that is no text or number, such as a box, stays a column."""
    value = row.values.get(name)
    if isinstance(value, list | tuple) and name == "completion":
        return list(value)
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return [{"role": "assistant", "content": str(value)}]
    return []


def _history(row: Row) -> list[Any]:
    """Earlier rounds of a pair, ``[[question, answer], ...]``."""
    history, messages = row.values.get("history"), []
    if not isinstance(history, list | tuple | None):
        row.wrong_shape("'history'", history, "a list of questions and answers")
        return []
    for round_ in history or ():
        if not isinstance(round_, list | tuple) or len(round_) != 2:
            row.wrong_shape("an entry of 'history'", round_, "a question and an answer")
            return []
        messages += [{"role": "user", "content": round_[0]}, {"role": "assistant", "content": round_[1]}]
    return messages


def _with_ground_truth(sample: Sample) -> Sample:
    reward_model = sample.columns.get("reward_model")
    if not isinstance(reward_model, Mapping) or sample.columns.get("solution") is not None:
        return sample
    columns = {**sample.columns, "solution": reward_model.get("ground_truth")}
    return Sample(sample.id, sample.turns, columns, sample.origin, sample.source)


READER = Reader(_recognise, _read)
