"""Rows of a ``datasets.Dataset`` given as an object, with media left encoded. Imports no ``datasets``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from mmpost.core.errors import MmpostError

_MEDIA_FEATURES = {"Image", "Audio", "Video"}


def undecoded(rows: Iterable[Any], *, name: str) -> Iterable[Any]:
    """The same rows with every Image, Audio and Video feature switched to ``decode=False``.

    Args:
        rows: Anything; only objects with ``features`` and ``cast_column`` are changed.
        name: Name for messages.

    Raises:
        MmpostError: MMP-D032 for an object without rows, MMP-D033 for a dictionary of splits.
    """
    if isinstance(rows, Mapping):
        raise MmpostError(
            "MMP-D033", f"{name}: has the splits {', '.join(map(str, rows))}.", "Choose one with Source.split"
        )
    if not isinstance(rows, Iterable):
        raise MmpostError("MMP-D032", f"{name}: data is {type(rows).__name__}; expected rows or a path")
    features = getattr(rows, "features", None)
    if not isinstance(features, Mapping) or not hasattr(rows, "cast_column"):
        return rows
    for column, feature in features.items():
        raw = _undecoded_feature(feature)
        if raw is not feature:
            rows = rows.cast_column(column, raw)
    return rows


def _undecoded_feature(feature: Any) -> Any:
    """The feature itself if it holds no media, else a copy that does not decode."""
    if isinstance(feature, Mapping):
        inner = {key: _undecoded_feature(value) for key, value in feature.items()}
        return inner if any(inner[key] is not feature[key] for key in feature) else feature
    if isinstance(feature, list) and len(feature) == 1:
        first = _undecoded_feature(feature[0])
        return feature if first is feature[0] else [first]
    if type(feature).__name__ in _MEDIA_FEATURES and getattr(feature, "decode", False):
        return dataclasses.replace(feature, decode=False)
    nested = getattr(feature, "feature", None)  # Sequence, List, LargeList
    if nested is not None:
        raw = _undecoded_feature(nested)
        if raw is not nested:
            changed = copy.copy(feature)
            changed.feature = raw
            return changed
    return feature
