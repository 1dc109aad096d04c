"""Laws of sampling: guidance, cuts, forced codes, and draws that do not depend on the batch."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.generator import sample
from mmpost_tokenizers.generator.layout import CodeLayout
from mmpost_tokenizers.generator.model import ClassConditionalGenerator, GeneratorConfig
from mmpost_tokenizers.generator.sample import Guidance, Sampling, generate

LAYOUT = CodeLayout(codebook_size=32, groups=1, grid=(2, 3), tokenizer_sha256="")
GROUPED = CodeLayout(codebook_size=8, groups=2, grid=(4,), tokenizer_sha256="")
CLASSES = torch.arange(12) % 5


def build(layout):
    torch.set_num_threads(1)
    model = ClassConditionalGenerator(GeneratorConfig(layout, num_classes=5, size="test"), seed=3)
    with torch.no_grad():
        # Fresh weights give nearly equal logits; sharper ones make the laws visible.
        model.llama.lm_head.weight.mul_(8)
    return model.eval()


@pytest.fixture(scope="module")
def generator():
    return build(LAYOUT)


def real_codes(layout, rows, seed=1):
    return torch.randint(layout.codebook_size, (rows, *layout.shape), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", [LAYOUT, GROUPED], ids=["one", "groups"])
def test_only_codes_come_back_in_the_grid(layout):
    codes = generate(build(layout), CLASSES, sampling=Sampling(temperature=3.0))
    assert codes.shape == (12, *layout.shape)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < layout.codebook_size
    # Not stuck at one code: an id of another range folded into this one would show as a constant.
    assert len(codes.unique()) > layout.codebook_size // 2


def test_draws_do_not_depend_on_the_batch(generator):
    whole = generate(generator, CLASSES, sampling=Sampling(seed=4, guidance=Guidance(2.0)))
    split = generate(generator, CLASSES, sampling=Sampling(seed=4, guidance=Guidance(2.0), batch_size=5))
    alone = generate(generator, CLASSES[7:8], sampling=Sampling(seed=4, guidance=Guidance(2.0)), numbers=np.array([7]))
    assert torch.equal(whole, split)
    assert torch.equal(whole[7:8], alone)
    other = generate(generator, CLASSES, sampling=Sampling(seed=5, guidance=Guidance(2.0)))
    assert not torch.equal(whole, other)


def test_sampling_leaves_the_global_stream_and_the_mode(generator):
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    generator.train()
    generate(generator, CLASSES, sampling=Sampling())
    assert generator.training
    generator.eval()
    assert torch.equal(torch.rand(2), expected)


def test_first_codes_follow_the_model(generator):
    with torch.no_grad():
        logits = generator.decoder(torch.tensor([2])).advance(None)[0]
    n = 4000
    layout = dataclasses.replace(LAYOUT, grid=(1,))
    short = ClassConditionalGenerator(dataclasses.replace(generator.config, layout=layout))
    short.llama.load_state_dict(generator.llama.state_dict())
    first = generate(short, torch.full((n,), 2), sampling=Sampling(batch_size=2000))[:, 0]
    share = torch.bincount(first, minlength=32) / n
    p = logits.softmax(-1)
    # Five standard errors over 32 codes.
    assert ((share - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-4).all()


@torch.no_grad()
def test_guidance_of_one_is_conditional_and_runs_one_row(generator):
    rows = []
    hook = generator.llama.model.register_forward_pre_hook(
        lambda _, __, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    plain = generate(generator, CLASSES[:3], sampling=Sampling(seed=1))
    assert set(rows) == {3}
    rows.clear()
    for kind in ("constant", "linear", "cosine"):
        same = generate(generator, CLASSES[:3], sampling=Sampling(seed=1, guidance=Guidance(1.0, kind)))
        assert torch.equal(plain, same)
    assert set(rows) == {3}
    rows.clear()
    generate(generator, CLASSES[:3], sampling=Sampling(seed=1, guidance=Guidance(1.5)))
    hook.remove()
    assert set(rows) == {6}


@torch.no_grad()
def test_guidance_is_linear_and_comes_before_the_cuts(generator):
    conditional = generator.decoder(torch.tensor([1])).advance(None)
    unconditional = generator.decoder(torch.tensor([5])).advance(None)
    step = sample._Guided(generator, torch.tensor([1]), np.array([3.0]))
    torch.testing.assert_close(step(0, None), unconditional + 3 * (conditional - unconditional))
    zero, one, two = (sample.guided(conditional, unconditional, w) for w in (0.0, 1.0, 2.0))
    torch.testing.assert_close(zero, unconditional)
    torch.testing.assert_close(one, conditional)
    torch.testing.assert_close(two - one, conditional - unconditional)
    # Greedy sampling under guidance takes the best guided code, which the cut to one conditional code would not keep.
    guided = sample.guided(conditional, unconditional, 50.0)
    assert guided.argmax() != conditional.argmax()
    drawn = generate(generator, torch.tensor([1]), sampling=Sampling(guidance=Guidance(50.0), top_k=1))
    assert drawn.flatten()[0] == guided.argmax()


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_greedy_codes_are_those_of_transformers(generator, scale):
    """An independent loop: ``generate`` of transformers with its own cache, guidance and suppression of ids."""
    prompt = generator.class_tokens(CLASSES[:5])[:, None]
    theirs = generator.llama.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=6,
        min_new_tokens=6,
        guidance_scale=scale,
        negative_prompt_ids=torch.full_like(prompt, int(generator.class_tokens(torch.tensor([5])))),
        negative_prompt_attention_mask=torch.ones_like(prompt),
        suppress_tokens=list(range(32, 38)),
        pad_token_id=37,
    )[:, 1:]
    mine = generate(generator, CLASSES[:5], sampling=Sampling(temperature=0.0, guidance=Guidance(scale)))
    assert torch.equal(mine.reshape(5, 6), theirs)


def test_schedules():
    assert Guidance(2.0).weights(4).tolist() == [2, 2, 2, 2]
    assert Guidance(3.0, "linear").weights(4).tolist() == [1, 1.5, 2, 2.5]
    expected = [1 + 5 * 0.5 * (1 - math.cos(math.pi * (step / 4) ** 1.15)) for step in range(4)]
    np.testing.assert_allclose(Guidance(6.0, "cosine", 1.15).weights(4), expected)


def test_cuts_in_order():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    free = sample.probabilities(logits, temperature=2.0, top_k=0, top_p=1.0)
    torch.testing.assert_close(free[0], (logits[0].double() / 2).softmax(-1))
    two = sample.probabilities(logits, temperature=1.0, top_k=2, top_p=1.0)
    torch.testing.assert_close(two[0], torch.tensor([0, 0, 1 / (1 + math.e), math.e / (1 + math.e)]).double())
    # After top-k 2 the best code has 0.731, so that top-p 0.7 keeps it alone; before, it has 0.644 and two would stay.
    both = sample.probabilities(logits, temperature=1.0, top_k=2, top_p=0.7)
    assert (both > 0).tolist() == [[False, False, False, True]]
    assert sample.probabilities(logits, temperature=0.0, top_k=0, top_p=1.0).tolist() == [[0, 0, 0, 1]]


def test_draw_never_takes_a_code_without_probability():
    probability = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).double().expand(4, -1)
    at = torch.tensor([0.0, 0.49, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sample.draw(probability, at).tolist() == [1, 1, 3, 3]
    assert sample.draw(probability, torch.ones(4, dtype=torch.float64)).tolist() == [3] * 4


@pytest.mark.parametrize("layout", [LAYOUT, GROUPED], ids=["one", "groups"])
def test_preservation_ratio(layout):
    model, truth = build(layout), real_codes(layout, 12)
    free = generate(model, CLASSES, sampling=Sampling(seed=2))
    none = generate(model, CLASSES, sampling=Sampling(seed=2), forced_tokens=truth, keep_prob=0.0)
    every = generate(model, CLASSES, sampling=Sampling(seed=2), forced_tokens=truth, keep_prob=1.0)
    half = generate(model, CLASSES, sampling=Sampling(seed=2), forced_tokens=truth, keep_prob=0.5)
    assert torch.equal(none, free)
    assert torch.equal(every, truth)
    keep = torch.from_numpy(sample.keep_mask(2, np.arange(12), layout.positions, 0.5)).reshape(12, *layout.grid)
    keep = keep[..., None].expand_as(truth) if layout.groups > 1 else keep
    assert torch.equal(half[keep], truth[keep])
    assert 0 < keep.float().mean() < 1


def test_kept_share_is_sigma_plus_lucky_matches(generator):
    rows = 600
    truth = real_codes(LAYOUT, rows)
    numbers = np.arange(rows)
    mask = sample.keep_mask(2, numbers, 6, 0.8)
    mixed = generate(
        generator, torch.arange(rows) % 5, sampling=Sampling(seed=2, batch_size=600), forced_tokens=truth, keep_prob=0.8
    )
    match = (mixed == truth).float()
    lucky = match.reshape(rows, -1)[torch.from_numpy(~mask)].mean()
    error = 4 * math.sqrt(0.8 * 0.2 / mask.size)
    assert abs(mask.mean() - 0.8) < error
    assert mask.mean() <= match.mean()
    assert abs(float(match.mean()) - (0.8 + 0.2 * float(lucky))) < error


@torch.no_grad()
def test_the_mixture_is_the_context_of_later_codes(generator):
    truth = real_codes(LAYOUT, 12)
    mixed = generate(generator, CLASSES, sampling=Sampling(temperature=0.0, seed=2), forced_tokens=truth, keep_prob=0.5)
    keep = sample.keep_mask(2, np.arange(12), 6, 0.5)
    best = generator(CLASSES, mixed).argmax(-1)
    free = torch.from_numpy(~keep)
    assert torch.equal(mixed.reshape(12, -1)[free], best[free])


@pytest.mark.parametrize(
    ("options", "keep", "words"),
    [
        ({"temperature": -1.0}, 0.0, "temperature -1.0 is negative"),
        ({"top_p": 0.0}, 0.0, "top_p 0.0 is not in (0, 1]"),
        ({"top_k": -2}, 0.0, "top_k -2 is negative"),
        ({}, 1.5, "keep_prob 1.5 is not in [0, 1]"),
        ({}, 0.5, "keep_prob needs forced_tokens"),
    ],
)
def test_wrong_options_are_refused(generator, options, keep, words):
    with pytest.raises(MmpostError) as caught:
        generate(generator, CLASSES, sampling=Sampling(**options), keep_prob=keep)
    assert str(caught.value) == f"sampling: {words}. Correct the option [MMP-C106]"


def test_forced_codes_must_fit(generator):
    with pytest.raises(MmpostError, match=r"12 classes.*MMP-C106"):
        generate(generator, CLASSES, sampling=Sampling(), forced_tokens=real_codes(LAYOUT, 3), keep_prob=0.5)
    with pytest.raises(MmpostError, match="MMP-C101"):
        generate(generator, CLASSES, sampling=Sampling(), forced_tokens=real_codes(GROUPED, 12), keep_prob=0.5)
