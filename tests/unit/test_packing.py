"""Packed batches that share prompts against the same rows padded and alone: same numbers, less work."""

import numpy as np
import pytest
import torch

from mmpost.adapters.layout import pack, pad
from mmpost.config.schema import FullSettings, LoraSettings
from mmpost.core.batch import Segment
from mmpost.models import attention
from mmpost.rollout.generate import Sampling, complete
from mmpost.train.learner import by_length, micro_batches
from mmpost.train.rows import Row, RowStream

one_family = pytest.mark.parametrize("family", ["qwen2.5-vl"])


def _trajectories(adapter, mixed_rows):
    """Groups of unequal completions over every kind of prompt, among whole conversations."""
    draw = np.random.default_rng(5)
    out = [(adapter.encode(mixed_rows[2]), None)]
    for sample in mixed_rows:
        prompt = adapter.encode_prompt(sample.prompt())
        for length in (1, 7, 2, 12)[: 1 + len(out) % 4]:
            out.append((prompt, torch.from_numpy(draw.integers(20, 200, length))))
    return [*out, (adapter.encode(mixed_rows[3]), None), (adapter.encode(mixed_rows[0]), None)]


def _run(model, batch):
    """Log-probabilities, and gradients of an uneven sum of them."""
    model.policy.zero_grad(set_to_none=True)
    logp, _ = model.policy(batch)
    weight = torch.linspace(-1, 2, len(logp), dtype=logp.dtype)
    (logp * weight).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.policy.named_parameters() if p.grad is not None}
    return logp.detach(), grads


def _compare(model, rows, tolerance):
    padded, packed = _run(model, pad(model.adapter, rows)), _run(model, pack(model.adapter, rows))
    assert (padded[0] - packed[0]).abs().max() <= tolerance * padded[0].abs().max()
    assert padded[1].keys() == packed[1].keys()
    norm = torch.sqrt(sum((g**2).sum() for g in padded[1].values()))
    difference = torch.sqrt(sum(((g - packed[1][name]) ** 2).sum() for name, g in padded[1].items()))
    assert difference <= tolerance * norm
    for name, gradient in padded[1].items():
        assert (gradient - packed[1][name]).abs().max() <= tolerance * norm, name


@pytest.mark.parametrize("as_block", [True, False, None])
def test_log_probs_and_gradients_are_those_of_padded_rows(open_tiny, mixed_rows, family, as_block, monkeypatch):
    if as_block is not None:
        monkeypatch.setattr(attention, "block_costs_less", lambda prompt, branches: as_block)
    model = open_tiny(peft=FullSettings())
    _compare(model, _trajectories(model.adapter, mixed_rows), 1e-5)


@one_family
@pytest.mark.parametrize("as_block", [True, False])
def test_double_precision_brings_them_closer(open_tiny, mixed_rows, family, as_block, monkeypatch):
    monkeypatch.setattr(attention, "block_costs_less", lambda prompt, branches: as_block)
    model = open_tiny(peft=FullSettings(), double=True)
    # transformers computes norms and rotary angles in float32 whatever the weights are.
    _compare(model, _trajectories(model.adapter, mixed_rows), 1e-6)


def test_recomputed_layers_get_the_same_plan(open_tiny, mixed_rows, family):
    model = open_tiny(peft=FullSettings())
    rows = _trajectories(model.adapter, mixed_rows)
    plain = _run(model, pack(model.adapter, rows))
    from mmpost.models.load import _checkpoint_language_model

    _checkpoint_language_model(model.policy.model)
    model.policy.train()
    again = _run(model, pack(model.adapter, rows))
    assert torch.equal(plain[0], again[0])
    assert all((plain[1][name] - again[1][name]).abs().max() < 1e-5 for name in plain[1])


@one_family
def test_low_rank_adapters_and_frozen_towers_share_prompts_too(open_tiny, mixed_rows, family):
    model = open_tiny(peft=LoraSettings(r=4))
    for name, parameter in model.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    _compare(model, _trajectories(model.adapter, mixed_rows), 1e-5)


@one_family
def test_order_of_rows_changes_nothing(tiny_model, mixed_rows):
    rows = _trajectories(tiny_model.adapter, mixed_rows)
    order = np.random.default_rng(0).permutation(len(rows))
    with torch.no_grad():
        straight, _ = tiny_model.policy(pack(tiny_model.adapter, rows))
        mixed, _ = tiny_model.policy(pack(tiny_model.adapter, [rows[i] for i in order]))
    sizes = [row.num_trained if tokens is None else len(tokens) for row, tokens in rows]
    pieces = dict(zip(order.tolist(), mixed.split([sizes[i] for i in order]), strict=True))
    assert (straight - torch.cat([pieces[i] for i in range(len(rows))])).abs().max() < 1e-5


def test_prompts_and_pictures_go_through_the_model_once(open_tiny, mixed_rows, family):
    model = open_tiny()
    inner = model.policy.inner.model
    tower = inner.vision_model if family == "smolvlm" else inner.visual
    decoder = inner.text_model if family == "smolvlm" else inner.language_model
    pixels, tokens = [], []

    def saw_pixels(module, args, kwargs):
        first = args[0] if args else kwargs.get("hidden_states", kwargs.get("pixel_values"))
        pixels.append(len(first))

    def saw_tokens(module, args, kwargs):
        tokens.append(kwargs["inputs_embeds"].shape[:2].numel())

    tower.register_forward_pre_hook(saw_pixels, with_kwargs=True)
    decoder.register_forward_pre_hook(saw_tokens, with_kwargs=True)
    prompts = [model.adapter.encode_prompt(mixed_rows[i].prompt()) for i in (1, 2)]
    rows = [(prompt, torch.arange(20, 20 + n)) for prompt in prompts for n in (3, 5, 4, 6)]
    with torch.no_grad():
        model.policy(pack(model.adapter, rows))
    if family == "smolvlm":
        units = sum(len(model.adapter.lengths("image", prompt.media)) for prompt in prompts)
    else:
        units = sum(len(prompt.media["pixel_values"]) for prompt in prompts)
    assert sum(pixels) == units
    # The last token of a completion predicts nothing and is not fed.
    assert tokens == [sum(len(prompt) for prompt in prompts) + 2 * (2 + 4 + 3 + 5)]


@one_family
def test_the_head_runs_on_trained_positions_only(tiny_model, mixed_rows):
    rows = _trajectories(tiny_model.adapter, mixed_rows)
    batch = pack(tiny_model.adapter, rows)
    seen = []
    hook = tiny_model.policy.head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad():
        tiny_model.policy(batch)
    hook.remove()
    assert sum(seen) == len(batch.target) == sum(r.num_trained if t is None else len(t) for r, t in rows)


def test_a_picture_behind_the_last_target_keeps_its_tokens(tiny_model, picture, turn):
    from mmpost.core.sample import Sample

    turns = (turn("user", "a"), turn("assistant", "b"), turn("user", picture(40, 40), "c"), turn("assistant", "d"))
    closed = (*turns[:3], turn("assistant", "d", train=False))
    rows = [(tiny_model.adapter.encode(Sample("x", closed, {}, "x:1")), None)]
    with torch.no_grad():
        padded, _ = tiny_model.policy(pad(tiny_model.adapter, rows))
        packed, _ = tiny_model.policy(pack(tiny_model.adapter, rows))
    assert len(padded) == len(packed) > 0
    assert (padded - packed).abs().max() < 1e-5


def test_models_with_sliding_windows_are_left_alone():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    from mmpost.models.policy import Policy

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, vocab_size=64, head_dim=16, num_key_value_heads=1))
    before = gemma.config._attn_implementation
    assert not attention.install(gemma)
    assert gemma.config._attn_implementation == before
    llama = Policy(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)))
    assert llama.packs


@one_family
def test_saved_models_open_without_our_attention(open_tiny, tmp_path, family):
    from transformers import AutoModelForImageTextToText

    model = open_tiny()
    assert model.policy.packs
    model.save(tmp_path / "out")
    assert "mmpost" not in (tmp_path / "out" / "config.json").read_text()
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert plain.config.get_text_config()._attn_implementation == "sdpa"


# -- the cost rule ---------------------------------------------------------------------------------------------------


def test_short_completions_go_as_a_block_and_long_ones_in_two_passes():
    assert attention.block_costs_less(60, [4] * 8)
    assert not attention.block_costs_less(281, [128] * 8)
    assert not attention.block_costs_less(1000, [256] * 16)


def test_a_plan_covers_every_token_once():
    segments = [Segment(0, 5), Segment(5, 3, 0), Segment(8, 1, 0), Segment(9, 7), Segment(16, 400), Segment(416, 90, 4)]
    plan = attention.Packed(segments, torch.device("cpu"))
    query = torch.randn(506, 4, 8, dtype=torch.float64)
    key, value = torch.randn(2, 506, 2, 8, dtype=torch.float64)
    out = plan.attend(0, query, key, value, None)
    allowed = torch.zeros(506, 506, dtype=torch.bool)
    for segment in segments:
        inside = slice(segment.start, segment.start + segment.length)
        allowed[inside, inside] = torch.ones(segment.length, segment.length).tril().bool()
        if segment.prefix is not None:
            before = segments[segment.prefix]
            allowed[inside, before.start : before.start + before.length] = True
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1)) / 8**0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(2, 1))
    assert (out - expected).abs().max() < 1e-12


# -- micro-batches and rollouts --------------------------------------------------------------------------------------


@one_family
def test_rows_of_a_prompt_stay_together(tiny_model, mixed_rows):
    prompts = [tiny_model.adapter.encode_prompt(sample.prompt()) for sample in mixed_rows[:3]]
    rows = [Row(prompt, completion=np.arange(3)) for prompt in prompts for _ in range(4)]
    assert [len(part) for part in micro_batches(rows, 9)] == [8, 4]
    assert [len(part) for part in micro_batches(rows, 4)] == [4, 4, 4]
    assert [len(part) for part in micro_batches(rows, 3)] == [3, 1, 3, 1, 3, 1]
    assert [row for part in micro_batches(rows, 3) for row in part] == rows


@one_family
def test_passes_keep_to_a_number_of_tokens(tiny_model, mixed_rows):
    prompts = [tiny_model.adapter.encode_prompt(sample.prompt()) for sample in mixed_rows[:2]]
    long, short = max(map(len, prompts)), min(map(len, prompts))
    rows = [Row(prompt, completion=np.arange(5)) for prompt in prompts for _ in range(4)]
    assert [len(part) for part in micro_batches(rows, 100, long + short + 40)] == [8]
    assert [len(part) for part in micro_batches(rows, 100, long + short + 39)] == [4, 4]
    assert [len(part) for part in micro_batches(rows[4:], 100, len(prompts[1]) + 10)] == [2, 2]
    # A row that is longer by itself still runs.
    assert [len(part) for part in micro_batches(rows, 100, 1)] == [1] * 8
    whole = [Row(tiny_model.adapter.encode(mixed_rows[0]))] * 3
    assert [len(part) for part in micro_batches(whole, 100, 2 * len(whole[0].encoded))] == [2, 1]


@one_family
def test_padded_batches_are_of_similar_length(tiny_model, mixed_rows):
    prompts = [tiny_model.adapter.encode_prompt(sample.prompt()) for sample in mixed_rows]
    rows = [Row(prompt, completion=np.arange(3)) for prompt in prompts for _ in range(2)]
    ordered = by_length(rows)
    assert sorted(map(id, ordered)) == sorted(map(id, rows))
    assert [len(row.encoded) for row in ordered] == sorted(len(row.encoded) for row in rows)
    assert [len(part) for part in micro_batches(ordered, 2)] == [2] * 5


def test_models_without_plans_decode_with_transformers_cache(tiny_model, mixed_rows, monkeypatch):
    prompts = [tiny_model.adapter.encode_prompt(sample.prompt()) for sample in mixed_rows]
    monkeypatch.setattr(tiny_model.adapter, "stop_token_ids", tuple(range(8, 200, 5)))

    def run(packs, batch_size):
        monkeypatch.setattr(tiny_model.policy, "packs", packs)
        return complete(
            tiny_model.policy,
            tiny_model.adapter,
            prompts,
            list(range(5)),
            n=3,
            sampling=Sampling(10, seed=4),
            batch_size=batch_size,
        )

    shared = run(True, 64)
    # Small batches make waiting prompts enter while others are under way.
    for other in (run(False, 64), run(False, 6), run(True, 6), run(True, 7), run(True, 1)):
        for first, second in zip(shared, other, strict=True):
            for mine, theirs in zip(first, second, strict=True):
                assert mine.tokens.tolist() == theirs.tokens.tolist()
                assert np.abs(mine.logp - theirs.logp).max() < 1e-5


@one_family
@pytest.mark.parametrize(("reuse", "calls"), [(True, 3), (False, 6)])
def test_rows_are_remembered_only_when_they_come_again(tiny_model, mixed_rows, reuse, calls):
    seen = []

    def encode(sample):
        seen.append(sample.id)
        return tiny_model.adapter.encode(sample)

    stream = RowStream([mixed_rows[:3]], [1.0], encode, count=3, rank=0, world=1, seed=0, reuse=reuse)
    first, second = stream.next(), stream.next()
    assert sorted(row.sample.id for row in first) == sorted(row.sample.id for row in second)
    assert len(seen) == calls
