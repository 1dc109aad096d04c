"""Each quantizer against its definition, computed in the most direct way."""

import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.base import build_quantizer
from mmpost_tokenizers.quantizers import QUANTIZERS
from mmpost_tokenizers.quantizers.configs import (
    CONFIGS,
    BSQConfig,
    EMAConfig,
    FSQConfig,
    LFQConfig,
    MultiScaleConfig,
    ProductConfig,
    ResidualConfig,
    VQConfig,
    quantizer_config,
)

VQ = VQConfig(codebook_size=16, dim=4, l2_norm=False)
ALL = {
    "vq": VQ,
    "vq_l2": VQConfig(codebook_size=16, dim=4),
    "vq_ema": EMAConfig(codebook_size=16, dim=4),
    "lfq": LFQConfig(dim=4),
    "bsq": BSQConfig(dim=4),
    "fsq": FSQConfig(levels=(8, 5, 5)),
    "product": ProductConfig(groups=2, part=VQ),
    "product_fsq": ProductConfig(groups=2, part=FSQConfig(levels=(5, 3))),
    "residual": ResidualConfig(depth=3, part=VQ),
    "multi_scale": MultiScaleConfig(part=VQ, scales=(1, 2, 4)),
}


@pytest.fixture(params=ALL)
def config(request):
    return ALL[request.param]


@pytest.fixture
def quantizer(config):
    return made(config)


def made(config):
    """The quantizer with codes that are as large as the latents of ``latents``."""
    torch.manual_seed(0)
    quantizer = build_quantizer(config)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.normal_()
    return quantizer.eval()


def latents(quantizer, batch=3, seed=1):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 4, quantizer.dim, generator=draws).requires_grad_()


def total(losses):
    return sum(losses.values(), torch.zeros(()))


def test_every_kind_is_tried_here():
    assert {config.kind for config in ALL.values()} == set(QUANTIZERS) == set(CONFIGS)


def test_shapes_and_range(quantizer):
    z = latents(quantizer)
    outcome = quantizer(z)
    assert outcome.latents.shape == z.shape
    assert outcome.indices.shape == (3, *quantizer.index_shape((4, 4)))
    assert outcome.indices.dtype == torch.int64
    assert 0 <= outcome.indices.min() <= outcome.indices.max() < quantizer.codebook_size
    assert len(outcome.indices.unique()) > 1
    # The straight-through sum z + (e - z) rounds.
    torch.testing.assert_close(outcome.latents, quantizer.lookup(outcome.indices), atol=1e-5, rtol=1e-5)


# FSQ bounds its latents first, and a sum of codes may have a nearer sum.
@pytest.mark.parametrize("name", ["vq", "vq_l2", "vq_ema", "lfq", "bsq", "product"])
def test_codes_quantize_to_themselves(name):
    quantizer = made(ALL[name])
    indices = quantizer(latents(quantizer)).indices
    assert torch.equal(quantizer(quantizer.lookup(indices)).indices, indices)


def test_fsq_takes_the_nearest_level_of_each_channel():
    quantizer = made(ALL["fsq"])
    half = torch.tensor([4, 2, 2])
    expected = (quantizer.project(latents(quantizer)) * half).round() / half
    assert torch.equal(quantizer(latents(quantizer)).latents, expected)


def test_json_round_trip(config):
    assert quantizer_config(config.to_json()) == config


def test_losses_come_only_from_the_clean_pass(quantizer):
    z = latents(quantizer)
    outcome = quantizer(z)
    before = {name: value.clone() for name, value in outcome.losses.items()}
    quantizer.straight_through(outcome, outcome.indices.flip(0))
    assert all(torch.equal(before[name], quantizer(z).losses[name]) for name in before)


def test_straight_through_of_other_indices(quantizer):
    z = latents(quantizer)
    outcome = quantizer(z)
    moved = quantizer.straight_through(outcome, outcome.indices.flip(0))
    torch.testing.assert_close(moved, quantizer.lookup(outcome.indices.flip(0)), atol=1e-5, rtol=1e-5)
    assert torch.equal(quantizer.straight_through(outcome, outcome.indices.clone()), outcome.latents)
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    moved_gradient = torch.autograd.grad((moved * weights).sum(), z, retain_graph=True)[0]
    clean_gradient = torch.autograd.grad((outcome.latents * weights).sum(), z)[0]
    assert torch.equal(moved_gradient, clean_gradient)
    assert moved_gradient.abs().sum() > 0


def test_codes_get_no_gradient_from_what_is_decoded(quantizer):
    outcome = quantizer(latents(quantizer))
    loss = outcome.latents.square().sum() + quantizer.straight_through(outcome, outcome.indices.flip(0)).square().sum()
    loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in quantizer.parameters())


@pytest.mark.parametrize("name", ["vq", "lfq", "residual", "multi_scale", "product"])
def test_gradient_at_the_latent_is_the_gradient_at_the_code(name):
    quantizer = made(ALL[name])
    z = latents(quantizer)
    outcome = quantizer(z)
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    at_codes = torch.autograd.grad((outcome.latents * weights).sum(), outcome.latents, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad((outcome.latents * weights).sum(), z)[0], at_codes)


@pytest.mark.parametrize("name", ["vq_l2", "bsq"])
def test_on_the_sphere_the_gradient_starts_at_the_unit_latent(name):
    quantizer = made(ALL[name])
    z = latents(quantizer)
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    through = torch.autograd.grad((quantizer(z).latents * weights).sum(), z)[0]
    expected = torch.autograd.grad((functional.normalize(z, dim=-1) * weights).sum(), z)[0]
    torch.testing.assert_close(through, expected)


@pytest.mark.parametrize("name", ["vq", "vq_l2", "vq_ema"])
def test_search_agrees_with_brute_force(name):
    quantizer = made(ALL[name])
    z = quantizer.normalise(latents(quantizer)).reshape(-1, 4)
    brute = (z[:, None] - quantizer.code_vectors()[None]).square().sum(2).argmin(1)
    assert torch.equal(quantizer(latents(quantizer)).indices.flatten(), brute)


def test_scale_of_latents_matters_only_without_l2_norm():
    for name, same in (("vq_l2", True), ("vq", False), ("bsq", True)):
        quantizer = made(ALL[name])
        z = latents(quantizer)
        assert torch.equal(quantizer(3 * z).indices, quantizer(z).indices) == same


def test_vq_losses_and_where_their_gradients_go():
    quantizer = made(VQConfig(codebook_size=16, dim=4, vq_weight=2.0, commit_weight=0.25))
    z = latents(quantizer)
    outcome = quantizer(z)
    unit = functional.normalize(z, dim=-1)
    codes = functional.normalize(quantizer.weight, dim=-1)[outcome.indices]
    torch.testing.assert_close(outcome.losses["vq"], 2 * (unit.detach() - codes).square().mean())
    torch.testing.assert_close(outcome.losses["commit"], 0.25 * (unit - codes.detach()).square().mean())
    assert torch.autograd.grad(outcome.losses["vq"], z, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(outcome.losses["commit"], quantizer.weight, allow_unused=True)[0] is None


def test_initial_codes_are_those_of_the_papers():
    plain = build_quantizer(VQConfig(codebook_size=64, dim=4, l2_norm=False)).weight
    assert plain.abs().max() <= 1 / 64
    assert plain.abs().max() > 0.9 / 64
    unit = build_quantizer(VQConfig(codebook_size=64, dim=4)).weight
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(64))


@pytest.mark.parametrize("l2_norm", [False, True])
def test_running_means(l2_norm):
    config = EMAConfig(codebook_size=8, dim=4, l2_norm=l2_norm, decay=0.9)
    quantizer = made(config).train()
    codes = quantizer.code_vectors().clone()
    counts, sums = torch.ones(8), codes.clone()
    for seed in range(3):
        z = latents(quantizer, seed=seed).detach()
        outcome = quantizer(z)
        flat = quantizer.normalise(z).reshape(-1, 4)
        chosen = torch.cdist(flat, codes).argmin(1)
        assert torch.equal(outcome.indices.flatten(), chosen)
        torch.testing.assert_close(outcome.latents.reshape(-1, 4), codes[chosen])
        torch.testing.assert_close(outcome.losses["commit"], 0.25 * (flat - codes[chosen]).square().mean())
        hot = functional.one_hot(chosen, 8).float()
        counts, sums = 0.9 * counts + 0.1 * hot.sum(0), 0.9 * sums + 0.1 * hot.T @ flat
        smoothed = (counts + 1e-5) / (counts.sum() + 8e-5) * counts.sum()
        codes = quantizer.normalise(sums / smoothed[:, None])
        torch.testing.assert_close(quantizer.code_vectors(), codes)


def test_running_means_stay_in_eval_mode():
    quantizer = made(ALL["vq_ema"])
    before = quantizer.code_vectors().clone()
    quantizer(latents(quantizer))
    assert torch.equal(quantizer.code_vectors(), before)


@pytest.mark.parametrize(("name", "scale"), [("lfq", 1.0), ("bsq", 0.5)])
def test_entropy_loss_by_hand(name, scale):
    quantizer = made(ALL[name])
    z = latents(quantizer)
    unit = quantizer.normalise(z).detach().reshape(-1, 4).double()
    p = torch.sigmoid(4 * unit * scale)

    def entropy(q):
        return -(q * q.log() + (1 - q) * (1 - q).log())

    expected = 0.1 * (entropy(p).sum(1).mean() - entropy(p.mean(0)).sum())
    losses = quantizer(z).losses
    assert set(losses) == {"entropy"}
    torch.testing.assert_close(losses["entropy"].double(), expected)


def test_entropy_loss_survives_saturated_latents():
    quantizer = made(ALL["lfq"])
    z = (100 * torch.ones(2, 1, 1, 4)).requires_grad_()
    loss = quantizer(z).losses["entropy"]
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert torch.isfinite(z.grad).all()


def test_entropy_loss_is_lowest_for_sure_bits_used_equally():
    quantizer = made(ALL["lfq"])
    z = quantizer.lookup(torch.arange(16)).view(1, 4, 4, 4) * 10
    torch.testing.assert_close(quantizer(z).losses["entropy"], torch.tensor(-0.1 * 4 * math.log(2)))


def test_signs_are_bits():
    codes = made(ALL["lfq"]).lookup(torch.tensor([0b0001, 0b1010]))
    assert codes.tolist() == [[1, -1, -1, -1], [-1, 1, -1, 1]]
    torch.testing.assert_close(made(ALL["bsq"]).code_vectors().norm(dim=1), torch.ones(16))


def test_fsq_codes_are_all_points_of_the_grid():
    quantizer = made(ALL["fsq"])
    codes = quantizer.code_vectors()
    assert quantizer.codebook_size == 200
    assert len(codes.unique(dim=0)) == 200
    assert [len(codes[:, channel].unique()) for channel in range(3)] == [8, 5, 5]
    assert quantizer(latents(quantizer)).losses == {}


def test_fsq_agrees_with_the_published_bound():
    quantizer = made(FSQConfig(levels=(4, 3)))
    z = torch.tensor([[[[0.0, 0.0], [9.0, -9.0], [-9.0, 9.0], [0.6, 0.6]]]])
    # Four levels are -1, -1/2, 0, 1/2, three are -1, 0, 1: rounded tanh, shifted by half a step if even.
    assert quantizer(z).latents.tolist() == [[[[0.0, 0.0], [0.5, -1.0], [-1.0, 1.0], [0.5, 1.0]]]]


def test_product_is_its_parts():
    quantizer = made(ALL["product"])
    z = latents(quantizer)
    outcome = quantizer(z)
    apart = [part(piece) for part, piece in zip(quantizer.parts, z.chunk(2, dim=-1), strict=True)]
    assert torch.equal(outcome.indices, torch.stack([one.indices for one in apart], dim=-1))
    assert torch.equal(outcome.latents, torch.cat([one.latents for one in apart], dim=-1))
    torch.testing.assert_close(outcome.losses["vq"], (apart[0].losses["vq"] + apart[1].losses["vq"]) / 2)


def test_residual_levels_see_what_is_left():
    quantizer = made(ALL["residual"])
    z = latents(quantizer)
    outcome = quantizer(z)
    residual, losses = z, []
    for level, part in enumerate(quantizer.levels):
        torch.testing.assert_close(quantizer.project(z, level), residual)
        codes = part.weight[torch.cdist(residual.reshape(-1, 4), part.weight).argmin(1)].view(z.shape)
        losses.append((residual - codes).square().mean())
        residual = residual - codes
    torch.testing.assert_close(outcome.latents, z - residual)
    torch.testing.assert_close(outcome.losses["vq"], torch.stack(losses).mean())
    torch.testing.assert_close(outcome.losses["commit"], 0.25 * torch.stack(losses).mean())


def test_a_zero_code_lets_residual_levels_only_help():
    quantizer = made(ALL["residual"])
    with torch.no_grad():
        for part in quantizer.levels:
            part.weight[0] = 0
    z = latents(quantizer)
    errors = [quantizer.project(z, level).square().sum(-1) for level in range(3)]
    assert (errors[1] <= errors[0] + 1e-6).all()
    assert (errors[2] <= errors[1] + 1e-6).all()


def multi_scale_by_hand(quantizer, z):
    """VAR's algorithm 1, one image, one scale and one place at a time where that is possible."""
    codes, target = quantizer.codebook.weight, z.permute(0, 3, 1, 2)
    residual, total_map, indices, errors = target, torch.zeros_like(target), [], []
    for scale, side in enumerate((1, 2, 4)):
        small = functional.adaptive_avg_pool2d(residual, side)
        chosen = torch.cdist(small.permute(0, 2, 3, 1).reshape(-1, 4), codes).argmin(1).view(len(z), side, side)
        maps = codes[chosen].permute(0, 3, 1, 2)
        maps = functional.interpolate(maps, size=(4, 4), mode="bicubic") if side < 4 else maps
        phi = quantizer.phis[np.abs(np.linspace(1 / 12, 11 / 12, 4) - scale / 2).argmin()]
        added = 0.5 * maps + 0.5 * functional.conv2d(maps, phi.weight, phi.bias, padding=1)
        total_map, residual = total_map + added, residual - added
        indices.append(chosen.flatten(1))
        errors.append((total_map - target).square().mean())
    return total_map.permute(0, 2, 3, 1), torch.cat(indices, 1), torch.stack(errors).mean()


def test_multi_scale_against_a_second_implementation():
    quantizer = made(ALL["multi_scale"])
    z = latents(quantizer)
    outcome = quantizer(z)
    expected, indices, error = multi_scale_by_hand(quantizer, z)
    assert torch.equal(outcome.indices, indices)
    torch.testing.assert_close(outcome.latents, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outcome.losses["vq"], error)
    torch.testing.assert_close(outcome.losses["commit"], 0.25 * error)
    gradients = torch.autograd.grad(outcome.losses["vq"], list(quantizer.parameters()), allow_unused=True)
    assert sum(gradient is not None for gradient in gradients) == 1 + 2 * 3  # codes, and three of four convolutions


def test_var_scales_give_680_indices():
    config = MultiScaleConfig(part=VQ, scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert build_quantizer(config).index_shape((16, 16)) == (680,)
    assert build_quantizer(MultiScaleConfig(part=VQ)).index_shape((11, 11)) == (286,)


def test_multi_scale_wants_the_grid_of_its_last_scale():
    with pytest.raises(MmpostError, match=re.escape("ends at a 4x4 map, but the token grid is [8, 8]")):
        made(ALL["multi_scale"])(torch.zeros(1, 8, 8, 4))


def test_quantizer_dropout():
    config = MultiScaleConfig(part=VQ, scales=(1, 2, 3, 4, 4), dropout=0.5, dropout_min_depth=3)
    quantizer = made(config).train()
    draws = torch.Generator().manual_seed(0)
    depth = quantizer._depth(4000, draws, torch.device("cpu"))
    assert depth.unique().tolist() == [3, 4, 5]
    # Half of the images draw 3, 4 or 5 with equal chance: 1/6 each below 5. Four standard errors of 4000 draws.
    for kept in (3, 4):
        assert abs((depth == kept).double().mean() - 1 / 6) < 4 * (1 / 6 * 5 / 6 / 4000) ** 0.5
    z = latents(quantizer, batch=16)
    dropped = quantizer(z, generator=torch.Generator().manual_seed(0))
    full = quantizer.eval()(z)
    assert torch.equal(dropped.indices, full.indices)
    same = (dropped.latents == full.latents).flatten(1).all(1)
    assert 0 < same.sum() < 16
    with pytest.raises(ValueError, match="pass generator"):
        quantizer.train()(z)


@pytest.mark.parametrize("name", ["vq", "vq_l2", "vq_ema", "product", "residual", "multi_scale"])
def test_dead_codes_become_latents(name):
    quantizer = made(ALL[name])
    z = latents(quantizer).detach()
    groups = quantizer.groups
    dead = torch.zeros(groups, 16, dtype=torch.bool)
    dead[:, 3:8] = True
    before = [quantizer.code_vectors(group).clone() for group in range(groups)]
    sources = [z if name == "multi_scale" else quantizer.project(z, group) for group in range(groups)]
    draws = torch.Generator().manual_seed(0)
    assert quantizer.revive(dead if groups > 1 else dead[0], z, generator=draws) == 5 * groups
    for group in range(groups):
        codes = quantizer.code_vectors(group)
        assert torch.equal(codes[~dead[group]], before[group][~dead[group]])
        distance = (codes[3:8, None] - sources[group].reshape(-1, codes.shape[1])).abs().sum(2).min(1)
        assert distance.values.max() < 1e-5
        assert len(distance.indices.unique()) == 5


@pytest.mark.parametrize("name", ["lfq", "bsq", "fsq"])
def test_fixed_codes_cannot_be_revived(name):
    quantizer = made(ALL[name])
    with pytest.raises(MmpostError, match="are fixed, so none can be revived") as caught:
        quantizer.revive(torch.ones(16, dtype=torch.bool), latents(quantizer), generator=torch.Generator())
    assert caught.value.code == "MMP-C076"


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"kind": "vqq"}, "unknown name 'vqq' among quantizers."),
        ({"kind": "vq", "codebook_size": 4}, "quantizer 'vq' lacks dim. Set it. [MMP-C071]"),
        ({"kind": "lfq", "dim": 4, "codes": 3}, "quantizer 'lfq' has no field codes. Known: dim, entropy_weight,"),
        ({"kind": "lfq", "dim": 63}, "quantizer 'lfq': dim=63 is not between 1 and 62. Correct dim. [MMP-C071]"),
        ({"kind": "fsq", "levels": [8, 2]}, "quantizer 'fsq': levels=(8, 2) is not 3 or more in each channel."),
        ({"kind": "residual", "depth": 2, "part": {"kind": "vq", "codebook_size": 4, "dim": 2}}, "part.l2_norm=True"),
    ],
)
def test_wrong_configurations(table, text):
    with pytest.raises(MmpostError, match=re.escape(text)):
        quantizer_config(table)


def test_total_loss_trains_learned_codes():
    for name in ("vq", "product", "residual", "multi_scale"):
        quantizer = made(ALL[name])
        before = [total(quantizer(latents(quantizer)).losses).item()]
        optimiser = torch.optim.SGD(quantizer.parameters(), 0.5)
        for _ in range(5):
            optimiser.zero_grad()
            total(quantizer(latents(quantizer)).losses).backward()
            optimiser.step()
        assert total(quantizer(latents(quantizer)).losses).item() < before[0]
