"""Gradients taken through the learner against transformers' own loss and against the published formulas."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmpost.algos import grpo, sft
from mmpost.config.schema import FullSettings, GrpoSection, KlSettings, LoraSettings, LossSection, RewardSpec
from mmpost.core.rollout import Group, Rollout
from mmpost.rewards.call import Reward
from mmpost.train.choose import choose
from mmpost.train.completions import Completions
from mmpost.train.distributed import Processes
from mmpost.train.draw import Candidate
from mmpost.train.learner import Learner
from mmpost.train.parts import Kl
from mmpost.train.rows import Drawn, Row, RowStream, Update

GRPO, SFT = grpo.preset(), sft.preset()

# For what has nothing to do with the family.
one_family = pytest.mark.parametrize("family", ["qwen2.5-vl"])


def _learner(model, method, *, micro_batch=2, temperature=1.0, max_length=1):
    """Plain settings: gradients stay in ``.grad`` as they were made, and no weight moves."""
    processes = Processes(bf16=False, cpu=True)
    weights = [p for p in model.policy.parameters() if p.requires_grad]
    return Learner(
        processes.prepare(model.policy),
        model.adapter,
        torch.optim.SGD(weights, lr=0.0),
        processes,
        method,
        micro_batch=micro_batch,
        temperature=temperature,
        max_grad_norm=0.0,
        max_length=max_length,
    )


def _with(**changes):
    """GRPO with other parts."""
    return replace(GRPO, rollout=replace(GRPO.rollout, **changes))


def _update(rows, *, positions=None, row_count=None):
    demos = [row for row in rows if row.demo]
    count = positions if positions is not None else sum(row.num_trained for row in rows if not row.demo)
    rest = row_count if row_count is not None else len(rows) - len(demos)
    return Update(rows, count, rest, rows[0], sum(row.num_trained for row in demos), len(demos))


def _gradients(model):
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.policy.named_parameters()
        if p.requires_grad
    }


def _largest(first, second):
    """Largest difference over all parameters."""
    assert first.keys() == second.keys()
    assert first
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def _size(gradients):
    return max(float(value.abs().max()) for value in gradients.values())


# -- demonstrations --------------------------------------------------------------------------------------------------


def _transformers_gradients(module, wrapper, adapter, samples, encoded, plain_inputs, processor):
    """Sum over rows of transformers' loss times the row's labels, over all labels: its mean over the whole step."""
    total = sum(row.num_trained for row in encoded)
    wrapper.zero_grad(set_to_none=True)
    value = 0.0
    for sample, row in zip(samples, encoded, strict=True):
        inputs = plain_inputs(processor, sample)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[0, : len(row)][row.train] = inputs["input_ids"][0, : len(row)][row.train]
        loss = module(**inputs, labels=labels).loss * row.num_trained / total
        loss.backward()
        value += float(loss.detach())
    names = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in wrapper.named_parameters()
        if p.requires_grad
    }
    return names, value


def test_sft_gradients_are_those_of_transformers_for_every_parameter(
    open_tiny, reference, plain_inputs, mixed_rows, record_property
):
    model, (_, processor) = open_tiny(peft=FullSettings()), reference
    encoded = [model.adapter.encode(sample) for sample in mixed_rows]
    assert len({row.num_trained for row in encoded}) > 2
    expected, loss = _transformers_gradients(
        model.policy.model, model.policy, model.adapter, mixed_rows, encoded, plain_inputs, processor
    )
    # Features that enter behind the last decoder layer (of two) reach no text; everything else must be moved.
    still = [name for name, value in expected.items() if not value.any()]
    assert all("deepstack_merger_list.1" in name for name in still), still
    worst = 0.0
    for micro_batch in (1, 2, len(encoded)):
        learner = _learner(model, SFT, micro_batch=micro_batch)
        report = learner.update(_update([Row(row, demo=True) for row in encoded]), 0.0)
        ours = _gradients(model)
        worst = max(worst, _largest(ours, expected))
        assert report["nll"] == pytest.approx(loss, abs=1e-5)
        norm = float(torch.cat([value.flatten() for value in expected.values()]).norm())
        assert report["grad_norm"] == pytest.approx(norm, rel=1e-4)
    record_property("max_gradient_difference", worst)
    assert worst < 1e-6


def test_sft_gradients_of_lora_are_those_of_transformers(
    open_tiny, reference, plain_inputs, mixed_rows, record_property
):
    model, (_, processor) = open_tiny(peft=LoraSettings(r=4)), reference
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=random)
    encoded = [model.adapter.encode(sample) for sample in mixed_rows]
    expected, _ = _transformers_gradients(
        model.policy.model, model.policy, model.adapter, mixed_rows, encoded, plain_inputs, processor
    )
    assert all("lora_" in name for name in expected)
    worst = 0.0
    for micro_batch in (1, 2, len(encoded)):
        _learner(model, SFT, micro_batch=micro_batch).update(_update([Row(row, demo=True) for row in encoded]), 0.0)
        worst = max(worst, _largest(_gradients(model), expected))
    record_property("max_gradient_difference", worst)
    assert worst < 1e-6


@one_family
def test_a_step_moves_weights_against_the_gradient_and_a_bad_gradient_moves_nothing(open_tiny, mixed_rows):
    model = open_tiny(peft=FullSettings())
    learner = _learner(model, SFT)
    rows = [Row(model.adapter.encode(sample), demo=True) for sample in mixed_rows[:2]]
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    learner.update(_update(rows), 0.1)
    for name, parameter in model.policy.named_parameters():
        assert torch.allclose(parameter, before[name] - 0.1 * parameter.grad, atol=1e-7), name
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    rows[1].advantage = float("nan")
    report = learner.update(_update(rows), 0.1)
    assert not np.isfinite(report["grad_norm"])
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.policy.named_parameters())


@one_family
def test_clipping_scales_the_gradient_to_its_limit(open_tiny, mixed_rows):
    model = open_tiny(peft=FullSettings())
    learner = _learner(model, SFT)
    rows = [Row(model.adapter.encode(sample), demo=True) for sample in mixed_rows]
    free = learner.update(_update(rows), 0.0)["grad_norm"]
    learner.max_grad_norm = free / 3
    report = learner.update(_update(rows), 0.0)
    norm = torch.cat([p.grad.flatten() for p in model.policy.parameters()]).norm()
    assert report["grad_norm"] == pytest.approx(free, rel=1e-5)
    assert float(norm) == pytest.approx(free / 3, rel=1e-4)


@one_family
def test_an_update_without_rows_moves_nothing(open_tiny, mixed_rows):
    model = open_tiny(peft=FullSettings())
    row = Row(model.adapter.encode(mixed_rows[1]), demo=True)
    report = _learner(model, SFT).update(Update([], 0, 0, row, 7, 2), 0.1)
    assert report["grad_norm"] == 0
    assert _size(_gradients(model)) == 0


# -- completions -----------------------------------------------------------------------------------------------------


def _problem(model, mixed_rows, seed=0):
    """Rows with advantages, old and reference log-probabilities off the policy's own by enough to be clipped."""
    rng = np.random.default_rng(seed)
    learner = _learner(model, GRPO, temperature=0.8)
    rows = []
    for i, sample in enumerate(mixed_rows):
        row = Row(model.adapter.encode(sample, loss_on="last_assistant"), float(rng.normal()))
        own = learner.log_probs([row])[0].astype(np.float64)
        row.old = own + 0.3 * rng.normal(size=own.shape)
        row.reference = own + 0.3 * rng.normal(size=own.shape)
        row.advantage = 0.0 if i == 4 else row.advantage
        rows.append(row)
    return rows


def _published_grpo(module, processor, plain_inputs, samples, rows, *, low=0.2, high=0.2, beta=0.0, kl="k3"):
    """Equation 3 of arXiv 2402.03300 at temperature 0.8, with plain transformers in float64: loops, min, clamp."""
    module.zero_grad(set_to_none=True)
    objective = torch.zeros((), dtype=torch.float64)
    clipped_away = 0
    for sample, row in zip(samples, rows, strict=True):
        inputs = plain_inputs(processor, sample)
        logp = (module(**inputs).logits[0].double() / 0.8).log_softmax(-1)
        places = row.encoded.train.nonzero()[:, 0].tolist()
        inner = torch.zeros((), dtype=torch.float64)
        for j, place in enumerate(places):
            here = logp[place - 1, int(inputs["input_ids"][0, place])]
            ratio = (here - float(row.old[j])).exp()
            value = torch.min(ratio * row.advantage, ratio.clamp(1 - low, 1 + high) * row.advantage)
            clipped_away += int(value.detach() != (ratio * row.advantage).detach())
            gap = float(row.reference[j]) - here
            penalty = {"k3": gap.exp() - gap - 1, "k2": 0.5 * gap**2}[kl]
            inner = inner + value - beta * penalty
        objective = objective + inner / len(places) / len(rows)
    (-objective).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()
    }
    return {f"model.{name}": value for name, value in gradients.items()}, float(objective.detach()), clipped_away


def test_grpo_gradients_are_the_published_ones(open_tiny, plain, plain_inputs, mixed_rows, record_property):
    model, (module, processor) = open_tiny(peft=FullSettings(), double=True), plain(double=True)
    rows = _problem(model, mixed_rows)
    worst = 0.0
    for beta, kl, high in ((0.0, "k3", 0.28), (0.1, "k3", 0.2), (0.1, "k2", 0.2)):
        expected, objective, clipped = _published_grpo(
            module, processor, plain_inputs, mixed_rows, rows, high=high, beta=beta, kl=kl
        )
        assert 0 < clipped < sum(row.encoded.num_trained for row in rows)
        section = LossSection(epsilon=0.2, epsilon_high=high, kl=KlSettings(beta=beta, kl=kl))
        method = choose("grpo", grpo.preset, section)
        for micro_batch in (2, len(rows)):
            learner = _learner(model, method, micro_batch=micro_batch, temperature=0.8)
            report = learner.update(_update(rows), 0.0)
            worst = max(worst, _largest(_gradients(model), expected))
            if kl == "k3":
                assert report["objective"] == pytest.approx(objective, abs=1e-9)
        assert _size(expected) > 1e-3
    record_property("max_gradient_difference", worst)
    assert worst < 1e-9


def test_grpo_in_float32_is_within_rounding_of_float64(open_tiny, plain, plain_inputs, mixed_rows, record_property):
    model, (module, processor) = open_tiny(peft=FullSettings()), plain(double=True)
    rows = _problem(model, mixed_rows)
    expected, _, _ = _published_grpo(module, processor, plain_inputs, mixed_rows, rows)
    _learner(model, GRPO, temperature=0.8).update(_update(rows), 0.0)
    ours = {name: value.double() for name, value in _gradients(model).items()}
    record_property("max_gradient_difference", _largest(ours, expected))
    assert _largest(ours, expected) < 1e-6


def test_rows_without_advantage_may_be_left_out(open_tiny, mixed_rows):
    model = open_tiny(peft=FullSettings(), double=True)
    rows = _problem(model, mixed_rows)
    positions = sum(row.encoded.num_trained for row in rows)
    kept = [row for row in rows if row.advantage != 0]
    assert len(kept) == len(rows) - 1
    for aggregate in ("seq_mean", "token", "const", "seq_sum"):
        learner = _learner(model, _with(aggregate=aggregate), micro_batch=4, temperature=0.8, max_length=30)
        learner.update(_update(rows), 0.0)
        whole = _gradients(model)
        learner.update(_update(kept, positions=positions, row_count=len(rows)), 0.0)
        assert _largest(_gradients(model), whole) < 1e-12
        assert _size(whole) > 1e-4


@one_family
def test_on_policy_rows_need_no_old_log_probs(open_tiny, mixed_rows):
    model = open_tiny(peft=FullSettings(), double=True)
    learner = _learner(model, GRPO, temperature=0.8)
    rows = _problem(model, mixed_rows)
    for row in rows:
        row.old = None
    learner.update(_update(rows), 0.0)
    without = _gradients(model)
    for row, logp in zip(rows, learner.log_probs(rows), strict=True):
        row.old = logp
    learner.update(_update(rows), 0.0)
    assert _largest(_gradients(model), without) < 1e-6


@one_family
def test_log_probs_do_not_depend_on_the_micro_batch_and_keep_the_mode(open_tiny, mixed_rows):
    model = open_tiny(peft=FullSettings())
    rows = [Row(model.adapter.encode(sample)) for sample in mixed_rows]
    model.policy.train()
    found = [_learner(model, GRPO, micro_batch=size).log_probs(rows) for size in (1, 2, 5)]
    assert model.policy.training
    for one, two, five, row in zip(*found, rows, strict=True):
        assert one.dtype == np.float32
        assert one.shape == (row.encoded.num_trained,)
        assert np.abs(one - two).max() < 1e-5
        assert np.abs(one - five).max() < 1e-5


# -- from prompts to rows --------------------------------------------------------------------------------------------


def _by_ids(prompts, completions, completion_ids, flat, **columns):
    """A number that differs between completions; prompts marked flat give every completion the same score."""
    return [0.5 if mark else float(sum(ids) % 101) for mark, ids in zip(flat, completion_ids, strict=True)]


def _completions(model, samples, method, *, seed=5, **section):
    stream = RowStream(
        [samples],
        [1.0],
        model.adapter.encode_prompt,
        count=len(samples),
        rank=0,
        world=1,
        seed=seed,
        workers=0,
        on_bad_row="error",
        on_long="error",
    )
    learner = _learner(model, method, temperature=0.9)
    section = GrpoSection(num_generations=4, max_completion_length=6, temperature=0.9, **section)
    source = Completions(
        stream,
        policy=model.policy,
        adapter=model.adapter,
        rewards=[Reward("ids", _by_ids, RewardSpec(name="ids"))],
        section=section,
        method=method,
        processes=learner.processes,
        log_probs=learner.log_probs,
        seed=seed,
        num_samples=2,
    )
    return source, learner


def _prompts(mixed_rows):
    rows = [sample.prompt() for sample in mixed_rows[:4]]
    return [replace(row, columns={"flat": i in (0, 2)}) for i, row in enumerate(rows)]


def test_groups_of_equal_scores_are_not_trained_but_counted(open_tiny, mixed_rows):
    model = open_tiny(peft=FullSettings(), double=True)
    source, learner = _completions(model, _prompts(mixed_rows), GRPO)
    (update,) = list(source.updates())
    assert update.row_count == 4 * 4
    assert 0 < len(update.rows) <= 8
    assert update.metrics["zero_spread"] == 0.5
    learner.update(update, 0.0)
    ours = _gradients(model)
    # The same rollouts once more, every row kept: a penalty of weight nearly nought keeps them all.
    source, learner = _completions(model, _prompts(mixed_rows), _with(kl=Kl(beta=1e-300)))
    (whole,) = list(source.updates())
    assert len(whole.rows) == whole.row_count == 16
    assert whole.positions == update.positions == sum(row.num_trained for row in whole.rows)
    learner.update(whole, 0.0)
    assert _largest(ours, _gradients(model)) < 1e-12
    assert _size(ours) > 1e-4


def test_the_engine_reports_what_the_trainer_recomputes(open_tiny, mixed_rows):
    model = open_tiny(peft=FullSettings())
    source, learner = _completions(model, _prompts(mixed_rows), GRPO)
    (update,) = list(source.updates())
    assert learner.update(update, 0.0)["gap"] < 1e-5
    for row, logp in zip(update.rows, learner.log_probs(update.rows), strict=True):
        assert np.abs(row.engine - logp).max() < 1e-5


@one_family
def test_several_steps_on_one_rollout_batch_hold_the_old_policy_fixed(open_tiny, mixed_rows):
    model = open_tiny(peft=FullSettings())
    source, learner = _completions(model, _prompts(mixed_rows), GRPO, num_iterations=3)
    assert source.updates_per_batch == 3
    seen = []
    for update in source.updates():
        seen.append([row.old for row in update.rows])
        learner.update(update, 0.5)
    assert len(seen) == 3
    for old in itertools.chain(*seen[1:]):
        assert old is not None
    assert all(first is later for later_step in seen[1:] for first, later in zip(seen[0], later_step, strict=True))
    moved = learner.log_probs(update.rows)
    assert max(np.abs(now - row.old).max() for now, row in zip(moved, update.rows, strict=True)) > 1e-4


@one_family
def test_truncated_and_unscored_completions_can_stay_out(open_tiny, mixed_rows):
    model = open_tiny(peft=FullSettings())
    source, _ = _completions(model, _prompts(mixed_rows), GRPO, mask_truncated_completions=True)
    prompt = model.adapter.encode_prompt(mixed_rows[0].prompt())
    ids = np.array([300, 301], dtype=np.int64)

    def rollout(score, *, truncated=False):
        return Rollout(ids, np.zeros(2, dtype=np.float32), "x", truncated, {"ids": score}, score)

    group = Group(mixed_rows[0], [rollout(1.0), rollout(0.0), rollout(None), rollout(1.0, truncated=True)], 0)
    entry = source._entry(Candidate(Drawn(mixed_rows[0], prompt, 0), group))
    update = source._to_update([entry], source._advantages([entry.scored]))
    assert [row.advantage for row in update.rows] == pytest.approx([0.5773, -1.1546], abs=1e-3)
    assert (update.row_count, update.positions) == (2, 4)
    assert [sample["score"] for sample in update.samples] == [1.0, 0.0]


@one_family
def test_shuffled_rewards_are_a_permutation_inside_the_group(open_tiny, mixed_rows):
    model = open_tiny(peft=FullSettings())
    source, _ = _completions(model, _prompts(mixed_rows), GRPO, shuffle_rewards=True)
    scores = [float(i) for i in range(8)]
    rollouts = [Rollout(np.zeros(1), np.zeros(1), "", False, {}, score) for score in scores]
    orders = [source.scores(Group(mixed_rows[0], rollouts, uid)) for uid in range(20)]
    assert all(sorted(order) == scores for order in orders)
    assert len({tuple(order) for order in orders}) > 15
    assert source.scores(Group(mixed_rows[0], rollouts, 3)) == orders[3]
