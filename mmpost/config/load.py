"""YAML files and command-line overrides to a checked configuration that knows where every value came from.

Files are merged from left to right (mappings at every depth, lists replaced), then overrides are applied. All
mistakes are reported together.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Generic, TypeVar

from mmpost.config import keys
from mmpost.config.check import Checker, ambiguous, canonical, with_items
from mmpost.config.document import Node, Origin, Problems, from_python, join, merge, parse, read, shown
from mmpost.config.dump import leaves, to_yaml
from mmpost.config.schema import Settings
from mmpost.core.errors import MmpostError

C = TypeVar("C", bound=Settings)

COMMAND_LINE = "command line"
_OVERRIDE = re.compile(r"([A-Za-z_][\w.-]*?)(\+?)=(.*)", re.DOTALL)
_CONFIG_ENDINGS = (".yaml", ".yml")
_DATA_ENDINGS = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A configuration and its history.

    Attributes:
        config: The checked configuration.
        sources: For every option by dotted name: ``default``, ``file:line`` or ``command line``.
        masked: Text as written of options that name environment variables; shown instead of their values.
    """

    config: C
    sources: dict[str, str]
    masked: dict[str, str]


def load(config_class: type[C], files: Sequence[Path | str], overrides: Sequence[str]) -> Loaded[C]:
    """Read, merge and check.

    Args:
        config_class: The command's configuration.
        files: YAML files, later ones win. A name that does not exist here may be a shipped recipe.
        overrides: ``a.b=c``, ``--a.b=c``, ``--a.b c``, ``a.b+=c``, in the order given.

    Raises:
        MmpostError: One of MMP-C001 to MMP-C010, or ManyErrors with all of them.
    """
    problems = Problems()
    reader = _Files(config_class, problems)
    tree = Node({}, Origin("defaults"))
    for name in files:
        tree = merge(tree, reader.read(str(name), None, ()))
    tree = _Overrides(config_class, problems, Origin(COMMAND_LINE, reader.layers + 1)).apply(tree, overrides)
    checker = Checker(config_class, problems, os.environ)
    values = checker.section(config_class, tree, "")
    problems.raise_all()
    config = config_class(**values)
    sources = {path: checker.sources.get(path, "default") for path, _ in leaves(config)}
    return Loaded(config, checker.sources | sources, checker.masked)


def resolved_yaml(loaded: Loaded[Any]) -> str:
    """The whole configuration as YAML, with the source of every value that is not a default; valid input."""
    return to_yaml(loaded.config, loaded.sources, loaded.masked)


def split_arguments(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sort the arguments of a training command into config files and overrides.

    A name ending in .yaml or .yml is a config file, so is the name of a shipped recipe; other existing paths,
    ``task:NAME`` and names ending in .jsonl, .json or .parquet are training data. What fits nothing is left
    among the overrides, where ``load`` reports it as MMP-C008 together with all other mistakes.
    """
    files: list[str] = []
    overrides: list[str] = []
    for argument in _joined(args):
        if argument.startswith("--") or _OVERRIDE.fullmatch(argument):
            overrides.append(argument)
        elif argument.endswith(_CONFIG_ENDINGS):
            files.append(argument)
        elif argument and (argument.endswith(_DATA_ENDINGS) or argument.startswith("task:") or Path(argument).exists()):
            overrides.append(f"data.train+={{path: {json.dumps(argument, ensure_ascii=False)}}}")
        elif _with_ending(Path(argument)) or _recipe(argument):
            files.append(argument)
        else:
            overrides.append(argument)
    return files, overrides


def _joined(args: Sequence[str]) -> list[str]:
    """``--a.b c`` and ``--a.b=c`` as ``a.b=c``; ``--a.b`` without a value stays as it is."""
    joined: list[str] = []
    rest = list(args)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            if not equals and rest and not rest[0].startswith("--") and not _OVERRIDE.fullmatch(rest[0]):
                equals, value = "=", rest.pop(0)
            argument = f"{name.replace('-', '_')}={value}" if equals else argument
        joined.append(argument)
    return joined


def find_recipe(name: str) -> Path:
    """The file of a recipe that comes with the package, named ``demo/sft`` or ``configs/demo/sft.yaml``.

    Raises:
        MmpostError: MMP-C009 when there is no such recipe.
    """
    found = _recipe(name)
    if found is None:
        raise MmpostError("MMP-C009", f"no recipe '{name}'{_near(_recipe_stem(name), _recipe_names())}")
    return found


def _recipes() -> Path:
    # A wheel carries the recipes inside the package; a checkout has them in configs/ beside it.
    package = Path(str(package_files("mmpost")))
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "configs"


def _recipe_stem(name: str) -> str:
    return name.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")


def _recipe(name: str) -> Path | None:
    stem = Path(_recipe_stem(name))
    if stem.is_absolute() or ".." in stem.parts or stem == Path("."):
        return None
    path = _recipes() / f"{stem}.yaml"
    return path if path.is_file() else None


def _with_ending(path: Path) -> Path | None:
    """``demo/sft.yaml`` for ``demo/sft`` when it exists."""
    return next((file for ending in _CONFIG_ENDINGS if (file := Path(f"{path}{ending}")).is_file()), None)


def _recipe_names() -> list[str]:
    root = _recipes()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=2)
    if near:
        return f"; did you mean {' or '.join(repr(word) for word in near)}?"
    return f"; there are: {', '.join(known[:8])}" if known else ""


def _near_files(path: Path) -> str:
    """What may have been meant by a missing config file: a file beside it, else a recipe of that name."""
    there = {file.stem: str(path.parent / file.name) for file in sorted(path.parent.iterdir()) if _is_config(file)}
    near = difflib.get_close_matches(path.stem, there, n=2)
    if near:
        return f"; did you mean {' or '.join(repr(there[stem]) for stem in near)}?"
    recipe = difflib.get_close_matches(_recipe_stem(str(path)), _recipe_names(), n=1, cutoff=0.75)
    if recipe:
        return f"; did you mean the recipe '{recipe[0]}'?"
    return f"; there are: {', '.join(list(there.values())[:8])}" if there else f"; '{path.parent}' has no .yaml file"


def _is_config(file: Path) -> bool:
    return file.suffix in _CONFIG_ENDINGS


class _Files:
    """Reads config files with what they extend."""

    def __init__(self, config_class: type[Settings], problems: Problems) -> None:
        self.config_class, self.problems, self.layers = config_class, problems, 0

    def read(self, name: str, parent: Node | None, open_files: tuple[Path, ...]) -> Node:
        """One file on top of the files it extends, with full option names.

        Args:
            name: As the user or the parent file wrote it.
            parent: The ``extends`` entry that names it; None for files of the command line.
            open_files: Files that are being read, from the outermost.
        """
        folder = parent.origin.folder if parent is not None else None
        asked = folder / name if folder is not None else Path(name)
        asked = asked if asked.exists() else _with_ending(asked) or asked
        recipe = None if asked.exists() else _recipe(name)
        path = asked if recipe is None else recipe
        label = str(asked) if recipe is None else f"configs/{_recipe_stem(name)}.yaml"
        place = parent or Node(None, Origin(label, self.layers + 1))
        if not path.is_file():
            self.layers += 1
            self._missing(place, asked, parent)
            return Node({}, place.origin)
        if path.resolve() in open_files:
            chain = " -> ".join(file.name for file in (*open_files, path))
            self.problems.add(place, "MMP-C010", f"extends goes in a circle: {chain}.", "Remove one of them.")
            return Node({}, place.origin)
        # The extended files are read after this one but are earlier layers: the layer is set again below.
        layer = read(path, Origin(label, self.layers + 1, path.parent), self.problems)
        extends = layer.value.get("extends")
        base = self._extended(extends, (*open_files, path.resolve())) if extends else Node({}, layer.origin)
        self.layers += 1
        own = {key: _on_layer(child, self.layers) for key, child in layer.value.items() if key != "extends"}
        layer = replace(_on_layer(layer, self.layers), value=own)
        return merge(base, canonical(self.config_class, layer, self.problems))

    def _extended(self, extends: Node, open_files: tuple[Path, ...]) -> Node:
        base = Node({}, extends.origin)
        for entry in extends.value if isinstance(extends.value, list) else [extends]:
            if isinstance(entry.value, str):
                base = merge(base, self.read(entry.value, entry, open_files))
            else:
                self.problems.add(entry, "MMP-C004", f"extends: expected the name of a file, got {shown(entry)}")
        return base

    def _missing(self, place: Node, path: Path, parent: Node | None) -> None:
        prefix = f"{parent.source}: extends: " if parent is not None else ""
        if path.is_dir():
            what, fix = f"{prefix}'{path}' is a folder, not a config file.", "Name a .yaml file in it."
        elif not path.parent.is_dir():
            what, fix = f"{prefix}no config file '{path}': there is no folder '{path.parent}'.", ""
        else:
            what, fix = f"{prefix}no config file '{path}'{_near_files(path)}", ""
        self.problems.add_bare(place, "MMP-C009", what, fix)


def _on_layer(node: Node, layer: int) -> Node:
    """The same tree, counted as a later layer."""
    value = node.value
    if isinstance(value, dict):
        value = {key: _on_layer(child, layer) for key, child in value.items()}
    elif isinstance(value, list):
        value = [_on_layer(child, layer) for child in value]
    return replace(node, value=value, origin=replace(node.origin, layer=layer))


class _Overrides:
    """Applies the command line to the merged files."""

    def __init__(self, config_class: type[Settings], problems: Problems, origin: Origin) -> None:
        self.config_class, self.problems = config_class, problems
        self.here = Node(None, origin)

    def apply(self, tree: Node, overrides: Sequence[str]) -> Node:
        """The tree after all overrides, in their order."""
        for override in _joined(overrides):
            if override.startswith("--") and re.fullmatch(r"[A-Za-z_][\w.-]*", override[2:]):
                key, plus, value = override[2:].replace("-", "_"), "", replace(self.here, value=True)
            else:
                match = _OVERRIDE.fullmatch(override)
                if match is None:
                    self._refuse(override)
                    continue
                key, plus, text = match.groups()
                parsed = parse(text, self.here.origin, self.problems, about=f"{key}: ")
                if parsed is None:
                    continue
                value = replace(parsed, text=text if parsed.text is None else parsed.text)
            path, candidates = keys.expand(self.config_class, key)
            if candidates:
                self.problems.add_bare(self.here, "MMP-C003", ambiguous(self.here, key, candidates))
                continue
            changed = self._put(tree, path, [], value, append=bool(plus))
            tree = with_items(self.config_class, changed or tree)
        return tree

    def _refuse(self, argument: str) -> None:
        path, candidates = keys.expand(self.config_class, argument.lstrip("-"))
        is_key = bool(candidates) or keys.field_at(self.config_class, path) is not None
        fix = (
            f"Write {argument}=VALUE."
            if is_key
            else "Write KEY=VALUE, a config file that ends in .yaml, or a data file."
        )
        self.problems.add(self.here, "MMP-C008", f"'{argument}' is neither an option, a config nor data.", fix)

    def _put(self, node: Node | None, rest: list[str], done: list[str], value: Node, *, append: bool) -> Node | None:
        """``node`` with ``value`` at the path ``rest``; None after a mistake was noted."""
        if node is None and ((rest and rest[0].isdigit()) or (append and not rest)):
            node = self._default(done)
        if not rest and append:
            return self._extended(node, done, value)
        if not rest:
            info = keys.field_at(self.config_class, done)
            if info is not None and keys.kinds(info) and isinstance(value.value, str):
                value = replace(value, value={"kind": value}, text=None)
            return merge(node, value)
        head, tail = rest[0], rest[1:]
        if node is not None and isinstance(node.value, list):
            return self._put_item(node, rest, done, value, append=append)
        entries = dict(node.value) if node is not None and isinstance(node.value, dict) else {}
        child = self._put(entries.get(head), tail, [*done, head], value, append=append)
        if child is None:
            return None
        entries[head] = child
        return replace(node or self.here, value=entries, text=None)

    def _put_item(self, node: Node, rest: list[str], done: list[str], value: Node, *, append: bool) -> Node | None:
        head, tail, name, count = rest[0], rest[1:], join(done), len(node.value)
        if not head.isdigit() or int(head) >= count:
            have = f"'{name}' has {count} item{'s' if count != 1 else ''}"
            what = f"no '{join([*done, head])}': {have}."
            self.problems.add(self.here, "MMP-C001", what, f"Add one with {name}+=VALUE.")
            return None
        item = self._put(node.value[int(head)], tail, [*done, head], value, append=append)
        if item is None:
            return None
        items = list(node.value)
        items[int(head)] = item
        return replace(node, value=items)

    def _default(self, path: list[str]) -> Node | None:
        """The default of an option, for overrides that change a part of it; None unless it is a list."""
        info = keys.field_at(self.config_class, path)
        value = info.get_default(call_default_factory=True) if info is not None else None
        return from_python(value, Origin("default")) if isinstance(value, list) else None

    def _extended(self, node: Node | None, path: list[str], value: Node) -> Node | None:
        """A list with more at its end."""
        if node is None or node.value is None:
            info = keys.field_at(self.config_class, path)
            if info is None or list in {_origin(part) for part in keys.options(info.annotation)}:
                node = replace(self.here, value=[])
        if node is None or not isinstance(node.value, list):
            self.problems.add(self.here, "MMP-C004", f"{join(path)}: only a list can be extended with +=")
            return None
        more = value.value if isinstance(value.value, list) else [value]
        return replace(node, value=[*node.value, *more], origin=self.here.origin, line=0)


def _origin(annotation: Any) -> Any:
    return getattr(annotation, "__origin__", annotation)
