import pytest
import torch

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.bridge.head import PUBLISHED, DimensionHead, HeadConfig, ParallelHead, guided

ORDER = (3, 0, 4, 1, 2)
SMALL = HeadConfig(channels=5, levels=7, z_dim=6, width=16, depth=2, heads=2)


def head(kind=DimensionHead, config=SMALL, order=ORDER, moved=True):
    """A head in eval mode; ``moved``: not at the start, where the modulation is zero."""
    torch.manual_seed(0)
    made = kind(config, order).eval()
    if moved:
        with torch.no_grad():
            for weight in made.parameters():
                weight.add_(0.2 * torch.randn(weight.shape))
    return made


def data(rows=4, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=draw), torch.randint(0, 7, (rows, 5), generator=draw)


def test_a_channel_sees_only_those_before_it():
    model = head()
    z, indices = data()
    before = model(z, indices)
    for step, channel in enumerate(ORDER):
        changed = indices.clone()
        changed[:, channel] = (changed[:, channel] + 1) % 7
        differs = (model(z, changed) - before).abs().amax((0, 2)) > 0
        seen = {c for c in range(5) if bool(differs[c])}
        assert seen == set(ORDER[step + 1 :])


def test_parallel_head_sees_no_index():
    model = head(ParallelHead)
    z, indices = data()
    assert torch.equal(model(z, indices), model(z, (indices + 1) % 7))


def test_step_by_step_equals_teacher_forcing():
    model = head()
    z, _ = data(rows=1)
    sampled = model.sample(z, generator=torch.Generator().manual_seed(3))
    forced = model.log_probs(z, sampled)
    # The chance of every first index, from prefixes that are recomputed.
    partial = torch.zeros_like(sampled)
    for channel in ORDER:
        alone = model(z, partial).log_softmax(-1)[0, channel]
        torch.testing.assert_close(alone[sampled[0, channel]], forced[0, channel], atol=1e-5, rtol=0)
        partial[0, channel] = sampled[0, channel]
    assert torch.equal(partial, sampled)


def test_cached_sampling_follows_the_teacher_forced_distribution():
    model = head(order=None)
    z, _ = data(rows=1)
    rows = 10_000
    sampled = model.sample(z.expand(rows, -1), generator=torch.Generator().manual_seed(0))
    first, second = model(z, torch.zeros(1, 5, dtype=torch.int64)).softmax(-1)[0, 0], []
    for index in range(7):
        given = torch.zeros(1, 5, dtype=torch.int64)
        given[0, 0] = index
        second.append(model(z, given).softmax(-1)[0, 1])
    expected = first[:, None] * torch.stack(second)
    found = torch.bincount(sampled[:, 0] * 7 + sampled[:, 1], minlength=49).view(7, 7) / rows
    # Five standard errors of a share of at most one half.
    assert float((found - expected).abs().max().detach()) < 5 * 0.5 / rows**0.5


def test_temperature_zero_takes_the_likeliest_given_the_ones_before():
    model = head()
    z, _ = data()
    sampled = model.sample(z, temperature=0)
    assert torch.equal(sampled, model.sample(z, temperature=0))
    assert torch.equal(model(z, sampled).argmax(-1), sampled)
    parallel = head(ParallelHead)
    assert torch.equal(parallel.sample(z, temperature=0), parallel(z, sampled).argmax(-1))


def test_same_seed_same_sample():
    z, _ = data(rows=50)
    for kind in (DimensionHead, ParallelHead):
        model = head(kind)
        one, two, other = (model.sample(z, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(one, two)
        assert not torch.equal(one, other)


def test_order_moves_channels_and_nothing_else():
    z, indices = data()
    plain, ordered = head(order=None), head()
    ordered.load_state_dict({**plain.state_dict(), "order": ordered.order})
    through = plain(z, indices[:, ordered.order])
    assert torch.equal(ordered(z, indices)[:, ordered.order], through)


def test_start_is_modulated_by_nothing():
    model = head(moved=False)
    z, indices = data()
    x = torch.cat([z[:, :0], model.enter(z)], 1)[:, None] + model.position[0]
    expected = model.classifiers[0](model.final_norm(model.norm(x)))[:, 0]
    torch.testing.assert_close(model(z, indices)[:, ORDER[0]], expected)


def test_log_probs_are_those_of_a_distribution():
    model = head()
    z, _ = data(rows=1)
    every = torch.cartesian_prod(*[torch.arange(7)] * 5)
    with torch.no_grad():
        total = torch.cat([model.log_probs(z.expand(len(part), -1), part).sum(1) for part in every.split(4000)])
    assert float(total.double().exp().sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "parameters", "without_modulation"),
    [
        ("3M", 4_465_536, 3_149_696),
        ("10M", 16_270_080, 11_016_960),
        ("13M", 20_998_656, 14_169_600),
        ("65M", 80_793_600, 53_504_000),
        ("94M", 118_582_272, 78_697_472),
    ],
)
def test_published_sizes(name, parameters, without_modulation):
    width, depth = PUBLISHED[name]
    with torch.device("meta"):
        model = DimensionHead(HeadConfig(width=width, depth=depth))
        parallel = ParallelHead(HeadConfig(width=width, depth=depth))
    modulation = sum(p.numel() for n, p in model.named_parameters() if "modulation" in n or n.startswith("final."))
    count = sum(p.numel() for p in model.parameters())
    assert (count, count - modulation) == (parameters, without_modulation)
    # The parallel head lacks the tables of indices, and only these.
    assert count - sum(p.numel() for p in parallel.parameters()) == 15 * 64 * width


def test_guidance_is_a_line_through_both_features():
    z, without = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(guided(z, without, 1), z)
    torch.testing.assert_close(guided(z, without, 0), without)
    torch.testing.assert_close(guided(z, without, 3) - without, 3 * (z - without))


def test_messages():
    with pytest.raises(MmpostError) as error:
        DimensionHead(SMALL, (0, 1, 2))
    assert str(error.value) == (
        "bridge: a channel order of 3 for 5 channels. "
        "Measure it on latents of this VAE with dimension_order. [MMP-C094]"
    )
    with pytest.raises(MmpostError) as error:
        HeadConfig(width=100, heads=8)
    assert str(error.value) == (
        "bridge: width=100 of the head is not a multiple of heads=8. Correct width or heads. [MMP-C090]"
    )
