"""``mmpost data check``: faults of a source, and a table of what is in it."""

from __future__ import annotations

import json
import sys
from typing import Any

from mmpost.api.data import Data, open_source
from mmpost.config.schema import DataSection, Source
from mmpost.core.errors import ManyErrors, MmpostError
from mmpost.data import check


def check_data(
    path: str,
    *,
    model: str | None,
    media_root: str | None,
    command: str | None,
    deep: bool,
    split: str | None,
    as_json: bool,
) -> int:
    """Print what is in the source and what is wrong with it.

    Returns:
        Number of faults.
    """
    section = DataSection(on_bad_row="skip", max_bad_share=1.0)
    data = open_source(Source(path=path, media_root=media_root, split=split), section, seed=0)
    faults = list(data.faults)
    media: Any = "decode" if deep else "exists"
    faults += check.check(data.samples, command=command, media=media, id_scope={})  # type: ignore[arg-type]
    lengths = None if model is None else _lengths(data, model, command, faults)
    summary = check.summary(
        [data], faults, count_tokens=None if lengths is None else lambda sample: lengths[sample.origin]
    )
    if as_json:
        rows = [{"code": fault.code, "message": str(fault)} for fault in faults]
        sys.stdout.write(json.dumps({**summary, "faults": rows}, ensure_ascii=False, default=str) + "\n")
    else:
        for line in check.summary_lines(summary):
            sys.stdout.write(line + "\n")
        if faults:
            sys.stderr.write(f"{ManyErrors(faults)}\n")
    return len(faults)


def _lengths(data: Data, model: str, command: str | None, faults: list[MmpostError]) -> dict[str, dict[str, int]]:
    """Tokens of every row by kind, keyed by origin; empty for rows that cannot be encoded.

    Args:
        data: The rows.
        model: Whose tokens.
        command: ``grpo`` counts prompts only.
        faults: Rows that do not fit are added, unless they are in it already.
    """
    from mmpost.api.model import load_model

    adapter = load_model(model, peft=None, max_length=DataSection().max_length).adapter
    known = {fault.what.split(": ")[0] for fault in faults}
    lengths: dict[str, dict[str, int]] = {}
    for sample in data.samples:
        answered = command != "grpo" and bool(sample.turns) and sample.turns[-1].role == "assistant"
        try:
            row = adapter.encode(sample) if answered else adapter.encode_prompt(sample.prompt())
        except MmpostError as error:
            lengths[sample.origin] = {}
            if sample.origin not in known:
                faults.append(error)
            continue
        counts = {kind: int((row.ids == token).sum()) for kind, token in adapter.token_ids.items()}
        lengths[sample.origin] = {"text": len(row) - sum(counts.values()), **counts}
    return lengths
