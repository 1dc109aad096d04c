"""What ``mmpost runs list|show|compare`` says about run folders."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mmpost.runs.charts import interval
from mmpost.runs.records import RunRecords, config_changes, flatten, is_number, is_run, read_run, require_run
from mmpost.runs.svg import number

MAX_DEPTH = 4  # runs/NAME, or runs/NAME/sft/seed-0 for chains of runs
SKIPPED = {"checkpoints", "samples", "eval", "media"}
COLUMNS = ("loss", "reward.total", "accuracy")


def list_runs(root: Path) -> list[dict[str, Any]]:
    """The runs under a folder, newest first.

    Args:
        root: Folder to search, four levels deep; a missing one holds no runs.

    Returns:
        Mappings with ``name`` (relative to root), ``path``, ``command``, ``status``, ``step``, ``metrics``
        (last value by dotted key) and ``started`` (seconds since 1970).
    """
    found = []
    for path in _runs(root, MAX_DEPTH):
        run = read_run(path, samples=False)
        found.append(
            {
                "name": path.relative_to(root).as_posix() if path != root else path.resolve().name,
                "path": path,
                "command": _kind(run.command),
                "status": run.status,
                "step": run.step,
                "metrics": last_metrics(run),
                "started": _started(run),
            }
        )
    return sorted(found, key=lambda run: -run["started"])


def show(run: Path) -> str:
    """One run in plain text: command, status, last values, evaluations, last events.

    Raises:
        MmpostError: MMP-E023 when the folder is no run.
    """
    records = read_run(require_run(run), samples=False)
    lines = [f"{run}: {records.status} at step {records.step}, started {_day(_started(records))}", ""]
    lines += [f"command: {line}" for line in records.command.splitlines()]
    values = last_metrics(records)
    if values:
        width = max(len(key) for key in values)
        lines += [
            "",
            "last values:",
            *(f"  {key:<{width}}  {number(value)}" for key, value in values.items()),
        ]
    if records.evals:
        lines += ["", "evaluations:"]
        lines += [f"  {line}" for name, result in records.evals.items() for line in _eval_lines(name, result)]
    if records.events:
        lines += ["", "last events:"]
        lines += [f"  {event.get('kind', '')}: {event.get('text', '')}" for event in records.events[-10:]]
    if records.unreadable:
        lines += ["", f"{records.unreadable} unreadable lines in the logs were left out"]
    return "\n".join(lines) + "\n"


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Two runs side by side.

    Returns:
        ``names``; ``config``, a list of (key, first, second) for options that differ; ``metrics``, a list of
        the same form for all last values and evaluation results, None where a run has none.

    Raises:
        MmpostError: MMP-E023 when a folder is no run.
    """
    one, two = read_run(require_run(first), samples=False), read_run(require_run(second), samples=False)
    values = [{**last_metrics(run), **_eval_values(run)} for run in (one, two)]
    keys = dict.fromkeys([*values[0], *values[1]])
    return {
        "names": (str(first), str(second)),
        "config": config_changes(one.config_text, two.config_text, neutral=True),
        "metrics": [(key, values[0].get(key), values[1].get(key)) for key in keys],
    }


def runs_table(runs: Sequence[dict[str, Any]], *, title: str | None = None) -> Table:
    """The result of ``list_runs`` as a table that fits 80 columns."""
    table = Table(title=title, box=None, pad_edge=False, header_style="dim")
    table.add_column("run", overflow="fold", ratio=1)
    for name in ("command", "status"):
        table.add_column(name, no_wrap=True)
    for name in ("step", "loss", "reward", "acc"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("started", no_wrap=True)
    for run in runs:
        numbers = [number(run["metrics"][key]) if key in run["metrics"] else "" for key in COLUMNS]
        status = Text(run["status"], _STYLES.get(run["status"], "yellow"))
        # Text, not str: brackets in a folder's name are no markup.
        table.add_row(Text(run["name"]), Text(run["command"]), status, str(run["step"]), *numbers, _day(run["started"]))
    return table


def compare_tables(result: dict[str, Any]) -> list[Table]:
    """The result of ``compare`` as two tables: options that differ, and last values."""
    tables = []
    for title, rows in (("options that differ", result["config"]), ("last values", result["metrics"])):
        table = Table(title=title, box=None, pad_edge=False, header_style="dim", title_justify="left")
        table.add_column("key", overflow="fold")
        for name in _headings(*result["names"]):
            table.add_column(Text(name), overflow="fold", justify="right")
        if title == "last values":
            table.add_column("difference", justify="right")
        for key, first, second in rows:
            cells = [Text(key), Text(_cell(first)), Text(_cell(second))]
            if title == "last values":
                both = is_number(first) and is_number(second)
                cells.append(Text(f"{'+' if second >= first else ''}{number(second - first)}" if both else ""))
            table.add_row(*cells)
        tables.append(table)
    return tables


def last_metrics(run: RunRecords) -> dict[str, float]:
    """Last logged number of each key; the first evaluation is also called ``accuracy``."""
    last: dict[str, float] = {}
    for record in [*run.metrics, *run.eval_metrics]:
        last |= {key: float(value) for key, value in flatten(record).items() if is_number(value)}
    dropped = ("step", "time", "epoch")
    last = {key: value for key, value in last.items() if key not in dropped and not _is_interval(key)}
    accuracy = next(
        (value for key, value in last.items() if key.startswith("eval.") and key.endswith(".accuracy")), None
    )
    if accuracy is None:
        accuracy = next((value for key, value in _eval_values(run).items() if key.endswith(".accuracy")), None)
    if accuracy is not None:
        last.setdefault("accuracy", accuracy)
    return last


_STYLES = {"finished": "green", "failed": "red"}


def _runs(root: Path, depth: int) -> Iterator[Path]:
    if not root.is_dir():
        return
    if is_run(root):
        yield root
    if depth > 0:
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False) and entry.name not in SKIPPED and not entry.name.startswith("."):
                yield from _runs(Path(entry.path), depth - 1)


def _headings(first: str, second: str) -> tuple[str, str]:
    """Folder names, or whole paths when those are equal; paths would leave values no room in 80 columns."""
    names = Path(first).name, Path(second).name
    return names if names[0] != names[1] else (first, second)


def _kind(command: str) -> str:
    """``sft`` of ``mmpost sft a.yaml``; the first word when there is no second."""
    words = command.splitlines()[0].split() if command else []
    return next((word for word in words[1:] if not word.startswith("-")), words[0] if words else "")


def _started(run: RunRecords) -> float:
    try:
        return datetime.fromisoformat(str(run.env.get("started", ""))).timestamp()
    except ValueError:
        return (run.path / "config.yaml").stat().st_mtime if (run.path / "config.yaml").exists() else 0.0


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _is_interval(key: str) -> bool:
    return key.endswith((".ci.0", ".ci.1", ".n"))


def _eval_values(run: RunRecords) -> dict[str, float]:
    return {
        f"eval.{name}.{metric}": float(values["value"])
        for name, result in run.evals.items()
        for metric, values in (result.get("metrics") or {}).items()
        if isinstance(values, dict) and is_number(values.get("value"))
    }


def _eval_lines(name: str, result: dict[str, Any]) -> list[str]:
    lines = []
    for metric, values in (result.get("metrics") or {}).items():
        if isinstance(values, dict) and is_number(values.get("value")):
            low, high = interval(values.get("ci"))
            span = f" [{number(low)}, {number(high)}]" if low is not None and high is not None else ""
            unparsed = f", unparsed {values['unparsed']}" if values.get("unparsed") is not None else ""
            lines.append(f"{name}: {metric} {number(values['value'])}{span}, n {values.get('n', '?')}{unparsed}")
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return number(value) if isinstance(value, float) else str(value)
