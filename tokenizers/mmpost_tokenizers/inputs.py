"""What a run is made of besides its options: codes, images, weights.

They are remembered in the run folder, so that a second start with something else is refused with its name instead of
being answered with the old result, and so that ``mmpost resume`` finds everything again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmpost.core.errors import MmpostError
from mmpost.runs.folder import RunFolder
from mmpost.runs.records import read_json

INPUTS_FILE = "inputs.json"


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a command was given.

    Attributes:
        command: Its words behind ``mmpost``.
        paths: Argument to place; a place on this machine is absolute, so that a resume may start anywhere.
        marks: Words that say what something is, and a mark of its content; equal marks are the same thing, wherever it
            lies.
    """

    command: str
    paths: dict[str, str]
    marks: dict[str, str]


def place_of(path: str) -> str:
    """Absolute if there is such a place; a hub id stays as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def labelled(marks: Mapping[str, str], owner: str) -> dict[str, str]:
    """The same marks, with whose they are."""
    return {f"{name} of {owner}": mark for name, mark in marks.items()}


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Words whose marks are not the same, in order."""
    return [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]


def open_run(out: Path, inputs: Inputs, *, words: Sequence[str], config_yaml: str) -> RunFolder:
    """Open a run folder for a command, new or to go on.

    Args:
        out: The folder.
        inputs: What the command was given.
        words: The command line.
        config_yaml: Resolved configuration.

    Raises:
        MmpostError: MMP-E020 to MMP-E022 as ``RunFolder.open``, MMP-T070 when the folder holds a run that was made of
            something else; the message names what differs.
    """
    before = read_inputs(out)
    if before is not None:
        _refuse_others(out, before, inputs)
    try:
        folder = RunFolder.open(out, command=words, config_yaml=config_yaml, overwrite=False)
    except MmpostError as error:
        # Only the commands of training have these options.
        raise MmpostError(error.code, error.what, "Choose another --out.") from error
    if folder.finished and before is None:
        what = f"'{out}' holds a finished run that does not say what it was made of."
        raise MmpostError("MMP-T070", what, "Choose another --out.")
    if not folder.finished:
        file = out / INPUTS_FILE
        partial = file.with_name(f"{INPUTS_FILE}.partial")
        partial.write_text(json.dumps(asdict(inputs), indent=1) + "\n")
        partial.replace(file)
    return folder


def read_inputs(out: Path) -> Inputs | None:
    """What the run in a folder was given; None when the folder does not say."""
    record = read_json(out / INPUTS_FILE)
    return Inputs(**record) if set(record) == {"command", "paths", "marks"} else None


def forget_after(folder: RunFolder, step: int) -> None:
    """Drop what metrics.jsonl says about steps behind ``step``: a run that goes on there logs them again."""
    file, kept = folder.path / "metrics.jsonl", 0
    if file.exists():
        for line in file.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n") or int(json.loads(line).get("step", 0)) > step:
                break
            kept += len(line)
    folder.truncate({"metrics.jsonl": kept}, step)


def _refuse_others(out: Path, before: Inputs, now: Inputs) -> None:
    if before.command != now.command:
        what = f"'{out}' holds a run of mmpost {before.command}."
        raise MmpostError("MMP-T070", what, "Choose another --out.")
    other = differing(before.marks, now.marks)
    if other:
        what = f"'{out}' holds a run that was made of something else; what differs: {'; '.join(other)}."
        raise MmpostError("MMP-T070", what, "Choose another --out, or give what that run was given.")
