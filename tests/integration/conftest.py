"""What the tests of commands share: a project as ``mmpost init`` writes it, and the command line in this process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers.utils import logging

from mmpost.cli import run


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tiny models are built into a folder of the session, and threads do not fight over the cores.

    The command switches progress bars off before it imports transformers; here transformers may be there already.
    """
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    torch.set_num_threads(threads)
    patch.undo()


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with 20 rows for each command; never written to."""
    folder = tmp_path_factory.mktemp("example") / "project"
    assert run(["init", str(folder), "--kind", "all"]) == 0
    for name in ("sft.jsonl", "grpo.jsonl"):
        lines = (folder / name).read_text().splitlines(keepends=True)[:20]
        (folder / name).write_text("".join(lines))
    kept = {image for line in lines for image in json.loads(line)["images"]}
    for image in (folder / "images").iterdir():
        if f"images/{image.name}" not in kept:
            image.unlink()
    return folder


@pytest.fixture
def project(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, which is also the working directory."""
    folder = tmp_path / "project"
    shutil.copytree(example, folder)
    monkeypatch.chdir(folder)
    return folder


# A reward that fails once, when the number in the file ``trip`` has been counted down.
TRIPPING = """
from pathlib import Path

def vowels(prompts, completions, **columns):
    trip = Path("trip")
    if trip.is_file():
        left = int(trip.read_text()) - 1
        trip.write_text(str(left))
        if left == 0:
            trip.unlink()
            raise RuntimeError("tripped")
    texts = [completion[-1]["content"] for completion in completions]
    return [SCORE for text in texts]
"""


@pytest.fixture
def judge(project: Path) -> Callable[[str], None]:
    """Writes ``judge.py`` with a reward that scores ``text`` by an expression and can be made to fail."""

    def write(score: str) -> None:
        (project / "judge.py").write_text(TRIPPING.replace("SCORE", score))

    return write


@pytest.fixture
def sparse(project: Path) -> Path:
    """The project with a picture in every fifth row only, so that in most passes a process has none."""
    for name in ("sft.jsonl", "grpo.jsonl"):
        rows = [json.loads(line) for line in (project / name).read_text().splitlines()]
        for number, row in enumerate(rows):
            if number % 5:
                row["images"] = []
                row["messages"][0]["content"] = row["messages"][0]["content"].replace("<image>", "")
        (project / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return project


@pytest.fixture
def mmpost(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line in this process, with what it wrote to both streams."""

    def call(*words: str | os.PathLike[str]) -> Outcome:
        capfd.readouterr()
        code = run([str(word) for word in words])
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture(scope="session")
def rows_of() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads a JSONL file, every line of which must be one object."""

    def read(path: Path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert all(isinstance(row, dict) for row in rows)
        return rows

    return read
