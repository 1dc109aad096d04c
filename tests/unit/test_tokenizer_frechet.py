"""Fréchet distance: closed forms, agreement with torchmetrics, streaming."""

import pytest
import torch
from torch import nn

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.frechet import Moments, frechet_distance, noise_floor, too_few


def features(n, dim, seed, scale=1.0, shift=0.0):
    made = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed + 100))
    return scale * made @ mixing + shift


def gaussian(mean, variances):
    """Moments of which mean and diagonal covariance are exactly these."""
    return Moments(11, torch.tensor(mean, dtype=torch.float64), torch.diag(torch.tensor(variances).double()) * 10)


def test_distance_of_diagonal_gaussians_is_the_closed_form():
    first, second = gaussian([0.0, 1.0, 2.0], [1.0, 4.0, 9.0]), gaussian([1.0, 1.0, 0.0], [4.0, 4.0, 1.0])
    # |mean difference|² plus the sum of (sigma1 - sigma2)²
    assert frechet_distance(first, second) == pytest.approx(5 + (1 + 0 + 4), rel=1e-12)


def test_a_shift_alone_is_its_squared_length():
    rows = features(50, 6, 1)
    moved = rows + torch.tensor([3.0, 0, 0, 4.0, 0, 0])
    assert frechet_distance(Moments.of(rows), Moments.of(moved)) == pytest.approx(25, rel=1e-5)


@pytest.mark.parametrize("n", [200, 5])  # 5 vectors of 16 numbers: a singular covariance
def test_zero_on_itself_and_symmetric(n):
    first, second = Moments.of(features(n, 16, 1)), Moments.of(features(n, 16, 2, scale=1.5))
    assert frechet_distance(first, first) <= 1e-10 * float(first.covariance.trace())
    forth, back = frechet_distance(first, second), frechet_distance(second, first)
    assert forth == pytest.approx(back, rel=1e-10)
    assert forth > 1


def test_agrees_with_torchmetrics_on_the_same_features():
    from torchmetrics.image.fid import FrechetInceptionDistance

    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 12)).double()

    class AsDouble(nn.Module):
        num_features = 12

        def forward(self, images):
            return net(images.double() / 255)

    draw = torch.Generator().manual_seed(3)
    real = torch.randint(0, 256, (300, 3, 4, 4), generator=draw, dtype=torch.uint8)
    fake = torch.randint(0, 200, (250, 3, 4, 4), generator=draw, dtype=torch.uint8)
    metric = FrechetInceptionDistance(feature=AsDouble(), normalize=False).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    extract = AsDouble()
    ours = frechet_distance(Moments.of(extract(real)), Moments.of(extract(fake)))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)
    assert ours > 0.01


def test_streamed_and_merged_moments_are_those_of_all_rows():
    rows = features(101, 8, 4, shift=1000.0)  # a large mean, where sums of squares would cancel
    whole = Moments.of(rows)
    streamed = Moments.empty(8)
    for part in rows.split(17):
        streamed.update(part)
    merged = Moments.merged([Moments.of(rows[:3]), Moments.empty(8), Moments.of(rows[3:60]), Moments.of(rows[60:])])
    for other in (streamed, merged):
        assert other.count == 101
        torch.testing.assert_close(other.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(other.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole.covariance, torch.cov(rows.double().T), rtol=1e-9, atol=1e-9)


def test_noise_floor_falls_with_more_images_and_is_a_function_of_the_seed():
    few, many = features(40, 8, 5), features(4000, 8, 5)
    assert noise_floor(few, seed=1) == noise_floor(few, seed=1) != noise_floor(few, seed=2)
    assert noise_floor(many, seed=1) < 0.2 * noise_floor(few, seed=1)


def test_too_few_images_are_remarked():
    assert too_few(64, 32) == ""
    assert too_few(63, 32) == (
        "only 63 images for 32 features: Fréchet distances are biased upwards; take at least 64, better 160"
    )


def test_one_image_and_infinite_features_are_refused():
    one = Moments.of(torch.ones(1, 3))
    with pytest.raises(MmpostError, match="needs at least 2 images on each side; there are 1") as caught:
        frechet_distance(one, one)
    assert caught.value.code == "MMP-V070"
    with pytest.raises(MmpostError, match="not finite") as caught:
        Moments.empty(2).update(torch.tensor([[1.0, float("nan")]]))
    assert caught.value.code == "MMP-V071"
