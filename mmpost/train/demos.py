"""Demonstrations of prompts: the answer that a row brings with it, kept aside while the policy writes its own.

A row that ends with the assistant, or that has a column ``demonstration`` or ``solution_text``, has one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mmpost.core.errors import MmpostError
from mmpost.core.protocols import Adapter
from mmpost.core.rollout import Rollout
from mmpost.core.sample import Part, Sample, Turn

# Where ``set_aside`` puts the answer; the others are looked at where it is missing.
COLUMN = "demonstration"
COLUMNS = (COLUMN, "solution_text")


def set_aside(sample: Sample) -> Sample:
    """The prompt, with the final assistant turn moved into the column ``demonstration``.

    A row without such a turn, and one whose answer is not text alone, comes back as a plain prompt.
    """
    if not sample.turns or sample.turns[-1].role != "assistant":
        return sample
    answer = sample.turns[-1]
    prompt = sample.prompt()
    if any(part.kind != "text" for part in answer.parts) or text_of(sample) is not None:
        return prompt
    return replace(prompt, columns={**prompt.columns, COLUMN: answer.text})


def text_of(sample: Sample) -> str | None:
    """The demonstration of a prompt row, or None where there is none."""
    texts = (sample.columns.get(name) for name in COLUMNS)
    return next((text for text in texts if isinstance(text, str) and text.strip()), None)


def demonstration(adapter: Adapter, sample: Sample) -> Rollout | None:
    """The demonstration of a prompt row as if the policy had written it; None where there is none.

    Its ids are those that supervised fine-tuning trains, the end token included, so that prompt and answer together
    are the row as ``Adapter.encode`` makes it. Log-probabilities are NaN: no policy sampled it.
    """
    text = text_of(sample)
    if text is None:
        return None
    turns = (*sample.prompt().turns, Turn("assistant", (Part("text", text),)))
    ids = adapter.encode_answer(replace(sample, turns=turns)).numpy()
    return Rollout(ids, np.full(len(ids), np.nan, dtype=np.float32), text, truncated=False)


def check_some(samples: list[Sample], preset: str) -> None:
    """At least one row has a demonstration.

    Raises:
        MmpostError: MMP-D041.
    """
    if not any(text_of(sample) is not None for sample in samples):
        raise MmpostError(
            "MMP-D041",
            f"preset '{preset}' trains on demonstrations, but none of {len(samples)} rows has one.",
            "End rows with the assistant's answer, or give them a column demonstration.",
        )
