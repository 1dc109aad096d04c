"""The one loss against brute force: published objectives in float64, row by row, differentiated by autograd."""

import math

import numpy as np
import pytest
import torch

from mmpost.algos import grpo, sft
from mmpost.config.schema import LossSection
from mmpost.train import estimator
from mmpost.train.advantages import ADVANTAGES
from mmpost.train.choose import choose
from mmpost.train.estimator import Counts
from mmpost.train.method import Scored
from mmpost.train.parts import Parts, terms
from mmpost.train.positions import Positions

SFT = sft.preset().demo

VOCAB = 7


def _grpo(**section):
    """Parts of GRPO with some options."""
    return choose("grpo", grpo.preset, LossSection(**section)).rollout


def of_group(name, scores):
    """Advantages of one group."""
    group = Scored(0, "", tuple(scores), (1,) * len(scores), (False,) * len(scores))
    return ADVANTAGES[name]()([group], {})[0]


def _problem(seed: int, rows: int = 6):
    """Random logits, targets, old and reference log-probabilities of rows of unequal length."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (rows,), generator=g)
    row = torch.repeat_interleave(torch.arange(rows), lengths)
    m = len(row)
    logits = torch.randn(m, VOCAB, generator=g, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, VOCAB, (m,), generator=g)
    logp = logits.detach().log_softmax(-1).gather(-1, target[:, None])[:, 0]
    old = logp + 0.4 * torch.randn(m, generator=g, dtype=torch.float64)
    reference = logp + 0.4 * torch.randn(m, generator=g, dtype=torch.float64)
    advantage = torch.randn(rows, generator=g, dtype=torch.float64)
    return logits, target, row, lengths, old, reference, advantage


def _logp(logits, target):
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def _ours(parts: Parts, problem, *, with_reference=False, max_length=9):
    logits, target, row, lengths, old, reference, advantage = problem
    logp = _logp(logits, target)
    positions = Positions(
        logp.detach(), old, advantage[row], row, lengths, reference=reference if with_reference else None
    )
    said = terms(parts, positions)
    counts = Counts(len(row), len(lengths), max_length)
    weight = estimator.aggregation_weight(parts.aggregate, row, lengths, counts)
    loss = estimator.surrogate(logp, estimator.coefficient(weight, said))
    return torch.autograd.grad(loss, logits)[0], weight, said


def _published_grpo(problem, aggregate, eps_low, eps_high, beta=0.0, kl="k3", max_length=9):
    """The objective as the papers write it: loops over rows and tokens, min and clamp, then autograd."""
    logits, target, row, lengths, old, reference, advantage = problem
    logp = _logp(logits, target)
    total = torch.zeros((), dtype=torch.float64)
    for i, length in enumerate(lengths.tolist()):
        inner = torch.zeros((), dtype=torch.float64)
        for m in (row == i).nonzero()[:, 0].tolist():
            ratio = (logp[m] - old[m]).exp()
            clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
            value = torch.minimum(ratio * advantage[i], clipped * advantage[i])
            difference = reference[m] - logp[m]
            penalty = difference.exp() - difference - 1 if kl == "k3" else 0.5 * difference**2
            inner = inner + value - beta * penalty
        scale = {
            "seq_mean": 1 / (length * len(lengths)),
            "token": 1 / len(row),
            "const": 1 / (max_length * len(lengths)),
            "seq_sum": 1 / len(lengths),
        }[aggregate]
        total = total + inner * scale
    return torch.autograd.grad(-total, logits)[0], -total.detach()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("aggregate", ["seq_mean", "token", "const", "seq_sum"])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.05, 0.05)])
def test_grpo_gradient_equals_the_published_objective(seed, aggregate, low, high):
    problem = _problem(seed)
    parts = _grpo(aggregate=aggregate, epsilon=low, epsilon_high=high)
    ours, weight, said = _ours(parts, problem)
    theirs, value = _published_grpo(problem, aggregate, low, high)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    # The value that is logged is the published one, too.
    torch.testing.assert_close(-(weight * said.objective).sum(), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_kl_penalty_gradient_equals_autograd_of_the_estimator(kl):
    problem = _problem(3)
    parts = _grpo(kl={"kl": kl, "beta": 0.3})
    ours, _, _ = _ours(parts, problem, with_reference=True)
    theirs, _ = _published_grpo(problem, "seq_mean", 0.2, 0.2, beta=0.3, kl=kl)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_sft_gradient_equals_cross_entropy():
    problem = _problem(1)
    logits, target = problem[0], problem[1]
    ours, _, _ = _ours(SFT, (*problem[:-1], torch.ones(6, dtype=torch.float64)))
    theirs = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), logits)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


# p = .5 for the target and .25 for the two others; dL/dz is kappa * (p - onehot).
GOLDEN = [
    (SFT, 0.5, 1.0, 1.0),
    (_grpo(), 0.4, 1.0, 0.0),  # ratio 1.25 is clipped for a positive advantage
    (_grpo(), 0.4, -1.0, -1.25),
    (_grpo(epsilon=0.2, epsilon_high=0.28), 0.4, 1.0, 1.25),
]


@pytest.mark.parametrize(("parts", "old", "advantage", "kappa"), GOLDEN)
def test_one_token_by_hand(parts, old, advantage, kappa):
    logits = torch.tensor([[math.log(0.25), math.log(0.5), math.log(0.25)]], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(-1)[:, 1]
    old = torch.tensor([math.log(old)], dtype=torch.float64)
    p = Positions(logp.detach(), old, torch.tensor([advantage]).double(), torch.tensor([0]), torch.tensor([1]))
    got = estimator.coefficient(torch.ones(1), terms(parts, p))
    assert float(got) == pytest.approx(kappa, abs=1e-12)
    grad = torch.autograd.grad(estimator.surrogate(logp, got), logits)[0]
    expected = kappa * (torch.tensor([[0.25, 0.5, 0.25]]).double() - torch.tensor([[0.0, 1.0, 0.0]]).double())
    torch.testing.assert_close(grad, expected)


def test_expected_kl_gradients_point_where_the_names_say():
    """Under y ~ pi: k2 gives the gradient of KL(pi || ref), k3 that of KL(ref || pi)."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(-1)
    logp = z.log_softmax(-1)
    p = logp.exp()
    reverse = torch.autograd.grad((p * (logp - ref)).sum(), z, retain_graph=True)[0]
    forward = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), z, retain_graph=True)[0]
    for kind, expected in (("k2", reverse), ("k3", forward)):
        coefficient = estimator.kl_coefficient(kind, logp, ref, torch.ones(5, dtype=torch.float64))
        got = torch.autograd.grad((p.detach() * coefficient * logp).sum(), z, retain_graph=True)[0]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert (reverse - forward).abs().max() > 1e-2


def test_a_removed_position_with_an_infinite_ratio_gives_zero_not_nan():
    logp = torch.tensor([0.0, -1.0], requires_grad=True)
    said = estimator.Terms(torch.tensor([0.0, 1.0]), torch.tensor([float("inf"), 1.0]), torch.ones(2))
    kappa = estimator.coefficient(torch.ones(2), said)
    assert kappa.tolist() == [0.0, 1.0]
    p = Positions(torch.tensor([0.0]), torch.tensor([-1e4]), torch.tensor([1.0]), torch.tensor([0]), torch.tensor([1]))
    assert float(estimator.coefficient(torch.ones(1), terms(_grpo(), p))) == 0.0
    grad = torch.autograd.grad(estimator.surrogate(logp, kappa), logp)[0]
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("aggregate", ["token", "seq_mean", "const", "seq_sum"])
@pytest.mark.parametrize("split", [[6], [3, 3], [1, 2, 3], [1] * 6])
def test_splitting_a_step_changes_no_coefficient(aggregate, split):
    *_, row, lengths, old, _, advantage = _problem(2)
    del old, advantage
    counts = Counts(len(row), 6, 9)
    whole = estimator.aggregation_weight(aggregate, row, lengths, counts)
    parts, first = [], 0
    for size in split:
        inside = (row >= first) & (row < first + size)
        parts.append(
            estimator.aggregation_weight(aggregate, row[inside] - first, lengths[first : first + size], counts)
        )
        first += size
    assert torch.equal(torch.cat(parts), whole)


def test_group_advantages_by_hand():
    a = of_group("group", [1, 0, 0, 1, 0, 0, 0, 0])
    assert a[0] == pytest.approx(1.6198, abs=1e-4)
    assert a[1] == pytest.approx(-0.5399, abs=1e-4)
    assert of_group("group_nostd", [1.0, 0.0]).tolist() == [0.5, -0.5]
    assert of_group("group", [0.5, 0.5, 0.5]).tolist() == [0.0, 0.0, 0.0]


def test_group_advantages_ignore_constants_scale_and_order_and_negate_under_flips():
    rng = np.random.default_rng(0)
    for _ in range(20):
        r = rng.integers(0, 2, 8).astype(float)
        r[:2] = [0, 1]
        a = of_group("group", list(r))
        np.testing.assert_allclose(of_group("group", list(r + 3)), a, atol=1e-12)
        np.testing.assert_allclose(of_group("group", list(r * 10)), a, rtol=2e-3)
        np.testing.assert_allclose(of_group("group", list(1 - r)), -a, atol=1e-12)
        order = rng.permutation(8)
        np.testing.assert_allclose(of_group("group", list(r[order])), a[order], atol=1e-12)


def test_a_completion_without_a_score_is_left_out_of_its_group():
    a = of_group("group_nostd", [1.0, None, 0.0])
    assert a[0] == 0.5
    assert np.isnan(a[1])
    assert a[2] == -0.5


def test_a_row_twice_as_long_weighs_twice_as_much_in_dr_grpo_and_the_same_in_grpo():
    row, lengths = torch.tensor([0] * 3 + [1] * 6), torch.tensor([3, 6])
    for name, factor in (("const", 2.0), ("seq_mean", 1.0), ("token", 2.0), ("seq_sum", 2.0)):
        weight = estimator.aggregation_weight(name, row, lengths, Counts(9, 2, 20))
        assert float(weight[row == 1].sum() / weight[row == 0].sum()) == pytest.approx(factor)
