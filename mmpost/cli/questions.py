"""``mmpost data filter``, ``mmpost data synthesize`` and ``mmpost upt --synthesize-questions``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from mmpost.config.load import load, split_arguments
from mmpost.config.upt import UPTConfig
from mmpost.core.errors import MmpostError

if TYPE_CHECKING:
    from mmpost.api.data import Data
    from mmpost.api.filtering import Rule
    from mmpost.api.questions import Mode

FLAG = "--synthesize-questions"


def open_sources(paths: Sequence[str], media_root: str | None, split: str | None, limit: int | None) -> list[Data]:
    """Read the named sources; a task keeps its answers, from which new questions may be made.

    Files of the same stem stay apart: the second is ``NAME-2``.
    """
    from mmpost.api.data import load_data

    found: list[Data] = []
    for path in paths:
        data = load_data(path, media_root=media_root, split=split, limit=limit)
        known = {other.name for other in found}
        names = (data.name, *(f"{data.name}-{number}" for number in range(2, len(paths) + 1)))
        data.name = next(name for name in names if name not in known)
        found.append(data)
    return found


def filter_data(data: Sequence[Data], model: str, out: Path, rule: Rule, *, as_json: bool, **options: Any) -> None:
    """Filter, and say how many rows of each source stay."""
    from mmpost.api.filtering import filter_rows

    table = filter_rows(data, model, out, rule=rule, progress=show("rows"), **options)
    if as_json:
        sys.stdout.write(json.dumps(table, ensure_ascii=False) + "\n")
        return
    shown = Table(title=f"{out}: {rule.keep}")
    for column in ("source", "rows", "kept", "share", "without a score"):
        shown.add_column(column, justify="left" if column == "source" else "right")
    for name, counts in table.items():
        share = f"{counts['kept'] / max(counts['rows'], 1):.1%}"
        shown.add_row(name, str(counts["rows"]), str(counts["kept"]), share, str(counts["unscored"]))
    Console().print(shown)


def synthesize_data(data: Sequence[Data], model: str, out: Path, *, as_json: bool, **options: Any) -> None:
    """Synthesize, and say what became of the questions."""
    from mmpost.api.questions import synthesize

    report(out, synthesize(data, model, out, progress=show("pictures"), **options), as_json=as_json)


def report(out: Path, counts: Mapping[str, int], *, as_json: bool = False) -> None:
    """What became of the questions, in one line."""
    if as_json:
        sys.stdout.write(json.dumps(counts) + "\n")
    else:
        sys.stderr.write(f"{out}: {', '.join(f'{count} {fate}' for fate, count in counts.items())}\n")


def show(what: str) -> Any:
    """Progress on a terminal; nothing elsewhere."""

    def write(done: int, total: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{done}/{total} pieces of {what}{'' if done < total else chr(10)}")

    return write


def synthesize_first(args: Sequence[str]) -> list[str]:
    """Make the questions of a UPT run before it starts, with its own model and data.

    Args:
        args: Command line with ``--synthesize-questions`` or ``--synthesize-questions=MODE``. Words that ask for
            several processes are for the training: the questions are made by this process before.

    Returns:
        The command line that trains on them.

    Raises:
        MmpostError: MMP-R231 without an output folder, beside which the questions are kept; MMP-R232 when no question
            stays; MMP-R234 in one of several processes of a launcher; and what the configuration, the words about
            processes and ``synthesize`` raise.
    """
    from mmpost.api.data import open_all
    from mmpost.api.questions import Wanted, synthesize
    from mmpost.cli import launch
    from mmpost.rollout.generate import Sampling

    flag = next(word for word in args if word.split("=")[0] == FLAG)
    rest = [word for word in args if word != flag]
    mode: Any = flag.partition("=")[2] or "direct"
    wanted, words = launch.split(rest)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or (wanted is not None and wanted.nnodes > 1):
        raise MmpostError(
            "MMP-R234",
            f"{FLAG} makes questions in one process, but this is one of several.",
            "Make them first with mmpost data synthesize, then train on that file; or use --gpus N, which starts the "
            "processes of one machine afterwards.",
        )
    config = load(UPTConfig, *split_arguments(words)).config
    launch.needed(wanted)  # a machine without so many devices is told now, not after the questions
    if config.train.output_dir is None:
        raise MmpostError(
            "MMP-R231",
            f"{FLAG} needs a run folder, beside which the questions are kept.",
            "Set train.output_dir=FOLDER.",
        )
    folder = Path(config.train.output_dir)
    out = folder.with_name(f"{folder.name}-questions") / "questions.jsonl"
    counts = synthesize(
        open_all(config.data, seed=config.train.seed),
        config.model.model_name_or_path,
        out,
        mode=_known(mode),
        sampling=Sampling(config.grpo.max_completion_length, 1.0, seed=config.train.seed),
        wanted=Wanted(),
        batch_size=config.grpo.rollout_batch_size,
        progress=show("pictures"),
    )
    report(out, counts)
    if not counts["kept"]:
        raise MmpostError(
            "MMP-R232",
            f"none of the new questions can be used ({', '.join(f'{n} {fate}' for fate, n in counts.items())}).",
            "Read them in the file beside it; a model that cannot ask needs questions of your own.",
        )
    return [*rest, f"data.train=[{{path: {json.dumps(str(out))}}}]"]


def _known(mode: Any) -> Mode:
    if mode not in ("direct", "in_context"):
        raise MmpostError("MMP-R230", f"unknown mode '{mode}'.", "Known: direct, in_context.")
    return "in_context" if mode == "in_context" else "direct"
