"""The evaluation of a tokenizer: complete, honest names, comparison only of what is comparable."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.base import build_tokenizer
from mmpost_tokenizers.cnn import CNNConfig
from mmpost_tokenizers.evaluate import compare_results, evaluate_tokenizer
from mmpost_tokenizers.images import Cutting, images_from_arrays
from mmpost_tokenizers.pfid import pfid
from mmpost_tokenizers.quantizers.configs import VQConfig
from mmpost_tokenizers.scores import Perceptual
from mmpost_tokenizers.toy_features import RandomConvFeatures

SIDE = 16


@pytest.fixture(scope="module")
def images():
    """Smooth random pictures, 40 of them."""
    coarse = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255
    pixels = functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic").clamp(0, 255).to(torch.uint8)
    return images_from_arrays(pixels.permute(0, 2, 3, 1).numpy(), cutting=Cutting(SIDE))


def build(codes=64, seed=0):
    torch.manual_seed(seed)
    config = CNNConfig(
        image_size=SIDE,
        quantizer=VQConfig(codebook_size=codes, dim=8),
        block_out_channels=(8,),
        layers_per_block=1,
        z_channels=8,
        stem_patch=4,
        norm_groups=4,
        lowest_attention=False,
        mid_attention=False,
    )
    return build_tokenizer(config)


@pytest.fixture(scope="module")
def trained(images):
    """A tokenizer after a few dozen steps of plain reconstruction."""
    model = build()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = torch.stack([images[i][0] for i in range(len(images))])
    for _ in range(80):
        clean = model.quantize(model.encode(batch))
        loss = (model.decode(clean.latents) - batch).square().mean() + sum(clean.losses.values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def result(trained, images):
    features = RandomConvFeatures(dim=8)
    return evaluate_tokenizer(
        trained, images, features, batch_size=16, curves={"perturb"}, perceptual=Perceptual(features), seed=2
    )


def keys_of(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def test_result_is_complete_and_survives_json(result, trained, images):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["images"] == 40
    assert result["extractor"]["name"] == "random-conv8-seed0"
    assert len(result["extractor"]["sha256"]) == 64
    assert (result["codebook_size"], result["token_grid"], result["deltas"]) == (64, [4, 4], [2, 3, 4])
    assert result["noise_floor"] > 0
    assert result["psnr"] > 10
    assert 0 < result["ssim"] < 1
    assert 0 < result["usage"] <= 1
    assert result["perplexity"] == pytest.approx(2 ** result["entropy_bits"])
    assert result["tokens"] == 640
    assert result["dfd[random-conv8-seed0]"] > 0
    assert result["uint8"] == "round((x + 1) * 127.5), clamped"


def test_only_inception_scores_are_called_fid(result, trained, images):
    assert not [key for key in keys_of(result) if "fid" in key.lower()]

    class Inception(RandomConvFeatures):
        is_inception = True

    named = evaluate_tokenizer(trained, images, Inception(dim=8), seed=2)
    assert (named["rfid"], named["pfid"]) == pytest.approx((result["rfd"], result["pfd"]), rel=1e-4)
    assert not {"rfd", "pfd"} & named.keys()


def test_perturbed_score_is_that_of_pfid(result, trained, images):
    alone = pfid(trained, images, RandomConvFeatures(dim=8), batch_size=16, seed=2)
    assert result["pfd"] == pytest.approx(alone.mean, rel=1e-9)
    assert result["rfd"] == pytest.approx(alone.clean, rel=1e-9)
    assert result["degradation"] == pytest.approx(alone.degradation, rel=1e-9)
    assert result["grid"] == alone.rows()


def test_error_grows_with_alpha_and_delta(result):
    # A trained decoder uses its codes: the margin here is a factor of three.
    assert result["pfd"] > 1.5 * result["rfd"]
    errors = [row["mse"] for row in result["curve"]]
    assert [row["alpha"] for row in result["curve"]] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert errors == sorted(errors)
    by_delta = [np.mean([row["mse"] for row in result["grid"] if row["delta"] == delta]) for delta in (2, 3, 4)]
    assert by_delta == sorted(by_delta)
    distances = [row["distance"] for row in result["curve"]]
    assert distances[-1] > distances[0]


def test_few_images_are_remarked(trained):
    pixels = np.random.default_rng(0).integers(0, 256, (8, SIDE, SIDE, 3), dtype=np.uint8)
    few = images_from_arrays(pixels, cutting=Cutting(SIDE))
    notes = evaluate_tokenizer(trained, few, RandomConvFeatures(dim=8))["notes"]
    assert notes == ["only 8 images for 8 features: Fréchet distances are biased upwards; take at least 16, better 40"]


def test_a_codebook_too_small_for_neighbourhoods_has_no_perturbed_score(images):
    found = evaluate_tokenizer(build(codes=3).eval(), images, RandomConvFeatures(dim=8))
    assert found["notes"] == ["no score of perturbed latents: a codebook of 3 codes has no three neighbourhoods."]
    assert not {"pfd", "grid", "curve", "deltas"} & found.keys()
    assert math.isfinite(found["rfd"])


def test_comparison_says_what_is_better(result):
    other = {**result, "rfd": result["rfd"] * 2, "psnr": result["psnr"] + 1}
    found = compare_results(result, other)
    assert found["rfd"]["better"] == "first"
    assert found["rfd"]["ratio"] == pytest.approx(2)
    assert found["psnr"]["better"] == "second"
    assert found["pfd"]["better"] == "equal"
    assert "dfd[random-conv8-seed0]" in found


def test_comparison_refuses_what_cannot_be_compared(result):
    other = {**result["extractor"], "name": "other", "sha256": "0" * 64}
    with pytest.raises(MmpostError) as caught:
        compare_results(result, {**result, "extractor": other})
    assert str(caught.value) == (
        "scores of two feature extractors cannot be compared: random-conv8-seed0 "
        f"({result['extractor']['sha256'][:8]}) and other (00000000). Evaluate both with the same extractor [MMP-V078]"
    )
    with pytest.raises(MmpostError, match="scores of two sets of images cannot be compared") as caught:
        compare_results(result, {**result, "data": "1" * 64})
    assert caught.value.code == "MMP-V079"
    # Perturbed scores of two codebook sizes say nothing about each other; the others do.
    found = compare_results(result, {**result, "codebook_size": 128})
    assert "pfd" not in found
    assert "rfd" in found
