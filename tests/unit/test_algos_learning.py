"""Objectives in the learner, on a policy that is a table: what they learn, and that they do not depend on the split."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mmpost.algos import ALGOS, asft, dapo, dft, grpo, gspo, hpt, kdrl, luffy, reinforce, rloo, sft
from mmpost.config.schema import GrpoSection, LossSection
from mmpost.core.batch import Batch, Encoded
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Group, Rollout
from mmpost.core.sample import Sample
from mmpost.models.policy import Other, Policy, token_logprob
from mmpost.train import estimator
from mmpost.train.choose import choose
from mmpost.train.distributed import Processes
from mmpost.train.learner import Learner
from mmpost.train.method import Method, Scored
from mmpost.train.mismatch import Mismatch
from mmpost.train.parts import Parts, terms
from mmpost.train.positions import Positions
from mmpost.train.rows import Row, Update
from mmpost.train.soft import Soft
from mmpost.train.stabilisers import Clip, ClipCov, EntropyTop

VOCAB, PROMPT, RIGHT, END = 6, 6, 2, 5


class Table(nn.Module):
    """A policy that knows the token before: row of the table = its logits."""

    packs = False

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.head = nn.Identity()

    def picked(self, batch):
        return self.table[batch.inputs["input_ids"].flatten()[batch.at]]

    def forward(self, batch, temperature=1.0, others=(), entropy_gradient=False):
        return token_logprob(self.picked(batch), self.head, batch.target, temperature, others, entropy_gradient)

    def view(self, batch, kind):
        return Other(self.picked(batch).detach(), self.head, kind)


class Pad:
    """The adapter that the table needs."""

    pad_token_id = 0

    def collate(self, rows, *, left=False):
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row.ids
        train = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            train[i, : len(row)] = row.train
        row, t = train.nonzero().unbind(1)
        return Batch({"input_ids": ids}, row, row * longest + t - 1, ids[row, t], len(rows))


PROMPT_ROW = Encoded(torch.tensor([PROMPT]), torch.tensor([False]), torch.tensor([[0]]))
_PROCESSES = Processes(bf16=False, cpu=True)


def _table(seed=0, scale=1.0):
    return Table(scale * torch.randn(VOCAB + 1, VOCAB, generator=torch.Generator().manual_seed(seed)).double())


def _learner(policy, method, *, micro_batch=64, rate=0.0, adam=False, others=None):
    kind = torch.optim.Adam if adam else torch.optim.SGD
    return Learner(
        policy,
        Pad(),
        kind(policy.parameters(), lr=rate),
        _PROCESSES,
        method,
        micro_batch=micro_batch,
        max_grad_norm=0.0,
        max_length=8,
        others=others,
    )


def _update(rows):
    sizes = {kind: [row.num_trained for row in rows if row.demo == kind] for kind in (False, True)}
    return Update(rows, sum(sizes[False]), len(sizes[False]), rows[0], sum(sizes[True]), len(sizes[True]))


def _rows(seed=0, count=12, *, demos=0):
    """Random completions of 1 to 5 tokens with everything that an objective may ask for."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count + demos):
        n = int(rng.integers(1, 6))

        def values(low, high, n=n):
            return rng.uniform(low, high, n)

        row = Row(PROMPT_ROW, float(rng.normal()), completion=rng.integers(0, VOCAB, n), demo=i >= count)
        if not row.demo:
            row.old, row.reference, row.teacher, row.engine = (values(-3, 0) for _ in range(4))
        else:
            row.advantage = 1.0
        rows.append(row)
    return rows


def _gradient(method, rows, *, micro_batch=64, policy=None, others=None, progress=0.0):
    policy = policy or _table()
    report = _learner(policy, method, micro_batch=micro_batch, others=others).update(
        _update(rows), 0.0, progress=progress
    )
    return policy.table.grad.clone(), report


# -- splitting -------------------------------------------------------------------------------------------------------


def _mixed():
    """Both kinds of rows, a penalty, engine weights, a bonus, and stabilisers that look at the whole step."""
    parts = Parts(
        "token",
        grpo.preset().rollout.denominator,
        (Clip(5.0), EntropyTop(0.5), ClipCov(0.1, 0.0)),
        kdrl.preset().rollout.kl,
        Mismatch("seq_tis"),
    )
    soft = (Soft("entropy", 0.01), Soft("forward_kl", 0.2, rows="demo"), Soft("reverse_kl", 0.3, rows="rollout"))
    return Method(rollout=parts, demo=luffy.preset().demo, demo_weight=0.3, soft=soft)


@pytest.mark.parametrize("make", [grpo.preset, gspo.preset, dapo.preset, _mixed])
def test_neither_micro_batch_nor_order_changes_a_step(make):
    method, others = make(), {"reference": _table(5)}
    rows = _rows(count=14, demos=4 if method.demo else 0)
    whole, report = _gradient(method, rows, others=others)
    assert float(whole.abs().max()) > 1e-3
    mixed = [rows[i] for i in np.random.default_rng(3).permutation(len(rows))]
    for order in (rows, mixed):
        for size in (1, 4, 7):
            found, again = _gradient(method, order, micro_batch=size, others=others)
            torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-12)
            assert again == pytest.approx(report, rel=1e-9, nan_ok=True)


def test_the_loss_that_depends_on_the_split_is_the_only_one():
    rows = _rows()
    for name in ("token", "seq_mean", "const", "seq_sum", "micro_token"):
        method = Method(rollout=replace(grpo.preset().rollout, aggregate=name))
        first, second = (_gradient(method, rows, micro_batch=size)[0] for size in (12, 4))
        assert torch.allclose(first, second, rtol=1e-9) == (name != "micro_token")


def test_a_step_of_both_kinds_is_the_sum_of_two_steps():
    rows = _rows(count=8, demos=5)
    whole, _ = _gradient(Method(rollout=grpo.preset().rollout, demo=sft.preset().demo, demo_weight=0.4), rows)
    completions, _ = _gradient(grpo.preset(), [row for row in rows if not row.demo])
    demos, report = _gradient(sft.preset(), [row for row in rows if row.demo])
    torch.testing.assert_close(whole, completions + 0.4 * demos, rtol=1e-10, atol=1e-14)
    assert report["demo_nll"] == pytest.approx(report["nll"])


def test_hpt_with_a_gate_that_is_always_open_is_sft_on_the_demonstrations():
    method = replace(hpt.preset(gamma=8), soft=())
    demos = [row for row in _rows(count=1, demos=6) if row.demo]
    ours, report = _gradient(method, demos)
    torch.testing.assert_close(ours, _gradient(sft.preset(), demos)[0])
    assert math.isnan(_gradient(grpo.preset(), _rows())[1]["demo_nll"])
    assert math.isfinite(report["objective"])


# -- terms over the whole vocabulary, and a teacher ------------------------------------------------------------------


def test_soft_terms_are_the_divergences_themselves():
    rows = _rows(count=6, demos=4)
    other = _table(7)
    for kind, who, sign in (("forward_kl", "demo", 1), ("reverse_kl", "all", 1), ("entropy", "rollout", -1)):
        method = Method(sft.preset().demo, sft.preset().demo, soft=(Soft(kind, 0.7, rows=who),))
        plain, before = _gradient(replace(method, soft=()), rows)
        ours, after = _gradient(method, rows, others={"reference": other})
        table = _table().table.detach().requires_grad_(True)
        total = torch.zeros(()).double()
        for demo in (False, True):
            if who not in ("all", "demo" if demo else "rollout"):
                continue
            before_token = [b for r in rows if r.demo == demo for b in (PROMPT, *r.completion[:-1])]
            p, q = (t[before_token].log_softmax(-1) for t in (table, other.table.detach()))
            value = {
                "forward_kl": (q.exp() * (q - p)).sum(-1),
                "reverse_kl": (p.exp() * (p - q)).sum(-1),
                "entropy": -(p.exp() * p).sum(-1),
            }[kind]
            total = total + 0.7 * sign * value.mean()
        torch.testing.assert_close(ours - plain, torch.autograd.grad(total, table)[0], rtol=1e-9, atol=1e-12)
        assert before["objective"] - after["objective"] == pytest.approx(float(total.detach()))


def test_asft_starts_as_dft():
    rows = [row for row in _rows(count=1, demos=6) if row.demo]
    start = _table()
    ours, _ = _gradient(asft.preset(), rows, others={"reference": copy.deepcopy(start)})
    torch.testing.assert_close(ours, _gradient(dft.preset(), rows)[0])
    moved, _ = _gradient(asft.preset(), rows, others={"reference": _table(9)})
    assert float((moved - ours).abs().max()) > 1e-3


def test_the_head_never_holds_logits_of_all_positions(monkeypatch):
    """Chunks give what one call gives, forward and backward, with no tensor as large as positions x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, torch.Tensor):
                    self.size = max(self.size, value.numel())
            return out

    positions, width, vocabulary = 64, 4, 200

    class Fixed(Policy):
        def __init__(self):
            nn.Module.__init__(self)
            torch.manual_seed(0)
            self.states = nn.Parameter(torch.randn(positions, width).double())
            self.lm_head = nn.Linear(width, vocabulary).double()

        head = property(lambda self: self.lm_head)

        def picked(self, batch):
            return self.states

    frozen = nn.Linear(3, vocabulary).double().requires_grad_(False)
    states = torch.randn(positions, 3).double()
    batch = Batch({}, torch.zeros(positions).long(), torch.arange(positions), torch.arange(positions), 1)
    found = []
    for chunk in (1000, 5, 64, 1):
        monkeypatch.setattr(Policy, "head_chunk", lambda self, heads, chunk=chunk: chunk)
        model = Fixed()
        largest = Largest()
        with largest:
            parts = model(batch, 0.7, [Other(states, frozen, "forward_kl"), Other(states, frozen, "reverse_kl")], True)
            sum((i + 1) * part.sum() for i, part in enumerate(parts)).backward()
        found.append([*parts, model.states.grad, model.lm_head.weight.grad])
        if chunk < positions:
            assert largest.size <= max(chunk * vocabulary, width * vocabulary)
        else:
            assert largest.size == positions * vocabulary
    for other in found[1:]:
        for first, second in zip(found[0], other, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)


def test_a_teacher_equal_to_the_student_changes_nothing_and_right_rows_are_left_alone():
    policy = _table()
    rows = _rows()
    for row, logp in zip(rows, _learner(policy, kdrl.preset()).log_probs(rows), strict=True):
        row.teacher, row.old = logp.astype(np.float64), None
    plain, _ = _gradient(Method(rollout=replace(kdrl.preset().rollout, kl=grpo.preset().rollout.kl)), rows)
    torch.testing.assert_close(_gradient(kdrl.preset(), rows)[0], plain, rtol=1e-4, atol=1e-7)
    for row in rows:
        row.teacher = row.teacher - 1.0
        row.penalised = False
    torch.testing.assert_close(_gradient(kdrl.preset(), rows)[0], plain)
    rows[0].penalised = True
    pulled, _ = _gradient(kdrl.preset(), rows)
    late, _ = _gradient(kdrl.preset(), rows, progress=1.0)
    torch.testing.assert_close((late - plain) * 5, pulled - plain, rtol=1e-8, atol=1e-12)
    assert float((pulled - plain).abs().max()) > 1e-5
    rule = kdrl.preset().rollout.kl.rows
    assert [rule(score) for score in (1.0, 0.0, None)] == [False, True, True]


def test_numbers_that_the_engine_lacks_count_and_do_no_harm():
    rows = _rows()
    clean, report = _gradient(Method(rollout=replace(grpo.preset().rollout, mismatch=Mismatch("token_tis"))), rows)
    assert report["lost"] == 0
    rows[0].engine[0] = np.nan
    rows[1].engine[:] = -np.inf
    broken, report = _gradient(Method(rollout=replace(grpo.preset().rollout, mismatch=Mismatch("token_tis"))), rows)
    assert torch.isfinite(broken).all()
    assert math.isfinite(report["gap"])
    total = sum(row.num_trained for row in rows)
    assert report["lost"] == pytest.approx((1 + rows[1].num_trained) / total)
    assert not torch.equal(clean, broken)


# -- gradients in expectation ----------------------------------------------------------------------------------------

ARMS = torch.tensor([0.1, 0.7, 0.3, 0.9, 0.5]).double()


def _sampled(parts, advantage, *, groups=5000, size=4, engine_noise=None):
    """Per-group estimates of the gradient of the expected reward of a 5-armed bandit, ``[groups, 5]``, and truth."""
    g = torch.Generator().manual_seed(11)
    z = torch.tensor([0.3, -0.2, 0.1, -0.5, 0.4]).double()
    chance = z.softmax(-1)
    truth = chance * (ARMS - (chance * ARMS).sum())
    behaviour = z if engine_noise is None else z + engine_noise
    arm = torch.multinomial(behaviour.softmax(-1), groups * size, replacement=True, generator=g)
    reward = torch.bernoulli(ARMS[arm], generator=g)
    table = [
        Scored(i, "", tuple(r.tolist()), (1,) * size, (False,) * size) for i, r in enumerate(reward.view(groups, size))
    ]
    a = torch.from_numpy(np.concatenate(advantage(table, {})))
    logp = z.log_softmax(-1)[arm]
    engine = behaviour.log_softmax(-1)[arm]
    count = groups * size
    p = Positions(logp, logp, a, torch.arange(count), torch.ones(count).long(), engine=engine)
    kappa = estimator.coefficient(torch.ones(count).double(), terms(parts, p))
    score = torch.eye(5).double()[arm] - chance
    return (kappa[:, None] * score).view(groups, size, 5).mean(1), truth


def _standard_errors(samples, truth):
    return float(((samples.mean(0) - truth) / (samples.std(0) / len(samples) ** 0.5)).abs().max())


def test_reinforce_and_rloo_are_unbiased_and_rloo_varies_less():
    plain, truth = _sampled(reinforce.preset().rollout, reinforce.preset(memory=None).advantage)
    loo, _ = _sampled(rloo.preset().rollout, rloo.preset().advantage)
    assert _standard_errors(plain, truth) < 4
    assert _standard_errors(loo, truth) < 4
    assert float(loo.var(0).sum()) < float(plain.var(0).sum())


def test_weights_for_the_engine_take_its_bias_away():
    noise = torch.tensor([0.5, -0.4, 0.3, -0.6, 0.2]).double()
    advantage = reinforce.preset(memory=None).advantage
    off, truth = _sampled(reinforce.preset().rollout, advantage, engine_noise=noise)
    weighted = replace(reinforce.preset().rollout, mismatch=Mismatch("token_tis", cap=math.inf))
    on, _ = _sampled(weighted, advantage, engine_noise=noise)
    assert _standard_errors(off, truth) > 8
    assert _standard_errors(on, truth) < 4


# -- learning --------------------------------------------------------------------------------------------------------


def _step_rows(method, policy, rng, state):
    """A step of 8 prompts with 8 one-token completions each; token ``RIGHT`` is right."""
    chance = policy.table[PROMPT].detach().softmax(-1).numpy()
    groups, scored = [], []
    for uid in range(8):
        arms = rng.choice(VOCAB, size=8, p=chance / chance.sum())
        rollouts = [
            Rollout(
                np.array([arm]),
                np.log(chance[[arm]]),
                str(arm),
                False,
                {"right": float(arm == RIGHT)},
                float(arm == RIGHT),
            )
            for arm in arms
        ]
        if method.joins:
            rollouts.append(Rollout(np.array([RIGHT]), np.zeros(1), str(RIGHT), False, {"right": 1.0}, 1.0))
        group = Group(Sample(str(uid), ()), rollouts, uid)
        for shape in method.shape:
            bound = shape.bind(GrpoSection(max_completion_length=100)) if hasattr(shape, "bind") else shape
            for rollout, score in zip(rollouts, bound(group), strict=True):
                rollout.score = score
        scores = tuple(rollout.score for rollout in rollouts)
        positive = sum(rollout.score_parts["right"] for rollout in rollouts[:8])
        groups.append(group)
        scored.append(
            Scored(uid, "", scores, (1,) * len(scores), (False,) * len(scores), 8, int(positive), (scores,), (1.0,))
        )
    credit = method.advantage(scored, state) if method.advantage else [np.zeros(8)] * 8
    rows = []
    for group, facts, advantages in zip(groups, scored, credit, strict=True):
        gated = method.gate is not None and method.gate(facts)
        if method.rollout is not None and not gated:
            for rollout, advantage in zip(group.rollouts[:8], advantages, strict=False):
                logp = np.array(rollout.logp)
                rows.append(Row(PROMPT_ROW, float(advantage), completion=rollout.tokens, reference=logp, teacher=logp))
        if method.demo is not None and (method.gate is None or gated):
            advantage = float(advantages[-1]) if method.joins else 1.0
            rows.append(Row(PROMPT_ROW, advantage, completion=np.array([RIGHT]), demo=True))
    return rows


@pytest.mark.parametrize("name", ALGOS)
def test_a_bandit_learns(name):
    # Two of five scores turned, as in the preset, leave a fifth of the pull: too little for 40 steps.
    method = Catalog("algos", ALGOS).get(name)(**({"rate": 0.1} if name == "noisy" else {}))
    policy = Table(torch.zeros(VOCAB + 1, VOCAB).double())
    with torch.no_grad():
        policy.table[PROMPT, RIGHT] = math.log(0.06 * (VOCAB - 1) / 0.94)
    others = {"reference": copy.deepcopy(policy), "teacher": copy.deepcopy(policy)}
    learner = _learner(policy, method, adam=True, others=others)
    rng, state = np.random.default_rng(1), {}
    assert float(policy.table[PROMPT].softmax(-1)[RIGHT].detach()) == pytest.approx(0.06)
    for step in range(40):
        learner.update(_update(_step_rows(method, policy, rng, state)), 0.2, progress=step / 39)
    # The anchor of ASFT balances what is left of DFT's pull near 0.9.
    assert float(policy.table[PROMPT].softmax(-1)[RIGHT].detach()) > (0.8 if name == "asft" else 0.9)


def test_a_bandit_with_shuffled_rewards_learns_nothing():
    policy = Table(torch.zeros(VOCAB + 1, VOCAB).double())
    learner = _learner(policy, grpo.preset(), adam=False)
    rng = np.random.default_rng(1)
    for _ in range(40):
        rows = _step_rows(grpo.preset(), policy, rng, {})
        for row, advantage in zip(rows, rng.permutation([row.advantage for row in rows]), strict=True):
            row.advantage = advantage
        learner.update(_update(rows), 0.5)
    assert float(policy.table[PROMPT].softmax(-1)[RIGHT].detach()) < 0.5


# -- a new objective, and its options --------------------------------------------------------------------------------

NEW = '''
"""Rewards times the square root of the ratio, in one file."""

import torch

from mmpost.train.advantages import Group
from mmpost.train.method import Method
from mmpost.train.parts import Parts


def root(p):
    return ((p.logp - p.old) / 2).exp()


def gentle(p, ratio):
    return torch.full_like(ratio, GENTLE)


GENTLE = 0.5


def preset(power: float = 1.0, names: list[str] | None = None) -> Method:
    if power <= 0:
        raise ValueError(f"power is {power}, but must be above 0")
    parts = Parts(aggregate="token", denominator=root, stabilise=(gentle,))
    return Method(rollout=parts, advantage=Group(std=False))
'''


def test_a_new_objective_is_one_file(tmp_path):
    file = tmp_path / "root.py"
    file.write_text(NEW)
    spec = f"{file}:preset"
    method = choose(spec, Catalog("algos", ALGOS).get(spec), LossSection(preset=spec, args={"power": 2}))
    policy = _table()
    learner = _learner(policy, method, rate=0.1)
    rows = _rows(3)
    seen = [policy.table.detach().clone()]
    for _ in range(2):
        # By hand: kappa = 1/N * 1/2 * sqrt(pi / old) * A, and the value that is logged is the same sum.
        now = policy.table.detach().requires_grad_(True)
        loss = value = 0.0
        count = sum(row.num_trained for row in rows)
        for row in rows:
            before = [PROMPT, *row.completion[:-1]]
            logp = now[before].log_softmax(-1)[range(len(before)), row.completion]
            kappa = 0.5 * ((logp.detach() - torch.from_numpy(row.old)) / 2).exp() * row.advantage / count
            loss, value = loss - (kappa * logp).sum(), value + float(kappa.sum())
        expected = now.detach() - 0.1 * torch.autograd.grad(loss, now)[0]
        report = learner.update(_update(rows), 0.1)
        torch.testing.assert_close(policy.table.detach(), expected)
        assert report["objective"] == pytest.approx(value)
        seen.append(policy.table.detach().clone())
    assert not torch.equal(seen[1], seen[2])
    with pytest.raises(MmpostError) as error:
        choose("root.py:preset", Catalog("algos", ALGOS).get(spec), LossSection(args={"power": -1.0}))
    assert str(error.value) == (
        "loss.args: 'root.py:preset' does not take these constants: power is -1.0, but must be above 0. [MMP-C035]"
    )
