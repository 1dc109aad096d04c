"""Completions by transformers' own ``generate``: slower than the native loop, and the reference that it is held to.

Works with transformers 5.17 and 5.23. Log-probabilities are taken from the model's raw logits while it generates, so
that no ``[steps, rows, V]`` tensor exists. 5.17 encodes the images of a prompt once per completion, 5.23 once.

Draws come from torch's generator, seeded by the first prompt of a batch: unlike those of the native engine they
depend on which prompts share a batch.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Rollout
from mmpost.models.policy import Policy, upcast
from mmpost.rollout.engine import Prompt, Setup, first_of_each, request_seed
from mmpost.rollout.generate import Sampling


class TransformersEngine:
    """``model.generate`` with every sampling field set, whatever the checkpoint's generation settings say."""

    name = "transformers"
    exact = True

    def __init__(self, setup: Setup) -> None:
        self.policy, self.adapter, self.batch_size = setup.policy, setup.adapter, setup.batch_size
        self.version: int | None = None
        self.unknown = 0

    def sync(self, policy: Policy, version: int) -> None:
        """See ``Engine``; the weights are the trainer's own already."""
        self.policy, self.version = policy, version

    def close(self) -> None:
        """See ``Engine``."""

    def complete(
        self, prompts: Sequence[Prompt], *, n: int, sampling: Sampling, first_generation: Sequence[int] | int = 0
    ) -> list[list[Rollout]]:
        """See ``Engine``."""
        first = first_of_each(first_generation, len(prompts))
        per_batch = max(1, self.batch_size // n)
        was_training = self.policy.training
        self.policy.eval()
        done: list[list[Rollout]] = []
        try:
            with torch.no_grad():
                for start in range(0, len(prompts), per_batch):
                    part = prompts[start : start + per_batch]
                    done.extend(self._batch(part, n, sampling, first[start]))
        finally:
            self.policy.train(was_training)
        return done

    def _batch(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, first: int) -> list[list[Rollout]]:
        # generate() refuses several completions of one prompt when it draws nothing.
        copies = 1 if sampling.temperature == 0 else n
        inputs = self._inputs(prompts)
        recorder = _Recorder(self.adapter.media_token_ids, sampling.temperature or 1.0)
        model = self.policy.inner
        with _settings(model, self._generation(sampling, copies)) as settings, torch.random.fork_rng(_cuda(model)):
            torch.manual_seed(request_seed(sampling.seed, prompts[0].uid, first))
            ids = model.generate(**inputs, generation_config=settings, logits_processor=LogitsProcessorList([recorder]))
        tokens = ids[:, inputs["input_ids"].shape[1] :].cpu().numpy()
        logps = recorder.finish(ids).cpu().numpy()
        rollouts = [self._rollout(*row) for row in zip(tokens, logps, strict=True)]
        return [rollouts[i : i + copies] * (n // copies) for i in range(0, len(rollouts), copies)]

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Left-padded prompts; positions are left to the model, which has to carry them on."""
        for prompt in prompts:
            _refuse_long_times(prompt)
        batch = self.adapter.collate([prompt.encoded for prompt in prompts], left=True).to(self.policy.device)
        inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "position_ids"}
        if "mm_token_type_ids" in inspect.signature(self.policy.inner.forward).parameters:
            inputs["mm_token_type_ids"] = self.adapter.token_types(inputs["input_ids"])
        return inputs

    def _generation(self, sampling: Sampling, copies: int) -> GenerationConfig:
        # A field that is left out is filled from the checkpoint's generation settings, and Qwen's ship top_k 50 and
        # repetition_penalty 1.05, which would make the log-probabilities wrong.
        greedy = sampling.temperature == 0
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=0,
            do_sample=not greedy,
            num_beams=1,
            num_return_sequences=copies,
            temperature=None if greedy else sampling.temperature,
            top_p=None if greedy else sampling.top_p,
            top_k=None if greedy else 0,
            min_p=None,
            typical_p=None if greedy else 1.0,
            epsilon_cutoff=0.0,
            eta_cutoff=0.0,
            repetition_penalty=1.0,
            encoder_repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            renormalize_logits=False,
            eos_token_id=list(self.adapter.stop_token_ids),
            pad_token_id=self.adapter.pad_token_id,
            use_cache=True,
            return_dict_in_generate=False,
        )

    def _rollout(self, tokens: np.ndarray, logps: np.ndarray) -> Rollout:
        stops = np.isin(tokens, self.adapter.stop_token_ids).nonzero()[0]
        length = int(stops[0]) + 1 if len(stops) else len(tokens)
        kept = tokens[:length].astype(np.int64)
        return Rollout(
            kept, logps[:length].astype(np.float32), self.adapter.decode(kept.tolist()), truncated=not len(stops)
        )


def _refuse_long_times(prompt: Prompt) -> None:
    """``generate`` goes on behind the largest position; everything else, behind the last token's."""
    positions = prompt.encoded.positions
    if int(positions.max()) > int(positions[:, -1].max()):
        raise MmpostError(
            "MMP-C040",
            f"{prompt.encoded.origin}: the transformers engine gives completions behind a video of this length other "
            "positions than training does.",
            "Set rollout.engine=native.",
        )


class _Recorder(LogitsProcessor):
    """Rules out media tokens, and keeps the log-probability of what was then drawn, before any cut.

    It stands before temperature and nucleus, so the logits that it sees are the model's own. A token is known one call
    after its logits.
    """

    def __init__(self, media: Sequence[int], temperature: float) -> None:
        self.media, self.temperature = torch.tensor(media, dtype=torch.long), temperature
        self.last: Tensor | None = None
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """One decode step: ids so far ``[R, T]``, logits ``[R, V]``."""
        self._take(input_ids)
        self.last = (upcast(scores) / self.temperature).log_softmax(-1)
        return scores.index_fill(-1, self.media.to(scores.device), -torch.inf)

    def finish(self, ids: Tensor) -> Tensor:
        """Log-probabilities ``[R, new tokens]``, once generation is over."""
        self._take(ids)
        self.last = None
        return torch.stack(self.logps, 1)

    def _take(self, ids: Tensor) -> None:
        if self.last is not None:
            self.logps.append(self.last.gather(-1, ids[:, -1:])[:, 0])


@contextlib.contextmanager
def _settings(model: Any, settings: GenerationConfig) -> Iterator[GenerationConfig]:
    """Hide the checkpoint's generation settings, from which ``generate`` fills fields that are None."""
    kept = model.generation_config
    model.generation_config = settings
    try:
        yield settings
    finally:
        model.generation_config = kept


def _cuda(model: Any) -> list[torch.device]:
    """Devices whose random state the draws would move."""
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []
