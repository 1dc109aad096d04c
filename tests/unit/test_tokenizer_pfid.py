"""pFID: published settings, equal perturbation of two tokenizers, honesty of the name, the cache of references."""

import numpy as np
import pytest
import torch

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.base import build_tokenizer
from mmpost_tokenizers.cnn import CNNConfig
from mmpost_tokenizers.frechet import Moments, frechet_distance
from mmpost_tokenizers.images import Cutting, images_from_arrays, to_uint8
from mmpost_tokenizers.pfid import ALPHAS, Sweep, deltas_for, pfid
from mmpost_tokenizers.quantizers.configs import VQConfig
from mmpost_tokenizers.statistics import reference_of
from mmpost_tokenizers.toy_features import RandomConvFeatures

SIDE = 8


def pictures(count=12, **cutting):
    pixels = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return images_from_arrays(pixels, cutting=Cutting(SIDE, **cutting))


def tokenizer(seed=0, codes=32, dim=4):
    torch.manual_seed(seed)
    config = CNNConfig(
        image_size=SIDE,
        quantizer=VQConfig(codebook_size=codes, dim=dim),
        block_out_channels=(8,),
        layers_per_block=1,
        z_channels=8,
        stem_patch=2,
        norm_groups=4,
        lowest_attention=False,
        mid_attention=False,
    )
    return build_tokenizer(config).eval()


def extractor():
    return RandomConvFeatures(dim=8)


def test_deltas_are_the_published_ones_and_scale_elsewhere():
    published = {16384: (200, 280, 360), 8192: (100, 140, 180), 4096: (50, 70, 90), 1024: (10, 15, 20)}
    assert {size: deltas_for(size) for size in published} == published
    assert deltas_for(256) == (3, 4, 6)
    assert deltas_for(32768) == (400, 560, 720)
    assert deltas_for(16) == (2, 3, 4)
    with pytest.raises(MmpostError, match="a codebook of 3 codes has no three neighbourhoods"):
        deltas_for(3)


def test_the_score_is_the_mean_of_fifteen_distances_to_the_input():
    model, images, features = tokenizer(), pictures(), extractor()
    done = []
    found = pfid(model, images, features, seed=4, progress=lambda now, total: done.append((now, total)))
    assert len(found.grid) == 15
    assert {alpha for alpha, _ in found.grid} == set(ALPHAS)
    assert found.mean == pytest.approx(sum(found.grid.values()) / 15)
    assert (found.key, found.feature_extractor, found.num_images, found.codebook_size) == (
        "pfd", "random-conv8-seed0", 12, 32,
    )  # fmt: skip
    assert done == [(12, 12)]
    # Without perturbation it is the distance of plain reconstructions.
    stacked, _ = images.stacked()
    made = to_uint8(model.reconstruct(torch.stack([images[i][0] for i in range(12)])))
    plain = frechet_distance(Moments.of(features(made)), Moments.of(features(stacked)))
    assert found.clean == pytest.approx(plain, rel=1e-9)
    assert found.degradation == found.mean / found.clean
    assert found.pmse == pytest.approx(sum(row["mse"] for row in found.rows()) / 15)


def test_batch_size_changes_nothing_and_the_seed_does():
    model, images, features = tokenizer(), pictures(), extractor()
    whole, parts = (pfid(model, images, features, seed=1, batch_size=size) for size in (12, 5))
    for setting, distance in whole.grid.items():
        assert parts.grid[setting] == pytest.approx(distance, rel=1e-4)
    assert pfid(model, images, features, seed=2).mean != whole.mean
    assert pfid(model, images, features, seed=1).grid == whole.grid


def test_two_tokenizers_are_perturbed_at_the_same_positions():
    settings = [(alpha, delta) for delta in deltas_for(32) for alpha in ALPHAS]
    bigger = [(alpha, delta) for delta in deltas_for(64) for alpha in ALPHAS]
    first = Sweep(tokenizer(), extractor(), settings, seed=3)
    second = Sweep(tokenizer(1, dim=6), extractor(), settings, seed=3)
    third = Sweep(tokenizer(1, codes=64), extractor(), bigger, seed=3)
    for sweep in (first, second, third):
        # The own code is rank 0, so "excluded" shows every selected token.
        sweep.perturb.exclude_self = True
    indices = torch.zeros(40, 4, 4, dtype=torch.int64)
    numbers = np.arange(40)
    for setting, other in zip(settings, bigger, strict=True):
        moved = first._perturbed(indices, setting, numbers) != 0
        assert torch.equal(moved, second._perturbed(indices, setting, numbers) != 0)
        assert torch.equal(moved, third._perturbed(indices, other, numbers) != 0)
        assert abs(moved.float().mean() - setting[0]) < 0.08
        # The same images in another order of batches
        assert torch.equal(moved[7:9], first._perturbed(indices[7:9], setting, numbers[7:9]) != 0)
    assert not torch.equal(
        first._perturbed(indices, settings[0], numbers), first._perturbed(indices, settings[1], numbers)
    )


def test_share_of_changed_tokens_and_neighbourhood():
    sweep = Sweep(tokenizer(), extractor(), [(0.7, 4), (0.9, 2)], seed=3)
    codes = sweep.tokenizer.quantizer.code_vectors().detach()
    clean = torch.randint(0, 32, (600, 4, 4), generator=torch.Generator().manual_seed(0))
    limit = torch.cdist(codes, codes).sort(1).values
    for alpha, delta in ((0.7, 4), (0.9, 2), (0.7, 4)):
        moved = sweep._perturbed(clean, (alpha, delta), np.arange(600))
        expected = alpha * (1 - 1 / delta)
        error = (expected * (1 - expected) / clean.numel()) ** 0.5
        assert abs((moved != clean).double().mean() - expected) < 4 * error
        distances = (codes[moved] - codes[clean]).norm(dim=-1)
        assert (distances <= limit[clean, delta - 1] + 1e-5).all()


def test_a_tokenizer_that_ignores_its_codes_does_not_suffer():
    model = tokenizer()
    for parameter in model.post_quant_conv.parameters():
        torch.nn.init.zeros_(parameter)
    found = pfid(model, pictures(), extractor())
    assert all(distance == pytest.approx(found.clean, rel=1e-6) for distance in found.grid.values())
    assert found.degradation == pytest.approx(1, rel=1e-6)


def test_reference_is_cached_by_contents_and_extractor(tmp_path):
    class Counting(RandomConvFeatures):
        calls = 0

        def forward(self, images):
            type(self).calls += 1
            return super().forward(images)

    images, features = pictures(), Counting(dim=8)
    first = reference_of(images, features, cache=tmp_path, batch_size=5)
    assert (Counting.calls, first.cached) == (3, False)
    again = reference_of(pictures(), features, cache=tmp_path)
    assert (Counting.calls, again.cached) == (3, True)
    assert torch.equal(again.features, first.features)
    assert torch.equal(again.moments.scatter, first.moments.scatter)
    assert again.noise_floor == first.noise_floor > 0
    assert not reference_of(pictures(11), features, cache=tmp_path).cached
    assert not reference_of(images, RandomConvFeatures(dim=8, seed=1), cache=tmp_path).cached
    assert len(list(tmp_path.iterdir())) == 3  # and no scratch files


def test_a_damaged_cache_is_computed_again_and_told(tmp_path, caplog):
    first = reference_of(pictures(), extractor(), cache=tmp_path)
    next(tmp_path.iterdir()).write_bytes(b"damaged")
    again = reference_of(pictures(), extractor(), cache=tmp_path)
    assert not again.cached
    assert "are damaged" in caplog.text
    assert torch.equal(again.features, first.features)
    assert reference_of(pictures(), extractor(), cache=tmp_path).cached


def test_random_crops_are_refused():
    with pytest.raises(MmpostError, match="random crops or flips cannot be evaluated") as caught:
        pfid(tokenizer(), pictures(flip=True), extractor())
    assert caught.value.code == "MMP-V076"
