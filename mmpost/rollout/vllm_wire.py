"""What vLLM is asked and what it answers, the same for a server and for the library.

Written against vLLM 0.26; field names are those of its ``SamplingParams``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmpost.core.batch import Encoded
from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Rollout
from mmpost.core.sample import Sample
from mmpost.media import image as image_media
from mmpost.rollout.generate import Sampling

# JSON knows no infinity; vLLM's server writes this for the log-probability of an impossible token.
FLOOR = -9999.0
# Unknown log-probabilities above this share mean that the engine does not give those of its sampler.
MAX_UNKNOWN = 0.01


def import_vllm(name: str) -> Any:
    """A module of vLLM.

    Raises:
        MmpostError: MMP-E010 when vLLM is not installed.
    """
    try:
        importlib.import_module("vllm")
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "vllm":
            raise
        what = "vllm, which is not installed" if error.name == "vllm" else f"{error.name}, which this vLLM lacks"
        raise MmpostError(
            "MMP-E010", f"'rollout.engine=vllm' needs {what}.", 'Run: pip install "mmpost-toolkit[vllm]"'
        ) from error


def sampling_params(adapter: Any, sampling: Sampling, n: int, seed: int) -> dict[str, Any]:
    """Every field that changes what is drawn, so that no default of the checkpoint applies.

    ``seed + i`` is the seed of completion ``i``. ``logprobs`` 0 gives that of the drawn token alone.
    """
    return {
        "n": n,
        "seed": seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": 0,
        "stop_token_ids": list(adapter.stop_token_ids),
        "ignore_eos": False,
        "logprobs": 0,
        "skip_special_tokens": False,
        # vLLM takes these as text and masks the logits of the token that each is.
        "bad_words": list(adapter.tokenizer.convert_ids_to_tokens(list(adapter.media_token_ids))),
    }


def processor_options(adapter: Any) -> dict[str, Any]:
    """The pixel budget, so that the engine resizes a picture as the trainer does.

    Raises:
        MmpostError: MMP-C040 for a model that takes no pictures.
    """
    if "image" not in adapter.kinds:
        raise MmpostError(
            "MMP-C040",
            f"the vllm engine takes text and images, not {', '.join(adapter.kinds)}.",
            "Set rollout.engine=native.",
        )
    size = dict(adapter.processor.image_processor.size)
    return {"size": {name: value for name, value in size.items() if value is not None}}


def pictures(sample: Sample) -> list[Image.Image]:
    """The images of a prompt as the trainer decodes them, in reading order.

    Raises:
        MmpostError: MMP-C040 for other media, or a decoding error.
    """
    kinds = {part.kind for part in sample.media()} - {"image"}
    if kinds:
        raise MmpostError(
            "MMP-C040",
            f"{sample.origin}: the vllm engine takes text and images, not {', '.join(sorted(kinds))}.",
            "Set rollout.engine=native.",
        )
    return [image_media.load(part.ref, origin=sample.origin) for part in sample.media("image") if part.ref is not None]


def image_spans(adapter: Any, ids: torch.Tensor) -> list[tuple[int, int]]:
    """Start and length of each run of image placeholders in int64 ``[T]``."""
    padded = torch.nn.functional.pad((ids == adapter.image_token_id).long(), (1, 1))
    edges = padded.diff().nonzero()[:, 0].tolist()
    return [(start, end - start) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def placeholder_mismatch(prompt: Encoded, ours: Sequence[int], theirs: Sequence[int]) -> MmpostError:
    """Trainer and engine disagree on the tokens of the images of a prompt."""
    return MmpostError(
        "MMP-R131",
        f"{prompt.origin}: vLLM makes {_tokens(theirs)} of the images of this prompt, the trainer {_tokens(ours)}.",
        "Start vLLM from the same checkpoint and processor; with models that cut a picture into tiles set "
        "rollout.engine=native.",
    )


def _tokens(lengths: Sequence[int]) -> str:
    each = " + ".join(map(str, lengths)) if len(lengths) > 1 else ""
    return f"{sum(lengths)} placeholder tokens{f' ({each})' if each else ''}"


def to_rollout(adapter: Any, where: str, tokens: Sequence[int], logps: Sequence[float | None]) -> Rollout:
    """One completion.

    Args:
        adapter: Knows end and media tokens.
        where: Who answered, for messages.
        tokens: Drawn ids including the end token.
        logps: Of each of them; None, NaN, infinite or ``FLOOR`` where unknown, which becomes NaN.

    Raises:
        MmpostError: MMP-E063 for an answer that cannot be trained on.
    """
    if not len(tokens) or len(tokens) != len(logps):
        raise unusable(where, f"a completion of {len(tokens)} tokens with {len(logps)} log-probabilities")
    ids = np.asarray(tokens, dtype=np.int64)
    drawn = sorted(set(ids.tolist()) & set(adapter.media_token_ids))
    if drawn:
        raise unusable(where, f"the media placeholder {drawn[0]}, which was ruled out")
    values = np.array([math.nan if _is_unknown(value) else value for value in logps], dtype=np.float32)
    ended = bool(np.isin(ids[-1], adapter.stop_token_ids))
    return Rollout(ids, values, adapter.decode(ids.tolist()), truncated=not ended)


def count_unknown(where: str, groups: Sequence[Sequence[Rollout]]) -> int:
    """Tokens without a log-probability.

    Raises:
        MmpostError: MMP-R130 when they are more than ``MAX_UNKNOWN`` of all.
    """
    total = sum(len(rollout.tokens) for group in groups for rollout in group)
    unknown = sum(int(np.isnan(rollout.logp).sum()) for group in groups for rollout in group)
    if unknown > MAX_UNKNOWN * total:
        raise MmpostError(
            "MMP-R130",
            f"{where} gave no log-probability for {unknown} of {total} tokens.",
            "Start vLLM with --logprobs-mode processed_logprobs; without log-probabilities the policy cannot be "
            "corrected for the engine.",
        )
    return unknown


def _is_unknown(value: float | None) -> bool:
    return value is None or not math.isfinite(value) or value <= FLOOR


def unusable(where: str, what: str) -> MmpostError:
    """An answer that is not what the protocol promises."""
    return MmpostError(
        "MMP-E063", f"{where} answered with {what}.", "Use a version of vLLM that docs/rollouts.md names."
    )
