"""The trainer of tokenizers: continuation to the bit, perturbation in its place, schedules, health, running means."""

import json
import math

import numpy as np
import pytest
import torch

from mmpost.core.errors import MmpostError
from mmpost.train.distributed import Processes
from mmpost_tokenizers import opening
from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.batches import ImageBatches
from mmpost_tokenizers.ema import RunningMean
from mmpost_tokenizers.health import CodebookMeter, count, health_of
from mmpost_tokenizers.images import Cutting, images_from_arrays
from mmpost_tokenizers.objective import Objective, TrainingPass
from mmpost_tokenizers.options import CNNSettings, LossesSection, TokenizerConfig, TokenizerTrainSection
from mmpost_tokenizers.perturbation import LatentPerturbation
from mmpost_tokenizers.training import TokenizerTrainer, learning_rate

SHAPE = {
    "kind": "cnn", "image_size": 16, "stem_patch": 4, "block_out_channels": [8], "layers_per_block": 1, "z_channels": 8,
    "norm_groups": 4, "lowest_attention": False, "mid_attention": False,
    "quantizer": {"kind": "vq", "codebook_size": 16, "dim": 4},
}  # fmt: skip
ADVERSARY = {
    "perceptual": "none", "adversarial": 0.5, "adversarial_start": 0.3, "lecam": 0.01,
    "discriminator": {"kind": "patchgan", "ndf": 4, "layers": 2, "norm": "group"},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokenizer():
    return opening.new_tokenizer(CNNSettings.model_validate(SHAPE), seed=1)


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16), dtype=np.uint8)
    return images_from_arrays(pixels, [n % 3 for n in range(24)], cutting=Cutting(16, "random", True))


class Lines(list):
    """What a run folder would have been told."""

    def log(self, record):
        self.append(json.loads(json.dumps(record)))

    def event(self, kind, text, **fields):
        self.append({"event": kind, "text": text, **fields})

    def offsets(self):
        return {"metrics.jsonl": len(self)}

    def truncate(self, offsets, step=None):
        del self[offsets["metrics.jsonl"] :]


def trainer(images, out, folder=None, *, tokenizer=None, losses=None, perturb=None, **train):
    shape = {**SHAPE, "perturb": {"beta": 0.5, "delta": 4, **(perturb or {})}, **(tokenizer or {})}
    options = {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "ema_decay": 0.9, **train}
    config = TokenizerConfig(tokenizer=shape, losses=losses or {"perceptual": "none"}, train=options)
    fresh = opening.new_tokenizer(config.tokenizer, seed=options.get("seed", 42))
    batches = ImageBatches(images, batch_size=8, seed=3)
    return TokenizerTrainer(fresh, batches, config, processes=Processes(strategy="ddp"), output=out, folder=folder)


def state_of(run):
    found = {f"tokenizer.{name}": value for name, value in run.tokenizer.state_dict().items()}
    found |= {f"mean.{name}": value for name, value in run.mean.model.state_dict().items()}
    return found | {f"objective.{name}": value for name, value in run.objective.state_dict().items()}


def untimed(lines):
    return [
        {name: value for name, value in line.items() if name not in ("time", "phase_s", "wait_share", "event", "text")}
        for line in lines
        if "event" not in line
    ]


def test_a_run_that_was_ended_and_continued_gives_the_same_bits(images, tmp_path):
    options = {"losses": ADVERSARY, "revive_steps": 2, "health_window": 3}
    whole = trainer(images, tmp_path / "whole", Lines(), **options)
    whole.run()
    lines = Lines()
    first = trainer(images, tmp_path / "cut", lines, save_steps=3, **options)
    # Ended one step after the checkpoint; what was logged since is forgotten.
    first.batches = Ending(first.batches, after=4)
    with pytest.raises(StopIteration):
        first.run()
    second = trainer(images, tmp_path / "cut", lines, save_steps=3, **options)
    second.resume(tmp_path / "cut" / "checkpoints" / "step-000003")
    assert second.state.step == 3
    second.run()
    for name, value in state_of(whole).items():
        assert torch.equal(value, state_of(second)[name]), name
    assert untimed(lines) == untimed(whole.folder)
    assert [line["step"] for line in untimed(lines)] == [1, 2, 3, 4, 5, 6]
    assert any("discriminator" in line for line in lines)


class Ending:
    """Batches that stop, as a killed process would."""

    def __init__(self, batches, after):
        self._batches, self._after = batches, after

    def __iter__(self):
        for number, batch in enumerate(self._batches):
            if number == self._after:
                return
            yield batch

    def __getattr__(self, name):
        return getattr(self._batches, name)


def test_a_checkpoint_opens_as_a_tokenizer_and_holds_the_running_means(images, tmp_path):
    run = trainer(images, tmp_path, max_steps=2)
    mean = run.run()
    run.save()
    opened = DiscreteTokenizer.from_pretrained(tmp_path / "checkpoints" / "step-000002")
    shown = torch.stack([images[n][0] for n in range(4)])
    assert torch.equal(opened.tokenize(shown), mean.tokenize(shown))
    raw = run.tokenizer.decoder.conv_in.weight
    assert not torch.equal(opened.decoder.conv_in.weight, raw)


@pytest.mark.parametrize("quantizer", [
    {"kind": "vq", "codebook_size": 16, "dim": 4}, {"kind": "vq_ema", "codebook_size": 16, "dim": 4},
    {"kind": "lfq", "dim": 4}, {"kind": "bsq", "dim": 4}, {"kind": "fsq", "levels": [4, 4]},
    {"kind": "product", "groups": 2, "part": {"kind": "vq", "codebook_size": 16, "dim": 2}},
    {"kind": "residual", "depth": 2, "part": {"kind": "vq", "codebook_size": 16, "dim": 4, "l2_norm": False}},
    {"kind": "multi_scale", "scales": [1, 2, 4], "part": {"kind": "vq", "codebook_size": 16, "dim": 4}},
], ids=lambda quantizer: quantizer["kind"])  # fmt: skip
def test_every_quantizer_trains_under_perturbation(images, tmp_path, quantizer):
    lines = Lines()
    run = trainer(images, tmp_path, lines, tokenizer={"quantizer": quantizer}, max_steps=2, perturb={"beta": 1.0})
    before = run.tokenizer.encoder.conv_in.weight.clone()
    run.run()
    assert not torch.equal(before, run.tokenizer.encoder.conv_in.weight)
    assert all(0 < line["changed"] <= 1 for line in lines)
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_perturbation_changes_the_images_and_no_loss_of_the_quantizer(tokenizer, images):
    batch = torch.stack([images[n][0] for n in range(8)])
    module = TrainingPass(tokenizer)
    clean = module(batch)
    moved = module(batch, LatentPerturbation(1.0, 1.0, 8), torch.Generator().manual_seed(0))
    assert torch.equal(clean.indices, moved.indices)
    assert torch.equal(clean.latents, moved.latents)
    for name, value in clean.losses.items():
        assert torch.equal(value, moved.losses[name]), name
    assert not torch.equal(clean.images, moved.images)
    assert moved.changed > 0.5
    # Neither a share nor a ratio of zero changes a bit.
    for perturb, ratio in ((LatentPerturbation(1.0, 0.0, 8), 1.0), (LatentPerturbation(1.0, 1.0, 8), 0.0)):
        same = module(batch, perturb, torch.Generator().manual_seed(0), ratio)
        assert torch.equal(clean.images, same.images)


def test_the_reconstruction_moves_the_encoder_and_never_the_codes(tokenizer, images):
    batch = torch.stack([images[n][0] for n in range(8)])
    done = TrainingPass(tokenizer)(batch, LatentPerturbation(1.0, 1.0, 8), torch.Generator().manual_seed(0))
    (done.images - batch).square().mean().backward()
    assert tokenizer.quantizer.weight.grad is None or not tokenizer.quantizer.weight.grad.any()
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0


def test_the_adversary_waits_for_its_start(images, tmp_path):
    lines = Lines()
    trainer(images, tmp_path, lines, losses=ADVERSARY).run()
    # Share 0.3 of six steps: the first step at or behind it is the third.
    assert ["adversarial" in line for line in lines] == [False, False, True, True, True, True]
    assert ["lecam" in line for line in lines] == [False, False, True, True, True, True]


def test_annealing_reaches_the_log(images, tmp_path):
    lines = Lines()
    perturb = {"beta": 1.0, "delta": 8, "anneal_start": 0.0, "anneal_end": 0.5, "end_ratio": 0.0}
    trainer(images, tmp_path, lines, perturb=perturb).run()
    changed = [line["changed"] for line in lines]
    assert changed[0] > 0.5
    assert changed[3:] == [0, 0, 0]


def test_2_to_the_24_codes_train_under_perturbation_without_being_listed(images, tmp_path):
    lines = Lines()
    quantizer = {"kind": "lfq", "dim": 24}
    perturb = {"beta": 1.0, "delta": 301, "end_ratio": 1.0}
    run = trainer(images, tmp_path, lines, tokenizer={"quantizer": quantizer}, max_steps=2, perturb=perturb)
    seen = []

    def watched(tokenizer, indices, **options):
        moved = type(run.perturbation).forward(run.perturbation, tokenizer, indices, **options)
        seen.append((indices, moved.indices))
        return moved

    run.perturbation.forward = watched
    run.run()
    run.save()
    # 301 codes are the code itself, the 24 that differ in one bit and the 276 that differ in two.
    distances = torch.cat([((old ^ new)[..., None] >> torch.arange(24) & 1).sum(-1).flatten() for old, new in seen])
    assert distances.unique().tolist() in ([1, 2], [0, 1, 2])
    assert float((distances == 2).double().mean()) == pytest.approx(276 / 301, abs=0.07)
    assert lines[-1]["changed"] == pytest.approx(1 - 1 / 301, abs=0.05)
    assert 0 < lines[-1]["codebook"]["usage"] < 1e-4
    again = trainer(images, tmp_path, tokenizer={"quantizer": quantizer}, max_steps=2, perturb=perturb)
    again.resume(tmp_path / "checkpoints" / "step-000002")
    assert again.meter.health() == run.meter.health()


REFUSED = {
    "latents of 2^24 codes": (
        {"quantizer": {"kind": "lfq", "dim": 24}, "perturb": {"neighbour_of": "latent", "beta": 1.0, "delta": 4}}, {},
        "16777216 codes are too many to list one by one (at most 1048576). "
        "Set tokenizer.perturb.neighbour_of=code, which counts neighbours without listing codes. [MMP-C077]",
    ),
    "revival of fixed codes": (
        {"quantizer": {"kind": "lfq", "dim": 4}}, {"revive_steps": 2},
        "the codes of quantizer 'LFQuantizer' are fixed, so none can be revived. "
        "Set train.revive_steps=0. [MMP-C076]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_quantizer_cannot_do_is_refused_before_training(name, images, tmp_path):
    shape, train, message = REFUSED[name]
    with pytest.raises(MmpostError) as caught:
        trainer(images, tmp_path, tokenizer=shape, perturb=shape.get("perturb"), **train)
    assert str(caught.value) == message


def test_a_gradient_that_is_not_finite_changes_nothing_and_stops_the_third_time(images, tmp_path):
    run = trainer(images, tmp_path, Lines())
    before = run.tokenizer.decoder.conv_in.weight.clone()
    with torch.no_grad():
        run.tokenizer.decoder.conv_out.bias.fill_(math.nan)
    with pytest.raises(MmpostError) as caught:
        run.run()
    assert str(caught.value) == (
        "the gradient was not finite in 3 steps in a row (last: step 3). "
        "Lower train.learning_rate, or set train.bf16=false. [MMP-T081]"
    )
    assert torch.equal(before, run.tokenizer.decoder.conv_in.weight)


def test_learning_rate_by_hand():
    train = TokenizerTrainSection(learning_rate=1.0, min_learning_rate=0.2, warmup_steps=2)
    assert [learning_rate(train, 1.0, step, 6) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert learning_rate(train, 1.0, 4, 6) == pytest.approx(0.6)
    assert learning_rate(train, 1.0, 6, 6) == pytest.approx(0.2)
    # A discriminator whose peak lies below the floor keeps its peak.
    assert learning_rate(train, 0.1, 6, 6) == pytest.approx(0.1)


def test_running_mean_by_hand(tokenizer):
    mean = RunningMean(tokenizer, 0.9)
    start = mean.model.quant_conv.weight.clone()
    with torch.no_grad():
        tokenizer.quant_conv.weight.add_(1.0)
    mean.update(0)  # warmed up: (1 + 0) / (10 + 0) of the old value stays
    assert torch.allclose(mean.model.quant_conv.weight, start + 0.9)
    mean.update(1000)
    assert torch.allclose(mean.model.quant_conv.weight, start + 0.9 + 0.1 * 0.1)
    assert RunningMean(tokenizer, 0.0).model is tokenizer


def test_health_by_hand():
    found = health_of(torch.tensor([[2, 2, 0, 0]]))
    assert (found.usage, found.dead, found.tokens) == (0.5, 2, 4)
    assert found.perplexity == pytest.approx(2.0)
    two = count(torch.tensor([[[0, 1], [0, 0]]]), 2, 2)
    assert two.tolist() == [[2, 0], [1, 1]]
    meter = CodebookMeter(4, window=2)
    for code in (0, 1, 2):
        meter.add(torch.full((1, 2), code))
    assert meter.total().tolist() == [[0, 2, 2, 0]]  # the first step has left the window


def test_many_codes_are_counted_as_few_are():
    """The sparse counts of 2^40 codes give the figures that dense counts of the same hits give."""
    draw = torch.Generator().manual_seed(0)
    places = torch.randint(0, 9, (5, 4, 2), generator=draw)
    few, many = CodebookMeter(10, 2, window=3), CodebookMeter(2**40, 2, window=3)
    for step in places:
        few.add(step)
        many.add(step * 7_000_000_001)
    here, there = few.health(), many.health()
    assert there.perplexity == pytest.approx(here.perplexity, rel=1e-12)
    assert there.tokens == here.tokens == 12
    assert 2 * 2**40 - there.dead == 20 - here.dead
    assert there.usage * 2**40 == pytest.approx(here.usage * 10)
    again = CodebookMeter(2**40, 2, window=3)
    again.load_state_dict(many.state_dict())
    assert again.health() == there
    assert CodebookMeter(2**40).health().tokens == 0


def test_dead_codes_are_revived_on_latents_of_the_batch(images, tmp_path):
    lines = Lines()
    run = trainer(images, tmp_path, lines, revive_steps=1, max_steps=1)
    run.run()
    assert lines[0]["revived"] == 16 - round(lines[0]["codebook"]["usage"] * 16)


def test_objective_reports_what_it_minimises(tokenizer, images):
    batch = torch.stack([images[n][0] for n in range(8)])
    objective = Objective(LossesSection(perceptual="features", perceptual_weight=0.5), image_size=16, dim=4)
    done = TrainingPass(tokenizer)(batch)
    total, parts = objective.generator_loss(done, batch, tokenizer.last_layer, adversarial=False)
    assert set(parts) == {"rec", "features", "vq", "commit"}
    expected = parts["rec"] + 0.5 * parts["features"] + parts["vq"] + parts["commit"]
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_discriminator_too_large_for_the_images_is_refused():
    with pytest.raises(MmpostError) as caught:
        Objective(LossesSection(adversarial=0.5), image_size=16, dim=4)
    assert str(caught.value) == (
        "losses.discriminator.layers=3 needs images of 24 pixels; tokenizer.image_size is 16. "
        "Lower losses.discriminator.layers. [MMP-C113]"
    )


def test_resident_pictures_are_the_same_pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 20, 20), dtype=np.uint8)
    images = images_from_arrays(pixels, range(6), cutting=Cutting(16))
    kept = opening.resident(images)
    assert kept is not images
    for index in range(6):
        assert torch.equal(kept[1, index][0], images[index][0])
        assert kept[index][1:] == images[index][1:]
    assert kept.fingerprint == images.fingerprint
    moving = images_from_arrays(pixels, range(6), cutting=Cutting(16, "random"))
    assert opening.resident(moving) is moving
