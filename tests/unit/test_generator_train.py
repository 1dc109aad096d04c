"""Training of the generator: likelihood, exact continuation, and that classes are hidden for guidance."""

import math

import numpy as np
import pytest
import torch

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.generator import train
from mmpost_tokenizers.generator.layout import CodeLayout
from mmpost_tokenizers.generator.model import ClassConditionalGenerator, GeneratorConfig
from mmpost_tokenizers.generator.options import GeneratorModelSection, GeneratorTrainSection
from mmpost_tokenizers.generator.pretokenize import Codes
from mmpost_tokenizers.generator.sample import Guidance, Sampling, generate
from mmpost_tokenizers.generator.train import GeneratorTrainer, mean_nll, new_generator, unigram_nll

LAYOUT = CodeLayout(codebook_size=16, groups=1, grid=(2, 2), tokenizer_sha256="a" * 64)
QUICK = GeneratorTrainSection(
    max_steps=6, batch_size=8, learning_rate=1e-3, save_steps=2, eval_steps=3, logging_steps=1
)


def toy_codes(count, *, crops=1, seed=0, layout=LAYOUT):
    """Codes that the class decides half of the time: class c prefers codes 4c to 4c + 3."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    shape = (count, crops, *layout.shape)
    own = labels.reshape(-1, *[1] * (len(shape) - 1)) * 4 + rng.integers(0, 4, shape)
    codes = np.where(rng.random(shape) < 0.7, own, rng.integers(0, 16, shape)) % layout.codebook_size
    keys = [f"{seed}-{i}" for i in range(count)]
    return Codes(layout, torch.from_numpy(codes.astype(np.uint16)), torch.from_numpy(labels), keys)


def small(seed=1, **changes):
    torch.set_num_threads(1)
    fields = {"layout": LAYOUT, "num_classes": 4, "size": "test", "dropout": 0.1} | changes
    return ClassConditionalGenerator(GeneratorConfig(**fields), seed=seed)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_continued_run_has_the_same_bytes(tmp_path):
    codes, held = toy_codes(20, crops=2), toy_codes(9, seed=1)
    straight = small()
    torch.manual_seed(1)
    whole = GeneratorTrainer(straight, codes, held, QUICK, folder=tmp_path / "a").run()
    first = small()
    seen = []
    torch.manual_seed(2)
    early = GeneratorTrainer(
        first, codes, held, QUICK, folder=tmp_path / "b", report=seen.append, stop=lambda: len(seen) == 3
    ).run()
    assert (early["finished"], early["steps"]) == (False, 3)
    assert not (tmp_path / "b" / "final").exists()
    second = small(seed=9)
    trainer = GeneratorTrainer(second, codes, held, QUICK, folder=tmp_path / "b", report=seen.append)
    assert trainer.step == 3
    again = trainer.run()
    assert same_weights(straight, second)
    assert again == whole
    assert [row["step"] for row in seen] == [1, 2, 3, 4, 5, 6]
    assert ["held_out_nll" in row for row in seen] == [False, False, True, False, False, True]
    kept = sorted(place.name for place in (tmp_path / "b" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]
    assert same_weights(ClassConditionalGenerator.from_pretrained(tmp_path / "b" / "final"), straight)


def test_training_leaves_the_global_stream():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    GeneratorTrainer(small(), toy_codes(8), None, QUICK).run()
    assert torch.equal(torch.rand(3), expected)


def test_micro_batches_do_not_change_the_step():
    results = []
    for size in (None, 3):
        model = small(dropout=0.0)
        GeneratorTrainer(model, toy_codes(20), None, QUICK.model_copy(update={"micro_batch_size": size})).run()
        results.append(model.state_dict())
    for name, weight in results[0].items():
        # Adam divides by the root of tiny second moments, which enlarges rounding of the sums.
        torch.testing.assert_close(weight, results[1][name], atol=2e-5, rtol=1e-4)


def test_another_run_in_the_folder_is_refused(tmp_path):
    codes = toy_codes(20)
    GeneratorTrainer(small(), codes, None, QUICK, folder=tmp_path).run()
    others = [
        (codes, QUICK.model_copy(update={"learning_rate": 2e-3}), small()),
        (toy_codes(20, seed=5), QUICK, small()),
        (codes, QUICK, small(class_dropout=0.3)),
    ]
    for other, options, model in others:
        with pytest.raises(MmpostError) as caught:
            GeneratorTrainer(model, other, None, options, folder=tmp_path)
        assert str(caught.value) == (
            f"'{tmp_path}' holds a run with other options, codes or model. "
            "Choose another folder, or the options of that run [MMP-T070]"
        )
    louder = QUICK.model_copy(update={"logging_steps": 2, "save_steps": 5})
    assert GeneratorTrainer(small(), codes, None, louder, folder=tmp_path).step == 6


def test_codes_of_another_tokenizer_are_refused():
    other = CodeLayout(16, 1, (2, 2), "b" * 64)
    with pytest.raises(MmpostError) as caught:
        GeneratorTrainer(small(), toy_codes(8, layout=other), None, QUICK)
    assert str(caught.value) == (
        "the generator and the training codes do not belong together: "
        "tokenizer hash aaaaaaaaaaaa against bbbbbbbbbbbb. "
        "Use the tokenizer that the codes were made with [MMP-C102]"
    )
    with pytest.raises(MmpostError, match="the generator and the held-out codes do not belong together"):
        GeneratorTrainer(small(), toy_codes(8), toy_codes(8, layout=other), QUICK)


def test_labels_decide_about_the_classes():
    codes = toy_codes(8)
    assert new_generator(GeneratorModelSection(size="test"), codes, seed=0).config.num_classes == 4
    with pytest.raises(MmpostError, match=r"class 3 is outside 0 to 2\..*MMP-C105"):
        new_generator(GeneratorModelSection(size="test", num_classes=3), Codes(
            LAYOUT, codes.codes[:1], torch.tensor([3]), ["a"]), seed=0)  # fmt: skip
    unlabelled = Codes(LAYOUT, codes.codes, torch.full((8,), -1), codes.keys)
    with pytest.raises(MmpostError, match=r"class -1 is outside"):
        new_generator(GeneratorModelSection(size="test"), unlabelled, seed=0)


def test_rows_crops_and_hidden_classes():
    codes = toy_codes(40, crops=3)
    options = QUICK.model_copy(update={"batch_size": 10})
    trainer = GeneratorTrainer(small(class_dropout=0.25), codes, None, options)
    rows, hidden, crops = [], [], []
    for step in range(100):
        trainer.step = step
        labels, chosen, mask = trainer._rows()
        hidden.append(mask.float().mean())
        for label, row in zip(labels, chosen, strict=True):
            match = (codes.codes.long() == row).all(-1).all(-1)
            image, crop = match.nonzero()[0].tolist()
            assert codes.labels[image] == label
            rows.append(image)
            crops.append(crop)
    # 25 epochs of 40 images; equal codes of two images are rare and would show as a wrong count.
    for epoch in range(25):
        assert len(set(rows[epoch * 40 : (epoch + 1) * 40])) >= 39
    assert rows[:40] != rows[40:80]
    assert abs(float(torch.stack(hidden).mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 1000)
    share = np.bincount(crops, minlength=3) / 1000
    assert np.abs(share - 1 / 3).max() < 0.07


def test_only_hidden_classes_train_the_null_embedding():
    for share, moves in ((0.0, False), (0.5, True)):
        model = small(class_dropout=share)
        before = model.llama.get_input_embeddings().weight[-1].clone()
        GeneratorTrainer(model, toy_codes(20), None, QUICK.model_copy(update={"weight_decay": 0.0})).run()
        assert torch.equal(model.llama.get_input_embeddings().weight[-1], before) is not moves


def test_norm_gains_are_not_decayed():
    groups = train._optimizer(small(), QUICK).param_groups
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert {weight.dim() for weight in groups[0]["params"]} == {2}
    assert {weight.dim() for weight in groups[1]["params"]} == {1}


def test_learning_rates():
    options = GeneratorTrainSection(
        learning_rate=1.0, warmup_steps=4, lr_scheduler_type="cosine", min_learning_rate=0.2
    )
    rates = [train.learning_rate(options, step, 12) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.6)
    assert train.learning_rate(options, 12, 12) == pytest.approx(0.2)
    constant = GeneratorTrainSection()
    assert {train.learning_rate(constant, step, 10) for step in range(10)} == {1e-4}


def test_unigram_by_hand():
    layout = CodeLayout(2, 2, (1,), "")
    seen = Codes(layout, torch.tensor([[[[0, 1]]], [[[0, 0]]]]), torch.zeros(2), ["a", "b"])
    asked = Codes(layout, torch.tensor([[[[0, 1]]]]), torch.zeros(1), ["c"])
    # Group 0 saw 0 twice: (2 + 1) / 4; group 1 saw each once: 1 / 2.
    assert unigram_nll(seen, asked) == pytest.approx(-(math.log(3 / 4) + math.log(1 / 2)) / 2)


def test_mean_nll_does_not_depend_on_batches(monkeypatch):
    model, codes = small(), toy_codes(11, crops=2)
    whole = mean_nll(model, codes)
    monkeypatch.setattr(train, "EVAL_BATCH", 4)
    assert mean_nll(model, codes) == pytest.approx(whole, rel=1e-6)
    with torch.no_grad():
        direct = model.eval().nll(codes.labels, codes.codes[:, 0].long()).mean()
    assert whole == pytest.approx(float(direct), rel=1e-5)


def test_not_finite_loss_ends_the_run():
    model = small()
    with torch.no_grad():
        model.llama.lm_head.weight[0, 0] = math.nan
    with pytest.raises(MmpostError, match=r"the loss is not finite at step 1\..*MMP-T072"):
        GeneratorTrainer(model, toy_codes(8), None, QUICK).run()


def test_it_learns_the_classes_and_guidance_follows_them():
    codes, held = toy_codes(400), toy_codes(100, seed=1)
    model = small(dropout=0.0)
    options = GeneratorTrainSection(max_steps=60, batch_size=32, learning_rate=2e-3)
    summary = GeneratorTrainer(model, codes, held, options).run()
    # The best possible is 0.7 of four codes plus 0.3 of sixteen: 2.13 nats; without the class it is log 16 = 2.77.
    assert summary["unigram_nll"] == pytest.approx(math.log(16), abs=0.05)
    assert summary["held_out_nll"] < 2.45
    classes = torch.arange(200) % 4
    agrees = [
        float((generate(model, classes, sampling=Sampling(guidance=Guidance(w), batch_size=200)) // 4
               == classes[:, None, None]).float().mean())
        for w in (1.0, 3.0)
    ]  # fmt: skip
    assert agrees[0] > 0.5
    assert agrees[1] > agrees[0] + 0.1
