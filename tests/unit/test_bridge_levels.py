import math

import pytest
import torch

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.bridge.levels import PostTrainingConfig, PostTrainingQuantizer, level_table

LEVELS = (2, 4, 8, 16, 32, 64)
RANGES = (2.0, 3.0, 4.0, 5.0)


def quantizer(levels=64, value_range=5.0, dim=4, **fields):
    fields = {"max_saturation": None, **fields}
    return PostTrainingQuantizer(PostTrainingConfig(dim=dim, levels=levels, value_range=value_range, **fields))


@pytest.fixture(scope="module")
def normal():
    """Quantiles of N(0, 1) in random order: its moments without the noise of a sample."""
    shares = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    mixed = torch.randperm(200_000, generator=torch.Generator().manual_seed(0))
    return torch.special.ndtri(shares)[mixed].float().view(-1, 4)


@pytest.mark.parametrize("scheme", ["gaussian", "uniform", "lloyd"])
@pytest.mark.parametrize("levels", LEVELS)
def test_levels_rise_and_are_symmetric(levels, scheme):
    table = level_table(levels, scheme)
    assert (table.diff() > 0).all()
    torch.testing.assert_close(table, -table.flip(0), atol=1e-5, rtol=0)
    assert abs(float(table.mean())) < 1e-6


@pytest.mark.parametrize(("levels", "value_range", "largest"), [(64, 5, 4.062), (64, 3, 2.437), (16, 5, 3.231)])
def test_largest_level_is_the_published_one(levels, value_range, largest):
    assert quantizer(levels, value_range).limits[1] == pytest.approx(largest, abs=6e-4)


def test_outer_boundaries_are_clamped():
    # With boundaries at infinity the last level of 64 would be 2.510.
    assert float(level_table(64)[-1]) == pytest.approx(2.437, abs=6e-4)
    assert float(level_table(16)[-1]) == pytest.approx(1.939, abs=6e-4)


@pytest.mark.parametrize("levels", LEVELS)
def test_index_is_that_of_the_nearest_level(levels, normal):
    bridge = quantizer(levels)
    x = normal[:5000]
    axis = (x * (3 / 5)).clamp(-3, 3)
    nearest = (axis[..., None] - bridge.table).abs().argmin(-1)
    middles = (bridge.table[1:] + bridge.table[:-1]) / 2
    off_middle = (axis[..., None] - middles).abs().amin(-1) > 1e-6
    assert torch.equal(bridge.quantize(x)[off_middle], nearest[off_middle])
    assert off_middle.float().mean() > 0.99


@pytest.mark.parametrize("value_range", RANGES)
@pytest.mark.parametrize("levels", LEVELS)
def test_quantizing_again_changes_nothing(levels, value_range):
    bridge = quantizer(levels, value_range)
    indices = torch.arange(levels)[:, None].expand(-1, 4)
    assert torch.equal(bridge.quantize(bridge.dequantize(indices)), indices)
    assert bridge.saturation_rate == 0


def test_idempotent_with_fitted_channels(normal):
    x = normal * torch.tensor([0.1, 1.0, 3.0, 20.0]) + torch.tensor([5.0, -7.0, 0.0, 100.0])
    bridge = PostTrainingQuantizer.fit(x, mode="channel")
    indices = torch.arange(64)[:, None].expand(-1, 4)
    assert torch.equal(bridge.quantize(bridge.dequantize(indices)), indices)


def test_values_beyond_the_range_take_the_outer_levels_and_are_counted():
    bridge = quantizer(dim=2)
    x = torch.tensor([[-100.0, 100.0], [0.1, 4.0], [-4.2, 4.2]])
    indices = bridge.quantize(x)
    assert indices[0].tolist() == [0, 63]
    assert indices[2].tolist() == [0, 63]
    assert bridge.saturation_rate == pytest.approx(4 / 6)
    bridge.reset_saturation()
    assert bridge.saturation_rate == 0


@pytest.mark.parametrize(
    ("levels", "errors"),
    [
        (8, (0.1320, 0.0514, 0.0368, 0.0403)),
        (16, (0.0803, 0.0209, 0.0108, 0.0103)),
        (32, (0.0511, 0.00885, 0.00314, 0.00261)),
        (64, (0.0339, 0.00394, 0.00091, 0.000657)),
    ],
)
def test_errors_on_normal_values(levels, errors, normal):
    for value_range, expected in zip(RANGES, errors, strict=True):
        bridge = quantizer(levels, value_range)
        error = float((bridge.dequantize(bridge.quantize(normal)) - normal).pow(2).mean())
        assert error == pytest.approx(expected, rel=0.02)


def test_uniform_and_lloyd_errors_on_normal_values(normal):
    def error(bridge):
        return float((bridge.dequantize(bridge.quantize(normal)) - normal).pow(2).mean())

    assert error(quantizer(8, scheme="uniform")) == pytest.approx(0.1302, rel=0.02)
    # Max, Quantizing for minimum distortion (1960): 8 and 16 levels.
    assert error(quantizer(8, scheme="lloyd")) == pytest.approx(0.03454, rel=0.02)
    assert error(quantizer(16, scheme="lloyd")) == pytest.approx(0.009497, rel=0.02)
    fitted = PostTrainingQuantizer.fit(normal[:20_000], levels=8, scheme="lloyd", max_saturation=None)
    assert error(fitted) == pytest.approx(0.03454, rel=0.02)


def test_entropy_of_the_indices(normal):
    def bits(value_range):
        shares = torch.bincount(quantizer(64, value_range).quantize(normal).flatten(), minlength=64) / normal.numel()
        return float(-(shares[shares > 0] * shares[shares > 0].log2()).sum())

    assert bits(5.0) == pytest.approx(5.72, abs=0.01)
    assert bits(3.0) > 5.99


@pytest.mark.parametrize("value_range", RANGES)
def test_error_falls_with_the_number_of_levels(value_range, normal):
    x = normal[:50_000]
    errors = []
    for levels in LEVELS:
        bridge = quantizer(levels, value_range)
        errors.append(float((bridge.dequantize(bridge.quantize(x)) - x).pow(2).mean()))
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)


def test_channels_fitted_on_their_own_lose_less():
    spread = torch.linspace(0.5, 1.4, 8)
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(1)) * spread
    errors = {}
    for mode in ("paper", "channel"):
        bridge = PostTrainingQuantizer.fit(x, mode=mode)
        errors[mode] = float((bridge.dequantize(bridge.quantize(x)) - x).pow(2).mean())
    assert errors["channel"] < 0.97 * errors["paper"]


def test_paper_mode_measures_one_scale_and_no_shift(normal):
    bridge = PostTrainingQuantizer.fit(normal * 2 + 0.5)
    assert bridge.shift.tolist() == [0.0] * 4
    assert bridge.scale.unique().numel() == 1
    assert float(bridge.scale[0]) == pytest.approx(0.5, rel=0.01)


def test_range_from_a_quantile(normal):
    bridge = PostTrainingQuantizer.fit(normal, quantile=1e-2)
    bridge.quantize(normal)
    assert bridge.saturation_rate == pytest.approx(1e-2, rel=0.05)


def test_latents_beyond_the_range_are_refused(normal):
    bridge, wide = quantizer(max_saturation=0.01), normal[:2000] * 3
    with pytest.raises(MmpostError) as error:
        bridge.quantize(wide)
    # Half a step beyond the last level, by hand from the published levels.
    last, before = (float(level_table(64)[place]) * 5 / 3 for place in (-1, -2))
    reach = last + (last - before) / 2
    share, within = float((wide.abs() > reach).float().mean()), float(wide.abs().quantile(0.99))
    text = str(error.value)
    assert text.startswith(
        f"the range cuts off {share:.1%} of the latents: measured from {float(wide.min()):.2f} to "
        f"{float(wide.max()):.2f} in units of the scale, 99.0% within {within:.2f}, but 64 levels with range 5 reach "
        f"{reach:.2f}; 1.0% may be cut off. Raise --range to "
    )
    assert text.endswith(
        ", or measure shift and scale of each channel with --mode channel, or accept it with --max-saturation 1. "
        "[MMP-E081]"
    )
    enough = float(text.split("--range to ")[1].split(",", maxsplit=1)[0])
    again = quantizer(value_range=enough, max_saturation=0.01)
    again.quantize(wide)
    assert again.cut_off_rate <= 0.01
    assert again.measured == pytest.approx((float(wide.min()), float(wide.max())), rel=1e-5)
    PostTrainingQuantizer.fit(wide, mode="channel").quantize(wide)
    quantizer(max_saturation=None).quantize(wide)
    quantizer(max_saturation=1.0).quantize(wide)


@pytest.mark.parametrize("levels", LEVELS)
def test_normal_latents_are_never_refused_at_the_published_range(levels, normal):
    bridge = quantizer(levels, max_saturation=0.01)
    bridge.quantize(normal)
    for rate, end in ((bridge.saturation_rate, bridge.limits[1]), (bridge.cut_off_rate, bridge.reach)):
        assert rate == pytest.approx(math.erfc(end / math.sqrt(2)), rel=0.1, abs=1e-5)
    # What is not cut off loses no more than latents between levels can.
    lost = (bridge.dequantize(bridge.quantize(normal)) - normal).abs()
    steps = bridge.table.diff() * (5 / 3)
    assert lost[normal.abs() <= bridge.reach].max() <= steps.max() / 2 + 1e-5


@pytest.mark.parametrize(("value_range", "refused"), [(2.0, True), (3.0, False), (4.0, False)])
def test_a_range_that_cuts_off_a_tenth_is_refused(value_range, refused, normal):
    bridge = quantizer(value_range=value_range, max_saturation=0.01)
    if not refused:
        bridge.quantize(normal)
        assert 0 < bridge.cut_off_rate < bridge.saturation_rate < 0.02
        return
    with pytest.raises(MmpostError, match=r"the range cuts off 7\.6% of the latents"):
        bridge.quantize(normal)


def test_few_values_are_judged_with_care():
    bridge = quantizer(max_saturation=0.01, dim=1)
    values = torch.zeros(100, 1)
    # 1 % is allowed; 4 standard errors of 100 values are 4 % more.
    values[:4] = 10.0
    bridge.quantize(values)
    values[4:8] = 10.0
    bridge.reset_saturation()
    with pytest.raises(MmpostError, match="MMP-E081"):
        bridge.quantize(values)


def test_a_range_far_below_the_latents_is_refused(normal):
    with pytest.raises(MmpostError, match="MMP-E081"):
        quantizer(value_range=0.5, max_saturation=0.01).quantize(normal)


def test_gradient_goes_straight_through(normal):
    z = normal[:10].clone().requires_grad_()
    quantized = quantizer()(z)
    weight = torch.arange(40.0).view(10, 4)
    (quantized.latents * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    torch.testing.assert_close(quantized.latents, quantizer().lookup(quantized.indices))
    assert quantized.losses == {}


def test_neighbours_of_a_code_are_the_adjacent_levels(normal):
    bridge = PostTrainingQuantizer.fit(normal * torch.tensor([1.0, 2.0, 3.0, 4.0]) + 1, levels=16, mode="channel")
    codes = bridge.code_vectors(2)
    assert codes.shape == (16, 1)
    nearest = torch.cdist(codes, codes).argsort(1)[:, 1]
    assert ((nearest - torch.arange(16)).abs() == 1).all()
    indices = torch.arange(16)[:, None].expand(-1, 4)
    assert torch.equal(bridge.dequantize(indices)[:, 2:3], codes)
    assert bridge.index_shape((2, 2)) == (2, 2, 4)


def test_saved_and_loaded(tmp_path, normal):
    bridge = PostTrainingQuantizer.fit(normal * 3 + 1, levels=32, scheme="lloyd", mode="channel")
    bridge.save(tmp_path)
    again = PostTrainingQuantizer.load(tmp_path)
    assert again.config == bridge.config
    assert torch.equal(again.quantize(normal), bridge.quantize(normal))
    assert torch.equal(again.code_vectors(3), bridge.code_vectors(3))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: quantizer(levels=1), "bridge: levels=1 is not between 2 and 65536. Correct levels. [MMP-C090]"),
        (
            lambda: PostTrainingQuantizer.fit(torch.ones(50, 2)),
            "bridge: the 50 latent positions do not vary in every channel, so there is no scale. "
            "Fit on more images. [MMP-C091]",
        ),
        (
            lambda: quantizer().quantize(torch.zeros(3, 5)),
            "bridge: latents with 5 channels, but the quantizer was made for 4. "
            "Fit a quantizer for this VAE. [MMP-C092]",
        ),
        (
            lambda: quantizer().quantize(torch.full((3, 4), math.nan)),
            "bridge: the VAE gave latents that are not finite. Run it in float32 or bfloat16; "
            "some VAEs overflow in float16. [MMP-E084]",
        ),
    ],
)
def test_messages(call, text):
    with pytest.raises(MmpostError) as error:
        call()
    assert str(error.value) == text


def test_folder_without_quantizer(tmp_path):
    with pytest.raises(MmpostError) as error:
        PostTrainingQuantizer.load(tmp_path)
    assert str(error.value) == f"no quantizer.json in '{tmp_path}'. Check the path. [MMP-E082]"
