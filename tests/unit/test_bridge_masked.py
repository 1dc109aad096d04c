import math

import pytest
import torch

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.bridge.head import PUBLISHED, DimensionHead, HeadConfig, ParallelHead
from mmpost_tokenizers.bridge.levels import PostTrainingConfig, PostTrainingQuantizer
from mmpost_tokenizers.bridge.masked import (
    NO_CLASS,
    SIZES,
    MaskedBackbone,
    MaskedConfig,
    MaskedGenerator,
    cosine_schedule,
    mask_rate,
)
from mmpost_tokenizers.bridge.options import BridgeTrainSection
from mmpost_tokenizers.bridge.training import BridgeTrainer

SMALL = MaskedConfig(classes=3, grid=(2, 3), channels=2, width=16, encoder_depth=1, decoder_depth=1, heads=2, buffer=2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(kind=DimensionHead, order=(1, 0)):
    """A generator of 2x3 positions, 2 channels and 5 levels, in eval mode, not at its start."""
    torch.manual_seed(0)
    head = kind(HeadConfig(channels=2, levels=5, z_dim=16, width=16, depth=1, heads=2), order)
    quantizer = PostTrainingQuantizer(PostTrainingConfig(dim=2, levels=5, max_saturation=None))
    model = MaskedGenerator(MaskedBackbone(SMALL), head, quantizer)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    return model.eval()


def maps(rows=8, seed=0):
    return torch.randint(0, 5, (rows, 2, 3, 2), generator=generator(seed)), torch.arange(rows) % 3


def options(**fields):
    defaults = {"batch_size": 4, "epochs": 3, "warmup_epochs": 1, "precision": "float32", "ema": 0.9}
    return BridgeTrainSection(**{**defaults, **fields})


@torch.no_grad()
def test_features_depend_on_known_positions_alone():
    backbone = small().backbone
    values = torch.randn(1, 6, 2, generator=generator())
    order = torch.tensor([[4, 1, 0, 5, 2, 3]])
    labels = torch.tensor([1])
    before = backbone(values, labels, order, 3)
    for position in range(6):
        changed = values.clone()
        changed[:, position] += 1
        differs = not torch.equal(backbone(changed, labels, order, 3), before)
        assert differs == (position in (5, 2, 3))


@torch.no_grad()
def test_order_among_known_and_among_masked_does_not_matter():
    backbone = small().backbone
    values, labels = torch.randn(1, 6, 2, generator=generator()), torch.tensor([1])
    one = backbone(values, labels, torch.tensor([[4, 1, 0, 5, 2, 3]]), 3)
    other = backbone(values, labels, torch.tensor([[0, 4, 1, 3, 5, 2]]), 3)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@torch.no_grad()
def test_class_changes_features_and_none_is_one_vector():
    backbone = small().backbone
    values, order = torch.zeros(3, 6, 2), torch.arange(6).expand(3, -1)
    first, second, none = backbone(values, torch.tensor([0, 1, NO_CLASS]), order, 6)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, none)


def test_mask_rates_are_a_cut_normal():
    draw = generator()
    rates = torch.tensor([mask_rate(SIZES["L"], draw) for _ in range(5000)], dtype=torch.float64)
    assert float(rates.min()) >= 0.7
    assert float(rates.max()) <= 1
    # Mean of a normal cut to [-1.2, 0] deviations: -(phi(0) - phi(1.2)) / (1/2 - Phi(-1.2)) deviations.
    density = 1 / math.sqrt(2 * math.pi)
    mass = 0.5 - 0.5 * math.erfc(1.2 / math.sqrt(2))
    mean = 1 - 0.25 * density * (1 - math.exp(-0.72)) / mass
    assert float(rates.mean()) == pytest.approx(mean, abs=5 * 0.085 / 5000**0.5)


@pytest.mark.parametrize(("length", "steps"), [(256, 256), (256, 64), (16, 16), (16, 3), (6, 1)])
def test_schedule_falls_to_zero(length, steps):
    left = cosine_schedule(length, steps)
    assert len(left) == steps
    assert left[-1] == 0
    assert all(after < before for before, after in zip([length, *left], left, strict=False))
    if steps == 64:
        assert left[31] == math.floor(256 * math.cos(math.pi / 4))


def test_sampling_is_reproducible_and_in_range():
    model, labels = small(), torch.tensor([0, 1, 2, NO_CLASS])
    one = model.generate(labels, steps=4, generator=generator(1))
    assert one.shape == (4, 2, 3, 2)
    assert torch.equal(one, model.generate(labels, steps=4, generator=generator(1)))
    assert not torch.equal(one, model.generate(labels, steps=4, generator=generator(2)))
    assert int(one.min()) >= 0
    assert int(one.max()) <= 4
    with pytest.raises(MmpostError) as error:
        model.generate(labels, steps=7, generator=generator())
    assert str(error.value) == "bridge: 7 steps for 6 positions. Take 1 to 6 steps. [MMP-C096]"


@torch.no_grad()
def test_guidance_mixes_features_before_the_head():
    model, labels = small(), torch.tensor([0, 1])
    values, order = torch.zeros(2, 6, 2), torch.arange(6).expand(2, -1)
    with_class = model.backbone(values, labels, order, 6)
    without = model.backbone(values, torch.full((2,), NO_CLASS), order, 6)
    # One step with constant guidance predicts all positions from one pass.
    z = without + 3 * (with_class - without)
    likeliest = model.head.sample(z.flatten(0, 1), temperature=0).view(2, 2, 3, 2)
    found = model.generate(labels, steps=1, guidance=3, schedule="constant", temperature=0, generator=generator())
    assert torch.equal(found, likeliest)


def test_likelihood_is_of_masked_positions_and_any_class_hides_the_class():
    model = small()
    indices, labels = maps()
    nats = model.nats(indices, labels, generator())
    assert nats.shape[0] == 8
    assert nats.shape[1] in (5, 6)
    assert nats.shape[2] == 2
    assert torch.equal(nats, model.nats(indices, labels, generator()))


@pytest.mark.parametrize("kind", [DimensionHead, ParallelHead])
def test_saved_and_opened(tmp_path, kind):
    model = small(kind)
    model.save_pretrained(tmp_path)
    again = MaskedGenerator.from_pretrained(tmp_path)
    assert type(again.head) is kind
    assert again.head.order.tolist() == [1, 0]
    indices, labels = maps()
    assert torch.equal(model.nats(indices, labels, generator()), again.nats(indices, labels, generator()))


@pytest.mark.parametrize(
    ("name", "head", "backbone", "whole"),
    [
        ("B", "65M", 172_174_848, 252_706_304),
        ("L", "65M", 406_095_872, 486_889_472),
        ("H", "94M", 791_196_160, 910_040_576),
    ],
)
def test_published_sizes(name, head, backbone, whole):
    # Published: 172M for the spatial model B; 486M and 910M for L and H with their heads.
    width, depth = PUBLISHED[head]
    with torch.device("meta"):
        spatial = MaskedBackbone(SIZES[name])
        sizes = HeadConfig(width=width, depth=depth, z_dim=SIZES[name].width)
        parts = (spatial, DimensionHead(sizes))
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert (counts[0], sum(counts)) == (backbone, whole)


def test_parts_must_fit():
    model = small()
    wide = DimensionHead(HeadConfig(channels=2, levels=5, z_dim=8, width=16, depth=1, heads=2))
    with pytest.raises(MmpostError) as error:
        MaskedGenerator(model.backbone, wide, model.quantizer)
    assert str(error.value) == (
        "bridge: width of z of the parts differ: 16, 8. Build the parts from one configuration. [MMP-C095]"
    )


@pytest.mark.parametrize(
    ("indices", "labels", "text"),
    [
        (torch.zeros(2, 3, 3, 2), torch.zeros(2), "index maps of shape (3, 3, 2), but the model has (2, 3, 2)"),
        (torch.full((2, 2, 3, 2), 5), torch.zeros(2), "indices from 5 to 5, but the model has 0..4"),
        (torch.zeros(2, 2, 3, 2), torch.tensor([0, 3]), "labels from 0 to 3, but the model has -1..2"),
    ],
)
def test_data_must_fit(indices, labels, text):
    with pytest.raises(MmpostError) as error:
        BridgeTrainer(small(), indices, labels, options())
    fix = "Encode the images with the tokenizer that the model was made for."
    assert str(error.value) == f"bridge: {text}. {fix} [MMP-C095]"


def test_paper_defaults():
    section = BridgeTrainSection()
    assert (section.learning_rate, section.batch_size, section.epochs, section.warmup_epochs) == (8e-4, 2048, 800, 200)
    assert (section.adam_beta1, section.adam_beta2, section.weight_decay) == (0.9, 0.95, 0.02)
    assert (section.ema, section.max_grad_norm) == (0.9999, 1.0)


def test_learning_rate_rises_and_falls_to_zero():
    seen = []
    trainer = BridgeTrainer(small(), *maps(), options(epochs=4, warmup_epochs=2, logging_steps=1), log=seen.append)
    trainer.run()
    rates = [record["learning_rate"] for record in seen]
    assert len(rates) == trainer.total == 8
    assert rates[3] == pytest.approx(8e-4)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_continued_run_ends_with_the_same_bits(tmp_path):
    indices, labels = maps()
    straight = BridgeTrainer(small(), indices, labels, options())
    straight.run()
    first = BridgeTrainer(small(), indices, labels, options(save_steps=2), folder=tmp_path)
    first.run(until=3)
    second = BridgeTrainer(small(), indices, labels, options())
    second.resume(tmp_path / "step-000002")
    torch.manual_seed(99)  # global state must not matter
    second.run()
    for one, two in ((straight.model, second.model), (straight.mean, second.mean)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[name]), name
    assert straight.evaluate(indices, labels, draws=2) == second.evaluate(indices, labels, draws=2)
    assert MaskedGenerator.from_pretrained(tmp_path / "step-000002").head.order.tolist() == [1, 0]


def test_half_precision_is_near_full():
    indices, labels = maps()
    losses = {}
    for precision in ("float32", "bfloat16"):
        trainer = BridgeTrainer(small(), indices, labels, options(precision=precision, epochs=1))
        trainer.run()
        losses[precision] = trainer.evaluate(indices, labels)
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_continuing_with_other_options_is_refused(tmp_path):
    indices, labels = maps()
    BridgeTrainer(small(), indices, labels, options(save_steps=2), folder=tmp_path).run(until=2)
    other = BridgeTrainer(small(), indices, labels, options(learning_rate=1e-3))
    with pytest.raises(MmpostError) as error:
        other.resume(tmp_path / "step-000002")
    assert str(error.value) == (
        f"bridge: '{tmp_path / 'step-000002'}' was made with other options. learning_rate: 0.0008 then, 0.001 now. "
        "Set them back, or start anew. [MMP-C099]"
    )
    with pytest.raises(MmpostError, match="MMP-E082"):
        other.resume(tmp_path / "step-000004")


def test_training_lowers_the_loss_on_one_batch():
    indices, labels = maps(4)
    trainer = BridgeTrainer(small(), indices, labels, options(epochs=40, learning_rate=5e-3, ema=0.5))
    before = trainer.evaluate(indices, labels, draws=4)
    trainer.run()
    assert trainer.evaluate(indices, labels, draws=4) < 0.7 * before
