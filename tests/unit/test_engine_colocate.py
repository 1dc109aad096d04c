"""vLLM in the training process, against a stand-in for the library."""

import dataclasses

import pytest

from mmpost.rollout.engine import Setup, open_engine, request_seed
from mmpost.rollout.generate import Sampling
from tests.unit.vllm_stand_in import GREEDY, StandInLLM, equal, error, native, section, shift

one_family = pytest.mark.parametrize("family", ["qwen2.5-vl"])


@pytest.fixture
def open_colocate(tiny_model, open_tiny, vllm_library, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that what the engine sets is taken back after the test
        monkeypatch.delenv(name)

    def make(**options):
        StandInLLM.served = open_tiny()
        vllm_library(llm=StandInLLM)
        setup = Setup(section(mode="colocate", **options), tiny_model.policy, tiny_model.adapter, "tiny", 64)
        return open_engine(setup)

    return make


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_colocated_completions_are_those_of_the_model(open_colocate, tiny_model, open_tiny, engine_prompts):
    engine = open_colocate()
    equal(engine.complete(engine_prompts, n=2, sampling=GREEDY), native(tiny_model, engine_prompts, n=2))
    trainer = open_tiny()
    trainer.policy.requires_grad_(True)
    shift(trainer)
    for version in (5, 5):
        engine.sync(trainer.policy, version)
    equal(engine.complete(engine_prompts, n=1, sampling=GREEDY), native(trainer, engine_prompts))
    assert engine.llm.log == [
        "sleep", "wake weights kv_cache", "generate", "sleep", "wake weights", "load", "reset", "wake kv_cache",
        "generate", "sleep",
    ]  # fmt: skip
    engine.close()
    assert engine.llm is None


@one_family
def test_colocated_draws_have_a_seed_per_completion(open_colocate, tiny_model, engine_prompts):
    engine = open_colocate(sleep=False, gpu_memory_utilization=0.4)
    assert engine.llm.share == 0.4
    sampling = Sampling(5, temperature=0.9, seed=3)
    groups = engine.complete(engine_prompts[:2], n=3, sampling=sampling, first_generation=6)
    assert "sleep" not in engine.llm.log
    for prompt, group in zip(engine_prompts, groups, strict=False):
        alone = dataclasses.replace(sampling, seed=request_seed(3, prompt.uid, 6))
        equal([group], native(tiny_model, [dataclasses.replace(prompt, uid=0)], alone, n=3))


@one_family
def test_colocated_placeholders_are_compared(open_colocate, engine_prompts):
    engine = open_colocate()
    engine.llm.extra = 1
    runs = [int(grid.prod()) // 4 for grid in engine_prompts[2].encoded.media["image_grid_thw"]]
    code, text = error(engine.complete, [engine_prompts[2]], n=1, sampling=GREEDY)
    assert code == "MMP-R131"
    assert f"vLLM makes {sum(runs) + 2} placeholder tokens ({runs[0] + 1} + {runs[1] + 1}) of" in text
    assert f"the trainer {sum(runs)} placeholder tokens ({runs[0]} + {runs[1]})." in text
