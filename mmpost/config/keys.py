"""Which options exist, under which dotted name, and which one was meant by a wrong name."""

from __future__ import annotations

import difflib
import functools
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def options(annotation: Any) -> tuple[Any, ...]:
    """Members of a union without null; a tuple of one for anything else."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(part for part in typing.get_args(annotation) if part is not type(None))
    return (annotation,)


def sections(field: FieldInfo) -> tuple[type[BaseModel], ...]:
    """The section that a field holds, the members of a union of sections, or nothing for a plain option."""
    parts = options(field.annotation)
    return parts if all(isinstance(part, type) and issubclass(part, BaseModel) for part in parts) else ()


def item_model(field: FieldInfo) -> type[BaseModel] | None:
    """The model of the items when the field is a list of objects."""
    for part in options(field.annotation):
        if typing.get_origin(part) is list:
            item = typing.get_args(part)[0]
            if isinstance(item, type) and issubclass(item, BaseModel):
                return item
    return None


def main_key(model: type[BaseModel]) -> str | None:
    """The one required option of an item: plain text in its place means this option (a path, a name)."""
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    return required[0] if len(required) == 1 else None


def kinds(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """Members of a union of sections by their ``kind``; empty when the field is no such union."""
    members = sections(field)
    if field.discriminator is None and len(members) < 2:
        return {}
    return {typing.get_args(member.model_fields["kind"].annotation)[0]: member for member in members}


def default_kind(field: FieldInfo) -> str:
    """The kind that a union of sections has when nothing is said."""
    kind: str = field.get_default(call_default_factory=True).kind
    return kind


@functools.cache
def leaf_paths(config_class: type[BaseModel]) -> dict[str, tuple[str, ...]]:
    """Dotted names of the options by their last word; without the options of list items."""
    found: dict[str, list[str]] = {}
    for path in _leaves(config_class, ""):
        paths = found.setdefault(path.rpartition(".")[2], [])
        if path not in paths:  # ``kind`` is in every member of a union
            paths.append(path)
    return {name: tuple(paths) for name, paths in found.items()}


def _leaves(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        members = sections(field)
        for member in members:
            yield from _leaves(member, f"{prefix}{name}.")
        if not members:
            yield prefix + name


def expand(config_class: type[BaseModel], key: str) -> tuple[list[str], tuple[str, ...]]:
    """The full path of a key whose section may be left out.

    Args:
        config_class: The command's configuration.
        key: Dotted or bare name, for example ``train.seed``, ``seed`` or ``columns.image``.

    Returns:
        The path in words, and the candidates when more than one option has that name (then the path is as
        given). An unknown key is returned as it is.
    """
    head, *rest = key.split(".")
    if head in config_class.model_fields:
        return [head, *rest], ()
    paths = leaf_paths(config_class).get(head, ())
    if len(paths) == 1:
        return [*paths[0].split("."), *rest], ()
    return [head, *rest], paths


def field_at(config_class: type[BaseModel], segments: list[str]) -> FieldInfo | None:
    """The field at a path, through sections and unions; None for unknown names and inside lists."""
    models: tuple[type[BaseModel], ...] = (config_class,)
    field: FieldInfo | None = None
    for segment in segments:
        field = next((model.model_fields[segment] for model in models if segment in model.model_fields), None)
        if field is None:
            return None
        models = sections(field)
    return field


def suggest(config_class: type[BaseModel], parent: str, key: str, known: list[str]) -> str:
    """The end of a message about an unknown key: the option that was probably meant, or where the list is.

    Foreign names (the table of other toolkits' options) are to be asked first, here.

    Args:
        config_class: The command's configuration.
        parent: Dotted name of the mapping that holds the key; empty at the top.
        key: The unknown word.
        known: Words allowed in that mapping.
    """
    leaves = leaf_paths(config_class)
    last = key.rpartition(".")[2]
    if last in leaves:
        return _meant(leaves[last])
    inside = difflib.get_close_matches(key, known, n=1)
    if inside and parent:
        return _meant((f"{parent}.{inside[0]}",))
    words = {**leaves, **{name: (name,) for name in known if not parent}}
    if "." in key:
        words |= {path: (path,) for paths in leaves.values() for path in paths}
    near = difflib.get_close_matches(key, words, n=1, cutoff=0.75 if "." in key else 0.6)
    if near:
        return _meant(words[near[0]])
    command = getattr(config_class, "command", None)
    section = f" {parent.partition('.')[0]}" if parent else ""
    return f"; 'mmpost {command} --help{section}' lists the options" if command else ""


def _meant(paths: tuple[str, ...]) -> str:
    return f"; did you mean {' or '.join(repr(path) for path in paths)}?"
