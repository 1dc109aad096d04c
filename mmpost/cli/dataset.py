"""``mmpost data check``: faults of a source, and a table of what is in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from mmpost.api.data import Data, open_source
from mmpost.config.schema import DataSection, Source
from mmpost.core.errors import ManyErrors, MmpostError
from mmpost.core.sample import Sample
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
    faults += [] if model is None else _too_long(data, model)
    summary = check.summary([data], faults, count_tokens=_counter(model) if model else None)
    if as_json:
        rows = [{"code": fault.code, "message": str(fault)} for fault in faults]
        sys.stdout.write(json.dumps({**summary, "faults": rows}, ensure_ascii=False, default=str) + "\n")
    else:
        for line in check.summary_lines(summary):
            sys.stdout.write(line + "\n")
        if faults:
            sys.stderr.write(f"{ManyErrors(faults)}\n")
    return len(faults)


def _counter(model: str) -> Callable[[Sample], dict[str, int]]:
    from mmpost.api.model import load_model

    adapter = load_model(model, peft=None).adapter

    def count(sample: Sample) -> dict[str, int]:
        row = adapter.encode_prompt(sample)
        image = int((row.ids == adapter.image_token_id).sum())
        return {"text": len(row) - image, "image": image}

    return count


def _too_long(data: Data, model: str) -> list[MmpostError]:
    """Rows that the default ``data.max_length`` refuses."""
    from mmpost.api.model import load_model

    adapter = load_model(model, peft=None, max_length=DataSection().max_length).adapter
    found = []
    for sample in data.samples:
        try:
            adapter.encode_prompt(sample)
        except MmpostError as error:
            found.append(error)
    return found
