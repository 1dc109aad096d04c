"""Stand-ins for vLLM, which needs a GPU and is not installed where the unit tests run.

``StandIn`` is a stand-in for ``vllm serve``, not vLLM: it speaks the routes, field names and status codes of vLLM 0.26
that the engine uses, and answers with completions and log-probabilities of a real tiny model. ``StandInLLM`` and
``install_library`` are stand-ins for the library: classes and signatures of vLLM 0.26 that the engines import.
"""

import base64
import dataclasses
import hashlib
import io
import json
import queue
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from mmpost.config.schema import RolloutSection, VllmSettings
from mmpost.core.batch import Encoded
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Part, Sample, Turn
from mmpost.media import image
from mmpost.rollout.generate import Sampling, complete

GREEDY = Sampling(6, temperature=0.0)
# Fields of SamplingParams of vLLM 0.26 that the engine may set.
FIELDS = {
    "n", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "logprobs",
    "skip_special_tokens", "bad_words", "output_kind",
}  # fmt: skip


class StandIn(ThreadingHTTPServer):
    """Stand-in for a vLLM 0.26 server.

    ``faults`` are answers (status, or seconds to sleep) given instead of the next real ones of a path; ``change``
    rewrites an answer.
    """

    daemon_threads = True

    def __init__(self, model, workers=1):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.adapter = model, model.adapter
        self.workers, self.wire = workers, queue.Queue()
        self.seen, self.faults, self.change, self.missing = [], {}, {}, set()
        self.weight_version = "default"
        self.version, self.logprobs_mode, self.transfer = "0.26.0", "processed_logprobs", {"backend": "nccl"}
        self.lock = threading.Lock()
        self.order_reversed = False

    @property
    def port(self):
        return self.server_address[1]

    def calls(self, path):
        return [body for seen, body in self.seen if seen == path]

    def answer(self, path, body):
        name = path.strip("/").split("?")[0].replace("/", "_")
        reply = getattr(self, f"on_{name}")(body)
        return self.change.get(path, lambda same: same)(reply)

    def on_health(self, _):
        return {}

    def on_version(self, _):
        return {"version": self.version}

    def on_v1_models(self, _):
        return {"object": "list", "data": [{"id": "tiny", "max_model_len": 200}]}

    def on_server_info(self, _):
        model = {"logprobs_mode": self.logprobs_mode, "dtype": "torch.float32"}
        return {"vllm_config": {"model_config": model, "weight_transfer_config": self.transfer}}

    def on_weight_info(self, _):
        return {"weight_version": self.weight_version}

    def on_get_world_size(self, _):
        return {"world_size": self.workers}

    def on_v1_chat_completions_render(self, body):
        adapter = self.adapter
        size = body["mm_processor_kwargs"]["size"]
        assert size == dict(adapter.processor.image_processor.size)
        urls = [part["image_url"]["url"] for part in body["messages"][0]["content"]]
        raw = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]
        sample = Sample("x", (Turn("user", tuple(Part("image", ref=data) for data in raw)),))
        encoded = adapter.encode_prompt(sample)
        buffer = io.BytesIO()
        torch.save(encoded.media, buffer)
        lengths = adapter.lengths("image", encoded.media)
        # The whole batch of tensors rides on the first item; the engine does not look into it.
        data = [base64.b64encode(buffer.getvalue()).decode(), *[None] * (len(lengths) - 1)]
        return {
            "features": {
                "mm_hashes": {"image": [hashlib.sha256(one).hexdigest() for one in raw]},
                "mm_placeholders": {"image": [{"offset": 7, "length": length} for length in lengths]},
                "kwargs_data": {"image": data},
            }
        }

    def on_inference_v1_generate(self, body):
        params = body["sampling_params"]
        assert set(params) <= FIELDS
        assert params["output_kind"] == 2
        assert params["top_k"] == 0
        assert params["repetition_penalty"] == 1.0
        assert params["n"] == 1 or params["temperature"] > 0
        ids = torch.tensor(body["token_ids"])
        media = {}
        if body["features"]:
            places = body["features"]["mm_placeholders"]["image"]
            assert all(
                (ids[p["offset"] : p["offset"] + p["length"]] == self.adapter.image_token_id).all() for p in places
            )
            data = body["features"]["kwargs_data"]["image"][0]
            media = torch.load(io.BytesIO(base64.b64decode(data)))
        encoded = Encoded(ids, torch.zeros(len(ids), dtype=torch.bool), self.adapter.positions(ids, media), media)
        sampling = Sampling(params["max_tokens"], params["temperature"], params["top_p"], params["seed"])
        with self.lock:
            group = complete(self.model.policy, self.adapter, [encoded], [0], n=params["n"], sampling=sampling,
                             batch_size=64)[0]  # fmt: skip
        choices = [
            {
                "index": i,
                "finish_reason": "length" if rollout.truncated else "stop",
                "token_ids": rollout.tokens.tolist(),
                "logprobs": {
                    "content": [
                        {"token": f"token_id:{token}", "logprob": float(logp), "top_logprobs": []}
                        for token, logp in zip(rollout.tokens, rollout.logp, strict=True)
                    ]
                },
            }
            for i, rollout in enumerate(group)
        ]
        return {"request_id": body["request_id"], "choices": choices[:: -1 if self.order_reversed else 1]}

    def on_init_weight_transfer_engine(self, body):
        info = body["init_info"]
        assert set(info) == {"master_address", "master_port", "rank_offset", "world_size"}
        assert info["world_size"] == self.workers + 1
        return {"message": "Weight transfer initialized"}

    def on_start_weight_update(self, _):
        return {"message": "Weight update started"}

    def on_update_weights(self, body):
        info = body["update_info"]
        assert info["packed"] is True
        state = self.model.policy.inner.state_dict()
        with self.lock, torch.no_grad():
            for name, kind, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
                tensor = self.wire.get(timeout=10)
                assert (str(tensor.dtype), list(tensor.shape)) == (f"torch.{kind}", shape)
                state[name].copy_(tensor)
        assert self.wire.empty()
        return {"message": "Weights updated"}

    def on_finish_weight_update(self, body):
        self.weight_version = body["weight_version"]
        return {"message": "Weight update finished"}

    def on_reset_prefix_cache(self, _):
        return {"success": True}


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body):
        server, path = self.server, self.path.split("?")[0]
        server.seen.append((path, body))
        fault = server.faults.get(path, [])
        status, reply = 200, None
        if path in server.missing:
            status, reply = 404, {"detail": "Not Found"}
        elif fault:
            given = fault.pop(0)
            if given == "drop":
                self.connection.close()
                return
            if isinstance(given, float):
                time.sleep(given)
            else:
                status, reply = given, {"error": {"message": "the engine\nis not well"}}
        if reply is None:
            reply = server.answer(self.path.split("?")[0], body)
        data = json.dumps(reply).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass


def install_library(monkeypatch, server=None, llm=None):
    """Put a stand-in for the library in place, whose NCCL is a queue to a stand-in server."""
    nccl = types.ModuleType("vllm.distributed.weight_transfer.nccl_engine")

    @dataclasses.dataclass
    class NCCLTrainerSendWeightsArgs:
        group: object
        src: int = 0
        post_iter_func: object = None
        packed: bool = False
        stream: object = None
        packed_buffer_size_bytes: int = 1 << 30
        packed_num_buffers: int = 2

    class NCCLWeightTransferEngine:
        @staticmethod
        def trainer_init(init_info):
            assert set(init_info) == {"master_address", "master_port", "world_size"}
            return types.SimpleNamespace(group=types.SimpleNamespace(store=1, socket=1))

        @staticmethod
        def trainer_send_weights(iterator, trainer_args):
            assert trainer_args.packed
            assert trainer_args.packed_buffer_size_bytes == 256 * 2**20
            for _, tensor in iterator:
                server.wire.put(tensor.clone())

    nccl.NCCLTrainerSendWeightsArgs = NCCLTrainerSendWeightsArgs
    nccl.NCCLWeightTransferEngine = NCCLWeightTransferEngine
    top = types.ModuleType("vllm")
    top.LLM, top.SamplingParams = llm, types.SimpleNamespace
    names = ["vllm", "vllm.distributed", "vllm.distributed.weight_transfer", nccl.__name__]
    for name in names:
        made = {"vllm": top, nccl.__name__: nccl}.get(name) or types.ModuleType(name)
        made.__path__ = []
        monkeypatch.setitem(sys.modules, name, made)


class StandInLLM:
    """Stand-in for ``vllm.LLM`` of vLLM 0.26, with the arguments that the engine uses; a tiny model answers."""

    served = None
    made = None

    def __init__(self, *, model, tensor_parallel_size, distributed_executor_backend, gpu_memory_utilization,
                 max_model_len, enable_sleep_mode, enable_prefix_caching, logprobs_mode, mm_processor_kwargs,
                 seed):  # fmt: skip
        assert (model, tensor_parallel_size, distributed_executor_backend) == ("tiny", 1, "external_launcher")
        assert logprobs_mode == "processed_logprobs"
        assert mm_processor_kwargs["size"]
        self.log, self.asleep, self.sleep_mode = [], set(), enable_sleep_mode
        self.share, self.extra = gpu_memory_utilization, 0
        StandInLLM.made = self

    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert not self.asleep
        self.log.append("generate")
        return [self._one(*pair) for pair in zip(prompts, sampling_params, strict=True)]

    def _one(self, prompt, params):
        adapter, token = self.served.adapter, self.served.adapter.image_token_id
        media, ids = {}, []
        pictures = prompt.get("multi_modal_data", {}).get("image", [])
        lengths = iter([])
        if pictures:
            parts = tuple(Part("image", ref=image.encode(picture)) for picture in pictures)
            media = adapter.encode_prompt(Sample("x", (Turn("user", parts),))).media
            lengths = iter(adapter.lengths("image", media))
        for one in prompt["prompt_token_ids"]:
            ids += [token] * (next(lengths) + self.extra) if one == token else [one]
        whole = torch.tensor(ids)
        out = types.SimpleNamespace(prompt_token_ids=ids, outputs=[])
        if self.extra:
            return out
        encoded = Encoded(whole, torch.zeros(len(ids), dtype=torch.bool), adapter.positions(whole, media), media)
        sampling = Sampling(params.max_tokens, params.temperature, params.top_p, params.seed)
        group = complete(self.served.policy, adapter, [encoded], [0], n=params.n, sampling=sampling, batch_size=64)[0]
        for i, rollout in enumerate(group):
            logprobs = [
                {int(t): types.SimpleNamespace(logprob=float(logp), rank=1)}
                for t, logp in zip(rollout.tokens, rollout.logp, strict=True)
            ]
            choice = types.SimpleNamespace(index=i, token_ids=tuple(rollout.tokens.tolist()), logprobs=logprobs)
            out.outputs.insert(0, choice)
        return out

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        assert "weights" not in self.asleep
        self.log.append("load")
        state = self.served.policy.inner.state_dict()

        def load_weights(weights):
            for name, tensor in weights:
                state[name].copy_(tensor)

        worker = types.SimpleNamespace(
            model_runner=types.SimpleNamespace(model=types.SimpleNamespace(load_weights=load_weights))
        )
        return [method(worker, *args)]

    def reset_prefix_cache(self):
        self.log.append("reset")

    def sleep(self, level):
        assert self.sleep_mode
        assert level == 1
        self.log.append("sleep")
        self.asleep = {"weights", "kv_cache"}

    def wake_up(self, tags):
        assert set(tags) <= self.asleep
        self.log.append("wake " + " ".join(tags))
        self.asleep -= set(tags)


def section(server=None, mode="server", **options):
    where = {} if server is None else {"host": "127.0.0.1", "port": server.port}
    return RolloutSection(engine="vllm", vllm=VllmSettings(vllm_mode=mode, **{**where, "start_timeout": 1, **options}))


def native(model, prompts, sampling=GREEDY, n=1):
    encoded, uids = [prompt.encoded for prompt in prompts], [prompt.uid for prompt in prompts]
    return complete(model.policy, model.adapter, encoded, uids, n=n, sampling=sampling, batch_size=64)


def equal(ours, theirs):
    for one, two in zip(ours, theirs, strict=True):
        for a, b in zip(one, two, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
            assert np.abs(a.logp - b.logp).max() < 1e-5
            assert (a.text, a.truncated) == (b.text, b.truncated)


def error(call, *args, **options):
    with pytest.raises(MmpostError) as caught:
        call(*args, **options)
    return caught.value.code, str(caught.value)


def shift(model):
    with torch.no_grad():
        for name, parameter in model.policy.named_parameters():
            if parameter.requires_grad or "lora" in name:
                parameter.add_(torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter))
