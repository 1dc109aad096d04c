"""From prompts to rows: which completions and demonstrations train, with what credit, and what a checkpoint keeps."""

import contextlib
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmpost.algos import dapo, hpt, luffy, reinforce_ada, riskpo, sft
from mmpost.config.schema import FullSettings, GrpoSection, RewardSpec
from mmpost.core.rollout import Rollout
from mmpost.core.sample import Part, Sample, Turn
from mmpost.core.seeding import uniform
from mmpost.rewards.score import Reward
from mmpost.train import demos
from mmpost.train.completions import Completions
from mmpost.train.distributed import Processes
from mmpost.train.draw import Dynamic
from mmpost.train.learner import Learner
from mmpost.train.rows import RowStream
from mmpost.train.sources import Demonstrations

one_family = pytest.mark.parametrize("family", ["qwen2.5-vl"])
RIGHT, WRONG = 300, 301


class Coins:
    """An engine whose completions are right with a probability that belongs to the prompt."""

    name, exact, version, unknown = "coins", True, None, 0

    def __init__(self, chance, *, length=2):
        self.chance, self.length, self.asked = chance, length, []

    def complete(self, prompts, *, n, sampling, first_generation=0):
        out = []
        for prompt, first in zip(prompts, np.broadcast_to(first_generation, len(prompts)), strict=True):
            self.asked.append((prompt.uid, int(first), n))
            right = [self._is_right(prompt, int(first) + g) for g in range(n)]
            out.append([self._rollout(flag, prompt.uid, g) for g, flag in enumerate(right)])
        return out

    def _is_right(self, prompt, generation):
        chance = self.chance(prompt)
        if isinstance(chance, int):
            return generation < chance
        return bool(uniform(1, "coins", prompt.uid, generation) < chance)

    def _rollout(self, right, uid, g):
        tokens = np.array([RIGHT if right else WRONG] * (self.length + uid % 2), dtype=np.int64)
        return Rollout(tokens, np.full(len(tokens), -1.5, dtype=np.float32), "right" if right else "wrong", False)

    def sync(self, policy, version):
        self.version = version

    def close(self):
        pass


def is_right(prompts, completions, completion_ids, **columns):
    """1 for completions of right tokens, and for the text of demonstrations that say so."""
    return [
        float(ids[0] == RIGHT or completion[0]["content"].startswith("yes"))
        for ids, completion in zip(completion_ids, completions, strict=True)
    ]


def _processes():
    return Processes(bf16=False, cpu=True)


def _source(model, samples, method, engine, *, count=None, processes=None, seed=5, **section):
    processes = processes or _processes()
    stream = RowStream(
        [samples],
        [1.0],
        lambda sample: model.adapter.encode_prompt(sample.prompt()),
        count=count or len(samples),
        rank=processes.rank,
        world=processes.world,
        seed=seed,
    )
    return Completions(
        stream,
        policy=model.policy,
        adapter=model.adapter,
        rewards=[Reward("is_right", is_right, RewardSpec(name="is_right"))],
        section=GrpoSection(**{"num_generations": 8, "max_completion_length": 8, **section}),
        method=method,
        processes=processes,
        log_probs=lambda rows: [np.full(row.num_trained, -1.0, dtype=np.float32) for row in rows],
        seed=seed,
        num_samples=2,
        engine=engine,
    )


def _prompts(count, *, answered=lambda i: True):
    rows = []
    for i in range(count):
        turns = (Turn("user", (Part("text", f"Is {i} a number?"),)), Turn("assistant", (Part("text", f"yes, {i}"),)))
        row = Sample(f"row{i}", turns if answered(i) else turns[:1], {"number": i}, f"rows.jsonl:{i + 1}")
        rows.append(demos.set_aside(row))
    return rows


def _number(prompt):
    return int(prompt.sample.columns["number"])


# -- gates -----------------------------------------------------------------------------------------------------------


@one_family
@pytest.mark.parametrize("gamma", [0, 2])
def test_prompts_are_trained_on_completions_or_on_their_demonstration(tiny_model, gamma):
    samples = _prompts(9, answered=lambda i: i != 1)
    source = _source(tiny_model, samples, hpt.preset(gamma=gamma, entropy=0), Coins(_number))
    (update,) = source.updates()
    # Prompt P has P right answers among 8. Row 1 has no demonstration.
    gated = {i for i in range(9) if i <= gamma}
    kinds = dict.fromkeys(range(9), (0, 0))
    by_prompt = {id(source.stream.again((0, i), 0).encoded): i for i in range(9)}
    for row in update.rows:
        number = by_prompt[id(row.encoded)]
        rollouts, shown = kinds[number]
        kinds[number] = (rollouts + (not row.demo), shown + row.demo)
    # Where all are right (8) the advantage is 0 and nothing has to be run.
    expected = {i: (0, int(i != 1)) if i in gated else (0 if i in (0, 8) else 8, 0) for i in range(9)}
    assert kinds == expected
    assert update.row_count == 8 * (9 - len(gated))
    assert update.demo_row_count == len(gated - {1})
    assert update.demo_positions == sum(row.num_trained for row in update.rows if row.demo)
    assert all(row.advantage == 1.0 for row in update.rows if row.demo)
    demos_found, missing = len(gated - {1}), int(1 in gated)
    share = demos_found / (demos_found + update.row_count)
    assert update.metrics["demo"] == {"share": pytest.approx(share), "rows": demos_found, "missing": missing}


def _learner(model, method, **options):
    processes = _processes()
    weights = [p for p in model.policy.parameters() if p.requires_grad]
    return Learner(
        processes.prepare(model.policy),
        model.adapter,
        torch.optim.SGD(weights, lr=0.0),
        processes,
        method,
        micro_batch=16,
        max_grad_norm=0.0,
        **options,
    )


def _gradient(model, method, update, **options):
    _learner(model, method, **options).update(update, 0.0)
    return torch.cat([p.grad.flatten() for p in model.policy.parameters() if p.grad is not None])


@one_family
def test_a_gate_for_everything_is_fine_tuning_and_a_gate_for_nothing_is_rl(open_tiny):
    model = open_tiny(peft=FullSettings(), double=True)
    samples = _prompts(4)
    everything, nothing = hpt.preset(gamma=8, entropy=0), hpt.preset(gamma=-1, entropy=0)

    def update(method):
        (found,) = _source(model, samples, method, Coins(lambda prompt: 1 + _number(prompt))).updates()
        return found

    ours = _gradient(model, everything, update(everything))
    turns = [(*s.turns, Turn("assistant", (Part("text", demos.text_of(s)),))) for s in samples]
    stream = RowStream(
        [[replace(s, turns=t) for s, t in zip(samples, turns, strict=True)]],
        [1.0],
        model.adapter.encode,
        count=4,
        rank=0,
        world=1,
        seed=5,
    )
    (plain,) = Demonstrations(stream, num_samples=0).updates()
    assert float((ours - _gradient(model, sft.preset(), plain)).abs().max()) < 1e-12
    assert float(ours.abs().max()) > 1e-4

    alone = replace(nothing, demo=None, gate=None)
    one = _gradient(model, nothing, update(nothing), max_length=8)
    two = _gradient(model, alone, update(alone), max_length=8)
    assert float((one - two).abs().max()) < 1e-12
    assert float(one.abs().max()) > 1e-6


@one_family
def test_demonstrations_join_the_statistics_of_their_group(tiny_model):
    samples = _prompts(2, answered=lambda i: i == 0)
    source = _source(tiny_model, samples, luffy.preset(), Coins(lambda prompt: 1), num_generations=3)
    (update,) = source.updates()
    demo = [row for row in update.rows if row.demo]
    assert len(demo) == 1
    # Rewards 1, 0, 0 and 1 with the demonstration; 1, 0, 0 without.
    side = 0.5 / (np.sqrt(1 / 3) + 1e-4)
    group = [row for row in update.rows if row.encoded is demo[0].encoded]
    assert [row.advantage for row in group] == pytest.approx([side, -side, -side, side])
    other = [row.advantage for row in update.rows if row.encoded is not demo[0].encoded]
    assert other == pytest.approx([1.1546, -0.5773, -0.5773], abs=1e-3)
    assert (update.row_count, update.demo_row_count) == (6, 1)
    assert update.metrics["demo"]["missing"] == 1
    # The log's rewards are those of the policy alone.
    assert update.metrics["reward"]["total"] == pytest.approx(1 / 3)


# -- selection -------------------------------------------------------------------------------------------------------


@one_family
def test_groups_that_are_dropped_do_not_count_in_the_means(tiny_model):
    samples = _prompts(12)
    method = dapo.preset(penalty=0)
    asked = []

    def right(prompt):
        asked.append(_number(prompt) % 3)
        return 4 * (_number(prompt) % 3)

    source = _source(tiny_model, samples, method, Coins(right), count=4)
    (update,) = source.updates()
    assert update.row_count == 4 * 8 == len(update.rows)
    assert update.positions == sum(row.num_trained for row in update.rows)
    assert {abs(round(row.advantage, 3)) for row in update.rows} == {0.935}
    draw = update.metrics["draw"]
    assert (draw["kept"], draw["dynamic_short"]) == (4, 0)
    # All completions are in the log, those of dropped groups too.
    flags = np.array(asked)[::8]
    assert len(flags) == 4 * draw["rounds"]
    assert update.metrics["zero_spread"] == pytest.approx((flags != 1).mean())
    assert update.metrics["reward"]["total"] == pytest.approx((flags / 2).mean())


@one_family
def test_further_rounds_ask_the_engine_for_further_completions(tiny_model):
    engine = Coins(lambda prompt: 2 + 20 * (_number(prompt) == 1))
    source = _source(tiny_model, _prompts(2), reinforce_ada.preset(rounds=3, per_round=4), engine, num_generations=4)
    (update,) = source.updates()
    one = next(uid for uid, first, _ in engine.asked if first == 4)
    # The prompt with 2 right among 4 is done at once; the one that is always right goes on, and has no spread.
    assert sorted(engine.asked) == sorted([(0, 0, 4), (1, 0, 4), (one, 4, 4), (one, 8, 4)])
    assert update.row_count == 8
    assert sorted(round(row.advantage, 6) for row in update.rows) == [-0.5, -0.5, 0.5, 0.5]
    assert update.metrics["draw"]["samples_per_prompt"] == 8


class Shared:
    """Processes as threads of this one."""

    def __init__(self, world):
        self.world, self.barrier, self.slots = world, threading.Barrier(world), [None] * world

    def member(self, rank):
        member = Member()
        member.rank, member.world, member.shared = rank, self.world, self
        return member


class Member:
    def gather(self, value):
        self.shared.slots[self.rank] = value
        self.shared.barrier.wait(timeout=30)
        out = list(self.shared.slots)
        self.shared.barrier.wait(timeout=30)
        return out

    def sum(self, values):
        return [float(sum(column)) for column in zip(*self.gather(list(values)), strict=True)]

    def max(self, value):
        return max(self.gather(value))

    def autocast(self):
        return contextlib.nullcontext()

    def whole(self, module):
        return contextlib.nullcontext()


@one_family
@pytest.mark.parametrize(
    "method",
    [
        dapo.preset(),
        dapo.preset(carry=True),
        riskpo.preset(bundle=3),
        reinforce_ada.preset(per_round=3),
        hpt.preset(gamma=1),
        luffy.preset(),
    ],
    ids=["dapo", "carry", "riskpo", "reinforce_ada", "hpt", "luffy"],
)
def test_rows_and_log_do_not_depend_on_the_number_of_processes(tiny_model, method):
    samples = _prompts(11, answered=lambda i: i % 4 != 0)

    def run(world):
        shared, out = Shared(world), [None] * world

        def work(rank):
            source = _source(
                tiny_model,
                samples,
                method,
                Coins(lambda prompt: 0.25),
                count=4,
                processes=shared.member(rank),
                num_generations=4,
                mini_batches=2,
            )
            found = []
            for _ in range(2):
                for update in source.updates():
                    metrics = {k: v for k, v in update.metrics.items() if k != "phase_s"}
                    prompts = {id(source.stream.again((0, i), 0).encoded): i for i in range(11)}
                    rows = [
                        (prompts[id(row.encoded)], row.completion.tolist(), round(row.advantage, 9), row.demo)
                        for row in update.rows
                    ]
                    counts = (update.positions, update.row_count, update.demo_positions, update.demo_row_count)
                    found.append((rows, counts, metrics))
            out[rank] = found

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        steps = list(zip(*out, strict=True))
        rows = [sorted(row for part in step for row in part[0]) for step in steps]
        counts = [tuple(np.sum([part[1] for part in step], axis=0).tolist()) for step in steps]
        return rows, counts, [step[0][2] for step in steps]

    one, two = run(1), run(2)
    assert one[0] == two[0]
    assert one[1] == two[1]
    assert len(one[0]) == 4
    assert sum(len(rows) for rows in one[0]) > 8
    for first, second in zip(one[2], two[2], strict=True):
        assert _numbers(first) == pytest.approx(_numbers(second))


def _numbers(metrics, prefix=""):
    out = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            out |= _numbers(value, f"{prefix}{name}/")
        elif value is not None:
            out[prefix + name] = float(value)
    return out


# -- checkpoints -----------------------------------------------------------------------------------------------------


@one_family
def test_a_checkpoint_keeps_the_method_and_the_groups_that_wait(tiny_model):
    samples = _prompts(11)
    method = replace(riskpo.preset(bundle=2), draw=Dynamic(carry=True))

    def open_source():
        return _source(tiny_model, samples, method, Coins(lambda prompt: 0.3), count=3, num_generations=3)

    def rows(source):
        (update,) = source.updates()
        return [
            (
                row.encoded.ids.tolist(),
                row.completion.tolist(),
                row.advantage,
                None if row.old is None else row.old.tolist(),
            )
            for row in update.rows
        ]

    whole = open_source()
    first = rows(whole)
    while not whole._surplus:
        first = rows(whole)
    saved = json.loads(json.dumps(whole.state_dict()))
    assert saved["surplus"]
    assert {"low", "high"} <= saved["method"].keys()
    later = [rows(whole) for _ in range(3)]
    resumed = open_source()
    resumed.load_state_dict(saved)
    assert [rows(resumed) for _ in range(3)] == later
    assert first != later[0]
    # Groups of an earlier step are measured against the policy that sampled them, the others against their own.
    old = [row[3] for row in later[0]]
    assert [-1.5] * len(old[0]) == old[0]
    assert None in old
