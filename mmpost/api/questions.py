r"""New questions for old pictures, asked by the model itself, so that label-free training has more to vote on.

Two modes of the source: ``direct`` shows the picture alone; ``in_context`` also shows the row's question and, where the
row has one, its answer. One question per picture is asked for, and no answer is kept. A question stays when

* it can be read: it stands in ``<question>`` tags or a box, or is the whole reply, was not cut by the length limit, and
  has at least ``min_words`` words;
* it does not speak of an earlier question or answer, and does not hold the answer that only the text had;
* it is not nearly the question of the row, nor one that was kept for the same picture (edit similarity below 0.9);
* it can be answered: of 8 answers of the model, the largest class of equal ones has a share within [0.3, 0.9]. Below,
  a vote means nothing; above, it has nothing left to teach.

Source: "Unsupervised Post-Training for Multi-Modal LLM Reasoning via GRPO", arXiv 2505.22453 (in-context and direct
synthesis with the model that is trained).
Differs: the words of the requests and all filters are our own; the paper trains on whatever the model asks.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmpost.api.data import Data
from mmpost.api.model import load_model
from mmpost.api.rollouts import PIECE, Progress, ask, fingerprint, journal_of, model_fingerprint, rows_of, write_rows
from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Rollout
from mmpost.core.sample import Part, Sample, Turn
from mmpost.models.load import LoadedModel
from mmpost.rewards import vote
from mmpost.rewards.equality import Equality
from mmpost.rewards.extract import extract, last_boxed
from mmpost.rollout.generate import Sampling
from mmpost.runs.journal import Journal

Mode = Literal["direct", "in_context"]
REQUESTS: dict[str, str] = {
    "direct": (
        "Look at the picture and think of one question about it that has a short, definite answer which can be worked "
        "out from the picture alone. Write only the question, in <question></question> tags."
    ),
    "in_context": (
        "Here is a question about the picture{answer}:\n{question}\n\nThink of one different question about the same "
        "picture, of a similar kind and difficulty, whose short, definite answer can be worked out from the picture "
        "alone. Write only the new question, in <question></question> tags."
    ),
}
ANSWER_IN_A_BOX = "Put the final answer in \\boxed{}."
PROBES = 8
NEARLY = 0.9

_TAGGED = re.compile(r"<question>(.*?)</question>", re.DOTALL | re.IGNORECASE)
_REFERS = re.compile(
    r"\b(?:original|given|previous|above|first|earlier|new|similar)\s+(?:question|answer|problem)\b", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which questions stay.

    Attributes:
        min_words: Least number of words.
        low: Lowest share of the largest class of answers.
        high: Highest share.
    """

    min_words: int = 3
    low: float = 0.3
    high: float = 0.9


def synthesize(
    data: Sequence[Data],
    model: str | LoadedModel,
    out: Path,
    *,
    mode: Mode,
    sampling: Sampling,
    wanted: Wanted | None = None,
    probe: Sampling | None = None,
    suffix: str = ANSWER_IN_A_BOX,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Write one new question per picture as an ordinary data file; resumable.

    Args:
        data: Sources whose rows have pictures; others are counted and left out.
        model: Name or folder of the model that asks and answers, or the open model.
        out: JSONL file.
        mode: ``direct`` or ``in_context``.
        sampling: How questions are drawn.
        wanted: Which ones stay.
        probe: How the answers of the probes are drawn; default as ``sampling`` at temperature 0.7.
        suffix: What is written behind each question, so that the answer can be found.
        batch_size: Completions decoded together.
        progress: Called with pieces done and pieces in all.

    Returns:
        Number of rows by what became of them: ``kept``, ``no picture``, ``unreadable``, ``refers to text``,
        ``near duplicate``, ``too hard``, ``too easy``.

    Raises:
        MmpostError: MMP-R226 to MMP-R228, MMP-R230 for an unknown mode, and what model and data raise.
    """
    if mode not in REQUESTS:
        raise MmpostError("MMP-R230", f"unknown mode '{mode}'.", f"Known: {', '.join(REQUESTS)}.")
    wanted = wanted or Wanted()
    probe = probe or dataclasses.replace(sampling, temperature=0.7, top_p=0.99)
    every = rows_of(data)
    rows = [row for row in every if row.media("image") and len(row.media()) == len(row.media("image"))]
    name = model if isinstance(model, str) else model.name
    work: dict[str, Any] = {"rows": fingerprint(rows), "model": model_fingerprint(name), "mode": mode, "suffix": suffix}
    work |= {"sampling": dataclasses.asdict(sampling), "probe": dataclasses.asdict(probe), "piece": PIECE}
    work |= {"wanted": dataclasses.asdict(wanted)}
    journal = Journal(journal_of(out), work)
    opened: list[LoadedModel] = [] if isinstance(model, str) else [model]

    def piece(number: int) -> list[dict[str, Any]]:
        if not opened:
            opened.append(load_model(name, peft=None))
        uids = range(number * PIECE, min((number + 1) * PIECE, len(rows)))
        part = [rows[uid] for uid in uids]
        asking = [_request(row, mode) for row in part]
        groups = ask(opened[0], asking, uids=uids, n=1, sampling=sampling, batch_size=batch_size)
        entries = [_read(row, group.rollouts[0], wanted) for row, group in zip(part, groups, strict=True)]
        hopeful = [index for index, entry in enumerate(entries) if not entry["fate"]]
        questions = [_row(part[index], entries[index], mode, suffix) for index in hopeful]
        numbers = [uids[index] for index in hopeful]
        groups = ask(opened[0], questions, uids=numbers, n=PROBES, sampling=probe, batch_size=batch_size)
        answers = [[extract(rollout.text) for rollout in group.rollouts] for group in groups]
        for index, names in zip(hopeful, Equality().classes(answers), strict=True):
            entries[index]["share"] = vote.agreement(names)
        return entries

    journal.complete(-(-len(rows) // PIECE), piece, progress)
    entries = [entry for piece_entries in journal.pieces for entry in piece_entries]
    fates = _fates(rows, entries, wanted)
    kept = [
        _row(row, entry, mode, suffix) for row, entry, fate in zip(rows, entries, fates, strict=True) if fate == "kept"
    ]
    write_rows(kept, out)
    counts = Counter(fates)
    counts["no picture"] = len(every) - len(rows)
    return {fate: counts[fate] for fate in ("kept", *sorted(set(counts) - {"kept"})) if fate == "kept" or counts[fate]}


def question_in(text: str) -> str:
    """The question of a reply, on one line; empty when there is none."""
    tagged = _TAGGED.findall(text)
    boxed = last_boxed(text)
    found = tagged[-1] if tagged else boxed if boxed is not None else text
    return " ".join(found.split())


def edit_similarity(first: str, second: str) -> float:
    """1 - Levenshtein distance / longer length, without regard to case and spacing; in [0, 1]."""
    one, two = (" ".join(text.casefold().split()) for text in (first, second))
    longest = max(len(one), len(two))
    if not longest:
        return 1.0
    letters = np.array([ord(letter) for letter in two], dtype=np.int64)
    places = np.arange(len(two) + 1)
    row = places.copy()
    for number, letter in enumerate(one, start=1):
        # Deletions and substitutions first; insertions are then a running minimum along the row.
        best = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))
        row = np.minimum.accumulate(np.concatenate([[number], best]) - places) + places
    return 1.0 - int(row[-1]) / longest


def _request(row: Sample, mode: Mode) -> Sample:
    """The row's pictures with the request for a question."""
    question = " ".join(turn.text for turn in row.turns if turn.role == "user").strip()
    answer = _answer(row)
    text = REQUESTS[mode]
    if mode == "in_context":
        text = text.format(question=question, answer=f" (its answer is {answer})" if answer else "")
    pictures = tuple(row.media("image"))
    return Sample(row.id, (Turn("user", (*pictures, Part("text", text))),), {}, row.origin, row.source)


def _answer(row: Sample) -> str:
    """What the row says is right, or nothing."""
    if row.turns and row.turns[-1].role == "assistant":
        said = row.turns[-1].text
        return extract(said) or said
    gold = row.columns.get("solution")
    return str(gold) if isinstance(gold, str | int | float) else ""


def _read(row: Sample, rollout: Rollout, wanted: Wanted) -> dict[str, Any]:
    """The question and why it cannot stay, if it cannot."""
    question = question_in(rollout.text)
    answer = _answer(row)
    # A single letter or digit stands in many questions by chance.
    leaks = len(answer) > 1 and re.search(rf"(?<!\w){re.escape(answer.casefold())}(?!\w)", question.casefold())
    fate = ""
    if rollout.truncated or len(question.split()) < wanted.min_words or question in REQUESTS.values():
        fate = "unreadable"
    elif _REFERS.search(question) or leaks:
        fate = "refers to text"
    elif edit_similarity(question, " ".join(turn.text for turn in row.turns if turn.role == "user")) >= NEARLY:
        fate = "near duplicate"
    return {"question": question, "fate": fate, "share": None}


def _fates(rows: Sequence[Sample], entries: Sequence[dict[str, Any]], wanted: Wanted) -> list[str]:
    """What becomes of each question, in the order of the rows."""
    kept: dict[Any, list[str]] = {}
    out = []
    for row, entry in zip(rows, entries, strict=True):
        fate = entry["fate"]
        of_picture = kept.setdefault(tuple(part.ref for part in row.media()), [])
        if not fate and entry["share"] < wanted.low:
            fate = "too hard"
        elif not fate and entry["share"] > wanted.high:
            fate = "too easy"
        elif not fate and any(edit_similarity(entry["question"], other) >= NEARLY for other in of_picture):
            fate = "near duplicate"
        if not fate:
            of_picture.append(entry["question"])
        out.append(fate or "kept")
    return out


def _row(row: Sample, entry: dict[str, Any], mode: Mode, suffix: str) -> Sample:
    """The new question as a row without any label."""
    words = f"{entry['question']} {suffix}".strip()
    columns = {"synthetic": {"mode": mode, "from": row.id, "share": entry["share"]}}
    parts = (*row.media("image"), Part("text", words))
    return Sample(f"{row.id}-{mode}", (Turn("user", parts),), columns, row.origin, row.source)
