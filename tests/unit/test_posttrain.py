"""Decoder post-training: pairs, freezing, exact continuation, and refusals."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.cnn import CNNConfig, CNNTokenizer
from mmpost_tokenizers.generator.identity import frozen_state, layout_of
from mmpost_tokenizers.generator.model import ClassConditionalGenerator, GeneratorConfig
from mmpost_tokenizers.generator.options import PosttrainSection
from mmpost_tokenizers.generator.sample import Sampling, keep_mask
from mmpost_tokenizers.held_out import HeldOut, halves
from mmpost_tokenizers.images import Cutting, from_uint8, images_from_arrays, to_uint8
from mmpost_tokenizers.losses import DeepFeatureLoss
from mmpost_tokenizers.objective import Objective
from mmpost_tokenizers.options import LossesSection
from mmpost_tokenizers.pairs import make_pairs, reencode
from mmpost_tokenizers.posttrain import DecoderPostTrainer, freeze, learning_rate
from mmpost_tokenizers.posttrain_losses import adversary_of, objective_loss, pixel_loss
from mmpost_tokenizers.quantizers.configs import EMAConfig, VQConfig

SAMPLING = Sampling(seed=3, batch_size=16)
QUICK = PosttrainSection(
    sigma=0.8, pair_mode="direct", main_learning_rate=1e-2, max_steps=6, batch_size=8, eval_steps=2, save_steps=2,
    ema_decay=0.5, logging_steps=1,
)  # fmt: skip


def build(seed=0, quantizer=None):
    torch.set_num_threads(1)
    config = CNNConfig(
        image_size=8, quantizer=quantizer or VQConfig(codebook_size=16, dim=4), block_out_channels=(8,),
        layers_per_block=1, z_channels=8, stem_patch=4, norm_groups=4, lowest_attention=False, mid_attention=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CNNTokenizer(config).eval()


def pictures(count, seed=0, size=8):
    """Smooth coloured ramps of three kinds, which is their class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    y, x = np.mgrid[0:size, 0:size] / size
    ramps = np.stack([x, y, (x + y) / 2])[labels]
    colours = rng.uniform(60, 255, (count, 1, 1, 3))
    pixels = (ramps[..., None] * colours).astype(np.uint8)
    return images_from_arrays(pixels, labels.tolist(), cutting=Cutting(size))


def generator_for(tokenizer, classes=3):
    return ClassConditionalGenerator(GeneratorConfig(layout_of(tokenizer), classes, "test"), seed=1).eval()


def pairs_of(tokenizer, count=24, seed=0, **changes):
    options = {"sigma": 0.8, "pair_mode": "direct", "sampling": SAMPLING} | changes
    return make_pairs(pictures(count, seed), tokenizer, generator_for(tokenizer), **options)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def tokenizer():
    return build()


# -- pairs -----------------------------------------------------------------------------------------------------------


def test_kept_share_follows_sigma(tokenizer):
    pairs = pairs_of(tokenizer, 200, sigma=0.7)
    assert torch.equal(pairs.real.long(), tokenizer.tokenize(from_uint8(pairs.images.stacked()[0])))
    keep = torch.from_numpy(keep_mask(3, np.arange(200), 4, 0.7)).reshape(200, 2, 2)
    assert torch.equal(pairs.inputs[keep], pairs.real[keep])
    lucky = float((pairs.inputs == pairs.real)[~keep].float().mean())
    assert pairs.kept >= keep.float().mean()
    assert abs(pairs.kept - (0.7 + 0.3 * lucky)) < 4 * math.sqrt(0.7 * 0.3 / 800)
    assert pairs.drift == 0


def test_sigma_one_is_reconstruction(tokenizer):
    pairs = pairs_of(tokenizer, sigma=1.0)
    assert torch.equal(pairs.inputs, pairs.real)
    assert pairs.kept == 1


def test_pairs_do_not_depend_on_the_batch(tokenizer):
    whole, split = pairs_of(tokenizer), pairs_of(tokenizer, batch_size=5)
    assert torch.equal(whole.inputs, split.inputs)


def test_reencoded_pairs_are_codes_of_eight_bit_images(tokenizer):
    direct, again = pairs_of(tokenizer), pairs_of(tokenizer, pair_mode="reencode")
    pixels = to_uint8(tokenizer.detokenize(direct.inputs.long()))
    assert torch.equal(again.inputs.long(), tokenizer.tokenize(from_uint8(pixels)))
    assert torch.equal(again.inputs.long(), reencode(tokenizer, direct.inputs.long()))
    assert again.kept == direct.kept
    assert again.drift == float((again.inputs != direct.inputs).double().mean())
    assert again.drift > 0


def test_pairs_are_kept_for_the_same_arguments_only(tokenizer, tmp_path):
    calls = []

    def make(**changes):
        calls.clear()
        return pairs_of(tokenizer, cache=tmp_path / "pairs", progress=lambda *_: calls.append(1), **changes)

    first = make(pair_mode="reencode")
    assert len(calls) == 1
    again = make(pair_mode="reencode")
    assert calls == []
    assert torch.equal(again.inputs, first.inputs)
    assert (again.kept, again.drift) == (first.kept, first.drift)
    other = make(sigma=0.5)
    assert len(calls) == 1
    assert other.kept < first.kept
    (tmp_path / "pairs").write_bytes(b"torn")
    make(sigma=0.5)
    assert len(calls) == 1


def test_pairs_that_were_ended_go_on_after_the_last_block(tokenizer, tmp_path, monkeypatch):
    whole = pairs_of(tokenizer, batch_size=5)
    monkeypatch.setattr("mmpost_tokenizers.pairs.BLOCK", 10)
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done == 15:
            raise KeyboardInterrupt

    options = {"batch_size": 5, "cache": tmp_path / "pairs", "progress": stop}
    with pytest.raises(KeyboardInterrupt):
        pairs_of(tokenizer, **options)
    assert seen == [(5, 24), (10, 24), (15, 24)]
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.000000000"]
    seen.clear()
    again = pairs_of(tokenizer, **options | {"progress": lambda *at: seen.append(at)})
    assert seen == [(15, 24), (20, 24), (24, 24)]
    assert torch.equal(again.inputs, whole.inputs)
    assert torch.equal(again.real, whole.real)
    assert [file.name for file in tmp_path.iterdir()] == ["pairs"]


def test_classes_of_other_names_are_refused(tokenizer):
    maker = ClassConditionalGenerator(
        GeneratorConfig(layout_of(tokenizer), 3, "test", class_names=("ant", "bee", "cow")), seed=1
    )
    options = {"sigma": 0.8, "pair_mode": "direct", "sampling": SAMPLING}
    same_names = dataclasses.replace(pictures(4), classes=("ant", "bee", "cow"))
    assert torch.equal(
        make_pairs(same_names, tokenizer, maker, **options).inputs,
        make_pairs(pictures(4), tokenizer, maker, **options).inputs,
    )
    with pytest.raises(MmpostError) as caught:
        make_pairs(dataclasses.replace(pictures(4), classes=("bee", "cow")), tokenizer, maker, **options)
    assert str(caught.value) == (
        "the generator and the images of the pairs have other classes: 3 against 2, class 0 is 'ant' against 'bee'. "
        "Give images with the same class folders as those that the codes were made of [MMP-C119]"
    )


@pytest.mark.parametrize("sigma", [0.0, -0.1, 1.01, math.nan])
def test_sigma_outside_is_refused(tokenizer, sigma):
    words = (
        f"sigma={sigma:g} is outside (0, 1]: it is the share of real codes that a pair keeps. "
        "Choose 0.7 to 0.9; at 0 the codes have nothing to do with the image [MMP-C104]"
    )
    with pytest.raises(MmpostError) as caught:
        pairs_of(tokenizer, sigma=sigma)
    assert str(caught.value) == words
    pairs = pairs_of(tokenizer, 2)
    with pytest.raises(MmpostError) as caught:
        DecoderPostTrainer(build(), pairs, pairs, QUICK.model_copy(update={"sigma": sigma}))
    assert str(caught.value) == words


def test_generator_of_another_tokenizer_is_refused(tokenizer):
    other = generator_for(build(seed=1))
    with pytest.raises(MmpostError, match=r"the generator and the tokenizer do not .*: tokenizer hash .*MMP-C102"):
        make_pairs(pictures(2), tokenizer, other, sigma=0.8, pair_mode="direct", sampling=SAMPLING)
    wider = generator_for(build(quantizer=VQConfig(codebook_size=32, dim=4)))
    with pytest.raises(MmpostError, match=r"codebook size 32 against 16\..*MMP-C102"):
        make_pairs(pictures(2), tokenizer, wider, sigma=0.8, pair_mode="direct", sampling=SAMPLING)


def test_images_must_have_known_classes_and_stand_still(tokenizer):
    options = {"sigma": 0.8, "pair_mode": "direct", "sampling": SAMPLING}
    unlabelled = dataclasses.replace(pictures(2), labels=(-1, -1))
    with pytest.raises(MmpostError, match=r"class -1 is outside 0 to 2\..*MMP-C105"):
        make_pairs(unlabelled, tokenizer, generator_for(tokenizer), **options)
    flipped = dataclasses.replace(pictures(2), cutting=Cutting(8, flip=True))
    with pytest.raises(MmpostError, match=r"cut or flipped at random.*MMP-T074"):
        make_pairs(flipped, tokenizer, generator_for(tokenizer), **options)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantizer", [VQConfig(codebook_size=16, dim=4), EMAConfig(codebook_size=16, dim=4)], ids=["vq", "ema"]
)
def test_only_the_decoder_changes(quantizer, tmp_path):
    tokenizer = build(quantizer=quantizer)
    pairs, held = pairs_of(tokenizer), pairs_of(tokenizer, 12, seed=1)
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    images = from_uint8(pairs.images.stacked()[0])
    codes = tokenizer.tokenize(images)
    options = QUICK.model_copy(update={"weight_decay": 0.1})
    DecoderPostTrainer(tokenizer, pairs, held, options, folder=tmp_path).run()
    frozen = frozen_state(tokenizer)
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, before[name]) is (name in frozen), name
    assert {name.split(".")[0] for name in before if name not in frozen} == {"decoder", "post_quant_conv"}
    assert torch.equal(tokenizer.tokenize(images), codes)
    again = DiscreteTokenizer.from_pretrained(tmp_path / "final")
    assert same(again, tokenizer)
    assert layout_of(again) == pairs.layout


def test_nothing_frozen_asks_for_a_gradient():
    tokenizer = build()
    weights = freeze(tokenizer)
    trained = {id(weight) for weight in tokenizer.parameters() if weight.requires_grad}
    assert trained == {id(weight) for weight in weights}
    assert not any(value.requires_grad for value in frozen_state(tokenizer).values())


def test_a_changed_encoder_is_found():
    tokenizer = build()
    pairs = pairs_of(tokenizer)

    def spoil():
        with torch.no_grad():
            tokenizer.quant_conv.bias.add_(1e-6)
        return False

    with pytest.raises(MmpostError, match=r"encoder or quantizer changed during post-training.*MMP-T071"):
        DecoderPostTrainer(tokenizer, pairs, pairs, QUICK, stop=spoil).run()


def test_continued_run_has_the_same_bytes(tmp_path):
    def start(folder, **changes):
        tokenizer = build()
        adversary = adversary_of(_objective(), how="reset")
        options = QUICK.model_copy(update={"discriminator": "reset"})
        pairs, held = pairs_of(tokenizer), pairs_of(tokenizer, 12, seed=1)
        return DecoderPostTrainer(tokenizer, pairs, held, options, folder=folder, adversary=adversary, **changes)

    whole = start(tmp_path / "a")
    summary = whole.run()
    seen = []
    early = start(tmp_path / "b", report=seen.append, stop=lambda: len(seen) == 4)
    first = early.run()
    assert (first["finished"], first["steps"]) == (False, 3)
    torch.rand(5)
    again = start(tmp_path / "b", report=seen.append)
    assert again.step == 3
    assert again.run() == summary
    assert same(again.tokenizer, whole.tokenizer)
    assert [row["step"] for row in seen] == [0, 1, 2, 3, 4, 5, 6]
    assert ["pair_loss" in row for row in seen] == [True, False, True, False, True, False, True]
    for name, value in whole._adversary.state_dict().items():
        assert torch.equal(value, again._adversary.state_dict()[name]), name


def test_another_run_in_the_folder_is_refused(tmp_path):
    tokenizer = build()
    pairs = pairs_of(tokenizer)
    DecoderPostTrainer(tokenizer, pairs, pairs, QUICK, folder=tmp_path).run()
    with pytest.raises(MmpostError, match=r"holds a run with other options, codes or model.*MMP-T070"):
        DecoderPostTrainer(build(), pairs, pairs, QUICK.model_copy(update={"seed": 7}), folder=tmp_path)


def test_held_out_pair_loss_falls():
    """Spec 11.2, in small: the decoder learns from mixed codes what helps on mixed codes of other images."""
    tokenizer = build()
    pairs, held = pairs_of(tokenizer, 96, sigma=0.9), pairs_of(tokenizer, 48, seed=1, sigma=0.9)
    options = QUICK.model_copy(update={"sigma": 0.9, "max_steps": 40, "batch_size": 32, "eval_steps": 10})
    trainer = DecoderPostTrainer(tokenizer, pairs, held, options, loss=pixel_loss(DeepFeatureLoss()))
    chosen, told = (held.subset(rows) for rows in halves(48, options.seed))
    start = [trainer.pair_loss(half) for half in (chosen, told)]
    summary = trainer.run()
    assert [summary["pair_loss_select_before"], summary["pair_loss_before"]] == start
    assert summary["pair_loss_after"] < 0.8 * summary["pair_loss_before"]
    kept = DecoderPostTrainer(tokenizer, pairs, held, options, loss=pixel_loss(DeepFeatureLoss()))
    # The weights that were kept give the losses that are reported.
    assert kept.pair_loss(told) == pytest.approx(summary["pair_loss_after"], rel=1e-6)
    assert kept.pair_loss(chosen) == pytest.approx(summary["pair_loss_select_after"], rel=1e-6)


def test_one_half_chooses_and_the_other_reports():
    """The best step on the choosing half is a bad one on the other; exactly that is reported."""
    pairs = pairs_of(build(), 9)
    held = HeldOut.of(pairs, seed=7)
    first, second = halves(9, 7)
    assert sorted(first + second) == list(range(9))
    assert (len(held.select), len(held.report)) == (4, 5)
    assert torch.equal(held.select.inputs, pairs.inputs[first])
    assert [held.report.images[row][2] for row in range(5)] == [pairs.images[row][2] for row in second]
    assert (first, second) == halves(9, 7) != halves(9, 8)
    # At each step first the half that chooses is measured, then the other.
    found = iter([5.0, 50.0, 3.0, 70.0, 4.0, 20.0])
    for step in (0, 10, 20):
        weights = {"at": torch.tensor(step)}
        held.measure(step, lambda _: next(found), weights.copy)
    summary = held.summary()
    assert (summary["pair_loss_before"], summary["pair_loss_after"], summary["pair_loss_last"]) == (50.0, 70.0, 20.0)
    assert (summary["pair_loss_select_before"], summary["pair_loss_select_after"]) == (5.0, 3.0)
    assert (summary["best_step"], int(held.best_weights["at"])) == (10, 10)
    again = HeldOut.of(pairs, seed=7)
    again.restore(json.loads(json.dumps(held.state())), held.best_weights)
    assert again.summary() == summary


def test_one_held_out_pair_is_too_few(tokenizer):
    pairs = pairs_of(tokenizer, 4)
    with pytest.raises(MmpostError) as caught:
        DecoderPostTrainer(build(), pairs, pairs.subset([0]), QUICK)
    assert str(caught.value) == (
        "post-training needs two held-out images or more, one to choose and one to report; got 1. "
        "Give more in data.eval. [MMP-T078]"
    )


def test_micro_batches_do_not_change_the_step():
    results = []
    for size in (None, 3):
        tokenizer = build()
        options = QUICK.model_copy(update={"micro_batch_size": size, "max_steps": 2})
        summary = DecoderPostTrainer(tokenizer, pairs_of(tokenizer), pairs_of(tokenizer, 12, seed=1), options).run()
        results.append((summary, tokenizer.state_dict()))
    assert results[0][0]["pair_loss_last"] == pytest.approx(results[1][0]["pair_loss_last"], rel=1e-4)
    moved = build().state_dict()
    assert not torch.equal(moved["decoder.conv_out.weight"], results[0][1]["decoder.conv_out.weight"])
    for name, weight in results[0][1].items():
        torch.testing.assert_close(weight, results[1][1][name], atol=2e-4, rtol=1e-3)


def test_micro_batches_give_the_discriminator_the_whole_batch_too():
    """Without adaptive weight and running means every part of the loss is a mean over images."""
    gradients = []
    for size in (None, 4):
        tokenizer = build()
        options = QUICK.model_copy(update={"discriminator": "reset", "micro_batch_size": size, "max_steps": 1})
        adversary = adversary_of(_objective(adaptive=False, lecam=0.0), how="reset")
        pairs = pairs_of(tokenizer)
        DecoderPostTrainer(tokenizer, pairs, pairs, options, adversary=adversary).run()
        gradients.append([weight.grad.clone() for weight in adversary.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-3)
    assert max(float(whole.abs().max()) for whole in gradients[0]) > 1e-3


def test_it_stops_and_keeps_the_best_weights():
    tokenizer = build()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    pairs = pairs_of(tokenizer)
    # The opposite of the right direction: no measurement is better than the start.
    options = QUICK.model_copy(update={"max_steps": 50, "patience": 2, "eval_steps": 3})

    def worse(output, target):
        error = ((output - target) ** 2).mean()
        return -error if output.requires_grad else error

    summary = DecoderPostTrainer(tokenizer, pairs, pairs, options, loss=worse).run()
    assert (summary["steps"], summary["best_step"], summary["stopped_early"]) == (6, 0, True)
    assert summary["pair_loss_after"] == summary["pair_loss_before"]
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())


def test_rates_are_a_share_of_the_main_rate():
    options = PosttrainSection(max_steps=10)
    assert learning_rate(options, 0) == pytest.approx(4.8e-5)
    assert learning_rate(options, 5) == pytest.approx(0.6 * 4.8e-5)
    assert learning_rate(options, 10) == pytest.approx(0.2 * 4.8e-5)


def test_pairs_of_other_settings_are_refused(tokenizer):
    pairs = pairs_of(tokenizer, 2)
    with pytest.raises(MmpostError) as caught:
        DecoderPostTrainer(build(), pairs, pairs, QUICK.model_copy(update={"pair_mode": "reencode"}))
    assert str(caught.value) == (
        "the pairs were made with sigma=0.8 and pair_mode=direct; the options say 0.8 and reencode. "
        "Make the pairs again [MMP-T073]"
    )
    with pytest.raises(MmpostError, match=r"the tokenizer and the pairs do not belong together.*MMP-C102"):
        DecoderPostTrainer(build(seed=1), pairs, pairs, QUICK)


def test_not_finite_loss_ends_the_run(tokenizer):
    pairs = pairs_of(tokenizer, 8)
    with pytest.raises(MmpostError, match=r"not finite at step 1\..*MMP-T072"):
        DecoderPostTrainer(build(), pairs, pairs, QUICK, loss=lambda output, _: (output * math.nan).mean()).run()


# -- losses and discriminator ------------------------------------------------------------------------------------------


def _objective(**changes):
    options = {
        "perceptual": "none", "adversarial": 0.5, "lecam": 0.01,
        "discriminator": {"kind": "patchgan", "ndf": 4, "layers": 1, "norm": "group"},
    } | changes  # fmt: skip
    return Objective(LossesSection(**options), image_size=8, dim=4)


def test_losses_by_hand():
    output, target = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    error = ((output - target) ** 2).mean()
    torch.testing.assert_close(pixel_loss()(output, target), error)
    torch.testing.assert_close(pixel_loss(lambda a, b: (a - b).abs().mean(), 2.0)(output, target),
                               error + 2 * (output - target).abs().mean())  # fmt: skip
    whole = objective_loss(_objective(reconstruction_weight=3.0))
    torch.testing.assert_close(whole(output, target), 3 * error)


def test_a_discriminator_that_is_missing(tmp_path):
    pairs = pairs_of(build(), 2)
    with pytest.raises(MmpostError) as caught:
        DecoderPostTrainer(build(), pairs, pairs, QUICK.model_copy(update={"discriminator": "reuse"}))
    assert str(caught.value) == (
        "discriminator=reuse, but no discriminator is given. "
        "Give the one of the main training, or set discriminator=none [MMP-C108]"
    )
    with pytest.raises(MmpostError, match=r"there is no discriminator to reuse in .*MMP-C108"):
        adversary_of(_objective(), how="reuse", tokenizer_folder=tmp_path)
    with pytest.raises(MmpostError, match=r"losses\.adversarial is 0\..*MMP-C108"):
        adversary_of(_objective(adversarial=0.0), how="reset")
    assert adversary_of(_objective(adversarial=0.0), how="none") is None


def test_the_saved_discriminator_is_reused(tmp_path):
    saved = Objective(_objective().options, image_size=8, dim=4, seed=5).discriminator.state_dict()
    torch.save(saved, tmp_path / "discriminator.pt")
    reused = adversary_of(_objective(), how="reuse", tokenizer_folder=tmp_path)
    assert all(torch.equal(value, saved[name]) for name, value in reused.judge.state_dict().items())
    fresh = adversary_of(_objective(), how="reset", tokenizer_folder=tmp_path)
    assert not same(fresh.judge, reused.judge)
    name = next(iter(saved))
    torch.save({name: saved[name][:1]}, tmp_path / "discriminator.pt")
    with pytest.raises(MmpostError, match=f"has another shape: {name}.*MMP-C108"):
        adversary_of(_objective(), how="reuse", tokenizer_folder=tmp_path)
