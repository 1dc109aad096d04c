"""Commands that ask a model about every row of a data set and write another data set: what they share."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mmpost.api.data import Data
from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Group
from mmpost.core.sample import Part, Sample
from mmpost.models.load import LoadedModel
from mmpost.rollout.generate import Sampling, complete
from mmpost_tasks.export import write_jsonl

# Rows that are worked on together; a piece of the journal. Fixed, because numbers may depend on the batch in the last
# bit, and a resumed command has to form the same batches.
PIECE = 32

Progress = Callable[[int, int], None]


def ask(
    model: LoadedModel,
    samples: Sequence[Sample],
    *,
    uids: Sequence[int],
    n: int,
    sampling: Sampling,
    batch_size: int,
) -> list[Group]:
    """Completions of the rows' prompts.

    Args:
        model: Writes them.
        samples: Rows; a final assistant turn is left out.
        uids: Number of each row in the work, which keys the random draws.
        n: Completions of each.
        sampling: How they are drawn.
        batch_size: Completions decoded together.
    """
    prompts = [sample.prompt() for sample in samples]
    encoded = model.adapter.encode_prompts(prompts)
    found = complete(model.policy, model.adapter, encoded, uids, n=n, sampling=sampling, batch_size=batch_size)
    return [Group(p, rollouts, uid) for p, rollouts, uid in zip(prompts, found, uids, strict=True)]


def rows_of(data: Sequence[Data]) -> list[Sample]:
    """All rows, with the name of their source and, with several sources, ids that differ.

    Raises:
        MmpostError: MMP-R227 when there are none.
    """
    rows = [
        dataclasses.replace(row, source=source.name, id=row.id if len(data) == 1 else f"{source.name}-{row.id}")
        for source in data
        for row in source.samples
    ]
    if not rows:
        raise MmpostError("MMP-R227", "no rows to work on.", "Look at the data: mmpost data check FILE.")
    return rows


def fingerprint(rows: Iterable[Sample]) -> str:
    """Hash of rows: words, media references and columns."""
    digest = hashlib.sha256()
    for row in rows:
        columns = json.dumps(dict(row.columns), sort_keys=True, ensure_ascii=False, default=str)
        digest.update(f"{row.id}\0{row.content_hash()}\0{columns}\0".encode())
    return digest.hexdigest()[:16]


def model_fingerprint(name: str) -> str:
    """Name of a model, and sizes and times of its weight files where it is a folder: another training is noticed."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"{name} {digest.hexdigest()[:16]}"


def journal_of(out: Path) -> Path:
    """Where the finished pieces of a file are kept."""
    return out.with_name(f"{out.stem}.rollouts.jsonl")


def write_rows(samples: Sequence[Sample], out: Path) -> None:
    """Write the prompts as an ordinary JSONL of messages, in one move.

    Pictures that are no files go to ``images/`` beside it. A final assistant turn is left out.

    Raises:
        MmpostError: MMP-R228 when rows hold media that such a file cannot.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = f".{out.stem}.partial"
    try:
        rows = _distinct([_portable(sample, out.parent) for sample in samples])
        path = write_jsonl(rows, out.parent, name=partial, answers=False)
    except ValueError as error:
        raise MmpostError("MMP-R228", f"{error}.", "Only rows with text and pictures can be written.") from error
    if not any((out.parent / "images").iterdir()):
        (out.parent / "images").rmdir()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.replace(out)


def _distinct(rows: Sequence[Sample]) -> list[Sample]:
    """Rows whose ids became the same are numbered, since pictures are named after them."""
    taken: set[str] = set()
    out = []
    for row in rows:
        names = itertools.chain([row.id], (f"{row.id}-{number}" for number in itertools.count(2)))
        taken.add(name := next(name for name in names if name not in taken))
        out.append(dataclasses.replace(row, id=name))
    return out


def _portable(sample: Sample, folder: Path) -> Sample:
    """The row with paths as seen from the folder, and an id that can be part of a file name."""

    def moved(part: Part) -> Part:
        if part.kind == "text" or not isinstance(part.ref, str) or not Path(part.ref).is_file():
            return part
        return dataclasses.replace(part, ref=os.path.relpath(part.ref, folder))

    turns = tuple(dataclasses.replace(turn, parts=tuple(moved(part) for part in turn.parts)) for turn in sample.turns)
    return dataclasses.replace(sample, turns=turns, id=re.sub(r"[^\w.-]", "_", sample.id))
