"""The spatial model that fills positions row by row: what it sees, its kept keys, its files."""

import pytest
import torch

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.bridge.head import DimensionHead, HeadConfig, ParallelHead
from mmpost_tokenizers.bridge.levels import PostTrainingConfig, PostTrainingQuantizer
from mmpost_tokenizers.bridge.masked import MaskedGenerator
from mmpost_tokenizers.bridge.options import BridgeTrainSection
from mmpost_tokenizers.bridge.raster import RasterBackbone, RasterConfig, RasterGenerator
from mmpost_tokenizers.bridge.spatial import NO_CLASS
from mmpost_tokenizers.bridge.training import BridgeTrainer

SMALL = RasterConfig(classes=3, grid=(2, 3), channels=2, width=16, depth=2, heads=2)


def small(kind=DimensionHead):
    """A generator of 2x3 positions, 2 channels and 5 levels, in eval mode, not at its start."""
    torch.manual_seed(0)
    head = kind(HeadConfig(channels=2, levels=5, z_dim=16, width=16, depth=1, heads=2), (1, 0))
    quantizer = PostTrainingQuantizer(PostTrainingConfig(dim=2, levels=5, max_saturation=None))
    model = RasterGenerator(RasterBackbone(SMALL), head, quantizer)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    return model.eval()


def maps(rows=8):
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 5, (rows, 2, 3, 2), generator=draw), torch.arange(rows) % 3


@torch.no_grad()
def test_a_feature_depends_on_class_and_earlier_positions_alone():
    backbone, labels = small().backbone, torch.tensor([1])
    values = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(0))
    before = backbone(values, labels)
    assert before.shape == (1, 6, 16)
    for position in range(5):
        changed = values.clone()
        changed[:, position] += 1
        differs = (backbone(changed, labels) != before).any(-1)[0].tolist()
        assert differs == [False] * (position + 1) + [True] * (5 - position)
    for other in (0, NO_CLASS):
        assert (backbone(values, torch.tensor([other])) != before).any(-1).all()


@pytest.mark.parametrize("kind", [DimensionHead, ParallelHead])
@torch.no_grad()
def test_probabilities_of_all_images_sum_to_one(kind):
    """The likelihood is exact: over the 5^4 maps of a grid of 1x2 positions with 2 channels it sums to 1."""
    torch.manual_seed(0)
    head = kind(HeadConfig(channels=2, levels=5, z_dim=16, width=16, depth=1, heads=2))
    quantizer = PostTrainingQuantizer(PostTrainingConfig(dim=2, levels=5, max_saturation=None))
    config = RasterConfig(classes=3, grid=(1, 2), channels=2, width=16, depth=1, heads=2)
    model = RasterGenerator(RasterBackbone(config), head, quantizer).eval()
    every = torch.cartesian_prod(*[torch.arange(5)] * 4).view(-1, 1, 2, 2)
    nats = model.nats(every, torch.ones(len(every), dtype=torch.int64), torch.Generator()).flatten(1).sum(1)
    assert float((-nats.double()).exp().sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@torch.no_grad()
def test_kept_keys_give_the_samples_of_whole_passes(guidance):
    """Greedy samples against a second way: the whole sequence anew for every position, guidance by hand."""
    model, labels = small(), torch.tensor([0, 1, 2, 2])
    made = model.generate(labels, guidance=guidance, temperature=0, generator=torch.Generator())
    values = torch.zeros(4, 0, 2)
    for place in range(6):
        known = model.backbone(values, labels)[:, -1]
        free = model.backbone(values, torch.full_like(labels, NO_CLASS))[:, -1]
        scale = 1 + (guidance - 1) * (place + 1) / 6
        drawn = model.head.sample(free + scale * (known - free), temperature=0)
        assert torch.equal(made.flatten(1, 2)[:, place], drawn)
        values = torch.cat([values, model.quantizer.dequantize(drawn)[:, None]], 1)


def test_samples_follow_the_likelihood():
    """Frequencies of the first index of many samples against the probabilities of the head."""
    model, count = small(), 4000
    labels = torch.ones(count, dtype=torch.int64)
    drawn = model.generate(labels, generator=torch.Generator().manual_seed(0))[:, 0, 0]
    with torch.no_grad():
        z = model.backbone(torch.zeros(1, 0, 2), torch.tensor([1]))[:, 0]
        # Channel 1 is predicted first, from z alone.
        shares = model.head(z, torch.zeros(1, 2, dtype=torch.int64))[0, 1].softmax(-1)
    found = torch.bincount(drawn[:, 1], minlength=5) / count
    assert bool(((found - shares).abs() < 4 * (shares * (1 - shares) / count).sqrt()).all())


def test_saved_and_opened(tmp_path):
    model = small()
    model.tokenizer_sha256 = "ab" * 32
    model.save_pretrained(tmp_path)
    again = RasterGenerator.from_pretrained(tmp_path)
    assert again.describe() == model.describe()
    assert torch.equal(again.nats(*maps(), torch.Generator()), model.nats(*maps(), torch.Generator()))
    with pytest.raises(MmpostError, match="it is of kind raster, not masked"):
        MaskedGenerator.from_pretrained(tmp_path)


def test_positions_are_filled_one_by_one():
    with pytest.raises(MmpostError) as error:
        small().generate(torch.tensor([0]), steps=3, generator=torch.Generator())
    assert str(error.value) == (
        "bridge: 3 steps for 6 positions that are filled one by one. Take 6 steps, or leave --steps out. [MMP-C096]"
    )


def test_parts_of_a_batch_give_the_step_of_the_whole():
    """Without dropout and hidden classes, passes of 2, 2 and 2 images make the step of one pass of 6."""
    seen = []
    for part in (None, 2):
        model = small()
        model.backbone.config = RasterConfig(**{**vars(SMALL), "dropout": 0.0, "label_dropout": 0.0})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name in ("dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        section = BridgeTrainSection(
            batch_size=6, micro_batch_size=part, max_steps=2, precision="float32", logging_steps=1
        )
        trainer = BridgeTrainer(model, *maps(6), section, log=seen.append)
        assert trainer.total == 2
        trainer.run()
    whole, parts = seen[:2], seen[2:]
    for here, there in zip(whole, parts, strict=True):
        assert there["loss"] == pytest.approx(here["loss"], rel=1e-5)
        assert there["grad_norm"] == pytest.approx(here["grad_norm"], rel=1e-4)
