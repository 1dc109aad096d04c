"""From what was written to the values of a configuration, with every mistake noted on the way.

``canonical`` gives one layer (a file, a Python call) its full option names; ``Checker`` reads the merged one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mmpost.config import keys
from mmpost.config.document import Node, Origin, Problems, from_python, merge, shown
from mmpost.config.values import WrongValueError, read_value

_ENV = re.compile(r"\$\{ENV:(\w+)\}")
# Options that name files; "*" stands for an item of a list.
_PATHS = {"data.train.*.path", "data.train.*.media_root", "model.model_name_or_path", "rewards.*.name"}


def canonical(config_class: type[BaseModel], layer: Node, problems: Problems) -> Node:
    """One layer with full names: bare keys move to their section, plain text becomes the item it stands for.

    Args:
        config_class: The command's configuration.
        layer: A mapping from keys to values.
        problems: Receives MMP-C003 for an ambiguous key and MMP-C005 for an option given in two ways.
    """
    root = replace(layer, value={})
    for key, child in layer.value.items():
        path, candidates = keys.expand(config_class, key)
        if candidates:
            problems.add_bare(child, "MMP-C003", ambiguous(child, key, candidates))
            continue
        nested = child
        for segment in reversed(path):
            nested = replace(child, value={segment: nested}, text=None)
        nested = with_items(config_class, nested)
        clash = _first_common(root, nested, "")
        if clash is not None:
            first = f" (first on line {clash[1].line})" if clash[1].line else ""
            problems.add(child, "MMP-C005", f"'{clash[0]}' is given twice{first}")
            continue
        root = merge(root, nested)
    return replace(root, origin=layer.origin, line=layer.line)


def ambiguous(node: Node, key: str, candidates: tuple[str, ...]) -> str:
    """Text of MMP-C003; the place is named where there is a line to name."""
    prefix = f"{node.source}: " if node.line else ""
    return f"{prefix}'{key}' is ambiguous: {', '.join(candidates)}"


def _first_common(first: Node, second: Node, path: str) -> tuple[str, Node] | None:
    """The dotted name of an option that both give, with its first value."""
    if not (isinstance(first.value, dict) and isinstance(second.value, dict)):
        return path, first
    for key, child in second.value.items():
        if key in first.value:
            clash = _first_common(first.value[key], child, f"{path}.{key}" if path else key)
            if clash is not None:
                return clash
    return None


def with_items(model: type[BaseModel], node: Node) -> Node:
    """Plain text in full where it stands for an item (``data.train: a.jsonl``) or a kind (``peft: lora``)."""
    if not isinstance(node.value, dict):
        return node
    value = dict(node.value)
    for name, child in node.value.items():
        info = model.model_fields.get(name)
        if info is None:
            continue
        item, members = keys.item_model(info), keys.sections(info)
        if item is not None:
            value[name] = _items(item, child)
        elif keys.kinds(info) and isinstance(child.value, str):
            value[name] = replace(child, value={"kind": child}, text=None)
        elif len(members) == 1:
            value[name] = with_items(members[0], child)
    return replace(node, value=value)


def _items(item: type[BaseModel], node: Node) -> Node:
    main = keys.main_key(item)
    single = isinstance(node.value, dict) or (isinstance(node.value, str) and main is not None)
    entries = [node] if single else node.value
    if not isinstance(entries, list):
        return node
    full = [replace(e, value={main: e}, text=None) if main and isinstance(e.value, str) else e for e in entries]
    return replace(node, value=full, text=None)


@dataclass
class Checker:
    """Reads a merged tree and notes what is wrong with it.

    Attributes:
        config_class: The command's configuration.
        problems: Receives MMP-C001 (unknown key) and MMP-C004 (wrong value).
        environment: Variables that ``${ENV:NAME}`` in the log section may name.
        sources: Dotted option to the place where its value was written.
        masked: Dotted option to its text as written, where it names environment variables.
    """

    config_class: type[BaseModel]
    problems: Problems
    environment: Mapping[str, str]
    sources: dict[str, str] = field(default_factory=dict)
    masked: dict[str, str] = field(default_factory=dict)

    def section(self, model: type[BaseModel], node: Node, path: str, known: list[str] | None = None) -> dict[str, Any]:
        """Values of one section, list item, or the whole configuration.

        Args:
            model: Its class.
            node: What was written.
            path: Dotted name; empty for the whole configuration.
            known: Words to suggest for an unknown one; default the fields of the model.
        """
        if not isinstance(node.value, dict):
            near = keys.leaf_paths(self.config_class).get(path, ())
            hint = f"; did you mean '{near[0]}'?" if len(near) == 1 else ""
            self.problems.add(node, "MMP-C004", f"{path}: expected a mapping of options, got {shown(node)}{hint}")
            return {}
        values: dict[str, Any] = {}
        for key, child in node.value.items():
            info = model.model_fields.get(key)
            if info is None:
                self.unknown(child, path, key, known or list(model.model_fields))
            else:
                self._field(info, child, f"{path}.{key}" if path else key, key, values)
        if node.value.keys() <= model.model_fields.keys():  # else the unknown key may be the required one, misspelt
            for name, info in model.model_fields.items():
                if info.is_required() and name not in node.value:
                    self.problems.add(node, "MMP-C004", f"{path}: '{name}' is missing")
        return values

    def unknown(self, node: Node, parent: str, key: str, known: list[str]) -> None:
        """Note an unknown key and the option that was probably meant."""
        if isinstance(node.value, dict) and not node.line and not parent and node.value:
            for word, child in node.value.items():  # ``trian.seed=1`` is one mistake about one whole name
                self.unknown(child, parent, f"{key}.{word}", known)
            return
        dotted = f"{parent}.{key}" if parent else key
        hint = keys.suggest(self.config_class, parent, key, known)
        self.problems.add(node, "MMP-C001", f"unknown key '{dotted}'{hint}")

    def _field(self, info: FieldInfo, node: Node, path: str, key: str, values: dict[str, Any]) -> None:
        members, item = keys.sections(info), keys.item_model(info)
        if members and node.value is None:
            return  # a section set to null, or left empty, has its defaults
        if keys.kinds(info):
            values[key] = self._union(info, node, path)
        elif members:
            values[key] = self.section(members[0], node, path)
        elif item is not None and not isinstance(node.value, list | None):
            self.problems.add(node, "MMP-C004", f"{path}: expected a list, got {shown(node)}")
        elif item is not None and node.value is not None:
            self.sources[path] = node.source
            values[key] = [self.section(item, child, f"{path}.{i}") for i, child in enumerate(node.value)]
        else:
            self._leaf(info, node, path, key, values)

    def _union(self, info: FieldInfo, node: Node, path: str) -> dict[str, Any]:
        kinds = keys.kinds(info)
        if not isinstance(node.value, dict):
            return self.section(kinds[keys.default_kind(info)], node, path)
        chosen = node.value.get("kind")
        kind = keys.default_kind(info) if chosen is None else chosen.value
        others = {name: member for member in kinds.values() for name in member.model_fields}
        if not isinstance(kind, str) or kind not in kinds:
            self._leaf(info=_kind_field(kinds), node=chosen or node, path=f"{path}.kind", key="kind", values={})
            for key, child in node.value.items():
                if key not in others:
                    self.unknown(child, path, key, list(others))
            return {}
        kept = {}
        for key, child in node.value.items():
            if child is chosen and chosen.value is None:
                continue
            needed = [name for name, member in kinds.items() if key in member.model_fields]
            if not needed or kind in needed:
                kept[key] = child
            # An earlier file's options of another kind go when a later layer switches the kind.
            elif chosen is None or child.origin.layer >= chosen.origin.layer:
                needs = " or ".join(f"{path}.kind={name}" for name in needed)
                self.problems.add(child, "MMP-C001", f"'{path}.{key}' needs {needs}; here {path}.kind is '{kind}'")
        return {"kind": kind, **self.section(kinds[kind], replace(node, value=kept), path, list(others))}

    def _leaf(self, info: FieldInfo, node: Node, path: str, key: str, values: dict[str, Any]) -> None:
        try:
            value = read_value(node, info)
        except WrongValueError as error:
            self.problems.add(error.node, "MMP-C004", f"{path}{error.suffix}: {error.what}")
            return
        if isinstance(value, str):
            value = self._environment(node, value, path)
            if re.sub(r"\.\d+\.", ".*.", path) in _PATHS:
                value = _beside(node.origin.folder, value, folder_only=path.startswith("model."))
        self.sources[path] = node.source
        values[key] = value

    def _environment(self, node: Node, value: str, path: str) -> str:
        names = _ENV.findall(value)
        if names and not path.startswith("log."):
            what = f"{path}: ${{ENV:{names[0]}}} is allowed in the log section only"
            self.problems.add(node, "MMP-C004", what)
            return value
        for name in names:
            if name not in self.environment:
                self.problems.add(node, "MMP-C004", f"{path}: the environment variable {name} is not set")
        if names:
            self.masked[path] = value
        return _ENV.sub(lambda match: self.environment.get(match[1], ""), value)


def config_values(config_class: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Checked constructor arguments from sections and bare option names, both as Python values.

    Raises:
        MmpostError: MMP-C001, MMP-C003, MMP-C004 or MMP-C005, or ManyErrors with all of them.
    """
    problems = Problems()
    layer = from_python(values, Origin(config_class.__name__))
    tree = canonical(config_class, layer, problems)
    checked = Checker(config_class, problems, os.environ).section(config_class, tree, "")
    problems.raise_all()
    return checked


def _kind_field(kinds: dict[str, type[BaseModel]]) -> FieldInfo:
    """A field whose choices are the kinds of a union."""
    return FieldInfo.from_annotation(Literal[tuple(kinds)])  # type: ignore[arg-type]


def _beside(folder: Path | None, value: str, *, folder_only: bool) -> str:
    """A relative path as it is, or beside the config file when only that exists.

    Args:
        folder: Folder of the config file; None for values that come from no file.
        value: A path, ``task:NAME``, a model name, or ``file.py:function``.
        folder_only: Only a folder counts (a model name may look like a path without being one).
    """
    stem, colon, function = value.partition(".py:")
    file = Path(stem + ".py" if colon else value)
    if folder is None or not value or value.startswith("task:") or file.is_absolute() or file.exists():
        return value
    beside = folder / file
    if not (beside.is_dir() if folder_only else beside.exists()):
        return value
    return f"{beside}:{function}" if colon else os.fspath(beside)
