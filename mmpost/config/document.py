"""What was written, and where: YAML text as a tree whose every value knows its file and line.

Two repairs of YAML's own rules: ``1e-6`` is a number, and on, off, yes and no are text (a boolean option
takes them as booleans later). What an option means is not decided here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import yaml
from pydantic import BaseModel

from mmpost.core.errors import MmpostError, raise_all

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
_KNOWN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}


@dataclass(frozen=True)
class Origin:
    """Where a group of values was written.

    Attributes:
        label: The file as the user named it, ``command line``, or the Python call.
        layer: Later layers win over earlier ones.
        folder: Folder of the file; None when there is no file.
    """

    label: str
    layer: int = 0
    folder: Path | None = None


@dataclass(frozen=True)
class Node:
    """One value of the tree.

    Attributes:
        value: A scalar, or a dict or list of further nodes.
        origin: Where it was written.
        line: Line number from 1; 0 when there are no lines.
        text: The text as written, where a scalar or a command-line value was written as text.
    """

    value: Any
    origin: Origin
    line: int = 0
    text: str | None = None

    @property
    def source(self) -> str:
        """``sft.yaml:14`` or ``command line``."""
        return f"{self.origin.label}:{self.line}" if self.line else self.origin.label

    def plain(self) -> Any:
        """The value without its positions."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value


@dataclass
class Problems:
    """Mistakes found so far; reported together, in the order in which they were written."""

    found: list[tuple[tuple[int, int], MmpostError]] = field(default_factory=list)

    def add(self, node: Node, code: str, what: str, fix: str = "") -> None:
        """Note a mistake at ``node``; its source is put before ``what``."""
        self.add_bare(node, code, f"{node.source}: {what}", fix)

    def add_bare(self, node: Node, code: str, what: str, fix: str = "") -> None:
        """Note a mistake whose text already says where it is."""
        self.found.append(((node.origin.layer, node.line), MmpostError(code, what, fix)))

    def raise_all(self) -> None:
        """Raise nothing, the one mistake, or all of them as one error."""
        raise_all([error for _, error in sorted(self.found, key=lambda item: item[0])])


def merge(base: Node | None, over: Node) -> Node:
    """``over`` on top of ``base``: mappings are merged at every depth, everything else is replaced."""
    if base is None or not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged.get(key), child)
    return replace(over, value=merged)


def from_python(value: Any, origin: Origin) -> Node:
    """Python values as a tree; of a section object only what was set explicitly, so that it can be merged."""
    if isinstance(value, BaseModel):
        given = {name for name in type(value).model_fields if name in value.model_fields_set or name == "kind"}
        value = {name: getattr(value, name) for name in type(value).model_fields if name in given}
    if isinstance(value, Mapping):
        return Node({str(key): from_python(item, origin) for key, item in value.items()}, origin)
    if isinstance(value, list | tuple):
        return Node([from_python(item, origin) for item in value], origin)
    return Node(str(value) if isinstance(value, PurePath) else value, origin)


def scalar(text: str) -> Any:
    """What an unquoted YAML word means: null, a boolean, a number, or itself."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.match(text):
        return int(text.replace("_", ""))
    if _FLOAT.match(text):
        return float(text)
    return float(_SPECIAL[text.lower()]) if text.lower() in _SPECIAL else text


def parse(text: str, origin: Origin, problems: Problems, *, about: str = "") -> Node | None:
    """Read one YAML document.

    Args:
        text: The document.
        origin: Where it comes from. An origin without a folder (the command line) gets no line numbers.
        problems: Receives MMP-C010 for syntax errors and MMP-C005 for duplicate keys.
        about: Put before the text of an error, for example the option that the document is the value of.

    Returns:
        The root, or None when the document is not valid YAML.
    """
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Node(None, origin, mark.line + 1 if mark and origin.folder is not None else 0)
        tab = "'\\t'" in str(error.problem)
        fix = "Indent with spaces, not tabs." if tab else "Check indentation, colons and quotes there."
        problems.add(where, "MMP-C010", f"{about}not valid YAML: {error.problem}.", fix)
        return None
    except yaml.YAMLError as error:  # characters that YAML forbids; they come without a line
        position = getattr(error, "position", 0)
        where = Node(None, origin, text.count("\n", 0, position) + 1 if origin.folder is not None else 0)
        problems.add(where, "MMP-C010", f"{about}not valid YAML: a control character.", "Remove it.")
        return None
    if root is None:
        return Node({} if origin.folder is not None else None, origin)
    return _Converter(origin, problems, about).convert(root, 1, "")


@dataclass
class _Converter:
    """PyYAML's nodes to ours."""

    origin: Origin
    problems: Problems
    about: str
    active: set[int] = field(default_factory=set)

    def convert(self, node: yaml.Node, line: int, path: str) -> Node:
        line = line if self.origin.folder is not None else 0
        here = Node(None, self.origin, line)
        if id(node) in self.active:
            self.problems.add(here, "MMP-C010", f"{self.about}'{path}' contains itself.", "Remove the alias.")
            return here
        if node.tag not in _KNOWN_TAGS:
            self.problems.add(here, "MMP-C010", f"{self.about}the tag '{node.tag}' is not supported.", "Remove it.")
            return here
        if isinstance(node, yaml.ScalarNode):
            quoted = node.style is not None and node.tag.endswith(":str")
            return replace(here, value=node.value if quoted else scalar(node.value), text=node.value)
        self.active.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                items = [
                    self.convert(item, item.start_mark.line + 1, f"{path}.{index}" if path else str(index))
                    for index, item in enumerate(node.value)
                ]
                return replace(here, value=items)
            return replace(here, value=self._mapping(node, path))
        finally:
            self.active.discard(id(node))

    def _mapping(self, node: yaml.Node, path: str) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        inherited: list[Node] = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                where = Node(None, self.origin, line if self.origin.folder is not None else 0)
                self.problems.add(
                    where, "MMP-C010", f"{self.about}a key must be a word.", "Put quotes around the text."
                )
                continue
            key = key_node.value
            dotted = f"{path}.{key}" if path else key
            child = self.convert(value_node, line, dotted)
            if key == "<<":
                inherited += child.value if isinstance(child.value, list) else [child]
            elif key in entries:
                first = f" (first on line {entries[key].line})" if entries[key].line else ""
                self.problems.add(child, "MMP-C005", f"{self.about}'{dotted}' is given twice{first}")
            else:
                entries[key] = child
        for parent in inherited:
            if isinstance(parent.value, dict):
                entries = {**parent.value, **entries}
            else:
                self.problems.add(parent, "MMP-C010", f"{self.about}'<<' needs a mapping.", "Write '<<: *name'.")
        return entries


def read(path: Path, origin: Origin, problems: Problems) -> Node:
    """Read a YAML file; what cannot be read counts as empty and is noted in ``problems``.

    Args:
        path: An existing path.
        origin: Its label, layer and folder.
        problems: Receives MMP-C005, MMP-C009 (unreadable) and MMP-C010 (not UTF-8, not YAML).
    """
    empty = Node({}, origin)
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = replace(empty, line=raw.count(b"\n", 0, error.start) + 1)
        what = f"not UTF-8 (byte 0x{raw[error.start]:02x})."
        problems.add(where, "MMP-C010", what, "Save the file as UTF-8.")
        return empty
    except OSError as error:
        problems.add(empty, "MMP-C009", f"cannot be read: {error.strerror}.", "Give the path of a YAML file.")
        return empty
    root = parse(text, origin, problems)
    if root is None or root.value is None:
        return empty
    if not isinstance(root.value, dict):
        problems.add(root, "MMP-C004", f"expected a mapping of options, got {shown(root)}")
        return empty
    return root


def shown(node: Node) -> str:
    """The value as an error message shows it: text in quotes, the rest as in YAML, long values cut."""
    value = node.plain()
    if isinstance(value, str):
        text = repr(value)
    elif value is None or isinstance(value, bool | dict | list):
        dumped: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
        text = dumped.removesuffix("\n...\n").strip()
    else:
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def join(segments: Sequence[str]) -> str:
    """Dotted name of a path."""
    return ".".join(segments)
