"""Weights on their way to an engine: which, under what names, when, and how often."""

import functools
import sys

import pytest
import torch

from mmpost.config.schema import LoraSettings
from mmpost.rollout.engine import Setup, open_engine
from mmpost.rollout.weights import announce, named_weights
from tests.unit.vllm_stand_in import GREEDY, equal, error, native, section, shift

one_family = pytest.mark.parametrize("family", ["qwen2.5-vl"])


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize("peft", [None, LoraSettings(r=2)])
def test_pushed_weights_are_used(open_vllm, open_tiny, vllm_server, vllm_library, engine_prompts, peft):
    vllm_library(vllm_server)
    trainer = open_tiny(peft=peft)
    engine = open_vllm(trainer)
    before = engine.complete(engine_prompts, n=1, sampling=GREEDY)
    if peft is None:
        trainer.policy.requires_grad_(True)
    shift(trainer)
    engine.sync(trainer.policy, 1)
    after = engine.complete(engine_prompts, n=1, sampling=GREEDY)
    assert engine.version == 1
    assert any(one[0].logp[0] != two[0].logp[0] for one, two in zip(before, after, strict=True))
    equal(after, native(trainer, engine_prompts))
    tags = [body["cache_salt"] for body in vllm_server.calls("/inference/v1/generate")]
    assert tags == ["mmpost-None"] * len(engine_prompts) + ["mmpost-1"] * len(engine_prompts)


@one_family
def test_weights_travel_once_per_version_and_in_four_steps(open_vllm, tiny_model, vllm_server, vllm_library):
    vllm_library(vllm_server)
    engine = open_vllm()
    del vllm_server.seen[:]
    for version in (3, 3, 4):
        engine.sync(tiny_model.policy, version)
    update = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
    assert [path for path, _ in vllm_server.seen] == [
        "/get_world_size",
        "/init_weight_transfer_engine",
        *update,
        *update,
    ]
    assert [body["weight_version"] for body in vllm_server.calls("/finish_weight_update")] == ["3", "4"]
    engine.close()
    # A failed push is not sent again: the server would wait for weights that do not come.
    vllm_server.faults["/start_weight_update"] = [500]
    assert error(engine.sync, tiny_model.policy, 5)[0] == "MMP-E063"
    assert len(vllm_server.calls("/start_weight_update")) == 3
    assert engine.version == 4


@one_family
def test_only_the_first_process_sends_and_all_wait(tiny_model, vllm_server, vllm_library):
    vllm_library(vllm_server)
    waits = []
    for rank in (1, 0):
        wait = functools.partial(waits.append, rank)
        engine = open_engine(
            Setup(section(vllm_server), tiny_model.policy, tiny_model.adapter, "tiny", 8, rank=rank, barrier=wait)
        )
        engine.sync(tiny_model.policy, 1)
        assert engine.version == 1
        assert len(vllm_server.calls("/update_weights")) == 1 - rank
        assert waits[-1] == rank


@one_family
def test_weights_of_another_run_are_noticed(open_vllm, tiny_model, vllm_server, vllm_library, engine_prompts):
    vllm_library(vllm_server)
    engine = open_vllm()
    engine.sync(tiny_model.policy, 2)
    vllm_server.weight_version = "7"
    assert error(engine.complete, engine_prompts[:1], n=1, sampling=GREEDY) == (
        "MMP-E064",
        f"the vLLM server at http://127.0.0.1:{vllm_server.port} holds weights of version 7, but version 2 was pushed. "
        "Give every run a server of its own. [MMP-E064]",
    )
    vllm_server.missing.add("/weight_info")
    engine.complete(engine_prompts[:1], n=1, sampling=GREEDY)
    engine.complete(engine_prompts[:1], n=1, sampling=GREEDY)
    assert len(vllm_server.calls("/weight_info")) == 2


@one_family
def test_without_the_library_nothing_can_be_pushed(open_vllm, tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    engine = open_vllm()
    text = (
        "'rollout.engine=vllm' needs vllm, which is not installed. Run: pip install \"mmpost-toolkit[vllm]\" [MMP-E010]"
    )
    assert error(engine.sync, tiny_model.policy, 1) == ("MMP-E010", text)
    setup = Setup(section(mode="colocate"), tiny_model.policy, tiny_model.adapter, "tiny", 8)
    assert error(open_engine, setup) == ("MMP-E010", text)


def test_lora_is_added_without_touching_the_trained_weights(open_tiny, family):
    model = open_tiny(peft=LoraSettings(r=2, lora_alpha=8))
    shift(model)
    kept = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    sent = dict(named_weights(model.policy))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.policy.state_dict().items())
    merged = model.policy.model.merge_and_unload()
    expected = dict(merged.named_parameters())
    assert sent.keys() == expected.keys()
    assert max(float((sent[name] - expected[name]).abs().max()) for name in sent) < 1e-6
    assert not any(tensor.requires_grad for tensor in sent.values())


@one_family
def test_weights_come_as_announced(open_tiny):
    for peft in (None, LoraSettings(r=2, modules_to_save=["merger"])):
        model = open_tiny(peft=peft)
        for dtype in (None, torch.bfloat16):
            sent = [(name, tensor.dtype, list(tensor.shape)) for name, tensor in named_weights(model.policy, dtype)]
            assert sent == announce(model.policy, dtype)
            assert [name for name, _, _ in sent] == [name for name, _ in open_tiny().policy.inner.named_parameters()]
