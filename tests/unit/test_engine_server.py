"""Completions by a vLLM server, against a stand-in that answers with a real tiny model."""

import dataclasses

import numpy as np
import pytest

from mmpost.core.sample import Part, Sample, Turn
from mmpost.rollout.engine import Prompt, Setup, open_engine, request_seed
from mmpost.rollout.generate import Sampling
from mmpost.rollout.vllm_http import Client
from tests.unit.vllm_stand_in import GREEDY, equal, error, native, section

one_family = pytest.mark.parametrize("family", ["qwen2.5-vl"])


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_completions_of_the_server_are_those_of_the_model(open_vllm, vllm_server, tiny_model, engine_prompts):
    engine = open_vllm()
    assert (engine.name, engine.exact, engine.version) == ("vllm", False, None)
    equal(engine.complete(engine_prompts, n=2, sampling=GREEDY), native(tiny_model, engine_prompts, n=2))
    assert len(vllm_server.calls("/inference/v1/generate")) == len(engine_prompts)
    assert len(vllm_server.calls("/v1/chat/completions/render")) == sum(
        bool(prompt.encoded.media) for prompt in engine_prompts
    )


@one_family
def test_a_group_is_one_request_and_comes_back_in_order(open_vllm, vllm_server, tiny_model, engine_prompts):
    sampling = Sampling(5, temperature=0.8, top_p=0.9, seed=7)
    vllm_server.order_reversed = True
    # Answers come back in another order than the requests went out.
    vllm_server.faults["/inference/v1/generate"] = [0.3]
    groups = open_vllm().complete(engine_prompts, n=4, sampling=sampling, first_generation=[0, 4, 0, 0, 8])
    bodies = {int(body["request_id"].split("-")[1]): body for body in vllm_server.calls("/inference/v1/generate")}
    assert len(bodies) == len(vllm_server.calls("/inference/v1/generate")) == len(engine_prompts)
    for prompt, first, group in zip(engine_prompts, [0, 4, 0, 0, 8], groups, strict=True):
        params = bodies[prompt.uid]["sampling_params"]
        assert bodies[prompt.uid]["token_ids"] == prompt.encoded.ids.tolist()
        assert (params["n"], params["temperature"], params["top_p"], params["max_tokens"]) == (4, 0.8, 0.9, 5)
        assert params["seed"] == request_seed(7, prompt.uid, first)
        assert params["stop_token_ids"] == list(tiny_model.adapter.stop_token_ids)
        assert params["bad_words"] == ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
        assert params["skip_special_tokens"] is False
        alone = dataclasses.replace(sampling, seed=params["seed"])
        equal([group], native(tiny_model, [dataclasses.replace(prompt, uid=0)], alone, n=4))


@one_family
def test_passing_faults_are_tried_again(open_vllm, vllm_server, tiny_model, engine_prompts):
    engine = open_vllm()
    vllm_server.faults["/inference/v1/generate"] = [503, "drop", 502]
    equal(engine.complete(engine_prompts[:1], n=1, sampling=GREEDY), native(tiny_model, engine_prompts[:1]))
    assert len(vllm_server.calls("/inference/v1/generate")) == 4


@one_family
def test_lasting_faults_say_what_to_do(open_vllm, vllm_server, engine_prompts):
    engine, ask = open_vllm(), {"n": 1, "sampling": GREEDY}
    where = f"http://127.0.0.1:{vllm_server.port}"
    vllm_server.faults["/inference/v1/generate"] = [503] * 4
    assert error(engine.complete, engine_prompts[:1], **ask) == (
        "MMP-E063",
        f"{where}/inference/v1/generate answered 503: the engine is not well "
        "Start it as docs/rollouts.md says. [MMP-E063]",
    )
    vllm_server.faults["/inference/v1/generate"] = [400]
    assert error(engine.complete, engine_prompts[:1], **ask)[0] == "MMP-E063"
    assert len(vllm_server.calls("/inference/v1/generate")) == 5
    vllm_server.faults["/inference/v1/generate"] = ["drop"] * 4
    code, text = error(engine.complete, engine_prompts[:1], **ask)
    assert code == "MMP-E060"
    assert text.startswith(f"no vLLM server answers at {where} in 4 tries: ")
    engine.client.timeout = 0.2
    vllm_server.faults["/inference/v1/generate"] = [0.6]
    assert error(engine.complete, engine_prompts[:1], **ask) == (
        "MMP-E061",
        f"{where}/inference/v1/generate gave no answer within 0.2 s. "
        "Raise rollout.vllm.timeout, or lower rollout.vllm.concurrency. [MMP-E061]",
    )


@one_family
def test_wrong_answers_are_refused(open_vllm, vllm_server, tiny_model, engine_prompts):
    engine, path = open_vllm(), "/inference/v1/generate"
    said = f"the vLLM server at http://127.0.0.1:{vllm_server.port} answered with "
    hint = " Use a version of vLLM that docs/rollouts.md names. [MMP-E063]"

    def change(function):
        vllm_server.change[path] = lambda reply: (function(reply["choices"]), reply)[1]
        sampling = Sampling(4, seed=2)
        return error(engine.complete, engine_prompts[:1], n=3, sampling=sampling)[1]

    assert change(lambda choices: choices.pop()) == f"{said}2 completions of a prompt instead of 3.{hint}"
    assert change(lambda choices: choices[1].update(token_ids=[9, 9])).startswith(f"{said}a completion of 2 tokens")
    media = tiny_model.adapter.media_token_ids[0]
    wrong = change(lambda choices: choices[2]["token_ids"].__setitem__(0, media))
    assert wrong == f"{said}the media placeholder {media}, which was ruled out.{hint}"


@one_family
def test_unknown_log_probabilities_are_counted_and_many_stop_the_run(open_vllm, vllm_server, engine_prompts):
    engine, sampling, path = open_vllm(), Sampling(8, seed=1), "/inference/v1/generate"

    def spoil(values):
        def function(reply):
            entries = [entry for choice in reply["choices"] for entry in choice["logprobs"]["content"]]
            for entry, value in zip(entries, values, strict=False):
                entry["logprob"] = value
            return reply

        vllm_server.change[path] = function

    spoil([float("nan")])
    group = engine.complete(engine_prompts[:1], n=40, sampling=sampling)[0]
    total = sum(len(rollout.tokens) for rollout in group)
    assert total > 200
    assert engine.unknown == 1 == sum(int(np.isnan(rollout.logp).sum()) for rollout in group)
    bad = [None, float("nan"), -9999.0, float("-inf"), float("nan"), None]
    spoil(bad)
    assert total < 100 * len(bad)
    assert error(engine.complete, engine_prompts[:1], n=40, sampling=sampling) == (
        "MMP-R130",
        f"the vLLM server at http://127.0.0.1:{vllm_server.port} gave no log-probability for 6 of {total} tokens. "
        "Start vLLM with --logprobs-mode processed_logprobs; without log-probabilities the policy cannot be "
        "corrected for the engine. [MMP-R130]",
    )


@pytest.mark.parametrize("family", ["qwen2.5-vl", "smolvlm"])
def test_other_placeholders_are_refused_with_both_numbers(open_vllm, vllm_server, engine_prompts, family):
    engine = open_vllm()
    if family == "smolvlm":
        # The server speaks of one stretch per picture, but the placeholders of tiles stand apart.
        def merge(reply):
            places = reply["features"]["mm_placeholders"]
            places["image"] = [{"offset": 0, "length": 99}]
            return reply

        vllm_server.change["/v1/chat/completions/render"] = merge
        theirs, ours = "99 placeholder tokens", "placeholder tokens ("
    else:

        def shrink(reply):
            reply["features"]["mm_placeholders"]["image"][0]["length"] -= 1
            return reply

        vllm_server.change["/v1/chat/completions/render"] = shrink
        runs = [int(grid.prod()) // 4 for grid in engine_prompts[2].encoded.media["image_grid_thw"]]
        theirs = f"{sum(runs) - 1} placeholder tokens ({runs[0] - 1} + {runs[1]})"
        ours = f"{sum(runs)} placeholder tokens ({runs[0]} + {runs[1]})"
    code, text = error(engine.complete, [engine_prompts[2]], n=1, sampling=GREEDY)
    assert code == "MMP-R131"
    assert text.startswith(f"rows.jsonl:3: vLLM makes {theirs} of the images of this prompt, the trainer ")
    assert ours in text
    assert vllm_server.calls("/inference/v1/generate") == []


@one_family
def test_only_text_and_images_are_sent(open_vllm, tiny_model):
    sample = Sample("v", (Turn("user", (Part("video", ref="a.mp4"), Part("text", "Why?"))),), {}, "rows.jsonl:4")
    encoded = tiny_model.adapter.encode_prompt(Sample("t", (Turn("user", (Part("text", "Why?"),)),)))
    assert error(open_vllm().complete, [Prompt(encoded, 0, sample)], n=1, sampling=GREEDY) == (
        "MMP-C040",
        "rows.jsonl:4: the vllm engine takes text and images, not video. Set rollout.engine=native. [MMP-C040]",
    )


# -- starting --------------------------------------------------------------------------------------------------------


@one_family
def test_a_server_that_was_started_wrongly_is_refused(open_vllm, vllm_server, engine_prompts):
    where = f"the vLLM server at http://127.0.0.1:{vllm_server.port}"
    hint = "Start it as docs/rollouts.md says. [MMP-E062]"
    vllm_server.version = "0.31.2rc1"
    assert error(open_vllm)[1] == f"{where} runs vLLM 0.31.2rc1; 0.22 to 0.27 can be used. {hint}"
    vllm_server.version, vllm_server.transfer = "0.26.1", None
    assert error(open_vllm)[1] == f"{where} was started without --weight-transfer-config. {hint}"
    vllm_server.transfer, vllm_server.logprobs_mode = {}, "raw_logprobs"
    assert error(open_vllm)[1] == f"{where} was started with --logprobs-mode raw_logprobs. {hint}"
    vllm_server.missing.add("/server_info")
    assert error(open_vllm)[1] == f"{where} does not serve /server_info. {hint}"
    vllm_server.missing.clear()
    vllm_server.logprobs_mode = "processed_logprobs"
    needed = max(len(prompt.encoded) for prompt in engine_prompts) + 190
    code, text = error(open_vllm().complete, engine_prompts, n=1, sampling=Sampling(190))
    assert code == "MMP-E063"
    assert f"take {needed} tokens, but {where} was started with --max-model-len 200." in text


@one_family
def test_no_server_is_said_after_the_wait(tiny_model, vllm_server):
    port = vllm_server.port
    vllm_server.shutdown()
    vllm_server.server_close()
    setup = Setup(section(vllm_server, start_timeout=0.2), tiny_model.policy, tiny_model.adapter, "tiny", 8)
    code, text = error(open_engine, setup)
    assert code == "MMP-E060"
    assert text.startswith(f"no vLLM server answers at http://127.0.0.1:{port} after 0.2 s: ")
    assert text.endswith(
        "Start it as docs/rollouts.md says, or set rollout.vllm.host and rollout.vllm.port. [MMP-E060]"
    )


@one_family
def test_the_engine_waits_for_a_server_that_starts_slowly(vllm_server):
    vllm_server.faults["/health"] = [503, 503, 503]
    client = Client(f"http://127.0.0.1:{vllm_server.port}", timeout=5, pause_s=0.01)
    client.wait(5)
    assert len(vllm_server.calls("/health")) == 4
