"""Reading a run folder back, whatever state it is in.

Every reader here accepts missing files and a last line cut off by a crash; what could not be read is counted,
never guessed. Writing is in ``mmpost.runs.folder``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from mmpost.core.errors import MmpostError

# Options that change what is written, shown or measured, but not one weight of the result.
NEUTRAL_KEYS = frozenset(
    {
        "train.output_dir",
        "train.overwrite",
        "train.logging_steps",
        "train.save_steps",
        "train.save_total_limit",
        "train.sample_steps",
        "data.workers",
    }
)
NEUTRAL_SECTIONS = ("log", "eval")
_EVAL_RECORD_KEYS = {"step", "epoch", "time", "tokens_total", "eval", "nonfinite"}


@dataclass(frozen=True, slots=True)
class Option:
    """One line of a resolved configuration.

    Attributes:
        key: Dotted name such as ``train.learning_rate``.
        value: Its text in the file.
        source: The comment behind it (``sft.yaml:4``, ``command line``); empty for a default.
    """

    key: str
    value: str
    source: str


@dataclass(slots=True)
class RunRecords:
    """Everything a run folder says, read once.

    Attributes:
        path: The run folder.
        command: Content of command.txt.
        config_text: Content of config.yaml, comments included.
        env: env.json, or empty.
        status: ``finished``, ``interrupted``, ``failed``, or ``unfinished`` when there is no status.json.
        step: Last step known.
        metrics: Training records of metrics.jsonl in file order.
        eval_metrics: Records of metrics.jsonl that hold evaluations.
        events: Lines of events.jsonl.
        samples: All written samples, earliest step first.
        evals: Name to content of eval/NAME.json.
        unreadable: Lines that are no JSON object, for example the last one after a crash.
    """

    path: Path
    command: str = ""
    config_text: str = ""
    env: dict[str, Any] = field(default_factory=dict)
    status: str = "unfinished"
    step: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    eval_metrics: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    evals: dict[str, dict[str, Any]] = field(default_factory=dict)
    unreadable: int = 0


def is_run(path: Path) -> bool:
    """True for a folder written by ``RunFolder``; a lone config.yaml may be the user's own project."""
    return (path / "config.yaml").is_file() and (path / "command.txt").is_file()


def read_run(path: Path, *, samples: bool = True) -> RunRecords:
    """Everything that can be read of the run folder ``path``.

    Args:
        path: The folder; files of it may be missing or torn.
        samples: False leaves sample files closed, for listings.
    """
    run = RunRecords(path)
    run.command = read_text(path / "command.txt").strip()
    run.config_text = read_text(path / "config.yaml")
    run.env = read_json(path / "env.json")
    records, torn = read_jsonl(path / "metrics.jsonl")
    run.metrics = [record for record in records if set(record) - _EVAL_RECORD_KEYS]
    run.eval_metrics = [record for record in records if isinstance(record.get("eval"), dict)]
    run.events, torn_events = read_jsonl(path / "events.jsonl")
    run.unreadable = torn + torn_events
    if samples:
        for file in sorted((path / "samples").glob("step-*.jsonl")):
            rows, torn = read_jsonl(file)
            run.samples += rows
            run.unreadable += torn
    run.evals = {file.stem: read_json(file) for file in sorted((path / "eval").glob("*.json"))}
    status = read_json(path / "status.json")
    run.status = str(status.get("status", "unfinished"))
    steps = [record.get("step") for record in records] + [status.get("step")]
    run.step = max((int(step) for step in steps if is_number(step)), default=0)
    return run


def require_run(path: Path) -> Path:
    """``path`` itself when it holds a run.

    Raises:
        MmpostError: MMP-E023 otherwise.
    """
    if not is_run(path):
        raise MmpostError(
            "MMP-E023",
            f"'{path}' is not a run folder (no config.yaml and command.txt).",
            "See: mmpost runs list.",
        )
    return path


def read_text(path: Path) -> str:
    """Text of a file, empty when it is missing; bytes that are no UTF-8 are replaced."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when the file is missing or torn."""
    try:
        value = json.loads(read_text(path) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON Lines file, and the number of lines that are none."""
    rows: list[dict[str, Any]] = []
    unreadable = 0
    for line in read_text(path).split("\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            rows.append(value)
        else:
            unreadable += 1
    return rows, unreadable


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite int or float, False for booleans, None and the rest."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and lists by dotted key; list items are numbered from 0."""
    if isinstance(tree, Mapping) and tree:
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and tree:
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree} if prefix else {}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return leaves


def parse_config(text: str) -> dict[str, Any]:
    """Dotted options of a resolved configuration; empty when it is no YAML mapping."""
    try:
        return flatten(yaml.safe_load(text))
    except yaml.YAMLError:
        return {}


def config_changes(before: str, after: str, *, neutral: bool = False) -> list[tuple[str, Any, Any]]:
    """Options that differ between two resolved configurations, as (key, before, after); None is "not given".

    Args:
        before: YAML text.
        after: YAML text.
        neutral: True also compares options that cannot change a weight, such as ``train.output_dir``.
    """
    old, new = parse_config(before), parse_config(after)
    changes = []
    for key in [*old, *(key for key in new if key not in old)]:
        is_neutral = key in NEUTRAL_KEYS or key.split(".")[0] in NEUTRAL_SECTIONS
        if old.get(key) != new.get(key) and (neutral or not is_neutral):
            changes.append((key, old.get(key), new.get(key)))
    return changes


def config_options(text: str) -> list[Option]:
    """Leaves of a resolved configuration with the comment that names their source."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return []
    options: list[Option] = []
    _walk(root, "", text.split("\n"), options)
    return options


def _walk(node: Any, prefix: str, lines: list[str], options: list[Option], line: int = 0) -> None:
    if isinstance(node, yaml.MappingNode) and node.value:
        for key, value in node.value:
            _walk(value, f"{prefix}.{key.value}" if prefix else key.value, lines, options, key.start_mark.line)
    elif isinstance(node, yaml.SequenceNode) and any(not isinstance(v, yaml.ScalarNode) for v in node.value):
        for index, value in enumerate(node.value):
            _walk(value, f"{prefix}.{index}", lines, options, value.start_mark.line)
    elif prefix:
        options.append(Option(prefix, _leaf(node), _comment(node, lines, line)))


def _leaf(node: Any) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "[" + ", ".join(item.value for item in node.value) + "]"
    return node.value if isinstance(node, yaml.ScalarNode) else "{}"


def _comment(node: Any, lines: list[str], key_line: int) -> str:
    # A value may itself hold ' #', so only what stands behind the value's end counts. Blocks end on the line
    # of the next key, whose comment is not theirs: there the key's line and the ends of the items count.
    if isinstance(node, yaml.SequenceNode):
        is_block = not node.flow_style
    else:
        is_block = getattr(node, "style", None) in {"|", ">"}
    if is_block:
        items = node.value if isinstance(node, yaml.SequenceNode) else []
        rests = [lines[key_line], *(_behind(item.end_mark, lines) for item in items)]
    else:
        rests = [_behind(node.end_mark, lines)]
    comments = (rest.partition("#")[2].strip() for rest in rests)
    return next((comment for comment in comments if comment), "")


def _behind(mark: Any, lines: list[str]) -> str:
    return lines[mark.line][mark.column :] if mark.line < len(lines) else ""
