"""Completions by a vLLM server on other GPUs.

Token ids go in and come out. A prompt is one request with ``n`` completions; its images are sent once, processed by
the server, and the features come back to stand beside the trainer's own token ids. Weights are pushed over NCCL.

Written against vLLM 0.26, the newest that runs with the torch of this project: ``/inference/v1/generate``,
``/v1/chat/completions/render``, and with ``VLLM_SERVER_DEV_MODE=1`` its weight-transfer routes and ``/server_info``.
"""

from __future__ import annotations

import base64
import logging
import re
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Rollout
from mmpost.media import image as image_media
from mmpost.models.policy import Policy
from mmpost.rollout import vllm_wire as wire
from mmpost.rollout.engine import Prompt, Setup, first_of_each, request_seed
from mmpost.rollout.generate import Sampling
from mmpost.rollout.vllm_http import START, Client, NotServed
from mmpost.rollout.vllm_weights import WeightChannel
from mmpost.rollout.weights import is_sharded, named_weights

_log = logging.getLogger(__name__)

# FINAL_ONLY of vLLM's RequestOutputKind: without it a request with n > 1 answers with the last completion only.
FINAL_ONLY = 2
# First and last version with these routes and this way to pack weights.
VERSIONS = ((0, 22), (0, 27))


class VllmServer:
    """A server that one run has for itself."""

    name = "vllm"
    exact = False

    def __init__(self, setup: Setup) -> None:
        """Wait for the server and see that it was started as needed.

        Raises:
            MmpostError: MMP-E060 when no server answers, MMP-E062 when it lacks something.
        """
        options = setup.section.vllm
        self.adapter, self.rank, self.barrier = setup.adapter, setup.rank, setup.barrier
        self.group_port, self.concurrency = options.group_port, options.concurrency
        self.client = Client(f"http://{options.host}:{options.port}", timeout=options.timeout)
        self.client.wait(options.start_timeout)
        self.version: int | None = None
        self.unknown = 0
        self._tells_version = True
        self._channel: WeightChannel | None = None
        served = self._ask("/v1/models")["data"][0]
        self.served, self.limit = str(served["id"]), served.get("max_model_len")
        self.dtype = self._check_started()

    # -- completions ---------------------------------------------------------------------------------------------

    def complete(
        self, prompts: Sequence[Prompt], *, n: int, sampling: Sampling, first_generation: Sequence[int] | int = 0
    ) -> list[list[Rollout]]:
        """See ``Engine``.

        Raises:
            MmpostError: MMP-E061, MMP-E063, MMP-E064 for what the server does, MMP-R130 for missing log-probabilities,
                MMP-R131 when it makes other placeholders of the images.
        """
        if not prompts:
            return []
        self._check_lengths(prompts, sampling)
        self._check_version()
        first = first_of_each(first_generation, len(prompts))
        with ThreadPoolExecutor(min(self.concurrency, len(prompts))) as pool:
            waiting = [pool.submit(self._one, *work, n, sampling) for work in zip(prompts, first, strict=True)]
            try:
                groups = [answer.result() for answer in waiting]
            finally:
                pool.shutdown(cancel_futures=True)
        self.unknown += wire.count_unknown(self._where, groups)
        return groups

    def _one(self, prompt: Prompt, first: int, n: int, sampling: Sampling) -> list[Rollout]:
        # Drawing nothing, vLLM refuses several completions of one prompt.
        copies = 1 if sampling.temperature == 0 else n
        params = wire.sampling_params(self.adapter, sampling, copies, request_seed(sampling.seed, prompt.uid, first))
        body = {
            "request_id": f"mmpost-{prompt.uid}-{first}-{uuid.uuid4().hex}",
            "model": self.served,
            "token_ids": prompt.encoded.ids.tolist(),
            "features": self._features(prompt),
            # Keys and values of other weights can then not be taken for those of these.
            "cache_salt": f"mmpost-{self.version}",
            "sampling_params": {**params, "output_kind": FINAL_ONLY},
        }
        choices = self._ask("/inference/v1/generate", body).get("choices", [])
        choices = sorted(choices, key=lambda choice: int(choice["index"]))
        if [choice["index"] for choice in choices] != list(range(copies)):
            raise wire.unusable(self._where, f"{len(choices)} completions of a prompt instead of {copies}")
        return [self._rollout(choice) for choice in choices] * (n // copies)

    def _rollout(self, choice: dict[str, Any]) -> Rollout:
        content = (choice.get("logprobs") or {}).get("content") or []
        logps = [entry.get("logprob") for entry in content]
        return wire.to_rollout(self.adapter, self._where, choice.get("token_ids") or [], logps)

    def _features(self, prompt: Prompt) -> dict[str, Any] | None:
        """Processed images of a prompt, placed where the trainer's token ids have their placeholders.

        Only images can be sent for processing, not images with token ids; they go in a message of their own, whose
        token ids are thrown away.
        """
        images = wire.pictures(prompt.sample)
        if not images:
            return None
        urls = [f"data:image/png;base64,{base64.b64encode(image_media.encode(image)).decode()}" for image in images]
        body = {
            "model": self.served,
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}} for url in urls]}
            ],
            "max_tokens": 1,
            "mm_processor_kwargs": wire.processor_options(self.adapter),
        }
        features = self._ask("/v1/chat/completions/render", body)["features"]
        theirs = [int(place["length"]) for place in features["mm_placeholders"]["image"]]
        spans = wire.image_spans(self.adapter, prompt.encoded.ids)
        ours = [length for _, length in spans]
        if ours != theirs:
            raise wire.placeholder_mismatch(prompt.encoded, ours, theirs)
        places = [{"offset": start, "length": length} for start, length in spans]
        return {**features, "mm_placeholders": {"image": places}}

    # -- weights -------------------------------------------------------------------------------------------------

    def sync(self, policy: Policy, version: int) -> None:
        """See ``Engine``; the first process sends, all wait until the server has everything.

        Raises:
            MmpostError: MMP-E010 when vLLM is not installed beside the trainer, MMP-E063 when the server refuses.
        """
        if version == self.version:
            return
        if self.rank == 0:
            if self._channel is None:
                self._channel = WeightChannel(self.client, self.group_port)
            self._channel.push(policy, version, self.dtype)
        elif is_sharded(policy):
            for _ in named_weights(policy):
                pass
        self.version = version
        self.barrier()

    def close(self) -> None:
        """Leave the group of the weights; the server stays up."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    # -- checks --------------------------------------------------------------------------------------------------

    @property
    def _where(self) -> str:
        return f"the vLLM server at {self.client.url}"

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            return self.client.get(path) if body is None else self.client.post(path, body)
        except NotServed as error:
            raise self._lacks(f"does not serve {path.partition('?')[0]}") from error

    def _lacks(self, what: str) -> MmpostError:
        return MmpostError("MMP-E062", f"{self._where} {what}.", f"{START}.")

    def _check_started(self) -> torch.dtype | None:
        """Version and options of the server; returns its dtype where it tells."""
        found = str(self._ask("/version").get("version", ""))
        if not _supported(found):
            low, high = (f"{major}.{minor}" for major, minor in VERSIONS)
            raise self._lacks(f"runs vLLM {found}; {low} to {high} can be used")
        config = self._ask("/server_info?config_format=json").get("vllm_config", {})
        if config.get("weight_transfer_config") is None:
            raise self._lacks("was started without --weight-transfer-config")
        model = config.get("model_config") or {}
        mode = model.get("logprobs_mode", "processed_logprobs") if isinstance(model, dict) else "processed_logprobs"
        if mode != "processed_logprobs":
            raise self._lacks(f"was started with --logprobs-mode {mode}")
        name = str(model.get("dtype", "")).removeprefix("torch.") if isinstance(model, dict) else ""
        dtype = getattr(torch, name, None) if name else None
        return dtype if isinstance(dtype, torch.dtype) else None

    def _check_lengths(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        longest = max(prompts, key=lambda prompt: len(prompt.encoded)).encoded
        needed = len(longest) + sampling.max_new_tokens
        if self.limit is not None and needed > self.limit:
            raise MmpostError(
                "MMP-E063",
                f"{longest.origin}: prompt and completion take {needed} tokens, but {self._where} was started with "
                f"--max-model-len {self.limit}.",
                f"Start it with --max-model-len {needed} or more.",
            )

    def _check_version(self) -> None:
        """The server still holds what was pushed last; servers that do not tell are believed."""
        if self.version is None or not self._tells_version:
            return
        try:
            found = self.client.get("/weight_info").get("weight_version")
        except NotServed:
            self._tells_version = False
            _log.info("%s does not tell the version of its weights", self._where)
            return
        if found != str(self.version):
            raise MmpostError(
                "MMP-E064",
                f"{self._where} holds weights of version {found}, but version {self.version} was pushed.",
                "Give every run a server of its own.",
            )


def _supported(version: str) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and VERSIONS[0] <= (int(found[1]), int(found[2])) <= VERSIONS[1]
