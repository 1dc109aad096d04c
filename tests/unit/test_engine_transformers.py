"""transformers' generate as an engine: tokens and numbers of the native one, whatever the checkpoint's settings."""

import copy

import numpy as np
import pytest
import torch

from mmpost.config.schema import RolloutSection
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost.rollout.engine import ENGINES, Prompt, Setup, first_of_each, open_engine, request_seed
from mmpost.rollout.generate import Sampling

one_family = pytest.mark.parametrize("family", ["qwen2.5-vl"])


@pytest.fixture
def prompts(tiny_model, mixed_rows):
    samples = [sample.prompt() for sample in mixed_rows]
    return [Prompt(tiny_model.adapter.encode_prompt(sample), 10 + i, sample) for i, sample in enumerate(samples)]


@pytest.fixture
def open_one(tiny_model):
    """Function that opens an engine on the tiny model, or on a model with one thing changed."""

    def make(name, policy=None, batch_size=64):
        section = RolloutSection(engine=name)
        return open_engine(Setup(section, policy or tiny_model.policy, tiny_model.adapter, "tiny", batch_size))

    return make


def _ids(groups):
    return [[rollout.tokens.tolist() for rollout in group] for group in groups]


def _gap(a, b):
    pairs = [(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)]
    return max(float(np.abs(x.logp - y.logp).max()) for x, y in pairs)


def test_greedy_completions_are_those_of_the_native_engine(open_one, tiny_model, prompts, monkeypatch):
    native, other = open_one("native"), open_one("transformers")
    free = native.complete(prompts, n=1, sampling=Sampling(10, temperature=0.0))
    # Ids that greedy paths meet become end tokens, so that rows stop at different places.
    ends = int(free[0][0].tokens[3]), int(free[3][0].tokens[6])
    for stop, sampling in ((ends, Sampling(10, temperature=0.0)), (ends[:1], Sampling(3, temperature=0.0))):
        monkeypatch.setattr(tiny_model.adapter, "stop_token_ids", stop)
        ours, theirs = (engine.complete(prompts, n=2, sampling=sampling) for engine in (native, other))
        assert _ids(ours) == _ids(theirs)
        assert _gap(ours, theirs) < 1e-5
        for one, two in zip(ours, theirs, strict=True):
            assert [r.truncated for r in one] == [r.truncated for r in two]
            assert [r.text for r in one] == [r.text for r in two]
        if stop == ends:
            assert min(len(group[0].tokens) for group in ours) < 10


def test_reported_log_probs_are_those_of_a_forward_pass(open_one, tiny_model, prompts):
    sampling = Sampling(6, temperature=0.7, top_p=0.9, seed=3)
    policy, adapter = tiny_model.policy, tiny_model.adapter
    for prompt, group in zip(prompts, open_one("transformers").complete(prompts, n=3, sampling=sampling), strict=True):
        rows = [prompt.encoded.with_completion(torch.from_numpy(rollout.tokens)) for rollout in group]
        with torch.no_grad():
            logp, _ = policy(adapter.collate(rows), 0.7)
        assert np.abs(logp.numpy() - np.concatenate([rollout.logp for rollout in group])).max() < 1e-5


@one_family
def test_settings_of_the_checkpoint_do_not_matter(open_one, open_tiny, prompts):
    model = open_tiny().policy
    sampling = Sampling(6, temperature=1.0, seed=5)
    before = open_one("transformers", model).complete(prompts, n=3, sampling=sampling)
    spoilt = model.inner.generation_config
    spoilt.repetition_penalty, spoilt.top_k, spoilt.top_p, spoilt.temperature = 5.0, 1, 0.01, 1e-6
    spoilt.min_p, spoilt.do_sample, spoilt.suppress_tokens = 0.99, True, list(range(100))
    spoilt.forced_eos_token_id, spoilt.bad_words_ids, spoilt.no_repeat_ngram_size = 7, [[9], [10]], 1
    kept = copy.deepcopy(spoilt.to_dict())
    after = open_one("transformers", model).complete(prompts, n=3, sampling=sampling)
    assert _ids(before) == _ids(after)
    assert model.inner.generation_config is spoilt
    assert spoilt.to_dict() == kept


@one_family
def test_media_tokens_are_never_drawn(open_one, open_tiny, prompts):
    model = open_tiny()
    head = copy.deepcopy(model.policy.head)
    with torch.no_grad():
        # A bias towards the placeholders; the head is not tied to the embedding any more.
        extra = torch.zeros(head.weight.shape[0])
        extra[list(model.adapter.media_token_ids)] = 1e4
        head.bias = torch.nn.Parameter(extra)
    model.policy.inner.set_output_embeddings(head)
    for temperature in (0.0, 1.0):
        groups = open_one("transformers", model.policy).complete(
            prompts, n=2, sampling=Sampling(5, temperature=temperature)
        )
        drawn = np.concatenate([rollout.tokens for group in groups for rollout in group])
        assert not np.isin(drawn, model.adapter.media_token_ids).any()


@one_family
def test_draws_repeat_and_leave_the_global_generator_alone(open_one, prompts):
    engine, sampling = open_one("transformers"), Sampling(6, seed=1)
    torch.manual_seed(0)
    first = engine.complete(prompts, n=3, sampling=sampling)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())
    again = engine.complete(prompts, n=3, sampling=sampling)
    later = engine.complete(prompts, n=3, sampling=sampling, first_generation=3)
    assert _ids(first) == _ids(again) != _ids(later)
    assert len({tuple(ids) for group in _ids(first)[:1] for ids in group}) == 3


@one_family
def test_draws_follow_the_distribution(open_one, tiny_model, prompts):
    """Frequencies of a first token against the policy's probabilities, by a chi-squared bound."""
    from scipy.stats import chi2

    prompt, n = prompts[0], 1500
    engine = open_one("transformers", batch_size=n)
    group = engine.complete([prompt], n=n, sampling=Sampling(1, temperature=0.3, seed=2))[0]
    with torch.no_grad():
        batch = tiny_model.adapter.collate([prompt.encoded], left=True)
        logits = tiny_model.policy.head(tiny_model.policy.hidden(batch.inputs)[-1:]) / 0.3
    logits[:, list(tiny_model.adapter.media_token_ids)] = -torch.inf
    expected = logits.softmax(-1)[0].double().numpy() * n
    counts = np.bincount([int(rollout.tokens[0]) for rollout in group], minlength=len(expected))
    often = expected > 5
    pairs = [*zip(counts[often], expected[often], strict=True), (counts[~often].sum(), expected[~often].sum())]
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs if wanted)
    assert statistic < chi2.ppf(0.999, len(pairs) - 1)


def test_the_mode_and_version_are_kept(open_one, tiny_model, prompts, family):
    for name in ("native", "transformers"):
        engine = open_one(name, copy.deepcopy(tiny_model.policy))
        assert (engine.name, engine.exact, engine.version, engine.unknown) == (name, True, None, 0)
        for training in (True, False):
            engine.policy.train(training)
            engine.complete(prompts[:1], n=1, sampling=Sampling(1))
            assert engine.policy.training is training
        engine.sync(tiny_model.policy, 4)
        assert engine.version == 4
        assert engine.policy is tiny_model.policy
        engine.close()


def test_seeds_of_later_completions_go_on_where_the_first_ended():
    seeds = [request_seed(seed, uid, 0) for seed in range(20) for uid in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0
    assert max(seeds) < 2**48
    assert request_seed(1, 2, 8) == request_seed(1, 2, 0) + 8
    assert first_of_each(3, 2) == [3, 3]
    assert first_of_each([0, 5], 2) == [0, 5]


def test_every_engine_can_be_named():
    assert set(ENGINES) == {"native", "transformers", "vllm-server", "vllm-colocate"}
    with pytest.raises(ValueError, match="engine"):
        RolloutSection(engine="sglang")
    with pytest.raises(MmpostError) as caught:
        Catalog("engines", ENGINES).get("vlm-server")
    assert caught.value.code == "MMP-C006"
