"""Completions by vLLM in the training process itself, on the same GPU: one copy of the engine per process.

Between rollouts it sleeps: its weights lie in host memory and its cache is freed. Written against vLLM 0.26 (``LLM``
with ``generate``, ``collective_rpc``, ``sleep``, ``wake_up``, ``reset_prefix_cache``).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmpost.core.rollout import Rollout
from mmpost.models.policy import Policy
from mmpost.rollout import vllm_wire as wire
from mmpost.rollout.engine import Prompt, Setup, first_of_each, request_seed
from mmpost.rollout.generate import Sampling
from mmpost.rollout.weights import named_weights

# What sleeps, and is woken one by one: weights are loaded before the cache takes its memory back.
PARTS = ("weights", "kv_cache")


class VllmColocate:
    """``vllm.LLM`` beside the policy."""

    name = "vllm"
    exact = False
    _where = "vLLM"

    def __init__(self, setup: Setup) -> None:
        """Load the checkpoint of the run a second time, into vLLM.

        Raises:
            MmpostError: MMP-E010 when vLLM is not installed.
        """
        options = setup.section.vllm
        self.adapter = setup.adapter
        self.version: int | None = None
        self.unknown = 0
        self._vllm = wire.import_vllm("vllm")
        self._sleeps = options.sleep
        self._asleep: set[str] = set()
        _be_launched(setup.rank)
        self.llm = self._vllm.LLM(
            model=setup.model,
            tensor_parallel_size=1,
            # The engine then runs in this process, so that weights are handed over without a copy through a pipe.
            distributed_executor_backend="external_launcher",
            gpu_memory_utilization=options.gpu_memory_utilization,
            max_model_len=options.max_model_len,
            enable_sleep_mode=options.sleep,
            enable_prefix_caching=True,
            # Log-probabilities at the sampling temperature, of the distribution that was drawn from.
            logprobs_mode="processed_logprobs",
            mm_processor_kwargs=wire.processor_options(self.adapter),
            seed=0,
        )
        self._sleep()

    def complete(
        self, prompts: Sequence[Prompt], *, n: int, sampling: Sampling, first_generation: Sequence[int] | int = 0
    ) -> list[list[Rollout]]:
        """See ``Engine``.

        Raises:
            MmpostError: MMP-E063 for an answer that cannot be trained on, MMP-R130 for missing log-probabilities,
                MMP-R131 when vLLM makes other placeholders of the images.
        """
        if not prompts:
            return []
        self._wake(*PARTS)
        copies = 1 if sampling.temperature == 0 else n
        first = first_of_each(first_generation, len(prompts))
        params = [
            self._vllm.SamplingParams(
                **wire.sampling_params(
                    self.adapter, sampling, copies, request_seed(sampling.seed, prompt.uid, generation)
                )
            )
            for prompt, generation in zip(prompts, first, strict=True)
        ]
        outputs = self.llm.generate([self._input(prompt) for prompt in prompts], params, use_tqdm=False)
        groups = []
        for prompt, output in zip(prompts, outputs, strict=True):
            self._check_prompt(prompt, output.prompt_token_ids)
            choices = sorted(output.outputs, key=lambda choice: int(choice.index))
            groups.append([self._rollout(choice) for choice in choices] * (n // copies))
        self.unknown += wire.count_unknown(self._where, groups)
        self._sleep()
        return groups

    def _input(self, prompt: Prompt) -> dict[str, Any]:
        images = wire.pictures(prompt.sample)
        ids = prompt.encoded.ids
        if not images:
            return {"prompt_token_ids": ids.tolist()}
        # vLLM expands one placeholder per image by itself; a run of them would be expanded again.
        keep = torch.ones(len(ids), dtype=torch.bool)
        for start, length in wire.image_spans(self.adapter, ids):
            keep[start + 1 : start + length] = False
        return {"prompt_token_ids": ids[keep].tolist(), "multi_modal_data": {"image": images}}

    def _check_prompt(self, prompt: Prompt, theirs: Sequence[int]) -> None:
        """The ids that vLLM expanded are the trainer's."""
        ids = prompt.encoded.ids
        if list(theirs) != ids.tolist():
            found = wire.image_spans(self.adapter, torch.tensor(theirs, dtype=torch.long))
            spans = wire.image_spans(self.adapter, ids)
            ours, other = [length for _, length in spans], [length for _, length in found]
            if ours == other:
                raise wire.unusable(self._where, "other token ids than those of the prompt")
            raise wire.placeholder_mismatch(prompt.encoded, ours, other)

    def _rollout(self, choice: Any) -> Rollout:
        tokens = list(choice.token_ids)
        logps = [step[token].logprob for token, step in zip(tokens, choice.logprobs or [], strict=False)]
        return wire.to_rollout(self.adapter, self._where, tokens, logps)

    def sync(self, policy: Policy, version: int) -> None:
        """See ``Engine``."""
        if version == self.version:
            return
        self._wake("weights")
        self.llm.collective_rpc(_load, args=(named_weights(policy),))
        self.llm.reset_prefix_cache()
        self.version = version

    def close(self) -> None:
        """Give the engine's memory back."""
        self.llm = None

    def _wake(self, *parts: str) -> None:
        needed = [part for part in parts if part in self._asleep]
        if needed:
            if torch.cuda.is_available():
                # Blocks that the trainer's allocator holds but does not use are what vLLM needs now.
                torch.cuda.empty_cache()
            self.llm.wake_up(tags=needed)
            self._asleep -= set(needed)

    def _sleep(self) -> None:
        if self._sleeps:
            # Level 1 keeps the weights in host memory: prompts may be completed again before the next update.
            self.llm.sleep(level=1)
            self._asleep = set(PARTS)


def _load(worker: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Runs inside vLLM's worker."""
    worker.model_runner.model.load_weights(weights)


def _be_launched(rank: int) -> None:
    """What a launcher would have set; a run in a single process has none."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    fallback = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    for name, value in fallback.items():
        os.environ.setdefault(name, value)
