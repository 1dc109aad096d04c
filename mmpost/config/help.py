"""The options of a command as text: grouped by section, with type, default and meaning."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mmpost.config import keys
from mmpost.config.dump import inline
from mmpost.config.values import type_name
from mmpost.core.errors import MmpostError

_COLUMN = 32  # where the meaning starts

Row = tuple[str, str]  # option=default, type and meaning


def render(config_class: type[BaseModel], section: str | None, width: int = 80) -> str:
    """Help text of all sections, of one section with what lies inside it, or of one option.

    Args:
        config_class: The command's configuration.
        section: ``train``, ``data.media``, ``media``, ``learning_rate``; None or ``all`` for everything.
        width: Longest line in columns, at least 60.

    Returns:
        Lines that end with a newline.

    Raises:
        MmpostError: MMP-C001 when there is no such section or option.
    """
    blocks = dict(_blocks(config_class, ""))
    if section is None or section == "all":
        chosen = blocks
    else:
        path = ".".join(keys.expand(config_class, section)[0])
        names = {name.rpartition(".")[2]: name for name in reversed(blocks)}
        path = path if path in blocks else names.get(path, path)
        chosen = {
            name: block for name, block in blocks.items() if name == path or name.startswith((f"{path}.", f"{path} "))
        }
        if not chosen:
            return _one_option(config_class, path, blocks, width)
    text = "\n".join(_block(name, *block, width) for name, block in chosen.items())
    if section is None or section == "all":
        note = "Write SECTION.OPTION=VALUE; the section may be left out where the option's name is unique."
        text = f"{textwrap.fill(note, width)}\n\n{text}"
    return text


def _blocks(model: type[BaseModel], path: str) -> Iterator[tuple[str, tuple[str, list[Row]]]]:
    """Sections in order: dotted name, one line of meaning, rows of (option=default, type and meaning)."""
    inside: list[tuple[str, type[BaseModel]]] = []
    rows: list[Row] = []
    for name, field in model.model_fields.items():
        item, kinds, members = keys.item_model(field), keys.kinds(field), keys.sections(field)
        if item is not None:
            inside.append((f"{path}{name}.N", item))
        inside += [(f"{path}{name} (kind={kind})", member) for kind, member in kinds.items()]
        if members and not kinds:
            inside.append((path + name, members[0]))
        if kinds:
            rows.append((f"{name}.kind={keys.default_kind(field)}", f"[{'|'.join(kinds)}] {field.description or ''}"))
        elif not members and name != "kind":
            rows.append(_row(name, field))
    if path and rows:
        yield path.removesuffix("."), (_title(model), rows)
    elif rows:
        yield "top level", ("Options outside the sections.", rows)
    elif path and not inside:
        yield path.removesuffix("."), (_title(model), rows)
    for name, member in inside:
        yield from _blocks(member, f"{name}.")


def _block(name: str, title: str, rows: list[Row], width: int) -> str:
    return textwrap.fill(f"{name}: {title}", width) + "\n" + "".join(_wrapped(row, width) for row in rows)


def _title(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().partition("\n")[0]


def _row(name: str, field: FieldInfo) -> Row:
    default: Any = field.get_default(call_default_factory=True)
    shown = f"{name}=" if field.is_required() else f"{name}={_short(default)}"
    required = " required:" if field.is_required() else ""
    return shown, f"[{type_name(field.annotation, field.metadata)}]{required} {field.description or ''}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else inline(value)


def _wrapped(row: Row, width: int) -> str:
    head, meaning = row
    first = f"  {head}"
    indent = " " * _COLUMN
    # A long name stands on a line of its own, so that all meanings start in the same column.
    first = f"{first.ljust(_COLUMN - 2)}  " if len(first) <= _COLUMN - 2 else f"{first}\n{indent}"
    body = textwrap.fill(meaning, width, initial_indent=indent, subsequent_indent=indent)
    return f"{first}{body[_COLUMN:]}\n"


def _one_option(config_class: type[BaseModel], path: str, blocks: dict[str, tuple[str, list[Row]]], width: int) -> str:
    parent, _, name = path.rpartition(".")
    for block, (_, rows) in blocks.items():
        if block.partition(" ")[0] == parent:
            for head, meaning in rows:
                if head.partition("=")[0] == name:
                    return f"{block}:\n{_wrapped((head, meaning), width)}"
    known = [block.partition(" ")[0] for block in blocks]
    near = difflib.get_close_matches(path, [*known, *keys.leaf_paths(config_class)], n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"sections: {', '.join(dict.fromkeys(known))}"
    raise MmpostError("MMP-C001", f"no section or option '{path}'; {hint}")
