"""What is wrong with rows that can be read, in themselves and together. No model is needed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Literal

from mmpost.config.schema import MediaSection
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Part, Sample, Turn
from mmpost.data.overview import summary, summary_lines
from mmpost.data.readers.preference import ANSWERS
from mmpost.data.readers.prompts import PAIRS
from mmpost.media import audio, image, video
from mmpost.media.ref import inline_bytes, local_path, locate

__all__ = ["check", "leakage", "summary", "summary_lines"]

Command = Literal["sft", "grpo"]
MediaCheck = Literal["none", "exists", "decode"]
IdScope = dict[tuple[str, str], str]

_NEEDS = "sft needs assistant, grpo needs user"
_LEAKS_LISTED = 3


def check(
    samples: Sequence[Sample],
    *,
    command: Command | None,
    media: MediaCheck,
    id_scope: IdScope | None,
    roots: Sequence[str] = (),
    budgets: MediaSection | None = None,
) -> list[MmpostError]:
    """Faults that the reader cannot see: roles for a command, empty answers, ids used twice, media files.

    Args:
        samples: Rows of one or more sources.
        command: What the rows are for; None checks what holds for every use.
        media: ``exists`` looks for the files, ``decode`` also decodes every one.
        id_scope: (source, id) to the row that has it, filled here; pass the same dict again to check ids
            across calls.
        roots: Folders that the reader looked in (``Table.roots``), named when a file is missing.
        budgets: How sounds and videos are decoded; None takes the defaults.

    Returns:
        MMP-D007, D008, D012, D013, D016, D027, D035, D040 and those of the decoders in the order of the rows, all of
        them.
    """
    faults: list[MmpostError] = []
    seen = {} if id_scope is None else id_scope
    intact: set[str] = set()
    preference_files: set[str] = set()
    for sample in samples:
        if command is not None and _is_preference(sample):
            file = sample.origin.rpartition(":")[0]
            if file not in preference_files:
                preference_files.add(file)
                faults.append(_not_trained(sample, command, file))
            continue
        faults += _roles(sample, command)
        faults += _identity(sample, seen)
        if media != "none":
            faults += _media(sample, media, intact, roots, budgets)
    return faults


def _is_preference(sample: Sample) -> bool:
    return all(sample.columns.get(name) is not None for name in ANSWERS)


def _not_trained(sample: Sample, command: str, file: str) -> MmpostError:
    columns = ", ".join(sample.columns)
    return MmpostError("MMP-D040", f"'{command}' does not train on preference data ({file}); columns found: {columns}")


def _roles(sample: Sample, command: Command | None) -> list[MmpostError]:
    faults = []
    if command != "grpo":
        faults += [
            MmpostError("MMP-D012", f"{sample.origin}: assistant message {i} is empty; nothing would be learned")
            for i, turn in enumerate(sample.turns, 1)
            if turn.role == "assistant" and turn.train and _is_empty(turn)
        ]
    # A question-answer pair keeps its answer as a column, so taking the assistant turn off loses nothing.
    turns = sample.prompt().turns if command == "grpo" and _is_pair(sample) else sample.turns
    last, wanted = (
        (turns[-1].role if turns else "none"),
        {"sft": "assistant", "grpo": "user"}.get(command or ""),
    )
    if wanted is not None and last != wanted:
        faults.append(MmpostError("MMP-D013", f"{sample.origin}: last message is '{last}'; {_NEEDS}"))
    return faults


def _is_pair(sample: Sample) -> bool:
    return any(sample.columns.get(answer) is not None for answer in PAIRS.values())


def _is_empty(turn: Turn) -> bool:
    return all(part.kind == "text" and not part.text.strip() for part in turn.parts)


def _identity(sample: Sample, seen: IdScope) -> list[MmpostError]:
    first = seen.setdefault((sample.source, sample.id), sample.origin)
    if first == sample.origin:
        return []
    return [MmpostError("MMP-D016", f"{sample.origin}: id '{sample.id}' already used in {first}")]


def _media(
    sample: Sample, depth: MediaCheck, intact: set[str], roots: Sequence[str], budgets: MediaSection | None
) -> list[MmpostError]:
    """Faults of one row's media; a good file is looked at once, a bad one is named in every row."""
    faults = []
    for part in sample.media():
        if part.kind == "action" or part.ref is None or part.ref in intact:
            continue
        try:
            _look_at(part, sample.origin, depth, roots, budgets)
        except MmpostError as error:
            faults.append(error)
        else:
            if isinstance(part.ref, str):
                intact.add(part.ref)
    return faults


def _look_at(part: Part, origin: str, depth: MediaCheck, roots: Sequence[str], budgets: MediaSection | None) -> None:
    ref = part.ref
    if isinstance(ref, str) and inline_bytes(ref, kind=part.kind, origin=origin) is None:
        _exists(ref, part.kind, origin, roots)
    if depth != "decode" or ref is None:
        return
    if part.kind == "image":
        image.load(ref, origin=origin)
    elif part.kind == "audio":
        audio.load(ref, origin=origin, section=budgets)
    elif part.kind == "video":
        video.load(ref, origin=origin, section=budgets)


def _exists(ref: str, kind: str, origin: str, roots: Sequence[str]) -> None:
    """Raise MMP-D007 or MMP-D035 unless the file is there. The reader has put its folder in front already."""
    if os.path.exists(local_path(ref)):
        return
    folder = os.path.dirname(origin.rpartition(":")[0])
    if not roots and folder and ref.startswith(os.path.join(folder, "")):
        roots = (folder, "")  # what the reader does without a media_root
    root = next((root for root in roots if root and ref.startswith(os.path.join(root, ""))), None)
    written = ref if root is None else ref[len(os.path.join(root, "")) :]
    locate(written, kind=kind, origin=origin, roots=roots)


def leakage(train: Iterable[Sample], evaluation: Iterable[Sample]) -> MmpostError | None:
    """The MMP-D018 of evaluation rows that training has seen, or None.

    Rows are the same when turns and media are, wherever the media path starts. A row without an answer is
    compared with the other row's prompt, since evaluation often keeps the answer in a column.
    """
    asked: dict[str, str] = {}
    answered: dict[str, str] = {}
    unanswered: dict[str, str] = {}
    for sample in map(_with_real_paths, train):
        prompt = sample.prompt().content_hash()
        asked.setdefault(prompt, sample.origin)
        if _has_answer(sample):
            answered.setdefault(sample.content_hash(), sample.origin)
        else:
            unanswered.setdefault(prompt, sample.origin)
    leaks, rows = [], 0
    for sample in map(_with_real_paths, evaluation):
        rows += 1
        prompt = sample.prompt().content_hash()
        if _has_answer(sample):
            origin = answered.get(sample.content_hash()) or unanswered.get(prompt)
        else:
            origin = asked.get(prompt)
        if origin is not None:
            leaks.append((sample.origin, origin))
    if not leaks:
        return None
    file = leaks[0][0].rpartition(":")[0]
    first = ", ".join(f"{evaluated} = {trained}" for evaluated, trained in leaks[:_LEAKS_LISTED])
    return MmpostError(
        "MMP-D018",
        f"{file}: {len(leaks)} of {rows} rows are in both training and evaluation data (same content hash); "
        f"first: {first}",
    )


def _has_answer(sample: Sample) -> bool:
    return bool(sample.turns) and sample.turns[-1].role == "assistant"


def _with_real_paths(sample: Sample) -> Sample:
    """The sample with every file named by its real path, so that two spellings of one file are equal."""
    if not any(isinstance(part.ref, str) for part in sample.media()):
        return sample
    turns = tuple(
        dataclasses.replace(turn, parts=tuple(_with_real_path(part) for part in turn.parts)) for turn in sample.turns
    )
    return dataclasses.replace(sample, turns=turns)


def _with_real_path(part: Part) -> Part:
    if isinstance(part.ref, str) and part.kind != "action" and os.path.exists(part.ref):
        return dataclasses.replace(part, ref=os.path.realpath(part.ref))
    return part
