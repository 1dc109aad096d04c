"""What the log says about votes: agreement, entropy, one answer for everything, and the pseudo-labels against labels.

Labels are looked at here, after the rewards are final, and nowhere else. They are for the eye: nothing that trains
reads these numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

from mmpost.rewards.answers import same
from mmpost.rewards.equality import Equality, Pair
from mmpost.rewards.extract import normalise
from mmpost.rewards.stats import Watch, set_watch


@dataclass(frozen=True, slots=True)
class Vote:
    """The vote of one group.

    Attributes:
        label: Pseudo-label, or None.
        answers: Of the completions, None where there is none.
        agreement: Share of the completions in the largest class.
        entropy: Of the answers over classes, nats.
        gold: Labels of the data, empty where there are none.
        equality: When two answers mean the same.
    """

    label: str | None
    answers: tuple[str | None, ...]
    agreement: float
    entropy: float
    gold: tuple[str, ...]
    equality: Equality


def votes_of(notes: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Any], labels: Sequence[str]) -> list[Vote]:
    """Votes among the notes of a group.

    Args:
        notes: ``Group.notes``.
        columns: Of the row.
        labels: Columns that hold labels.
    """
    if not notes:
        return []
    gold = tuple(dict.fromkeys(text for name in labels for text in gold_texts(columns.get(name))))
    return [
        Vote(note["label"], note["answers"], note["agreement"], note["entropy"], gold, note["equality"])
        for note in notes.values()
        if "agreement" in note
    ]


def gold_texts(gold: Any) -> list[str]:
    """A label as texts: one, several right ones of a list, or one text of boxes."""
    if gold is None:
        return []
    if isinstance(gold, list | tuple):
        if all(isinstance(item, int | float) for item in gold) and len(gold) == 4:
            return [str(list(gold))]
        if gold and all(isinstance(item, list | tuple) for item in gold):
            return [str([list(item) for item in gold])]
        return [normalise(str(item)) for item in gold if item is not None]
    return [normalise(str(gold))]


def summary(votes: Sequence[Vote]) -> dict[str, Any]:
    """Metrics of the votes of a step over all processes.

    Returns:
        ``agreement``, ``entropy``, ``unparsed`` (share of completions without an answer), ``labelled`` (share of
        prompts with a pseudo-label), ``same_answer`` (share of the pseudo-labels that are the most frequent one); and,
        where there are labels, ``accuracy`` of the ``pseudo_labels`` and of the ``completions`` of prompts that have
        both. Empty without votes.
    """
    if not votes:
        return {}
    count = len(votes)
    answers = [answer for vote in votes for answer in vote.answers]
    names = Counter(vote.label.casefold() for vote in votes if vote.label is not None)
    out: dict[str, Any] = {
        "agreement": sum(vote.agreement for vote in votes) / count,
        "entropy": sum(vote.entropy for vote in votes) / count,
        "unparsed": sum(answer is None for answer in answers) / max(len(answers), 1),
        "labelled": names.total() / count,
    }
    if names.total() > 1:
        out["same_answer"] = max(names.values()) / names.total()
    known = [vote for vote in votes if vote.gold and vote.label is not None]
    if known:
        right = _right(known)
        labels = sum((vote.label, vote.gold) in right for vote in known) / len(known)
        shares = [sum((answer, vote.gold) in right for answer in vote.answers) / len(vote.answers) for vote in known]
        out["accuracy"] = {"pseudo_labels": labels, "completions": sum(shares) / len(known)}
    return out


def _right(votes: Sequence[Vote]) -> set[tuple[str | None, tuple[str, ...]]]:
    """Answers that mean one of the labels of their row, with these labels."""
    right: set[tuple[str | None, tuple[str, ...]]] = set()
    open_pairs: dict[Equality, dict[Pair, list[tuple[str | None, tuple[str, ...]]]]] = {}
    for vote in votes:
        rule = vote.equality
        for answer in {vote.label, *vote.answers} - {None}:
            assert answer is not None
            if any(same(answer, one, tolerance=rule.tolerance, percent=rule.percent) for one in vote.gold):
                right.add((answer, vote.gold))
                continue
            for one in vote.gold:
                open_pairs.setdefault(rule, {}).setdefault((answer, one), []).append((answer, vote.gold))
    for rule, asked in open_pairs.items():
        for found, entries in zip(_quietly(rule, list(asked)), asked.values(), strict=True):
            right.update(entries if found else ())
    return right


def _quietly(rule: Equality, asked: Sequence[Pair]) -> list[bool]:
    """Comparisons that may fail without harm: what cannot be compared counts as different."""

    def work() -> list[bool]:
        set_watch(Watch(on_error="null"))
        return rule.pairs(asked)

    return copy_context().run(work)
