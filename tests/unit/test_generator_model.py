"""The generator's ids, sizes, likelihood and files."""

import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.generator import model as module
from mmpost_tokenizers.generator.model import ClassConditionalGenerator, CodeLayout, GeneratorConfig
from mmpost_tokenizers.generator.sizes import SIZES

LAYOUT = CodeLayout(codebook_size=32, groups=1, grid=(2, 3), tokenizer_sha256="a" * 64)
GROUPED = CodeLayout(codebook_size=8, groups=3, grid=(4,), tokenizer_sha256="b" * 64)


@pytest.fixture(scope="module", params=[LAYOUT, GROUPED], ids=["one", "groups"])
def generator(request):
    torch.set_num_threads(1)
    return ClassConditionalGenerator(GeneratorConfig(request.param, num_classes=5, size="test"), seed=3).eval()


def codes_of(layout, rows, seed=0):
    shape = (rows, *layout.shape)
    return torch.randint(layout.codebook_size, shape, generator=torch.Generator().manual_seed(seed))


# Counts of LlamaGen's Table 1 for 16,384 codes and 1,000 classes, in millions; "test" is that of the spec at K = 256.
@pytest.mark.parametrize(
    ("name", "codes", "millions"),
    [("B", 16384, 111), ("L", 16384, 343), ("400M", 16384, 395), ("XL", 16384, 775), ("XXL", 16384, 1412),
     ("3B", 16384, 3099)],
)  # fmt: skip
def test_sizes_have_the_published_parameter_counts(name, codes, millions):
    layout = CodeLayout(codes, 1, (16, 16), "")
    with torch.device("meta"):
        llama = LlamaForCausalLM(module._llama_config(GeneratorConfig(layout, 1000, name)))
    assert sum(weight.numel() for weight in llama.parameters()) // 10**6 == millions


def test_test_size_has_four_hundred_thousand_parameters():
    model = ClassConditionalGenerator(GeneratorConfig(CodeLayout(256, 1, (4, 4), ""), 10, "test"))
    assert (SIZES["test"].width, SIZES["test"].depth) == (96, 3)
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(4e5, rel=0.05)


def test_unknown_size_names_the_nearest():
    with pytest.raises(MmpostError) as caught:
        ClassConditionalGenerator(GeneratorConfig(LAYOUT, 5, "test1"))
    assert str(caught.value) == (
        "unknown generator size 'test1'. Did you mean 'test'? Known: test, small, B, L, 400M, XL, XXL, 3B [MMP-C100]"
    )


def test_classes_come_after_all_codes_and_null_is_last(generator):
    layout = generator.config.layout
    first = layout.codebook_size * layout.groups
    ids = generator.class_tokens(torch.arange(6), torch.tensor([False, True, False, False, False, False]))
    assert ids.tolist() == [first, first + 5, first + 2, first + 3, first + 4, first + 5]
    assert generator.config.vocab_size == first + 5 + 1
    assert generator.llama.get_input_embeddings().num_embeddings == first + 6


def test_groups_have_id_ranges_of_their_own():
    model = ClassConditionalGenerator(GeneratorConfig(GROUPED, 5, "test"))
    codes = torch.arange(12).reshape(1, 4, 3) % 8
    assert model.sequence(codes).tolist() == [[0, 9, 18, 3, 12, 21, 6, 15, 16, 1, 10, 19]]


@pytest.mark.parametrize("bad", [-1, 6])
def test_class_outside_the_range_is_refused(generator, bad):
    with pytest.raises(MmpostError, match=rf"class {bad} is outside 0 to 5\..* \[MMP-C105\]"):
        generator.class_tokens(torch.tensor([0, bad]))


def test_codes_that_do_not_fit_are_refused(generator):
    layout = generator.config.layout
    with pytest.raises(MmpostError, match="MMP-C101"):
        generator.sequence(torch.zeros(1, 5, 5, dtype=torch.long))
    codes = codes_of(layout, 1)
    codes.view(-1)[:2] = torch.tensor([0, layout.codebook_size])
    with pytest.raises(MmpostError, match=rf"reach from 0 to {layout.codebook_size}, the codebook has .*MMP-C106"):
        generator.sequence(codes)


@torch.no_grad()
def test_cached_logits_equal_full_sequence_logits(generator):
    layout = generator.config.layout
    codes, classes = codes_of(layout, 3), torch.tensor([0, 4, 5])
    full = generator(classes, codes)
    flat = codes.reshape(3, -1)
    decoder = generator.decoder(classes)
    steps = [decoder.advance(None if place == 0 else flat[:, place - 1]) for place in range(layout.length)]
    torch.testing.assert_close(torch.stack(steps, 1), full, atol=1e-4, rtol=0)
    assert full.shape == (3, layout.length, layout.codebook_size)


@torch.no_grad()
def test_logits_are_those_of_plain_llama(generator):
    layout = generator.config.layout
    codes, classes = codes_of(layout, 2), torch.tensor([1, 2])
    ids = torch.cat([generator.class_tokens(classes)[:, None], generator.sequence(codes)[:, :-1]], 1)
    plain = generator.llama(input_ids=ids).logits
    mine = generator(classes, codes)
    for place in range(layout.length):
        start = place % layout.groups * layout.codebook_size
        torch.testing.assert_close(mine[:, place], plain[:, place, start : start + layout.codebook_size])


@torch.no_grad()
def test_a_later_code_changes_no_earlier_logit(generator):
    layout = generator.config.layout
    codes, classes = codes_of(layout, 1), torch.tensor([1])
    other = codes.flatten().clone()
    other[3] = (other[3] + 1) % layout.codebook_size
    change = (generator(classes, codes) - generator(classes, other.reshape(codes.shape))).abs().amax((0, 2))
    # 1e-5: attention over another batch of values may round differently.
    assert change[:4].max() < 1e-5
    assert change[4:].min() > 1e-5


@torch.no_grad()
def test_nll_is_the_probability_over_the_own_codebook(generator):
    layout = generator.config.layout
    codes, classes = codes_of(layout, 2), torch.tensor([0, 1])
    expected = -generator(classes, codes).log_softmax(-1).gather(-1, codes.reshape(2, -1, 1))[..., 0]
    torch.testing.assert_close(generator.nll(classes, codes), expected)


def test_dropout_acts_only_while_training():
    config = GeneratorConfig(LAYOUT, 5, "test", dropout=0.5)
    model = ClassConditionalGenerator(config, seed=3)
    plain = ClassConditionalGenerator(dataclasses.replace(config, dropout=0.0), seed=3).eval()
    codes, classes = codes_of(LAYOUT, 2), torch.tensor([0, 1])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(classes, codes), plain(classes, codes))
        assert (model.train()(classes, codes) - plain(classes, codes)).abs().max() > 0.01


def test_weights_depend_on_the_seed_and_leave_the_global_stream():
    config = GeneratorConfig(LAYOUT, 5, "test")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one = ClassConditionalGenerator(config, seed=1)
    assert torch.equal(torch.rand(3), expected)
    again, other = ClassConditionalGenerator(config, seed=1), ClassConditionalGenerator(config, seed=2)
    name = "llama.lm_head.weight"
    assert torch.equal(one.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


@torch.no_grad()
def test_folder_round_trip_and_plain_transformers(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    again = ClassConditionalGenerator.from_pretrained(tmp_path)
    assert again.config == generator.config
    codes, classes = codes_of(generator.config.layout, 1), torch.tensor([2])
    assert torch.equal(again(classes, codes), generator(classes, codes))
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain.lm_head.weight, generator.llama.lm_head.weight)


def test_folder_that_is_no_generator(tmp_path):
    with pytest.raises(MmpostError) as caught:
        ClassConditionalGenerator.from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"'{tmp_path}' is not a generator: there is no generator.json. "
        "Give a folder of `mmpost generator train` [MMP-C109]"
    )


def test_lost_and_misshapen_weights_are_named(generator, tmp_path):
    from safetensors.torch import load_file, save_file

    generator.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    norm = weights.pop("model.norm.weight")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(MmpostError, match=r"lack or do not know model\.norm\.weight\..*MMP-C109"):
        ClassConditionalGenerator.from_pretrained(tmp_path)
    save_file({**weights, "model.norm.weight": torch.cat([norm, norm])}, file, {"format": "pt"})
    with pytest.raises(MmpostError, match="MMP-C109"):
        ClassConditionalGenerator.from_pretrained(tmp_path)
    save_file({**weights, "model.norm.weight": norm}, file, {"format": "pt"})
    about = tmp_path / "generator.json"
    about.write_text(about.read_text().replace('"num_classes": 5', '"num_classes": 6'))
    with pytest.raises(MmpostError, match=r"config\.json has another shape than generator\.json\..*MMP-C109"):
        ClassConditionalGenerator.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"codebook_size": 64}, "codebook size 32 against 64"),
        ({"groups": 2}, "groups 1 against 2"),
        ({"grid": (4, 4)}, "grid 2x3 against 4x4"),
        ({"tokenizer_sha256": "c" * 64}, "tokenizer hash aaaaaaaaaaaa against cccccccccccc"),
    ],
)
def test_layouts_tell_how_they_differ(change, words):
    assert LAYOUT.difference(dataclasses.replace(LAYOUT, **change)) == words
