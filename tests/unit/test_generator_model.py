"""The generator's ids, sizes, likelihood and files."""

import dataclasses
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.generator import model as module
from mmpost_tokenizers.generator.layout import CodeLayout
from mmpost_tokenizers.generator.model import ClassConditionalGenerator, GeneratorConfig
from mmpost_tokenizers.generator.rotary import GridRotary
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


def test_class_names_are_in_the_folder(tmp_path):
    config = GeneratorConfig(LAYOUT, 3, "test", class_names=("ant", "bee"))
    ClassConditionalGenerator(config).save_pretrained(tmp_path)
    assert ClassConditionalGenerator.from_pretrained(tmp_path).config == config


# -- rotary positions by row and column --------------------------------------------------------------------------------


def turned(rotary, vector, places):
    """A vector at places of the sequence, turned as transformers turns queries and keys."""
    cos, sin = rotary(vector, torch.tensor(places)[None])
    return apply_rotary_pos_emb(vector.expand(1, 1, len(places), -1), vector[None, None, None], cos, sin)[0][0, 0]


def test_scores_depend_on_differences_of_rows_and_columns_only():
    """Brute force over a grid of 4 rows and 5 columns: equal differences, equal scores; others differ."""
    rotary = GridRotary((4, 5), 1, 16)
    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = list(range(1, 21))
    scores = turned(rotary, query, places) @ turned(rotary, key, places).T
    at = {place: divmod(place, 5) for place in range(20)}
    seen = {}
    for one, other in itertools.product(range(20), repeat=2):
        difference = at[one][0] - at[other][0], at[one][1] - at[other][1]
        seen.setdefault(difference, []).append(float(scores[one, other]))
    assert len(seen) == 7 * 9
    means = sorted(sum(values) / len(values) for values in seen.values())
    for values in seen.values():
        assert values == pytest.approx([values[0]] * len(values), abs=1e-5)
    assert min(after - before for before, after in itertools.pairwise(means)) > 1e-4


def test_first_half_turns_with_the_row_and_second_with_the_column():
    rotary = GridRotary((3, 4), 2, 8)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float64), torch.arange(25)[None])
    # The class token first; then two codes share each place.
    assert (cos[0, 0] == 1).all()
    place = 1 + 2 * (2 * 4 + 3) + 1  # the second code of row 2, column 3
    assert torch.equal(cos[0, place], cos[0, place - 1])
    expected = torch.tensor([2.0, 2.0 / 100, 3.0, 3.0 / 100])
    torch.testing.assert_close(cos[0, place].float(), expected.cos().repeat(2))
    torch.testing.assert_close(sin[0, place].float(), expected.sin().repeat(2))


@pytest.mark.parametrize("layout", [LAYOUT, CodeLayout(8, 3, (2, 2), "")], ids=["one", "groups"])
def test_two_dimensional_generator_is_cached_saved_and_causal(layout, tmp_path):
    model = ClassConditionalGenerator(GeneratorConfig(layout, 5, "test", rope="2d"), seed=3).eval()
    codes, classes = codes_of(layout, 3), torch.tensor([0, 2, 4])
    with torch.no_grad():
        whole = model(classes, codes)
        decoder, flat = model.decoder(classes), codes.flatten(1)
        steps = [decoder.advance(None if at == 0 else flat[:, at - 1]) for at in range(layout.length)]
        plain = ClassConditionalGenerator(GeneratorConfig(layout, 5, "test"), seed=3).eval()(classes, codes)
    torch.testing.assert_close(torch.stack(steps, 1), whole, atol=1e-4, rtol=1e-4)
    assert (whole - plain).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = ClassConditionalGenerator.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(classes, codes), whole)
    # Plain transformers would turn by other angles; the folder does not pass for a Llama.
    with pytest.raises(ValueError, match="mmpost_grid_llama"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_row_of_codes_has_no_columns():
    with pytest.raises(MmpostError) as caught:
        ClassConditionalGenerator(GeneratorConfig(GROUPED, 5, "test", rope="2d"))
    assert str(caught.value) == (
        "rope=2d needs a grid of rows and columns, but the codes are a row of 4. Set model.rope=1d [MMP-C120]"
    )


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
