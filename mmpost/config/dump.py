"""A configuration as YAML again, without loss, and as flat names and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from mmpost.config.document import scalar


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that either our rules or YAML 1.1 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Repeat values instead of naming them."""
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    plain = isinstance(scalar(value), str) and "\n" not in value
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def inline(value: Any) -> str:
    """One value on one line of YAML."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=1_000_000, sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def leaves(model: BaseModel, beside: BaseModel | None = None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all options, in the order of the schema.

    Args:
        model: A configuration or a part of it.
        beside: Another one that it will be compared with. Lists of objects that are longer or shorter there
            stay whole, as plain values, because their items do not correspond.
        prefix: Put before every name.
    """
    for name in type(model).model_fields:
        value, path, other = getattr(model, name), prefix + name, getattr(beside, name, None)
        if isinstance(value, BaseModel):
            yield from leaves(value, other, f"{path}.")
        elif _is_items(value) and (not isinstance(other, list) or len(other) == len(value)):
            for index, item in enumerate(value):
                yield from leaves(item, other[index] if other else None, f"{path}.{index}.")
        elif _is_items(value):
            yield path, [item.model_dump(exclude_unset=True) for item in value]
        else:
            yield path, value


def to_yaml(config: BaseModel, sources: Mapping[str, str], masked: Mapping[str, str]) -> str:
    """The whole configuration as YAML.

    Args:
        config: What to write.
        sources: Where values came from; becomes a comment behind every value that is not a default.
        masked: Text to write instead of a value, by dotted name.
    """
    return "".join(f"{line}\n" for line in _lines(config, "", "", sources, masked))


def _lines(
    model: BaseModel, path: str, pad: str, sources: Mapping[str, str], masked: Mapping[str, str]
) -> Iterator[str]:
    for name in type(model).model_fields:
        value, dotted = getattr(model, name), path + name
        if isinstance(value, BaseModel):
            yield f"{pad}{name}:"
            yield from _lines(value, f"{dotted}.", f"{pad}  ", sources, masked)
        elif _is_items(value):
            yield f"{pad}{name}:"
            for index, item in enumerate(value):
                first, *others = _lines(item, f"{dotted}.{index}.", f"{pad}    ", sources, masked)
                yield f"{pad}  - {first.strip()}"
                yield from others
        else:
            source = sources.get(dotted, "default")
            comment = "" if source == "default" else f"  # {source}"
            yield f"{pad}{name}: {inline(masked.get(dotted, value))}{comment}"


def _is_items(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, BaseModel) for item in value)
