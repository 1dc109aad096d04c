"""The decoder of fixed shapes: the dynamic one's ids and numbers, slots used again, and one graph for each shape."""

import numpy as np
import pytest
import torch

from mmpost.config.schema import RolloutSection
from mmpost.core.errors import MmpostError
from mmpost.rollout.engine import Prompt, Setup, open_engine
from mmpost.rollout.generate import Sampling, complete
from mmpost.rollout.static import StaticDecoder, ladder, step, token_sizes

one_family = pytest.mark.parametrize("family", ["qwen2.5-vl"])


@pytest.fixture
def prompts(tiny_model, mixed_rows):
    return [tiny_model.adapter.encode_prompt(sample.prompt()) for sample in mixed_rows]


@pytest.fixture
def stopping(tiny_model, monkeypatch):
    """An eighth of all ids as end tokens, so that rows end at different lengths."""
    ids = tuple(range(8, len(tiny_model.adapter.tokenizer), 8))
    monkeypatch.setattr(tiny_model.adapter, "stop_token_ids", ids)


def _complete(model, prompts, *, static=None, n=3, batch_size=6, tokens=12, **sampling):
    sampling = Sampling(tokens, **{"seed": 4, **sampling})
    uids = list(range(len(prompts)))
    options = {"n": n, "sampling": sampling, "batch_size": batch_size, "static": static}
    return complete(model.policy, model.adapter, prompts, uids, **options)


def _equal(first, second):
    """Same ids; log-probabilities to 1e-5."""
    for one, two in zip([r for group in first for r in group], [r for group in second for r in group], strict=True):
        assert one.tokens.tolist() == two.tokens.tolist()
        assert one.truncated == two.truncated
        assert np.abs(one.logp - two.logp).max() <= 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_ids_and_log_probs_are_those_of_the_dynamic_decoder(tiny_model, prompts, stopping, temperature):
    usual = _complete(tiny_model, prompts, temperature=temperature)
    assert len({len(rollout.tokens) for group in usual for rollout in group}) > 2 or temperature == 0
    static = StaticDecoder(tiny_model.policy, tiny_model.adapter)
    # The second time the buffers hold what is left of the first.
    for _ in range(2):
        _equal(_complete(tiny_model, prompts, static=static, temperature=temperature), usual)


@one_family
@pytest.mark.parametrize("batch_size", [1, 6, 64])
def test_the_size_of_the_batch_changes_nothing(tiny_model, prompts, stopping, batch_size):
    static = StaticDecoder(tiny_model.policy, tiny_model.adapter)
    many = prompts * 3
    _equal(_complete(tiny_model, many, static=static, batch_size=batch_size), _complete(tiny_model, many))


@one_family
def test_completions_outgrow_the_first_size(tiny_model, prompts):
    static = StaticDecoder(tiny_model.policy, tiny_model.adapter)
    _equal(
        _complete(tiny_model, prompts[:2], static=static, n=2, tokens=140),
        _complete(tiny_model, prompts[:2], n=2, tokens=140),
    )
    assert sorted({tokens for _, _, tokens in static.views}) == [128, 192]


@one_family
def test_one_decoder_serves_calls_of_all_sizes(tiny_model, prompts, stopping):
    static = StaticDecoder(tiny_model.policy, tiny_model.adapter)
    for chosen, n, tokens in ((prompts[:1], 1, 4), (prompts, 4, 12), (prompts[2:4], 2, 7), (prompts, 3, 70)):
        usual = _complete(tiny_model, chosen, n=n, tokens=tokens)
        _equal(_complete(tiny_model, chosen, static=static, n=n, tokens=tokens), usual)


@one_family
def test_buffers_keep_their_place_between_rollouts(tiny_model, prompts, stopping):
    static = StaticDecoder(tiny_model.policy, tiny_model.adapter)
    _complete(tiny_model, prompts, static=static)
    before = static.buffers, dict(static.views)
    places = [t.data_ptr() for pair in static.buffers.own.values() for t in pair]
    _complete(tiny_model, prompts[::-1], static=static, seed=9)
    assert static.buffers is before[0]
    assert [t.data_ptr() for pair in static.buffers.own.values() for t in pair] == places
    assert all(static.views[key] is view for key, view in before[1].items())


@one_family
def test_slots_are_used_again_and_every_step_has_the_full_batch(tiny_model, prompts, stopping, monkeypatch):
    static = StaticDecoder(tiny_model.policy, tiny_model.adapter)
    entered, rows = [], []
    admit, run = static.admit, static._run

    def saw_prompts(given, n):
        entered.append(len(given))
        return admit(given, n)

    def saw_rows(view, tokens):
        rows.append(len(tokens))
        return run(view, tokens)

    monkeypatch.setattr(static, "admit", saw_prompts)
    monkeypatch.setattr(static, "_run", saw_rows)
    many = prompts * 2
    _complete(tiny_model, many, static=static, n=2, batch_size=6)
    assert sum(entered) == len(many)
    assert entered[0] == 3
    assert len(entered) > 2
    # Three slots of two rows, and one slot once nothing waits.
    assert set(rows) <= {6, 2}
    assert rows[0] == 6


@pytest.mark.parametrize(
    "family",
    ["smolvlm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl"))],
)
def test_the_step_is_one_graph_without_breaks(tiny_model, prompts):
    usual = _complete(tiny_model, prompts[:3], n=2, tokens=6, batch_size=6)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # ``fullgraph`` would raise at a break, and ``required`` lets no failure pass.
    static = StaticDecoder(tiny_model.policy, tiny_model.adapter, True, "eager")
    _equal(_complete(tiny_model, prompts[:3], static=static, n=2, tokens=6, batch_size=6), usual)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == len(static.views) == 1
    assert not counters["graph_break"]
    # Other prompts, and weights that were updated in place, are no reason to compile again.
    with torch.no_grad():
        weight = next(p for name, p in tiny_model.policy.named_parameters() if name.endswith("mlp.up_proj.weight"))
        kept = weight.clone()
        weight.mul_(1.5)
        try:
            moved = _complete(tiny_model, prompts[2:0:-1], n=2, tokens=6, batch_size=6)
            _equal(_complete(tiny_model, prompts[2:0:-1], static=static, n=2, tokens=6, batch_size=6), moved)
        finally:
            weight.copy_(kept)


@pytest.mark.slow
@one_family
def test_inductor_gives_the_same_numbers(tiny_model, prompts):
    usual = _complete(tiny_model, prompts[:2], n=2, tokens=5)
    torch._dynamo.reset()
    static = StaticDecoder(tiny_model.policy, tiny_model.adapter, True)
    _equal(_complete(tiny_model, prompts[:2], static=static, n=2, tokens=5), usual)


@one_family
def test_what_cannot_be_compiled_is_told(tiny_model, prompts, monkeypatch, caplog):
    def breaks(policy, view, tokens):
        torch._dynamo.graph_break()
        return step(policy, view, tokens)

    usual = _complete(tiny_model, prompts[:1], tokens=3)
    monkeypatch.setattr("mmpost.rollout.static.step", breaks)
    static = StaticDecoder(tiny_model.policy, tiny_model.adapter, True, "eager")
    with pytest.raises(MmpostError) as caught:
        _complete(tiny_model, prompts[:1], static=static, tokens=3)
    assert caught.value.code == "MMP-E066"
    monkeypatch.undo()
    monkeypatch.setattr("mmpost.rollout.static.step", breaks)
    willing = StaticDecoder(tiny_model.policy, tiny_model.adapter, True, "eager")
    willing.required = False
    monkeypatch.setattr("mmpost.rollout.static.step", step)
    _equal(_complete(tiny_model, prompts[:1], static=willing, tokens=3), usual)
    assert [r.message for r in caplog.records if "rollouts go on without torch.compile" in r.message]


# -- the engine's options --------------------------------------------------------------------------------------------


def _engine(model, **options):
    return open_engine(Setup(RolloutSection(**options), model.policy, model.adapter, "tiny", 6))


@one_family
def test_the_engine_takes_the_static_cache_when_asked(tiny_model, mixed_rows, prompts, stopping):
    asked = [Prompt(p, 10 + i, sample.prompt()) for i, (p, sample) in enumerate(zip(prompts, mixed_rows, strict=True))]
    dynamic, static = _engine(tiny_model), _engine(tiny_model, cache="static", compile="auto")
    sampling = Sampling(8, seed=2)
    _equal(static.complete(asked, n=2, sampling=sampling), dynamic.complete(asked, n=2, sampling=sampling))
    assert dynamic.static is None
    kept = static.static
    assert not kept.compiled  # auto, and no CUDA device
    static.complete(asked[:1], n=2, sampling=sampling)
    assert static.static is kept
    static.close()
    assert static.static is None


@one_family
def test_a_model_without_plans_stays_dynamic_and_says_so_once(open_tiny, mixed_rows, caplog):
    model = open_tiny()
    model.policy.packs = False
    asked = [Prompt(model.adapter.encode_prompt(mixed_rows[0].prompt()), 3, mixed_rows[0].prompt())]
    engine = _engine(model, cache="static")
    for _ in range(2):
        engine.complete(asked, n=2, sampling=Sampling(3))
    said = [record.message for record in caplog.records]
    assert said == ["rollout.cache=static needs a model with full attention in every layer; it stays dynamic"]


@one_family
def test_compiling_growing_shapes_is_refused(tiny_model):
    with pytest.raises(MmpostError) as caught:
        _engine(tiny_model, compile=True)
    assert caught.value.code == "MMP-C067"
    assert caught.value.fix == "Set rollout.cache=static."


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_sizes_are_few_and_large_enough():
    for count in range(1, 300):
        size = ladder(count)
        assert count <= size <= max(1.5 * count, 1)
    assert sorted({ladder(count) for count in range(1, 25)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24]


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(1, [64]), (128, [128]), (129, [128, 192]), (1024, [128, 512, 1024]), (2049, [128, 512, 2048, 2112])],
)
def test_sizes_of_completions(limit, sizes):
    assert token_sizes(limit) == sizes
