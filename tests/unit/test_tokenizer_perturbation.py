"""Latent perturbation: how much changes, by what, and what must not change."""

import copy
import itertools
import re

import pytest
import torch

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.base import Quantizer, build_quantizer
from mmpost_tokenizers.cnn import CNNConfig, CNNTokenizer
from mmpost_tokenizers.perturbation import LatentPerturbation, PerturbationSchedule, scaled_delta
from mmpost_tokenizers.quantizers.configs import (
    BSQConfig,
    EMAConfig,
    FSQConfig,
    LFQConfig,
    MultiScaleConfig,
    ProductConfig,
    ResidualConfig,
    VQConfig,
)
from mmpost_tokenizers.quantizers.neighbours import lattice_neighbours, nearest_codes

VQ = VQConfig(codebook_size=64, dim=4)
PLAIN = VQConfig(codebook_size=64, dim=4, l2_norm=False)
ALL = {
    "vq": VQ,
    "vq_plain": PLAIN,
    "vq_ema": EMAConfig(codebook_size=64, dim=4),
    "lfq": LFQConfig(dim=6),
    "bsq": BSQConfig(dim=6),
    "fsq": FSQConfig(levels=(8, 5, 3)),
    "product": ProductConfig(groups=2, part=VQ),
    "residual": ResidualConfig(depth=3, part=PLAIN),
    "multi_scale": MultiScaleConfig(part=PLAIN, scales=(1, 2, 4)),
}


def made(name):
    torch.manual_seed(0)
    quantizer = build_quantizer(ALL[name])
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.normal_()
    return quantizer.eval()


def clean(quantizer, batch=200, seed=1):
    z = torch.randn(batch, 4, 4, quantizer.dim, generator=torch.Generator().manual_seed(seed))
    return z, quantizer(z)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def spread(changed):
    """Standard error of a share of tokens whose images are perturbed as one."""
    per_image = changed.flatten(1).double().mean(1)
    return max(float(per_image.std()) / len(per_image) ** 0.5, 1e-9)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("setting", [(1.0, 1.0, 6), (0.7, 1.0, 4), (0.9, 0.5, 3)])
def test_shares_of_selected_and_changed_tokens(name, setting):
    alpha, beta, delta = setting
    quantizer = made(name)
    _, outcome = clean(quantizer)
    moved = LatentPerturbation(alpha, beta, delta)(quantizer, outcome.indices, generator=seeded())
    for share, mask in ((alpha * beta, moved.selected), (alpha * beta * (1 - 1 / delta), moved.changed)):
        assert abs(mask.double().mean() - share) <= 4 * spread(mask)
    assert abs(moved.image_mask.double().mean() - beta) <= 4 * (beta * (1 - beta) / 200) ** 0.5
    assert torch.equal(moved.changed, moved.indices != outcome.indices)
    assert not (moved.changed & ~moved.selected).any()
    assert not moved.selected[~moved.image_mask].any()


def test_latent_centred_draws_change_the_same_share():
    quantizer = made("vq")
    z, outcome = clean(quantizer)
    perturb = LatentPerturbation(0.7, 1.0, 4, neighbour_of="latent")
    moved = perturb(quantizer, outcome.indices, z=z, generator=seeded())
    assert abs(moved.changed.double().mean() - 0.7 * 0.75) <= 4 * spread(moved.changed)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("exclude_self", [False, True])
def test_new_codes_are_among_the_nearest(name, exclude_self):
    quantizer, delta = made(name), 5
    _, outcome = clean(quantizer, batch=40)
    perturb = LatentPerturbation(0.8, 1.0, delta, exclude_self=exclude_self)
    moved = perturb(quantizer, outcome.indices, generator=seeded())
    assert torch.equal(moved.indices[~moved.selected], outcome.indices[~moved.selected])
    assert torch.equal(moved.changed, moved.selected) or not exclude_self
    for group in range(quantizer.groups):
        codes = quantizer.code_vectors(group).double()
        part = (..., group) if quantizer.groups > 1 else (...,)
        old, new = outcome.indices[part].flatten(), moved.indices[part].flatten()
        distances = (codes[:, None] - codes[None]).square().sum(2)
        limit = distances.sort(1).values[:, delta - 1 + int(exclude_self)]
        # Distances, not ranks: ties are broken by rounding or at random.
        assert (distances[old, new] <= limit[old] + 1e-6).all()


def test_each_neighbour_is_drawn_equally_often():
    quantizer, delta, draws = made("vq"), 5, 40000
    indices = torch.full((draws, 1), 7)
    moved = LatentPerturbation(1.0, 1.0, delta)(quantizer, indices, generator=seeded())
    counts = torch.bincount(moved.indices.flatten(), minlength=64)
    expected = nearest_codes(quantizer.code_vectors(), delta)[7].long()
    assert set(counts.nonzero().flatten().tolist()) == set(expected.tolist())
    error = (0.2 * 0.8 / draws) ** 0.5
    assert ((counts[expected].double() / draws - 0.2).abs() < 4 * error).all()


@pytest.mark.parametrize(("levels", "start", "delta"), [((2,) * 5, 11, 9), ((8, 5, 3), 57, 12), ((5, 3), 0, 4)])
def test_ties_on_a_lattice_are_broken_evenly(levels, start, delta):
    """Against all orders that ties can have: inside the border always, at the border with equal chance."""
    quantizer = build_quantizer(LFQConfig(dim=5) if levels[0] == 2 else FSQConfig(levels=levels))
    codes = quantizer.code_vectors().double()
    distances = (codes - codes[start]).square().sum(1)
    border = distances.sort().values[delta - 1]
    inside, tied = distances < border - 1e-9, (distances - border).abs() < 1e-9
    expected = inside.double() / delta + tied.double() * (delta - int(inside.sum())) / delta / int(tied.sum())
    draws = 40000
    moved = LatentPerturbation(1.0, 1.0, delta)(quantizer, torch.full((draws, 1), start), generator=seeded())
    share = torch.bincount(moved.indices.flatten(), minlength=len(codes)).double() / draws
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt() + 1e-12).all()


def test_lattice_ranks_are_ranks_of_distance():
    levels = (4, 3, 5)
    quantizer = build_quantizer(FSQConfig(levels=levels))
    codes = quantizer.code_vectors().double()
    distances = torch.cdist(codes, codes)
    starts, ranks = (torch.tensor(grid) for grid in zip(*itertools.product(range(60), range(60)), strict=True))
    uniforms = torch.rand(3600, 3, generator=seeded())
    found = lattice_neighbours(starts, ranks, uniforms, levels)
    expected = distances.sort(1).values[starts, ranks]
    torch.testing.assert_close(distances[starts, found], expected)
    assert torch.equal(found[ranks == 0], starts[ranks == 0])


def test_2_to_the_40_codes_have_neighbours():
    quantizer = build_quantizer(LFQConfig(dim=40))
    indices = quantizer(torch.randn(50, 4, 4, 40, generator=seeded())).indices
    moved = LatentPerturbation(1.0, 1.0, 41)(quantizer, indices, generator=seeded())
    bits = (quantizer.lookup(indices) != quantizer.lookup(moved.indices)).sum(-1)
    # One code at distance 0 and 40 at distance 1.
    assert bits.unique().tolist() == [0, 1]
    with pytest.raises(MmpostError, match="1099511627776 codes are too many to list one by one"):
        quantizer.code_vectors()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("setting", [(0.0, 1.0, 6), (1.0, 0.0, 6), (1.0, 1.0, 1), "eval"])
def test_settings_that_change_nothing(name, setting):
    quantizer = made(name)
    z, outcome = clean(quantizer, batch=4)
    perturb = LatentPerturbation(1.0, 1.0, 6).eval() if setting == "eval" else LatentPerturbation(*setting)
    moved = perturb(quantizer, outcome.indices, z=z, generator=seeded())
    assert torch.equal(moved.indices, outcome.indices)
    assert not moved.changed.any()
    assert torch.equal(quantizer.straight_through(outcome, moved.indices), outcome.latents)


def test_latent_centred_with_one_neighbour_changes_nothing():
    quantizer = made("vq")
    z, outcome = clean(quantizer)
    perturb = LatentPerturbation(1.0, 1.0, 2, neighbour_of="latent")
    moved = perturb(quantizer, outcome.indices, z=z, generator=seeded(), ratio=0.5)
    assert torch.equal(moved.indices, outcome.indices)


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    config = CNNConfig(
        image_size=8,
        quantizer=VQ,
        block_out_channels=(8, 16),
        layers_per_block=1,
        z_channels=8,
        norm_groups=4,
        lowest_attention=False,
        mid_attention=False,
    )
    return CNNTokenizer(config)


def test_reconstruction_with_and_without(tokenizer):
    images = torch.rand(3, 3, 8, 8, generator=seeded()) * 2 - 1
    plain = tokenizer.reconstruct(images)
    for idle in (LatentPerturbation(0.0), LatentPerturbation(1.0, 1.0, 1), LatentPerturbation(1.0, 1.0, 9).eval()):
        assert torch.equal(tokenizer.reconstruct(images, idle, seeded()), plain)
    strong = tokenizer.reconstruct(images, LatentPerturbation(1.0, 1.0, 32), seeded())
    assert not torch.equal(strong, plain)
    assert torch.equal(tokenizer.reconstruct(images, LatentPerturbation(1.0, 1.0, 32), seeded()), strong)
    with pytest.raises(ValueError, match="pass generator"):
        tokenizer.reconstruct(images, LatentPerturbation(1.0, 1.0, 32))


@pytest.mark.parametrize("batch", [4, 8, 64])
@pytest.mark.parametrize("exact", [False, True])
def test_random_images_are_a_tenth_of_any_batch(batch, exact):
    quantizer = made("vq")
    indices = torch.zeros(batch, 2, dtype=torch.int64)
    perturb, draws = LatentPerturbation(1.0, 0.1, 3, exact=exact), seeded()
    numbers = [int(perturb(quantizer, indices, generator=draws).image_mask.sum()) for _ in range(400)]
    mean = sum(numbers) / 400
    if exact:
        assert set(numbers) <= {int(0.1 * batch), int(0.1 * batch) + 1}
    assert abs(mean - 0.1 * batch) < 4 * (batch * 0.09 / 400) ** 0.5


@pytest.mark.parametrize(("batch", "expected"), [(4, 0), (8, 0), (9, 0), (10, 1), (64, 6)])
def test_released_rule_takes_the_first_images(batch, expected):
    quantizer = made("vq")
    z, outcome = clean(quantizer, batch=batch)
    perturb = LatentPerturbation(1.0, 0.1, 6, variant="released")
    moved = perturb(quantizer, outcome.indices, z=z, generator=seeded())
    assert moved.image_mask.tolist() == [True] * expected + [False] * (batch - expected)
    assert perturb.neighbour_of == "latent"
    assert perturb.semantic_sees_perturbed
    assert not LatentPerturbation().semantic_sees_perturbed


def test_exact_token_numbers():
    quantizer = made("vq")
    _, outcome = clean(quantizer, batch=100)
    moved = LatentPerturbation(0.75, 1.0, 3, exact=True)(quantizer, outcome.indices, generator=seeded())
    assert moved.selected.flatten(1).sum(1).unique().tolist() == [12]
    moved = LatentPerturbation(0.3, 1.0, 3, exact=True)(quantizer, outcome.indices, generator=seeded())
    assert moved.selected.flatten(1).sum(1).unique().tolist() == [4, 5]


def test_residual_levels_keep_the_residuals_of_the_clean_pass():
    quantizer = made("residual")
    _, outcome = clean(quantizer, batch=5)
    moved = LatentPerturbation(0.5, 1.0, 6)(quantizer, outcome.indices, generator=seeded())
    # Levels after a changed one are not chosen again: unselected ones keep their index.
    assert torch.equal(moved.indices[~moved.selected], outcome.indices[~moved.selected])
    expected = sum(level.weight[moved.indices[..., number]] for number, level in enumerate(quantizer.levels))
    torch.testing.assert_close(quantizer.straight_through(outcome, moved.indices), expected, atol=1e-5, rtol=1e-5)


def test_latent_centred_residual_levels():
    quantizer = made("residual")
    z, outcome = clean(quantizer, batch=5)
    perturb = LatentPerturbation(1.0, 1.0, 4, neighbour_of="latent")
    moved = perturb(quantizer, outcome.indices, z=z, generator=seeded())
    for group in range(3):
        distances = torch.cdist(quantizer.project(z, group).reshape(-1, 4), quantizer.code_vectors(group))
        chosen = distances.gather(1, moved.indices[..., group].reshape(-1, 1)).squeeze(1)
        assert (chosen <= distances.sort(1).values[:, 3] + 1e-5).all()


def test_one_generator_per_image_makes_images_independent_of_the_batch():
    for name in ("vq", "fsq", "product"):
        quantizer = made(name)
        _, outcome = clean(quantizer, batch=6)
        perturb = LatentPerturbation(0.5, 1.0, 6)
        together = perturb(quantizer, outcome.indices, generator=[seeded(n) for n in range(6)]).indices
        alone = [perturb(quantizer, outcome.indices[n : n + 1], generator=[seeded(n)]).indices for n in range(6)]
        assert torch.equal(together, torch.cat(alone))
    with pytest.raises(ValueError, match="2 generators for 6 images"):
        perturb(quantizer, outcome.indices, generator=[seeded(), seeded()])


def test_two_tokenizers_with_one_grid_are_perturbed_at_the_same_places():
    masks = []
    for name in ("vq", "vq_plain", "fsq"):
        quantizer = made(name)
        _, outcome = clean(quantizer, batch=10)
        masks.append(LatentPerturbation(0.5, 0.5, 6)(quantizer, outcome.indices, generator=seeded()).selected)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_neighbours_follow_codes_that_move():
    quantizer = made("vq_plain")
    indices = torch.arange(64).view(1, 64)
    always, seldom = (
        LatentPerturbation(1.0, 1.0, 2, exclude_self=True),
        LatentPerturbation(1.0, 1.0, 2, exclude_self=True, refresh_every=3),
    )
    before = [one(quantizer, indices, generator=seeded()).indices for one in (always, seldom)]
    assert torch.equal(*before)
    # Through .data, which leaves no trace in the tensor's version.
    quantizer.weight.data.copy_(torch.randn(64, 4, generator=seeded(9)))
    moved = always(quantizer, indices, generator=seeded()).indices
    assert not torch.equal(moved, before[0])
    later = [seldom(quantizer, indices, generator=seeded()).indices for _ in range(4)]
    assert torch.equal(later[0], before[0])
    assert torch.equal(later[1], before[0])
    assert torch.equal(later[2], moved)
    assert torch.equal(copy.deepcopy(always)(quantizer, indices, generator=seeded()).indices, moved)


def test_table_agrees_with_brute_force_and_starts_with_the_code():
    codes = torch.randn(300, 8, generator=seeded()) * 5
    codes[7] = codes[100]  # equal codes are at distance 0, but each comes first in its own row
    table = nearest_codes(codes, 20).long()
    assert torch.equal(table[:, 0], torch.arange(300))
    distances = (codes.double()[:, None] - codes.double()[None]).square().sum(2)
    torch.testing.assert_close(distances.gather(1, table).sort(1).values, distances.sort(1).values[:, :20])


@pytest.mark.parametrize("end_ratio", [0.0, 0.25, 0.5, 1.0])
def test_schedule(end_ratio):
    schedule = PerturbationSchedule(0.2, 0.6, end_ratio)
    expected = {0.0: 1, 0.2: 1, 0.4: 1 - (1 - end_ratio) / 2, 0.6: end_ratio, 1.0: end_ratio}
    assert {p: pytest.approx(schedule.ratio(p)) for p in expected} == expected
    released = PerturbationSchedule(0.2, 0.6, end_ratio, variant="released")
    assert (released.ratio(0.4) == pytest.approx(schedule.ratio(0.4))) == (end_ratio == 0.5)
    assert released.ratio(0.4) == pytest.approx(1 - end_ratio / 2)
    assert released.ratio(0.61) == end_ratio


def test_published_epochs_are_the_default_schedule():
    schedule = PerturbationSchedule()
    ratios = [schedule.ratio(epoch / 200) for epoch in (0, 40, 80, 120, 199)]
    assert ratios == pytest.approx([1, 1, 0.75, 0.5, 0.5])


def test_ratio_scales_alpha_and_delta_and_leaves_beta():
    quantizer = made("vq")
    _, outcome = clean(quantizer)
    full = LatentPerturbation(0.5, 0.5, 3)(quantizer, outcome.indices, generator=seeded())
    half = LatentPerturbation(1.0, 0.5, 6)(quantizer, outcome.indices, generator=seeded(), ratio=0.5)
    assert torch.equal(full.indices, half.indices)


def test_delta_for_other_codebooks():
    assert [scaled_delta(size) for size in (4096, 8192, 16384, 1024, 256, 16)] == [100, 200, 400, 25, 6, 2]


def test_defaults_are_the_trained_values():
    perturb = LatentPerturbation()
    assert (perturb.alpha, perturb.beta, perturb.delta, perturb.neighbour_of) == (1.0, 0.1, 100, "code")


def test_a_quantizer_without_neighbours():
    class Continuous(Quantizer):
        codebook_size = 100
        dim = 4

    indices = torch.zeros(2, 4, dtype=torch.int64)
    assert not LatentPerturbation(1.0, 0.0, 5)(Continuous(), indices, generator=seeded()).changed.any()
    with pytest.raises(MmpostError) as caught:
        LatentPerturbation(1.0, 1.0, 5)(Continuous(), indices, generator=seeded())
    assert str(caught.value) == (
        "the codes of quantizer 'Continuous' have no neighbours, so its latents cannot be perturbed. "
        "Choose another quantizer, or set tokenizer.perturb.beta=0. [MMP-C070]"
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"alpha": 1.5}, "perturbation.alpha=1.5 is not between 0 and 1. Correct alpha. [MMP-C072]"),
        ({"delta": 0}, "perturbation.delta=0 is not a whole number, 1 or more. Correct delta. [MMP-C072]"),
        ({"variant": "mine"}, "perturbation.variant='mine' is not paper or released."),
        ({"refresh_every": 11}, "perturbation.refresh_every=11 is not between 1 and 10."),
        ({"variant": "released", "exact": True}, "perturbation.variant=released with exact or exclude_self."),
    ],
)
def test_wrong_settings(settings, text):
    with pytest.raises(MmpostError, match=re.escape(text)):
        LatentPerturbation(**settings)


def test_what_does_not_fit_the_quantizer():
    indices = torch.zeros(2, 4, 4, dtype=torch.int64)
    with pytest.raises(MmpostError) as caught:
        LatentPerturbation(1.0, 1.0, 100)(made("vq"), indices, generator=seeded())
    assert str(caught.value) == (
        "perturbation.delta=100 needs 100 codes, but the codebook has 64. "
        "Lower delta; 2 is usual at this size. [MMP-C072]"
    )
    for name in ("product", "residual", "multi_scale"):
        quantizer = made(name)
        z, outcome = clean(quantizer, batch=20)
        with pytest.raises(MmpostError, match=f"leaves quantizer '{name}' unperturbed") as caught:
            LatentPerturbation(1.0, 1.0, 5, variant="released")(quantizer, outcome.indices, z=z, generator=seeded())
        assert caught.value.code == "MMP-C073"
    with pytest.raises(MmpostError, match="neighbours of latents are not defined"):
        LatentPerturbation(1.0, 1.0, 5, neighbour_of="latent")(quantizer, outcome.indices, z=z, generator=seeded())
    with pytest.raises(MmpostError, match="Choose 0 <= start <= end <= 1"):
        PerturbationSchedule(0.7, 0.6)
