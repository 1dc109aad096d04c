"""Rollouts: one prefill per prompt, transformers' own numbers, and draws that depend on nothing but their key."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import GenerationConfig

from mmpost.core.sample import Sample
from mmpost.rollout import generate
from mmpost.rollout.generate import Sampling, _nucleus, _sample, complete

NO_MEDIA = torch.tensor([], dtype=torch.long)

# For what has nothing to do with the family.
one_family = pytest.mark.parametrize("family", ["qwen2.5-vl"])


@pytest.fixture
def prompts(tiny_model, mixed_rows):
    return [tiny_model.adapter.encode_prompt(sample.prompt()) for sample in mixed_rows]


@pytest.fixture
def stopping(tiny_model, monkeypatch):
    """The adapter with a quarter of all ids as end tokens, so that rows end at different lengths."""
    ids = tuple(range(8, len(tiny_model.adapter.tokenizer), 4))
    monkeypatch.setattr(tiny_model.adapter, "stop_token_ids", ids)
    return tiny_model.adapter


def _ids(groups):
    return [[rollout.tokens.tolist() for rollout in group] for group in groups]


def _complete(model, prompts, *, n=3, uids=None, batch_size=64, tokens=8, **sampling):
    return complete(
        model.policy,
        model.adapter,
        prompts,
        uids if uids is not None else list(range(len(prompts))),
        n=n,
        sampling=Sampling(tokens, **sampling),
        batch_size=batch_size,
    )


# -- the model's work ------------------------------------------------------------------------------------------------


def test_each_prompt_is_prefilled_once_and_each_picture_encoded_once(open_tiny, mixed_rows, family):
    model = open_tiny()
    prompts = [model.adapter.encode_prompt(sample.prompt()) for sample in mixed_rows]
    tower = model.policy.inner.model.vision_model if family == "smolvlm" else model.policy.inner.model.visual
    decoder = model.policy.inner.model.text_model if family == "smolvlm" else model.policy.inner.model.language_model
    encoded, decoded = [], []

    def saw_pixels(module, args, kwargs):
        encoded.append(
            len(kwargs["pixel_values"] if family == "smolvlm" else args[0] if args else kwargs["hidden_states"])
        )

    def saw_tokens(module, args, kwargs):
        decoded.append(tuple(kwargs.get("inputs_embeds", kwargs.get("input_ids")).shape[:2]))

    tower.register_forward_pre_hook(saw_pixels, with_kwargs=True)
    decoder.register_forward_pre_hook(saw_tokens, with_kwargs=True)
    n, tokens = 4, 5
    groups = _complete(model, prompts, n=n, tokens=tokens)
    if family == "smolvlm":
        units = sum(len(model.adapter.lengths("image", prompt.media)) for prompt in prompts if prompt.media)
    else:
        units = sum(len(prompt.media["pixel_values"]) for prompt in prompts if prompt.media)
    assert sum(encoded) == units > 0
    assert len(encoded) == 1
    # One sequence of all prompts without padding, then one token per open row.
    assert decoded[0] == (1, sum(len(prompt) for prompt in prompts))
    steps = max(len(rollout.tokens) for group in groups for rollout in group)
    assert len(decoded) == steps
    assert all(rows <= len(prompts) * n for _, rows in decoded[1:])


def test_small_batches_still_prefill_each_prompt_once(open_tiny, mixed_rows, family):
    model = open_tiny()
    prompts = [model.adapter.encode_prompt(sample.prompt()) for sample in mixed_rows]
    decoder = model.policy.inner.model.text_model if family == "smolvlm" else model.policy.inner.model.language_model
    seen = []

    def saw_tokens(module, args, kwargs):
        seen.append(kwargs.get("inputs_embeds", kwargs.get("input_ids")).shape[1])

    decoder.register_forward_pre_hook(saw_tokens, with_kwargs=True)
    _complete(model, prompts, n=4, batch_size=8, tokens=3)
    # No prompt of these rows is as short as the eight rows that may be open.
    prefilled = [length for length in seen if length > 8]
    assert sum(prefilled) == sum(len(prompt) for prompt in prompts)
    assert max(prefilled) <= sum(sorted(len(prompt) for prompt in prompts)[-2:])


@one_family
def test_the_mode_of_the_module_is_kept(open_tiny, mixed_rows):
    model = open_tiny()
    prompt = model.adapter.encode_prompt(mixed_rows[0].prompt())
    for training in (True, False):
        model.policy.train(training)
        _complete(model, [prompt], tokens=2)
        assert model.policy.training is training


# -- transformers' numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_plain_transformers(
    tiny_model, reference, plain_inputs, mixed_rows, prompts, record_property, temperature
):
    model, processor = reference
    groups = _complete(tiny_model, prompts, temperature=temperature, seed=4)
    worst = 0.0
    for sample, prompt, group in zip(mixed_rows, prompts, groups, strict=True):
        inputs = dict(plain_inputs(processor, sample.prompt(), generate=True))
        assert inputs["input_ids"][0].tolist() == prompt.ids.tolist()
        for rollout in group:
            tokens = torch.from_numpy(rollout.tokens)
            whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens[None]], 1)}
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
            if "mm_token_type_ids" in whole:
                extra = torch.zeros(1, len(tokens), dtype=torch.long)
                whole["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], extra], 1)
            with torch.no_grad():
                logits = model(**whole).logits[0, len(prompt) - 1 : -1] / temperature
            expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].numpy()
            worst = max(worst, float(np.abs(rollout.logp - expected).max()))
            assert rollout.logp.dtype == np.float32
    record_property("max_logp_difference", worst)
    assert worst < 1e-5


def test_greedy_completions_are_those_of_generate(
    tiny_model, reference, plain_inputs, mixed_rows, prompts, monkeypatch
):
    model, processor = reference
    adapter = tiny_model.adapter
    free = _complete(tiny_model, prompts, n=1, tokens=10, temperature=0.0)
    # Ids that greedy paths meet become end tokens, so that rows stop at different places.
    monkeypatch.setattr(adapter, "stop_token_ids", (int(free[0][0].tokens[3]), int(free[3][0].tokens[6])))
    ours = _complete(tiny_model, prompts, n=1, tokens=10, temperature=0.0)
    assert min(len(group[0].tokens) for group in ours) < 10
    for sample, group in zip(mixed_rows, ours, strict=True):
        inputs = plain_inputs(processor, sample.prompt(), generate=True)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=list(adapter.stop_token_ids),
            pad_token_id=adapter.pad_token_id,
            suppress_tokens=list(adapter.media_token_ids),
        )
        out = model.generate(**inputs, generation_config=settings)[0, inputs["input_ids"].shape[1] :]
        assert group[0].tokens.tolist() == out.tolist()


def test_three_greedy_prompts_together_are_each_alone(tiny_model, prompts):
    together = _complete(tiny_model, prompts[1:4], n=2, tokens=10, temperature=0.0)
    for prompt, group in zip(prompts[1:4], together, strict=True):
        alone = _complete(tiny_model, [prompt], n=1, tokens=10, temperature=0.0)[0][0]
        for rollout in group:
            assert rollout.tokens.tolist() == alone.tokens.tolist()


# -- draws by key ----------------------------------------------------------------------------------------------------


def test_ids_do_not_depend_on_the_batch(tiny_model, prompts, stopping):
    uids = [11, 5, 7, 300, 2]
    whole = _ids(_complete(tiny_model, prompts, uids=uids, seed=9))
    assert len({len(tokens) for group in whole for tokens in group}) > 2
    for batch_size in (1, 7):
        assert _ids(_complete(tiny_model, prompts, uids=uids, seed=9, batch_size=batch_size)) == whole
    order = [3, 0, 4, 2, 1]
    shuffled = _complete(tiny_model, [prompts[i] for i in order], uids=[uids[i] for i in order], seed=9)
    assert _ids(shuffled) == [whole[i] for i in order]
    more = _ids(_complete(tiny_model, prompts, uids=uids, seed=9, n=5))
    assert [group[:3] for group in more] == whole
    assert _ids(_complete(tiny_model, prompts[2:3], uids=uids[2:3], seed=9)) == whole[2:3]


@pytest.mark.parametrize("share", [0.0, 2.0])
def test_ids_do_not_depend_on_whether_ended_rows_leave_the_batch(tiny_model, prompts, stopping, monkeypatch, share):
    usual = _complete(tiny_model, prompts, seed=2, n=6)
    monkeypatch.setattr(generate, "COMPACT_SHARE", share)
    other = _complete(tiny_model, prompts, seed=2, n=6)
    assert _ids(other) == _ids(usual)
    for first, second in zip(usual, other, strict=True):
        for one, two in zip(first, second, strict=True):
            assert np.abs(one.logp - two.logp).max() < 1e-5


@one_family
def test_other_seeds_prompts_and_generations_draw_other_tokens(tiny_model, prompts):
    same = [prompts[0]] * 2
    first = _ids(_complete(tiny_model, same, uids=[0, 1], n=4, seed=1))
    assert _ids(_complete(tiny_model, same, uids=[0, 1], n=4, seed=1)) == first
    second = _ids(_complete(tiny_model, same, uids=[0, 1], n=4, seed=2))
    everything = [tuple(tokens) for groups in (first, second) for group in groups for tokens in group]
    assert len(set(everything)) == len(everything)


@one_family
def test_end_tokens_are_kept_and_truncation_is_told(tiny_model, prompts, stopping):
    rollouts = [r for group in _complete(tiny_model, prompts, n=6, tokens=5, seed=3) for r in group]
    stop = set(stopping.stop_token_ids)
    for rollout in rollouts:
        ends = [int(token) in stop for token in rollout.tokens]
        assert 1 <= len(rollout.tokens) == len(rollout.logp) <= 5
        assert not any(ends[:-1])
        assert rollout.truncated == (not ends[-1])
        assert rollout.truncated <= (len(rollout.tokens) == 5)
        assert rollout.text == stopping.tokenizer.decode(rollout.tokens.tolist(), skip_special_tokens=True)
    assert {rollout.truncated for rollout in rollouts} == {True, False}
    assert {len(rollout.tokens) for rollout in rollouts} == {1, 2, 3, 4, 5}


@one_family
def test_an_end_token_at_the_length_limit_is_no_truncation(tiny_model, prompts, monkeypatch):
    free = _complete(tiny_model, prompts[:1], n=1, tokens=4, temperature=0.0)[0][0]
    monkeypatch.setattr(tiny_model.adapter, "stop_token_ids", (int(free.tokens[3]),))
    ended = _complete(tiny_model, prompts[:1], n=1, tokens=4, temperature=0.0)[0][0]
    first = free.tokens.tolist().index(int(free.tokens[3]))
    assert ended.tokens.tolist() == free.tokens.tolist()[: first + 1]
    assert not ended.truncated


# -- the sampler -----------------------------------------------------------------------------------------------------


def _draws(logits, count, **sampling):
    uids = np.arange(count)
    chosen, logp = _sample(
        logits.expand(count, -1), NO_MEDIA, Sampling(1, **{"seed": 5, **sampling}), uids, uids % 3, 0
    )
    return chosen, logp


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_distribution(temperature):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    count = 100_000
    chosen, _ = _draws(logits, count, temperature=temperature)
    expected = (logits / temperature).softmax(-1).numpy() * count
    seen = np.bincount(chosen.numpy(), minlength=20)
    statistic = float(((seen - expected) ** 2 / expected).sum())
    assert chi2.ppf(0.001, 19) < statistic < chi2.ppf(0.999, 19)


def test_draws_of_neighbouring_keys_are_independent():
    logits = torch.zeros(4, dtype=torch.float64)
    count = 40_000
    uids = np.repeat(np.arange(count), 2)
    generations = np.tile([0, 1], count)
    steps = [
        _sample(logits.expand(2 * count, -1), NO_MEDIA, Sampling(1, seed=8), uids, generations, t)[0].numpy()
        for t in (0, 1)
    ]
    pairs = [
        (steps[0][::2], steps[0][1::2]),  # two generations of a prompt
        (steps[0], steps[1]),  # two positions of a completion
        (steps[0][:-2:2], steps[0][2::2]),  # two prompts
    ]
    for first, second in pairs:
        table = np.bincount(4 * first + second, minlength=16)
        expected = len(first) / 16
        assert float(((table - expected) ** 2 / expected).sum()) < chi2.ppf(0.999, 15)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p):
    probability = torch.randn(50, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    probability = (2 * probability).softmax(-1)
    kept = _nucleus(probability, top_p)
    for row, cut in zip(probability.tolist(), kept.tolist(), strict=True):
        order = sorted(range(30), key=lambda i: -row[i])
        mass, chosen = 0.0, set()
        for i in order:
            chosen.add(i)
            mass += row[i]
            if mass >= top_p:
                break
        assert {i for i, value in enumerate(cut) if value > 0} == chosen
        assert all(cut[i] == row[i] for i in chosen)


def test_draws_with_top_p_follow_the_cut_distribution_and_report_the_uncut_one():
    logits = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    count = 50_000
    chosen, logp = _draws(logits, count, top_p=0.7)
    cut = _nucleus(logits.softmax(-1)[None], 0.7)[0]
    expected = (cut / cut.sum()).numpy() * count
    seen = np.bincount(chosen.numpy(), minlength=12)
    inside = expected > 0
    assert seen[~inside].sum() == 0
    assert float(((seen - expected)[inside] ** 2 / expected[inside]).sum()) < chi2.ppf(0.999, inside.sum() - 1)
    assert torch.equal(logp, logits.log_softmax(-1)[chosen])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
@pytest.mark.parametrize("size", [30.0, 1e4, 1e30, float("inf")])
def test_media_tokens_are_never_drawn_however_likely(temperature, top_p, size):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3))
    media = torch.tensor([3, 7, 39])
    others = [i for i in range(40) if i not in (3, 7, 39)]
    wild = logits.clone()
    wild[media] = size
    uids = np.arange(2000)
    sampling = Sampling(1, temperature=temperature, top_p=top_p, seed=1)
    chosen, _ = _sample(wild.expand(2000, -1), media, sampling, uids, uids * 0, 0)
    assert not torch.isin(chosen, media).any()
    # What is drawn instead is what the other tokens alone would give, not whatever is left at the edge.
    alone, _ = _sample(logits[others].expand(2000, -1), NO_MEDIA, sampling, uids, uids * 0, 0)
    assert torch.equal(chosen, torch.tensor(others)[alone])
    assert len(chosen.unique()) > 5 or temperature == 0


def test_the_adapter_names_its_media_tokens_and_rollouts_avoid_them(open_tiny, mixed_rows, family):
    model = open_tiny()
    adapter = model.adapter
    assert adapter.image_token_id in adapter.media_token_ids
    if family != "smolvlm":
        assert {adapter.config.video_token_id, adapter.config.vision_start_token_id} <= set(adapter.media_token_ids)

    class Wild(torch.nn.Module):
        """A head that wants nothing but placeholders."""

        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, hidden):
            logits = self.head(hidden)
            return logits.index_fill(-1, torch.tensor(adapter.media_token_ids), 1e6)

    model.policy.inner.lm_head = Wild(model.policy.inner.lm_head)
    prompts = [adapter.encode_prompt(sample.prompt()) for sample in mixed_rows]
    for temperature in (0.0, 1.0):
        groups = _complete(model, prompts, temperature=temperature)
        tokens = np.concatenate([rollout.tokens for group in groups for rollout in group])
        assert not np.isin(tokens, adapter.media_token_ids).any()


def test_a_text_only_prompt_of_one_word_works(tiny_model, turn):
    prompt = tiny_model.adapter.encode_prompt(Sample("a", (turn("user", "x"),)))
    (group,) = _complete(tiny_model, [prompt], n=2, tokens=3)
    assert [len(rollout.tokens) for rollout in group] == [3, 3]
