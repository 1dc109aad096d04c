"""Is this value right for this option, and if not, what was expected?

Stricter than pydantic on purpose: ``true`` is not a number, ``1`` is not a boolean, quoted text is no number.
"""

from __future__ import annotations

import difflib
import math
import numbers
import types
import typing
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from mmpost.config.document import Node, scalar, shown
from mmpost.config.keys import options

_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class WrongValueError(Exception):
    """A value does not fit.

    Attributes:
        what: ``expected a whole number, got 'ten'``.
        node: The value at fault, which may lie inside a list.
        suffix: Its place inside the option, for example ``.0``.
    """

    def __init__(self, what: str, node: Node, suffix: str = "") -> None:
        super().__init__(what, node, suffix)
        self.what, self.node, self.suffix = what, node, suffix


def read_value(node: Node, field: FieldInfo) -> Any:
    """The Python value of one option.

    Args:
        node: What was written.
        field: The option, with its type and its limits.

    Raises:
        WrongValueError: The value has the wrong type, is out of range, or is none of the choices.
    """
    return _read(node, field.annotation, field.metadata)


def _read(node: Node, annotation: Any, limits: list[Any]) -> Any:
    if annotation is Any:
        return node.plain()
    parts = options(annotation)
    optional = type(None) in typing.get_args(annotation)
    if node.value is None and optional:
        return None
    # Text takes everything that was written as text, so it is asked last.
    for part in sorted(parts, key=lambda part: part is str):
        fits, value = _try(node, part, parts)
        if fits:
            _check_limits(node, value, limits, part)
            return value
    raise WrongValueError(f"expected {_expected(parts)}, got {shown(node)}{_hint(node, parts)}", node)


def _try(node: Node, part: Any, parts: tuple[Any, ...]) -> tuple[bool, Any]:  # noqa: PLR0912
    """Whether the value fits one member of the union, and what it then is."""
    value, origin = node.value, typing.get_origin(part)
    if origin is typing.Literal:
        choices = typing.get_args(part)
        for candidate in (value, node.text, "null" if value is None else None):
            if isinstance(candidate, str) and candidate in choices:
                return True, candidate
        return False, None
    if part is bool:
        if isinstance(value, str):
            value = _SWITCH.get(value.lower())
        return isinstance(value, bool), value
    if part is int:
        whole = isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value // 1
        return whole, int(value) if whole else None
    if part is float:
        number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
        return number, float(value) if number else None
    if part is str:
        if value is not None and not isinstance(value, str) and node.text is not None:
            value = node.text  # a run name 2024 or a commit 12345e7 is text as it stands
        return isinstance(value, str), value
    if origin is list:
        if isinstance(value, list):
            return True, _items(node, typing.get_args(part)[0])
        single = not isinstance(value, dict) and value is not None and str not in parts
        return single, [_read(node, typing.get_args(part)[0], [])] if single else None
    if origin is dict:
        return isinstance(value, dict), _entries(node, typing.get_args(part)[1]) if isinstance(value, dict) else None
    try:
        return True, TypeAdapter(part).validate_python(node.plain())
    except ValidationError:
        return False, None


def _items(node: Node, annotation: Any) -> list[Any]:
    return [_inside(item, annotation, f".{index}") for index, item in enumerate(node.value)]


def _entries(node: Node, annotation: Any) -> dict[str, Any]:
    return {key: _inside(item, annotation, f".{key}") for key, item in node.value.items()}


def _inside(node: Node, annotation: Any, suffix: str) -> Any:
    try:
        return _read(node, annotation, [])
    except WrongValueError as error:
        raise WrongValueError(error.what, error.node, suffix + error.suffix) from None


def _check_limits(node: Node, value: Any, limits: list[Any], part: Any) -> None:
    if part not in (int, float):
        return
    for limit in limits:
        low_ok = value >= getattr(limit, "ge", value) and not value <= getattr(limit, "gt", -math.inf)
        high_ok = value <= getattr(limit, "le", value) and not value >= getattr(limit, "lt", math.inf)
        if not (low_ok and high_ok):
            raise WrongValueError(f"expected {word(part)} {limits_text(limits)}, got {shown(node)}", node)


def limits_text(limits: list[Any]) -> str:
    """``of at least 0 and below 1``; empty without limits."""
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    parts = [
        f"{text} {getattr(limit, name):g}" for limit in limits for name, text in words.items() if hasattr(limit, name)
    ]
    return " and ".join(parts)


def word(part: Any) -> str:
    """What a type is called in a message."""
    if typing.get_origin(part) is typing.Literal:
        choices = typing.get_args(part)
        return f"one of {', '.join(choices)}" if len(choices) > 1 else f"'{choices[0]}'"
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    containers = {list: "a list", dict: "a mapping"}
    return plain.get(part) or containers.get(typing.get_origin(part), getattr(part, "__name__", str(part)))


def _expected(parts: tuple[Any, ...]) -> str:
    return " or ".join(word(part).replace(" or ", ", ") if len(parts) > 1 else word(part) for part in parts)


def _hint(node: Node, parts: tuple[Any, ...]) -> str:
    if not isinstance(node.value, str):
        return ""
    choices = [
        choice for part in parts if typing.get_origin(part) is typing.Literal for choice in typing.get_args(part)
    ]
    near = difflib.get_close_matches(node.value.lower(), choices, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    is_number = any(part in (int, float) for part in parts) and isinstance(scalar(node.value), numbers.Real)
    return "; remove the quotes" if is_number else ""


def type_name(annotation: Any, limits: list[Any]) -> str:
    """The type in a few characters for the help text: ``int >= 1``, ``auto|float32``, ``list``."""
    names = []
    for part in options(annotation):
        if typing.get_origin(part) is typing.Literal:
            names.append("|".join(typing.get_args(part)))
        elif isinstance(part, types.GenericAlias):
            names.append(typing.get_origin(part).__name__)
        else:
            names.append({str: "text", bool: "true|false"}.get(part, getattr(part, "__name__", str(part)).lower()))
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{sign} {getattr(limit, name):g}" for limit in limits for name, sign in signs.items() if hasattr(limit, name)
    ]
    return " ".join(["|".join(names), *([", ".join(bounds)] if bounds else [])])
