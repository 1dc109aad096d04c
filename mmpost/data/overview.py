"""What a data set holds, as numbers and as the lines that ``mmpost data check`` prints."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mmpost.core.errors import MmpostError
from mmpost.core.sample import Sample

_ORIGIN = re.compile(r"(.*?:\d+): ")
_LONGEST = 5
_QUANTILES = ("p50", "p90", "p99", "max")


class Rows(Protocol):
    """What ``summary`` reads of a source; ``mmpost.data.source.Table`` is one."""

    name: str
    samples: list[Sample]
    faults: list[MmpostError]
    bad_rows: list[dict[str, Any]]
    sha256: str


def summary(
    sources: Sequence[Rows],
    faults: Sequence[MmpostError] = (),
    *,
    count_tokens: Callable[[Sample], Mapping[str, int]] | None = None,
) -> dict[str, Any]:
    """What ``mmpost data check`` prints, ready for JSON.

    Args:
        sources: The sources as read.
        faults: What ``check`` and ``leakage`` found; the sources' own may be among them and count once.
        count_tokens: Tokens of a row by kind, for example ``{"text": 40, "image": 256}``.

    Returns:
        ``sources``: one object each with ``name, sha256, rows, bad, by_code, media, chars, tokens, longest``.
        ``total``: ``rows, bad, by_code, media``. ``chars`` and every kind in ``tokens`` hold p50, p90, p99
        and max; ``tokens`` is None without ``count_tokens``; ``longest`` lists the five longest rows, by
        tokens if counted, else by characters.
    """
    own = {id(fault) for source in sources for fault in source.faults}
    found = [fault for fault in faults if id(fault) not in own]
    parts = [_summary_of(source, found, count_tokens) for source in sources]
    media: Counter[str] = Counter()
    for part in parts:
        media.update(part["media"])
    everything = [fault for source in sources for fault in source.faults] + found
    total = {
        "rows": sum(part["rows"] for part in parts),
        "bad": sum(part["bad"] for part in parts),
        "by_code": _by_code(everything),
        "media": dict(media),
    }
    return {"sources": parts, "total": total}


def _summary_of(
    source: Rows,
    found: Sequence[MmpostError],
    count_tokens: Callable[[Sample], Mapping[str, int]] | None,
) -> dict[str, Any]:
    origins = {sample.origin for sample in source.samples}
    checked = [fault for fault in found if _origin(fault) in origins]
    chars = [sum(len(turn.text) for turn in sample.turns) for sample in source.samples]
    tokens = None if count_tokens is None else [dict(count_tokens(sample)) for sample in source.samples]
    lengths = chars if tokens is None else [sum(counts.values()) for counts in tokens]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))[:_LONGEST]
    longest = [(source.samples[i], lengths[i]) for i in order]
    return {
        "name": source.name,
        "sha256": source.sha256,
        "rows": len(source.samples) + len(source.bad_rows),
        "bad": len(source.bad_rows) + len({_origin(fault) for fault in checked}),
        "by_code": _by_code([*source.faults, *checked]),
        "media": dict(Counter(part.kind for sample in source.samples for part in sample.media())),
        "chars": quantiles(chars),
        "tokens": None if tokens is None else _token_quantiles(tokens, lengths),
        "longest": [{"origin": row.origin, "id": row.id, "length": length} for row, length in longest],
    }


def _origin(fault: MmpostError) -> str | None:
    match = _ORIGIN.match(fault.what)
    return match[1] if match else None


def _by_code(faults: Iterable[MmpostError]) -> dict[str, int]:
    return dict(sorted(Counter(fault.code for fault in faults).items()))


def _token_quantiles(tokens: Sequence[Mapping[str, int]], lengths: Sequence[int]) -> dict[str, dict[str, int]]:
    kinds = sorted({kind for counts in tokens for kind in counts})
    by_kind = {kind: quantiles([counts.get(kind, 0) for counts in tokens]) for kind in kinds}
    return {**by_kind, "total": quantiles(lengths)}


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """p50, p90, p99 and max of counts, each a value that occurs; all 0 when there are none."""
    if not values:
        return dict.fromkeys(_QUANTILES, 0)
    found = np.quantile(np.asarray(values), [0.5, 0.9, 0.99, 1.0], method="inverted_cdf")
    return dict(zip(_QUANTILES, map(int, found), strict=True))


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """The result of ``summary`` as lines of plain text, one block per source."""
    lines = []
    for source in summary["sources"]:
        unit = "characters" if source["tokens"] is None else "tokens"
        lines.append(f"{source['name']}: {source['rows']} rows, {source['bad']} bad{_counts(source['by_code'])}")
        lines.append(f"  media: {_counts(source['media']).strip(' ()') or 'none'}")
        lines.append(f"  characters: {_quantile_text(source['chars'])}")
        for kind, values in (source["tokens"] or {}).items():
            lines.append(f"  {kind} tokens: {_quantile_text(values)}")
        lines += [f"  long row: {row['origin']} ({row['length']} {unit})" for row in source["longest"]]
    total = summary["total"]
    lines.append(f"total: {total['rows']} rows, {total['bad']} bad{_counts(total['by_code'])}")
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f" ({listed})" if listed else ""


def _quantile_text(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {values[name]}" for name in _QUANTILES)
