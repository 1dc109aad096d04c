"""Every objective against its published loss: by hand for one token, against TRL's own code, and in expectation."""

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmpost.algos import bnpo, cispo, dft, dr_grpo, grpo, gspo, luffy, luspo, ppo, reinforce, sapo, sft, vespo
from mmpost.train import estimator
from mmpost.train.denominators import OWN, capped
from mmpost.train.estimator import Counts
from mmpost.train.mismatch import Mismatch
from mmpost.train.parts import Kl, Parts, terms
from mmpost.train.positions import Positions
from mmpost.train.stabilisers import (
    Clip,
    ClipCov,
    Delta,
    Dual,
    EntropyTop,
    Luffy,
    OffSequence,
    Sapo,
    Survey,
    Vespo,
)

DAPO = Parts("token", grpo.preset().rollout.denominator, (Clip(0.2, 0.28),))


def _one(parts, *, p=0.5, old=None, advantage=1.0, engine=None):
    """kappa of one token with w = 1."""

    def vector(value):
        return torch.tensor([value], dtype=torch.float64)

    logp = vector(math.log(p))
    position = Positions(
        logp,
        logp if old is None else vector(math.log(old)),
        vector(advantage),
        torch.tensor([0]),
        torch.tensor([1]),
        engine=None if engine is None else vector(math.log(engine)),
    )
    return float(estimator.coefficient(torch.ones(1, dtype=torch.float64), terms(parts, position)))


# p = .5 for the target and .25 for the two others; old = .4 makes the ratio 1.25.
GOLDEN = {
    "sft": (sft.preset().demo, {}, 1.0),
    "dft": (dft.preset().demo, {}, 0.5),
    "luffy": (luffy.preset().demo, {}, 0.1388889),
    "grpo, clipped": (grpo.preset().rollout, {"old": 0.4}, 0.0),
    "grpo, negative": (grpo.preset().rollout, {"old": 0.4, "advantage": -1.0}, -1.25),
    "ppo, clipped": (ppo.preset().rollout, {"old": 0.4}, 0.0),
    "dapo": (DAPO, {"old": 0.4}, 1.25),
    "cispo, cap 1.1": (cispo.preset(cap=1.1).rollout, {"old": 0.4}, 1.1),
    "cispo, cap 5": (cispo.preset().rollout, {"old": 0.4}, 1.25),
    "cispo, low 1.5": (cispo.preset(low=1.5).rollout, {"old": 0.4}, 1.5),
    "sapo": (sapo.preset().rollout, {"old": 0.4}, 1.2307),
    "sapo, negative": (sapo.preset().rollout, {"old": 0.4, "advantage": -1.0}, -1.2287),
    "vespo": (vespo.preset().rollout, {"old": 0.4}, 0.7381),
    "vespo, negative": (vespo.preset().rollout, {"old": 0.4, "advantage": -1.0}, -1.1846),
    "reinforce": (reinforce.preset().rollout, {"old": 0.4, "advantage": -0.3}, -0.3),
    "dual, kept": (replace(DAPO, stabilise=(Clip(), Dual(3.0))), {"old": 0.2, "advantage": -1.0}, -2.5),
    "dual, cut": (replace(DAPO, stabilise=(Clip(), Dual(2.0))), {"old": 0.2, "advantage": -1.0}, 0.0),
    "delta, cut": (replace(DAPO, stabilise=(Delta(1.2),)), {"old": 0.4, "advantage": -1.0}, 0.0),
    "engine weight, cut at 2": (replace(DAPO, mismatch=Mismatch("token_tis")), {"old": 0.4, "engine": 0.1}, 2.5),
    "engine weight, IcePop": (replace(DAPO, mismatch=Mismatch("token_mask")), {"old": 0.4, "engine": 0.1}, 5.0),
    "engine weight, masked": (replace(DAPO, mismatch=Mismatch("seq_mask")), {"old": 0.4, "engine": 0.1}, 0.0),
    "engine weight, rejected": (replace(DAPO, mismatch=Mismatch("geo_reject")), {"old": 0.4, "engine": 0.1}, 0.0),
    "engine bypass": (replace(DAPO, mismatch=Mismatch("bypass")), {"old": 0.1, "engine": 0.4}, 1.25),
    "engine not finite": (replace(DAPO, mismatch=Mismatch("token_tis")), {"old": 0.4, "engine": math.inf}, 1.25),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_one_token_by_hand(name):
    parts, facts, kappa = GOLDEN[name]
    assert _one(parts, **facts) == pytest.approx(kappa, abs=5e-5)
    logits = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log().requires_grad_()
    logp = logits.log_softmax(-1)[:, 1]
    exact = torch.tensor([_one(parts, **facts)], dtype=torch.float64)
    grad = torch.autograd.grad(estimator.surrogate(logp, exact), logits)[0]
    torch.testing.assert_close(grad, float(exact) * torch.tensor([[0.25, -0.5, 0.25]], dtype=torch.float64))


def test_gspo_by_hand():
    ratios = torch.tensor([1.2, 0.9, 1.1], dtype=torch.float64)
    logp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)

    def kappa(ratios, advantage=2.0):
        p = Positions(
            logp, logp - ratios.log(), torch.full((3,), advantage).double(), torch.zeros(3).long(), torch.tensor([3])
        )
        weight = estimator.aggregation_weight("seq_mean", p.row, p.lengths, Counts(3, 1))
        return estimator.coefficient(weight, terms(gspo.preset(epsilon=0.2, epsilon_high=0.2).rollout, p))

    torch.testing.assert_close(kappa(ratios), torch.full((3,), 1.0591 * 2 / 3).double(), rtol=1e-4, atol=0)
    # One token up and another down leave the sequence where it was; a token's own ratio would change.
    torch.testing.assert_close(kappa(ratios * torch.tensor([2.0, 0.5, 1.0])), kappa(ratios), rtol=1e-12, atol=0)


def test_clip_by_hand_for_each_side_and_sign():
    expected = {
        (1.3, 1): 0,
        (1.3, -1): 1,
        (0.7, 1): 1,
        (0.7, -1): 0,
        (1.1, 1): 1,
        (1.1, -1): 1,
        (0.9, 1): 1,
        (0.9, -1): 1,
    }
    for (ratio, advantage), kept in expected.items():
        p = Positions(
            *(torch.tensor([v]).double() for v in (0.0, 0.0, advantage)), torch.tensor([0]), torch.tensor([1])
        )
        assert float(Clip(0.2)(p, torch.tensor([ratio]).double())) == kept


# -- against TRL -----------------------------------------------------------------------------------------------------


def _problem(seed=0, rows=6, longest=11):
    """Rows of unequal length, padded for TRL and flat for us."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logp = -torch.rand(rows, longest, generator=g, dtype=torch.float64) * 3
    lengths = torch.randint(3, longest + 1, (rows,), generator=g)
    mask = (torch.arange(longest)[None] < lengths[:, None]).double()
    return SimpleNamespace(
        logp=logp,
        old=logp + 0.35 * normal(rows, longest),
        reference=logp + 0.5 * normal(rows, longest),
        mask=mask,
        lengths=lengths,
        advantage=normal(rows, 1),
        weight=torch.rand(rows, longest, generator=g, dtype=torch.float64) * 2,
        entropy=torch.rand(rows, longest, generator=g, dtype=torch.float64) * 2,
    )


def _trl(x, *, loss_type, old=True, reference=False, weight=False, bias_kl=False, beta=0.0, delta=None, **options):
    """Gradient on the log-probabilities and value of TRL's own loss, on the same tensors."""
    trainer = pytest.importorskip("trl").GRPOTrainer
    logp = x.logp.clone().requires_grad_(True)
    arguments = SimpleNamespace(
        delta=delta,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        use_bias_correction_kl=bias_kl,
        steps_per_generation=1,
    )
    accelerator = SimpleNamespace(
        num_processes=1,
        gather=lambda t: t,
        reduce=lambda t, reduction: t,
        sync_gradients=True,
        gather_for_metrics=lambda t: t,
        pad_across_processes=lambda t, **options: t,
    )
    quantile = options.pop("top_entropy_quantile", 1.0)
    stand_in = SimpleNamespace(
        args=arguments,
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, x.entropy, None),
        aux_loss_enabled=False,
        top_entropy_quantile=quantile,
        off_policy_mask_threshold=options.pop("off_policy", None),
        importance_sampling_level=options.pop("level", "token"),
        beta=beta,
        loss_type=loss_type,
        epsilon_low=options.pop("low", 0.2),
        epsilon_high=options.pop("high", 0.2),
        use_vllm=weight,
        vllm_importance_sampling_correction=weight,
        current_gradient_accumulation_steps=1,
        max_completion_length=32,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        get_gamma_weights=trainer.get_gamma_weights,
        get_off_policy_mask=trainer.get_off_policy_mask,
    )
    stand_in.get_high_entropy_mask = lambda *a: trainer.get_high_entropy_mask(stand_in, *a)
    rows, longest = x.logp.shape
    inputs = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_ids": torch.zeros(rows, longest, dtype=torch.long),
        "completion_mask": x.mask,
        "advantages": x.advantage.squeeze(-1),
        "num_items_in_batch": x.mask.sum(),
    }
    if old:
        inputs["old_per_token_logps"] = x.old
    if reference:
        inputs["ref_per_token_logps"] = x.reference
    if weight:
        inputs["importance_sampling_ratio"] = x.weight
    assert not options
    loss = trainer._compute_loss(stand_in, None, inputs)
    loss.backward()
    return logp.grad, float(loss.detach())


def _ours(parts, x, *, old=True, reference=False, weight=False, facts=None):
    """The same from kappa: gradient in TRL's shape and minus the objective."""
    kept = x.mask.bool()
    logp = x.logp.clone().requires_grad_(True)
    flat = logp[kept]
    row = torch.repeat_interleave(torch.arange(len(x.lengths)), x.lengths)
    was = x.old[kept] if old else flat.detach()
    p = Positions(
        flat.detach(),
        was,
        x.advantage[:, 0][row],
        row,
        x.lengths,
        reference=x.reference[kept] if reference else None,
        # An engine for which old / engine is the weight that TRL is given.
        engine=was - x.weight[kept].log() if weight else None,
        entropy=x.entropy[kept],
        facts=facts or {},
    )
    said = terms(parts, p)
    share = estimator.aggregation_weight(parts.aggregate, row, x.lengths, Counts(len(row), len(x.lengths), 32))
    estimator.surrogate(flat, estimator.coefficient(share, said)).backward()
    return logp.grad, -float((share * said.objective).sum())


_DAPO = {"loss_type": "dapo", "high": 0.28}
TIS = Mismatch("token_tis", cap=math.inf)
TRL_CASES = {
    "grpo": (grpo.preset().rollout, {"loss_type": "grpo"}),
    "grpo, on-policy": (replace(DAPO, stabilise=(Clip(),)), {"loss_type": "dapo", "old": False}),
    "dapo": (DAPO, _DAPO),
    "bnpo": (bnpo.preset().rollout, {"loss_type": "bnpo"}),
    "dr_grpo": (dr_grpo.preset().rollout, {"loss_type": "dr_grpo"}),
    "two-sided": (replace(DAPO, stabilise=(Delta(1.5), Clip())), {"loss_type": "dapo", "delta": 1.5}),
    "gspo": (
        gspo.preset(0.05, 0.05).rollout,
        {"loss_type": "grpo", "level": "sequence", "low": 0.05, "high": 0.05},
    ),
    "luspo": (
        luspo.preset(0.05, 0.05).rollout,
        {"loss_type": "luspo", "level": "sequence", "low": 0.05, "high": 0.05},
    ),
    "cispo": (cispo.preset(cap=1.1).rollout, {"loss_type": "cispo", "high": 1.1}),
    "sapo": (sapo.preset().rollout, {"loss_type": "sapo"}),
    "vespo": (vespo.preset().rollout, {"loss_type": "vespo"}),
    "k3": (replace(DAPO, kl=Kl("k3", 0.1)), {**_DAPO, "reference": True, "beta": 0.1}),
    "rho k3": (replace(DAPO, kl=Kl("rho_k3", 0.1)), {**_DAPO, "reference": True, "beta": 0.1, "bias_kl": True}),
    "engine weight": (replace(DAPO, mismatch=TIS), {**_DAPO, "weight": True}),
    "engine weight, k3": (
        replace(DAPO, mismatch=TIS, kl=Kl("k3", 0.1, engine_weight=False)),
        {**_DAPO, "weight": True, "reference": True, "beta": 0.1},
    ),
    "off-policy rows": (replace(DAPO, stabilise=(Clip(0.2, 0.28), OffSequence(0.02))), {**_DAPO, "off_policy": 0.02}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TRL_CASES)
def test_gradient_and_value_are_those_of_trl(name, seed):
    parts, options = TRL_CASES[name]
    x = _problem(seed)
    theirs, loss = _trl(x, **options)
    ours, value = _ours(parts, x, **{key: options[key] for key in ("old", "reference", "weight") if key in options})
    assert float((ours - theirs).abs().max()) < 1e-12
    assert float(theirs.abs().max()) > 1e-3
    assert value == pytest.approx(loss, abs=1e-10)


def test_cases_differ_from_each_other():
    """An objective that forgot its own part would agree with another one."""
    x = _problem(0, rows=40)
    flags = ("reference", "weight")
    seen = [_ours(parts, x, **{f: f in options for f in flags})[0] for parts, options in TRL_CASES.values()]
    same = {(a, b) for a in range(len(seen)) for b in range(a) if torch.allclose(seen[a], seen[b])}
    # One micro-batch: the mean over it is the mean over all tokens, and both have the same clip.
    assert same == {(list(TRL_CASES).index("bnpo"), list(TRL_CASES).index("grpo, on-policy"))}


def test_most_uncertain_tokens_are_those_of_trl():
    x = _problem(1)
    facts = {"EntropyTop": EntropyTop(0.3).survey(Survey(*(x.entropy[x.mask.bool()].numpy(),) * 3))}
    parts = replace(DAPO, stabilise=(Clip(0.2, 0.28), EntropyTop(0.3)))
    ours, value = _ours(parts, x, facts=facts)
    theirs, loss = _trl(x, **_DAPO, top_entropy_quantile=0.3)
    assert float((ours - theirs).abs().max()) < 1e-12
    assert value == pytest.approx(loss, abs=1e-10)
    assert 0 < int((ours != 0).sum()) < 0.4 * int(x.mask.sum())


# -- values of hand-made cases ---------------------------------------------------------------------------------------


def test_dual_clip_is_the_gradient_of_its_objective():
    ratio = torch.linspace(0.5, 5, 40, dtype=torch.float64)
    for sign in (1.0, -1.0):
        logp = ratio.log().requires_grad_(True)
        a = torch.full_like(ratio, sign)
        published = torch.minimum(logp.exp() * a, logp.exp().clamp(0.8, 1.2) * a)
        published = torch.maximum(published, 3.0 * a) if sign < 0 else published
        expected = torch.autograd.grad(published.sum(), logp)[0]
        p = Positions(logp.detach(), torch.zeros(40).double(), a, torch.arange(40), torch.ones(40).long())
        parts = Parts("token", grpo.preset().rollout.denominator, (Clip(), Dual(3.0)))
        said = terms(parts, p)
        torch.testing.assert_close(estimator.coefficient(torch.ones(40).double(), said), expected)
        torch.testing.assert_close(said.objective, published.detach())


@pytest.mark.parametrize("stabiliser", [Sapo(), Luffy(), Vespo(), Clip(), Dual(), Delta()])
def test_stabilisers_are_never_negative_and_one_where_nothing_has_moved(stabiliser):
    g = torch.Generator().manual_seed(0)
    logp = -torch.rand(20, generator=g, dtype=torch.float64) * 4
    a = torch.randn(20, generator=g, dtype=torch.float64)
    row, lengths = torch.repeat_interleave(torch.arange(5), 4), torch.full((5,), 4)
    p = Positions(logp, logp + torch.randn(20, generator=g, dtype=torch.float64), a, row, lengths)
    assert (stabiliser(p, (p.logp - p.old).exp()) >= 0).all()
    if not isinstance(stabiliser, Luffy):
        same = replace(p, old=logp)
        torch.testing.assert_close(stabiliser(same, torch.ones(20).double()), torch.ones(20).double())


def test_the_largest_covariances_are_dropped():
    g = torch.Generator().manual_seed(3)
    logp, a = (torch.randn(1000, generator=g, dtype=torch.float64) * 2 for _ in range(2))
    part = ClipCov(share=0.01)
    facts = {"ClipCov": part.survey(Survey(logp.numpy(), logp.numpy(), a.numpy()))}
    p = Positions(logp, logp, a, torch.arange(1000), torch.ones(1000).long(), facts=facts)
    dropped = part(p, torch.ones(1000).double()) == 0
    covariance = (logp - logp.mean()) * (a - a.mean())
    assert int(dropped.sum()) == 10
    assert float(covariance[dropped].min()) > 1
    inside = covariance[~dropped & (covariance < 5)]
    assert float(covariance[dropped].min()) > float(inside.max())


# -- penalties -------------------------------------------------------------------------------------------------------


def _expected(parts, z, other, old=None, field="reference"):
    """Gradient on z of -L, exactly: the expectation over y ~ old (default the policy) of kappa times grad log pi."""
    logp = z.log_softmax(-1)
    behaviour = logp.detach() if old is None else old
    count = len(z)
    p = Positions(
        logp.detach(),
        behaviour,
        torch.zeros(count).double(),
        torch.arange(count),
        torch.ones(count).long(),
        **{field: other},
    )
    kappa = estimator.coefficient(torch.ones(count).double(), terms(parts, p))
    return torch.autograd.grad((behaviour.exp() * kappa * logp).sum(), z)[0]


def test_expected_gradients_of_penalties_are_those_of_the_divergences():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True)
    other = torch.randn(6, generator=g, dtype=torch.float64).log_softmax(-1)
    old = (z.detach() + 0.5 * torch.randn(6, generator=g, dtype=torch.float64)).log_softmax(-1)
    logp = z.log_softmax(-1)
    reverse = torch.autograd.grad((logp.exp() * (logp - other)).sum(), z, retain_graph=True)[0]
    forward = torch.autograd.grad((other.exp() * (other - logp)).sum(), z)[0]

    def gap(kind, truth, old=None, field="reference", to="reference"):
        found = _expected(Parts("token", OWN, kl=Kl(kind, 1.0, to=to)), z, other, old, field)
        return float((found + truth).abs().max())

    assert gap("k2", reverse) < 1e-12
    assert gap("k3", forward) < 1e-12
    assert gap("rho_k3", reverse, old) < 1e-12
    assert gap("k2", reverse, field="teacher", to="teacher") < 1e-12
    # In the reward the penalty is the advantage of the sampled token, off-policy together with its ratio.
    assert gap("k1_reward", reverse) < 1e-12
    # The test can tell them apart.
    assert min(gap("k3", reverse), gap("k2", forward), gap("k2", reverse, old)) > 1e-3


def test_penalty_by_hand():
    p = Positions(
        *(torch.tensor([math.log(v)]).double() for v in (0.5, 0.4)),
        torch.tensor([0.0]).double(),
        torch.tensor([0]),
        torch.tensor([1]),
        reference=torch.tensor([math.log(0.25)]).double(),
    )
    for kind, shift in (("k2", 0.6931), ("k3", 0.5), ("rho_k3", 0.8664)):
        assert float(terms(replace(DAPO, kl=Kl(kind, 1.0)), p).kl_shift) == pytest.approx(shift, abs=1e-4)


def test_a_clipped_token_is_still_held_by_the_penalty_and_an_exempt_row_is_not():
    x = _problem(2)
    row = torch.repeat_interleave(torch.arange(6), x.lengths)
    kept = x.mask.bool()
    p = Positions(
        x.logp[kept],
        x.old[kept],
        x.advantage[:, 0][row],
        row,
        x.lengths,
        reference=x.reference[kept],
        penalised=row != 2,
    )
    said = terms(replace(DAPO, kl=Kl("k2", 0.1)), p)
    clipped = said.stabiliser == 0
    assert clipped.any()
    kappa = estimator.coefficient(torch.ones(len(row)).double(), said)
    torch.testing.assert_close(kappa[clipped & (row != 2)], -0.1 * (p.logp - p.reference)[clipped & (row != 2)])
    torch.testing.assert_close(
        kappa[row == 2], estimator.coefficient(torch.ones(len(row)).double(), terms(DAPO, p))[row == 2]
    )


def test_the_weight_of_a_penalty_moves_on_a_straight_line():
    kl = Kl("k2", 5e-3, 1e-3, to="teacher")
    assert [kl.at(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([5e-3, 3e-3, 1e-3])
    assert Kl("k2", 0.2).at(0.7) == 0.2


# -- splitting a step ------------------------------------------------------------------------------------------------

SPLIT = {
    "grpo": grpo.preset().rollout,
    "dapo": DAPO,
    "dr_grpo": dr_grpo.preset().rollout,
    "gspo": gspo.preset(0.05, 0.05).rollout,
    "luspo": luspo.preset(0.05, 0.05).rollout,
    "cispo": cispo.preset(1.1).rollout,
    "vespo": vespo.preset().rollout,
    "reinforce": reinforce.preset().rollout,
    "seq_tis": replace(DAPO, mismatch=Mismatch("seq_tis")),
}


def _kappa_by_row(parts, x, order, sizes):
    """kappa of each row when rows come in ``order`` and in micro-batches of ``sizes``."""
    counts = Counts(int(x.lengths.sum()), len(x.lengths), 32)
    found = {}
    for members in order.split(sizes):
        lengths = x.lengths[members]
        row = torch.repeat_interleave(torch.arange(len(members)), lengths)
        kept = x.mask[members].bool()
        p = Positions(
            x.logp[members][kept],
            x.old[members][kept],
            x.advantage[members, 0][row],
            row,
            lengths,
            engine=(x.old + 0.1 * x.weight)[members][kept],
        )
        weight = estimator.aggregation_weight(parts.aggregate, row, lengths, counts)
        kappa = estimator.coefficient(weight, terms(parts, p))
        found.update(zip(members.tolist(), kappa.split(lengths.tolist()), strict=True))
    return torch.cat([found[i] for i in range(len(order))])


@pytest.mark.parametrize("name", SPLIT)
def test_neither_split_nor_order_of_a_step_changes_a_coefficient(name):
    x = _problem(4, rows=12)
    whole = _kappa_by_row(SPLIT[name], x, torch.arange(12), [12])
    assert float(whole.abs().max()) > 0
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for order in (torch.arange(12), shuffled):
        for sizes in ([3] * 4, [1] * 12, [5, 4, 3]):
            torch.testing.assert_close(_kappa_by_row(SPLIT[name], x, order, sizes), whole, rtol=1e-12, atol=0)


def test_capped_ratios_keep_their_gradient():
    x = _problem(0)
    ours, _ = _ours(Parts("token", capped(1.05)), x)
    clipped, _ = _ours(replace(DAPO, stabilise=(Clip(0.05),)), x)
    far = ((x.logp - x.old).exp() > 1.06) & (x.advantage > 0) & x.mask.bool()
    assert far.any()
    assert (clipped[far] == 0).all()
    expected = -1.05 * x.advantage.expand_as(x.logp)[far] / x.mask.sum()
    torch.testing.assert_close(ours[far], expected)
