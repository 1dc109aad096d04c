"""Agree with most of your own answers: a reward that needs no label.

The completions of a prompt vote on its answer; the answer of the largest class of equal answers becomes the
pseudo-label, and a completion scores 1 if its answer is the pseudo-label's, else 0.

Source: "Unsupervised Post-Training for Multi-Modal LLM Reasoning via GRPO", arXiv 2505.22453, section 3.2, and its
release (verl/workers/reward/function.py).
There: 10 completions at temperature 0.7; the answer is the content of the last box; strings are counted, ties go to the
one seen first, and a completion without a box votes for the string "None".
Differs (``variant: paper``, the default): equal answers vote together however they are written; a completion without an
answer neither votes nor wins; a tie goes to the class whose completions the policy finds more likely; and a group in
which no answer has ``min_support`` votes gets no reward. ``variant: released`` is the release.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

from mmpost.rewards import vote
from mmpost.rewards.call import judges_groups
from mmpost.rewards.equality import Equality, Kind, similarity
from mmpost.rewards.extract import extract, last_boxed, normalise, raw_answer, text_of, to_letter, to_number
from mmpost.rewards.geometry import read_boxes
from mmpost.rewards.stats import current_watch

Variant = Literal["paper", "released", "random"]

_BOXES = ("auto", "boxes")


@judges_groups
def majority_vote(
    prompts: list[Any],
    completions: list[Any],
    *,
    group: list[int],
    uid: list[int],
    mean_logp: list[float | None],
    variant: Variant = "paper",
    kind: Kind = "auto",
    ties: vote.Ties = "likelier",
    min_support: int = 2,
    iou: float = 0.5,
    tolerance: float = 1e-6,
    percent: bool = False,
    item_timeout: float = 5.0,
    seed: int = 0,
    **columns: list[Any],
) -> list[float | None]:
    """1 if the answer is the one that most completions of the prompt give, else 0.

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings.
        group: Number of the prompt in this call; the completions of a prompt stand together.
        uid: Number of the prompt in the run.
        mean_logp: Mean log-probability of the completion's tokens, nats.
        variant: ``paper``; ``released``, which counts strings and lets "None" win; ``random``, a control whose
            pseudo-label is drawn evenly from the answers that the group has.
        kind: What the answers are; see ``Equality``.
        ties: See ``vote.winner``.
        min_support: Votes that a pseudo-label needs; below it the group gets None.
        iou: Least intersection over union of boxes that vote together.
        tolerance: Largest relative difference of numbers.
        percent: ``50%`` means 0.5; else ``%`` is a unit.
        item_timeout: Seconds for one comparison by math-verify.
        seed: Of the variant ``random``.
        columns: None are given; a label could not be read.

    Returns:
        1.0 or 0.0; None for every completion of a group without a pseudo-label.
    """
    if variant not in ("paper", "released", "random"):
        raise ValueError(f"variant is {variant!r}; expected paper, released or random")
    equality = Equality(kind, tolerance, percent, iou, item_timeout)
    starts = [i for i, number in enumerate(group) if i == 0 or number != group[i - 1]]
    spans = list(zip(starts, [*starts[1:], len(group)], strict=True))
    texts = [text_of(completion) for completion in completions]
    read = last_boxed if variant == "released" else functools.partial(_read, kind)
    answers = [[read(text) for text in texts[start:stop]] for start, stop in spans]
    classes = equality.classes(answers)
    labels: list[str | None] = []
    for (start, stop), said, names in zip(spans, answers, classes, strict=True):
        if variant == "released":
            labels.append(vote.released(said))
            continue
        won = vote.winner(names, mean_logp[start:stop], ties=ties, min_support=min_support)
        if variant == "random" and won is not None:
            # A control learns from the same groups as the vote.
            won = vote.random_class(names, seed=seed, uid=uid[start])
        labels.append(None if won is None else _representative(said, names, won))
    scores = _scores(answers, classes, labels, equality, variant)
    notes = current_watch().notes
    for (start, _), said, names, label in zip(spans, answers, classes, labels, strict=True):
        notes[group[start]] = {
            "label": label,
            "answers": tuple(said),
            "agreement": vote.agreement(names),
            "entropy": vote.entropy(names),
            "equality": equality,
        }
    return [score for scored in scores for score in scored]


def _read(kind: Kind, text: str) -> str | None:
    """The answer, if it is one of that kind."""
    if kind == "boxes":
        # Like the reward for boxes: a text without an answer of its own may name them anywhere.
        said = raw_answer(text)
        found = text if said is None else said
        return normalise(found) if len(read_boxes(found)) else None
    answer = extract(text)
    if (kind == "number" and to_number(answer) is None) or (kind == "choice" and to_letter(answer) is None):
        return None
    return answer


def _representative(answers: Sequence[str | None], classes: Sequence[int | None], won: int) -> str:
    """The winning class in one answer: of boxes the one most like the others, else the first."""
    members = [said for said, name in zip(answers, classes, strict=True) if name == won and said is not None]
    boxes = [read_boxes(said) for said in members]
    if not all(len(found) for found in boxes):
        return members[0]
    likeness = [sum(similarity(one, other) for other in boxes) for one in boxes]
    return members[likeness.index(max(likeness))]


def _scores(
    answers: Sequence[Sequence[str | None]],
    classes: Sequence[Sequence[int | None]],
    labels: Sequence[str | None],
    equality: Equality,
    variant: Variant,
) -> list[list[float | None]]:
    """1 for members of the label's class.

    Boxes are compared with the label itself, because a class may be a long chain; so are all answers of the release.
    """
    direct = [
        label is not None and (variant == "released" or bool(len(read_boxes(label)) and equality.kind in _BOXES))
        for label in labels
    ]
    asked = [
        (label, _said(answer))
        for said, label, is_direct in zip(answers, labels, direct, strict=True)
        for answer in said
        if is_direct and label is not None
    ]
    equal = dict(zip(asked, equality.pairs([(normalise(a), normalise(b)) for a, b in asked]), strict=True))
    out: list[list[float | None]] = []
    for said, names, label, is_direct in zip(answers, classes, labels, direct, strict=True):
        if label is None:
            out.append([None] * len(said))
        elif is_direct:
            out.append([float(equal[label, _said(answer)]) for answer in said])
        else:
            won = names[list(said).index(label)]
            out.append([float(name == won) for name in names])
    return out


def _said(answer: str | None) -> str:
    """The answer as the release sees it. Boxes have no such answer, so that it equals none of them."""
    return "None" if answer is None else answer
