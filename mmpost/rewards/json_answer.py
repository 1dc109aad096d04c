"""Is the answer JSON of the right shape; 1.0 or 0.0 per completion."""

from __future__ import annotations

import json as json_library
import re
from collections.abc import Callable, Mapping
from typing import Any

from mmpost.rewards.extract import raw_answer, text_of

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value == int(value),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}
_NOTES = {"title", "description", "default", "examples", "$schema"}


def json(
    prompts: list[Any],
    completions: list[Any],
    *,
    required: list[str] | None = None,
    schema: dict[str, Any] | None = None,
    **columns: list[Any],
) -> list[float | None]:
    r"""1 if the answer is valid JSON with the required keys, and fits the schema.

    Args:
        prompts: Message lists; not read.
        completions: Message lists or strings. JSON is read from ``\boxed{}`` or ``<answer>``, else from the last
            fenced block, else it is the whole text.
        required: Keys that the object must have.
        schema: A JSON Schema of these words: type, enum, const, properties, required, additionalProperties (true or
            false), items, minItems, maxItems, minLength, maxLength, minimum, maximum.
        columns: Other columns; not read.

    Raises:
        ValueError: The schema has another word, which would not be checked.
    """
    whole = dict(schema or {})
    if required:
        whole["type"] = whole.get("type", "object")
        whole["required"] = [*whole.get("required", []), *required]
    check_schema(whole)
    return [float(_fits(text_of(completion), whole)) for completion in completions]


def _fits(text: str, schema: Mapping[str, Any]) -> bool:
    found = raw_answer(text)
    if found is None:
        blocks = _FENCE.findall(text)
        found = blocks[-1] if blocks else text
    try:
        value = json_library.loads(found, parse_constant=_refuse)
        return fits(value, schema)
    except (ValueError, RecursionError):  # NaN, brackets without end, numbers of 5000 digits
        return False


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a decoded value fits a schema of the words that ``json`` lists."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_TYPES[kind](value) for kind in kinds):
        return False
    if "enum" in schema and not any(_equal(value, one) for one in schema["enum"]):
        return False
    if "const" in schema and not _equal(value, schema["const"]):
        return False
    if isinstance(value, dict):
        return _fits_object(value, schema)
    if isinstance(value, list):
        return _within(len(value), schema, "minItems", "maxItems") and all(
            fits(one, schema.get("items", {})) for one in value
        )
    if isinstance(value, str):
        return _within(len(value), schema, "minLength", "maxLength")
    return not _TYPES["number"](value) or _within(value, schema, "minimum", "maximum")


def _fits_object(value: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    properties = schema.get("properties", {})
    if not all(name in value for name in schema.get("required", [])):
        return False
    if schema.get("additionalProperties") is False and not all(name in properties for name in value):
        return False
    return all(fits(value[name], inner) for name, inner in properties.items() if name in value)


def _equal(first: Any, second: Any) -> bool:
    # In Python True equals 1; in JSON it does not.
    return first == second and isinstance(first, bool) == isinstance(second, bool)


def _within(number: float, schema: Mapping[str, Any], low: str, high: str) -> bool:
    return schema.get(low, number) <= number <= schema.get(high, number)


def check_schema(schema: Mapping[str, Any]) -> None:
    """Refuse a schema that ``fits`` would not check in full.

    Raises:
        ValueError: Names the word.
    """
    words = {"type", "enum", "const", "properties", "required", "additionalProperties", "items"}
    words |= {"minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum"}
    for word in schema:
        if word not in words | _NOTES:
            raise ValueError(f"schema word '{word}' is not supported; supported: {', '.join(sorted(words))}")
    kinds = schema.get("type", [])
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind not in _TYPES:
            raise ValueError(f"schema type '{kind}' is unknown; known: {', '.join(_TYPES)}")
    if not isinstance(schema.get("additionalProperties", True), bool):
        raise ValueError("schema word 'additionalProperties' is supported with true or false only")
    inner = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
    for one in inner:
        check_schema(one)
