"""The folder of one training run: what is written, when, and how a second start finds its place again."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmpost.core.errors import MmpostError
from mmpost.runs.environment import MAX_PATCH_BYTES, environment, git_state
from mmpost.runs.records import config_changes, is_run, read_json, read_jsonl, read_text
from mmpost.runs.thumbs import write_thumb

Status = Literal["finished", "interrupted", "failed"]
LOGS = ("metrics.jsonl", "events.jsonl")
# Everything that a run writes; a folder with other files may still become a run folder.
WRITTEN = {
    *LOGS,
    *("config.yaml", "command.txt", "env.json", "git.patch", "data_manifest.json", "status.json", "bad_rows.jsonl"),
    *("samples", "eval", "checkpoints", "final", "report.html"),
}


class RunFolder:
    """One run on disk. Only the first process of a run makes one.

    Attributes:
        path: The folder.
        resuming: It held an unfinished run with the same configuration.
        finished: It holds a finished run with the same configuration; nothing was written.
    """

    def __init__(self, path: Path, *, resuming: bool = False, finished: bool = False) -> None:
        self.path = path
        self.resuming = resuming
        self.finished = finished

    @classmethod
    def open(cls, path: str | Path, *, command: Sequence[str], config_yaml: str, overwrite: bool) -> RunFolder:
        """Create the folder, or recognise the run that it holds.

        Args:
            path: The run folder; parents are created.
            command: The command line in words.
            config_yaml: The resolved configuration, sources as comments.
            overwrite: Delete an earlier run in the folder first.

        Raises:
            MmpostError: MMP-E020 not writable, MMP-E021 another configuration, MMP-E022 no run folder.
        """
        folder = Path(path)
        _probe(folder)
        entries = list(folder.iterdir())
        holds_run = is_run(folder)
        taken = [entry.name for entry in entries if overwrite or entry.name in WRITTEN]
        if taken and not holds_run:
            raise MmpostError(
                "MMP-E022",
                f"output folder '{folder}' holds '{taken[0]}' but no run; its files are never deleted.",
                "Choose another train.output_dir.",
            )
        if overwrite and holds_run:
            _empty(folder, entries)
            holds_run = False
        if holds_run:
            _same_config(folder, config_yaml)
            status = read_json(folder / "status.json").get("status")
            run = cls(folder, resuming=status != "finished", finished=status == "finished")
        else:
            run = cls(folder)
        if not run.finished:
            run._describe(command, config_yaml)
        return run

    def _describe(self, command: Sequence[str], config_yaml: str) -> None:
        line = shlex.join(command)
        commands = read_text(self.path / "command.txt").splitlines()
        if not commands or commands[-1] != line:
            commands.append(line)
        self._write("command.txt", "\n".join(commands) + "\n")
        self._write("config.yaml", config_yaml)
        if not self.resuming:
            facts = environment()
            commit, patch = git_state(Path.cwd())
            if commit:
                facts["git"] = {"commit": commit, "changed": bool(patch)}
                if len(patch) > MAX_PATCH_BYTES:
                    facts["git"]["patch"] = f"left out: {len(patch)} bytes"
                else:
                    self._write("git.patch", patch)
            self._write_json("env.json", facts)
        else:
            (self.path / "status.json").unlink(missing_ok=True)

    def add_environment(self, fields: Mapping[str, Any]) -> None:
        """Add what only the trainer knows (devices, precision) to env.json."""
        self._write_json("env.json", {**read_json(self.path / "env.json"), **fields})

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; NaN and infinity become null and are named in ``nonfinite``."""
        nonfinite: list[str] = []
        row = _plain(record, "", nonfinite)
        if nonfinite:
            row["nonfinite"] = nonfinite
        self._append("metrics.jsonl", row)

    def event(self, kind: str, text: str, **fields: Any) -> None:
        """Append one line ``{"time", "kind", "text", ...}`` to events.jsonl; time in seconds since 1970."""
        self._append("events.jsonl", _plain({"time": round(time.time(), 3), "kind": kind, "text": text, **fields}))

    def write_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> Path:
        """Write the samples of a step and the thumbnails of their media.

        Args:
            step: Optimiser steps done.
            samples: Mappings with ``media``, a list of ``{"type", "ref"}``; ``ref`` is replaced by ``thumb``.

        Returns:
            samples/step-NNNNNN.jsonl.
        """
        name = f"samples/step-{step:06d}.jsonl"
        self._write_rows(name, samples)
        return self.path / name

    def write_eval(self, name: str, result: Mapping[str, Any], samples: Iterable[Mapping[str, Any]]) -> Path:
        """Write eval/NAME.json and eval/NAME.samples.jsonl.

        Args:
            name: File name without ending.
            result: The result file's content; ``schema`` and ``samples`` are filled in.
            samples: Rows in the keys of lmms-eval, media as in ``write_samples``.

        Returns:
            Path of the result file.
        """
        if Path(name).name != name:
            raise ValueError(f"an evaluation's name is one file name, not {name!r}")
        self._write_rows(f"eval/{name}.samples.jsonl", samples)
        self._write_json(f"eval/{name}.json", {"schema": 1, **result, "samples": f"{name}.samples.jsonl"})
        return self.path / "eval" / f"{name}.json"

    def offsets(self) -> dict[str, int]:
        """Sizes of the logs in bytes; a checkpoint stores them."""
        return {name: _size(self.path / name) for name in LOGS}

    def truncate(self, offsets: Mapping[str, int], step: int | None = None) -> None:
        """Forget what was logged after a checkpoint, so that a resumed run logs no step twice.

        Args:
            offsets: What ``offsets()`` said at the checkpoint; a log not named keeps its lines.
            step: Step of the checkpoint; sample files of later steps are deleted.
        """
        for name in LOGS:
            file = self.path / name
            if file.exists():
                _cut(file, offsets.get(name, _size(file)))
        for file in (self.path / "samples").glob("step-*.jsonl"):
            number = file.stem.removeprefix("step-")
            if step is not None and number.isdecimal() and int(number) > step:
                file.unlink()

    def checkpoints(self) -> list[Path]:
        """Complete checkpoint folders, earliest step first; trainer_state/state.json is written last."""
        found = (self.path / "checkpoints").glob("step-*/trainer_state/state.json")
        return sorted(file.parent.parent for file in found)

    def finish(self, status: Status, step: int | None = None) -> None:
        """Write status.json.

        Args:
            status: How the run ended.
            step: Steps done; by default the last one in metrics.jsonl.
        """
        if step is None:
            rows, _ = read_jsonl(self.path / "metrics.jsonl")
            step = max((int(row["step"]) for row in rows if row.get("step") is not None), default=0)
        self._write_json("status.json", {"status": status, "step": step, "time": round(time.time(), 3)})

    def _write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        lines = [_line({**row, "media": [self._thumb(item) for item in row.get("media") or []]}) for row in rows]
        self._write(name, "".join(lines))

    def _thumb(self, item: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in item.items() if key != "ref"}
        if item.get("type") != "image" or item.get("ref") is None:
            return {"thumb": None, **kept}
        folder = self.path / "samples" / "media"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return {**kept, "thumb": f"samples/media/{write_thumb(item['ref'], folder)}"}
        except (OSError, ValueError) as error:
            # The trainer has read this image already; a missing thumbnail must not end its run, but is named.
            return {**kept, "thumb": None, "error": str(error)}

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        try:
            with (self.path / name).open("ab+") as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a crash tore the last line; keep it apart from the new one
                        file.write(b"\n")
                file.write(_bytes(_line(row)))
        except OSError as error:
            raise _cannot_write(self.path, error.strerror or str(error)) from error

    def _write(self, name: str, content: str | bytes) -> None:
        # Written beside and moved, so that a crash leaves the old file or the new one, never half of one.
        target = self.path / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".partial")
            partial.write_bytes(_bytes(content) if isinstance(content, str) else content)
            partial.replace(target)
        except OSError as error:
            raise _cannot_write(self.path, error.strerror or str(error)) from error

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self._write(name, json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _cannot_write(path: Path, why: str) -> MmpostError:
    return MmpostError(
        "MMP-E020", f"cannot write to output folder '{path}': {why}.", "Choose another train.output_dir."
    )


def _probe(folder: Path) -> None:
    """Create the folder and one file in it, or say why that cannot be done."""
    if folder.exists() and not folder.is_dir():
        raise _cannot_write(folder, "it is a file")
    nearest = next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)
    try:
        # root may write anywhere, but a folder without any write bit was closed on purpose.
        if nearest.is_dir() and not stat.S_IMODE(nearest.stat().st_mode) & 0o222:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _cannot_write(folder, error.strerror or str(error)) from error


def _empty(folder: Path, entries: Iterable[Path]) -> None:
    # The folder itself stays: it may be a mount point or a link.
    try:
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    except OSError as error:
        raise _cannot_write(folder, error.strerror or str(error)) from error


def _same_config(folder: Path, config_yaml: str) -> None:
    changes = config_changes(read_text(folder / "config.yaml"), config_yaml)
    if changes:
        listed = ", ".join(f"{key} (was {_shown(old)}, now {_shown(new)})" for key, old, new in changes[:5])
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise MmpostError(
            "MMP-E021",
            f"'{folder}' holds a run with another configuration: {listed}{more}.",
            "Choose another train.output_dir, or train.overwrite=true to delete that run.",
        )


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _bytes(text: str) -> bytes:
    # A byte-level tokenizer can decode to half a surrogate pair; its backslash form is valid JSON.
    return text.encode("utf-8", errors="backslashreplace")


def _plain(value: Any, key: str = "", nonfinite: list[str] | None = None) -> Any:
    """Plain JSON values: numpy numbers become Python's, NaN and infinity None.

    The dotted keys of those that were not finite are added to ``nonfinite``.
    """
    if isinstance(value, Mapping):
        return {
            str(name): _plain(item, f"{key}.{name}" if key else str(name), nonfinite) for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}.{index}", nonfinite) for index, item in enumerate(value)]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), key, nonfinite)
    if isinstance(value, np.generic):
        return _plain(value.item(), key, nonfinite)
    if isinstance(value, float) and not np.isfinite(value):
        if nonfinite is not None:
            nonfinite.append(key)
        return None
    return str(value) if isinstance(value, Path) else value


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _cut(file: Path, size: int) -> None:
    """Shorten to at most ``size`` bytes that end with a whole line."""
    head = file.read_bytes()[:size]
    with file.open("r+b") as stream:
        stream.truncate(head.rfind(b"\n") + 1)
