"""Scores of pairs, usage and sets: closed forms and agreement with torchmetrics."""

import math

import pytest
import torch
from torch import nn

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.scores import LLAMAGEN_QUEUE, Perceptual, UsageMeter, psnr, psnr_of_mean_colour, ssim
from mmpost_tokenizers.set_scores import generation_scores, inception_score, kid, precision_recall
from mmpost_tokenizers.toy_features import RandomConvFeatures


def images(n, side=16, seed=0, high=256):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (n, 3, side, side), generator=draw, dtype=torch.uint8)


def normal(n, dim, seed, shift=0.0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


def test_psnr_closed_forms():
    target = torch.full((3, 3, 4, 4), 100, dtype=torch.uint8)
    made = target.clone()
    made[0] += 10
    made[1] += 1
    wanted = torch.tensor([20 * math.log10(25.5), 20 * math.log10(255), 100.0]).double()
    torch.testing.assert_close(psnr(made, target), wanted)
    half = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    half[..., 0] = 20
    torch.testing.assert_close(psnr_of_mean_colour(half), torch.tensor([20 * math.log10(25.5)]).double())


def test_ssim_is_one_on_itself_and_falls_with_noise():
    target = images(2)
    assert ssim(target, target).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert (ssim(images(2, seed=5), target) < 0.3).all()


def test_deep_feature_distance_is_never_called_lpips(tmp_path):
    from torchvision.models import vgg16

    distance = Perceptual(RandomConvFeatures(dim=16))
    assert distance.key == "dfd[random-conv16-seed0]"
    target = images(3)
    assert distance(target, target).tolist() == [0, 0, 0]
    light = (target.int() + 3).clamp(max=255).to(torch.uint8)
    assert (distance(images(3, seed=2), target) > distance(light, target)).all()
    with torch.device("meta"):
        shapes = vgg16().features.state_dict()
    draw = torch.Generator().manual_seed(0)
    trunk = {f"features.{name}": torch.randn(value.shape, generator=draw) * 0.05 for name, value in shapes.items()}
    torch.save(trunk, tmp_path / "vgg16.pth")
    other = Perceptual(tmp_path / "vgg16.pth")
    assert other.key == f"dfd[vgg16-layout-{other.sha256[:8]}]"
    assert other(target[:1], target[:1]).tolist() == [0]
    assert other(images(1, seed=2), target[:1]).item() > 0


def test_usage_by_hand():
    meter = UsageMeter(4)
    meter.update(torch.tensor([[[0, 0], [0, 1]]]))
    found = meter.result()
    assert found["usage"] == found["usage_llamagen"] == 0.5
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert found["perplexity"] == pytest.approx(math.exp(entropy))
    assert found["entropy_bits"] == pytest.approx(entropy / math.log(2))
    assert found["tokens"] == 4


def test_three_definitions_of_usage_differ():
    meter = UsageMeter(100)
    rare = torch.zeros(1, 1000, dtype=torch.int64)
    rare[0, :60] = torch.arange(60)  # one hit in 1000 is a tenth of a fair share
    meter.update(rare)
    assert meter.result()["usage_xqgan"] == 0.6
    for _ in range(5):
        meter.update(torch.full((1, 20_000), 99))
    found = meter.result()
    assert found["usage"] == 0.61
    # The queue of 65,536 has forgotten the first batch.
    assert LLAMAGEN_QUEUE < 5 * 20_000
    assert found["usage_llamagen"] == 0.01
    # The moving mean of rare codes is down to 0.9^5 of 0.1 fair shares, below 0.08.
    assert found["usage_xqgan"] == 0.02


def test_usage_of_groups_is_their_mean():
    meter = UsageMeter(4, groups=2)
    meter.update(torch.tensor([[[0, 0], [1, 0], [2, 0], [3, 0]]]))
    found = meter.result()
    assert found["usage"] == found["usage_llamagen"] == 0.625
    assert found["perplexity"] == pytest.approx(2.5)
    assert found["entropy_bits"] == pytest.approx(1.0)


def test_precision_and_recall_of_known_sets():
    real = normal(200, 4, 1)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, normal(200, 4, 2, shift=50)) == (0.0, 0.0)
    # One point again and again is precise, but covers little.
    narrow = real[:1] + 0.01 * normal(200, 4, 3)
    precision, recall = precision_recall(real, narrow)
    assert precision > 0.99
    assert recall < 0.05
    # On a line: radius of every real point 0..3 with k=1 is 1.
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert precision_recall(line, torch.tensor([[3.9], [4.1], [-1.0], [10.0]]), k=1)[0] == 0.5
    with pytest.raises(MmpostError, match="need more than 3 images on each side; there are 3 and 200"):
        precision_recall(real[:3], real)


def test_inception_score_is_that_of_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    class Logits(nn.Module):
        def forward(self, rows):
            return rows.float().flatten(1)[:, :10] / 40

    pictures = images(60, side=4)
    metric = InceptionScore(feature=Logits(), splits=1)
    metric.update(pictures)
    assert inception_score(Logits()(pictures), splits=1)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-5)
    sure = torch.eye(5).repeat(8, 1) * 1000
    assert inception_score(sure, splits=1) == (pytest.approx(5), 0)
    assert inception_score(torch.zeros(20, 5))[0] == pytest.approx(1)


def test_kid_is_that_of_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    class Features(nn.Module):
        def forward(self, rows):
            return rows.float().flatten(1)[:, :12] / 100

    real, fake = images(40, side=4), images(40, side=4, seed=1, high=150)
    metric = KernelInceptionDistance(feature=Features(), subsets=1, subset_size=40)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours, spread = kid(Features()(real), Features()(fake), subsets=3, subset_size=1000)
    assert ours == pytest.approx(float(metric.compute()[0]), rel=1e-4)
    assert spread < 1e-9


def test_generation_scores_substitute_nothing_for_inception():
    class Inception:
        name, dim, is_inception, sha256 = "inception-v3-2015-12-05", 8, True, "6726825d"

        def __call__(self, images):
            return images

    real, fake = normal(60, 8, 1), normal(50, 8, 2)
    toy = generation_scores(real, fake, RandomConvFeatures(dim=8), fake_logits=normal(50, 8, 3))
    assert list(toy) == ["gfd", "precision", "recall", "images", "real_images", "extractor", "notes"]
    full = generation_scores(real, fake, Inception(), fake_logits=normal(50, 8, 3))
    assert full["gfid"] == toy["gfd"]
    assert {"kid", "kid_std", "inception_score", "inception_score_std"} < full.keys()
    assert "gfd" not in full
