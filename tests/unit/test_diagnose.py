import copy
import itertools
import json
import random
import shutil
from statistics import median

import pytest

from mmpost.train.diagnose import CONSTANT_STEPS, RULES, SPIKE_WARMUP, STEADY, Diagnosis

HEALTHY = {
    "reward/total": 0.5,
    "reward/by_name/answer": 0.5,
    "zero_spread": 0.3,
    "truncated": 0.02,
    "completion_length": 100.0,
    "entropy": 0.8,
    "grad_norm": 0.5,
    "logp_gap": 1e-7,
    "clip_share": 0.01,
}


# A reward function that never moves is a finding of its own, so it moves by a hair.
HAIR = itertools.cycle([0.0, 1e-4])


def new(memory=None, *, half=False, max_grad_norm=1.0):
    return Diagnosis({} if memory is None else memory, half=half, max_grad_norm=max_grad_norm)


def feed(diagnosis, steps, **changes):
    """Findings of ``steps`` equal steps: HEALTHY with changes; ``answer`` sets the reward function and the total."""
    found = []
    for _ in range(steps):
        step = {**HEALTHY, "reward/by_name/answer": 0.5 + next(HAIR)}
        for name, value in changes.items():
            step[{"answer": "reward/by_name/answer", "total": "reward/total"}.get(name, name)] = value
        found += diagnosis.feed(step)
    return found


def walk(seed, steps):
    """Metrics of a run that works: noise, a reward that rises slowly, entropy that halves, drops of everything."""
    draw = random.Random(seed)
    length = 100.0
    for index in range(steps):
        share = index / steps
        length = min(max(length + draw.gauss(0, 2), 85), 118)
        answer = min(max(0.3 + 0.4 * share + draw.gauss(0, 0.05), 0), 1)
        yield {
            "reward/total": answer + 0.1 * min(draw.uniform(0.95, 1.02), 1),
            "reward/by_name/answer": answer,
            "reward/by_name/format": min(draw.uniform(0.95, 1.02), 1),
            "reward/std_within": 0.2,
            "zero_spread": min(max(0.3 + 0.3 * share + draw.gauss(0, 0.1), 0), 1),
            "truncated": draw.uniform(0, 0.2),
            "completion_length": length + draw.gauss(0, 3),
            "entropy": 0.9 * (1 - 0.6 * share) * draw.uniform(0.8, 1.2),
            "grad_norm": 0.4 * draw.lognormvariate(0, 0.5),
            "logp_gap": draw.uniform(0, 2e-6),
            "clip_share": draw.uniform(0, 0.15),
            "phase_s/rollout": draw.uniform(1, 2),
            "kl": None if index % 7 else 0.01,
        }


@pytest.mark.parametrize("seed", range(8))
def test_a_healthy_run_is_silent(seed):
    diagnosis = new()
    assert [finding for step in walk(seed, 300) for finding in diagnosis.feed(step)] == []


def test_steps_without_numbers_are_silent():
    diagnosis = new()
    for _ in range(60):
        assert diagnosis.feed({"entropy": None, "grad_norm": float("inf"), "logp_gap": float("nan")}) == []
    assert diagnosis.last("grad_norm") == []


@pytest.mark.parametrize(
    ("answer", "why", "advice"),
    [
        (1.0, "too easy ('answer' is 1, its highest)", "Add harder rows, or stop here."),
        (0.0, "too hard ('answer' is 0, its lowest)", "Add easier rows, or train with mmpost sft first."),
        (-1.0, "too hard ('answer' is -1, its lowest)", "Add easier rows, or train with mmpost sft first."),
        (
            0.4,
            "each prompt is too easy or too hard ('answer' is 0.4 on average)",
            "Add rows of medium difficulty, or raise grpo.num_generations.",
        ),
    ],
)
def test_groups_without_spread_five_steps_running(answer, why, advice):
    diagnosis = new()
    assert feed(diagnosis, 4, zero_spread=1.0, answer=answer) == []
    (finding,) = feed(diagnosis, 1, zero_spread=1.0, answer=answer)
    assert str(finding) == (
        "for every prompt of 5 steps all completions got the same reward, so nothing is learned from them: "
        f"{why}. {advice} [MMP-R201]"
    )


def test_four_of_five_steps_without_spread_are_no_finding():
    diagnosis = new()
    for _ in range(3):
        assert feed(diagnosis, 4, zero_spread=1.0, answer=0.0) + feed(diagnosis, 2, zero_spread=0.5) == []


def test_nearly_all_groups_without_spread_over_twenty_steps():
    diagnosis = new()
    assert feed(diagnosis, 19, zero_spread=0.9, answer=0.0) == []
    (finding,) = feed(diagnosis, 1, zero_spread=0.9, answer=0.0)
    assert finding.words.startswith("for 90 % of the prompts of 20 steps all completions got the same reward")


def test_an_easy_reward_does_not_hide_one_out_of_reach():
    diagnosis = new()
    step = {"reward/by_name/format": 1.0, "reward/by_name/answer": 0.0, "zero_spread": 1.0}
    (finding,) = [finding for _ in range(5) for finding in diagnosis.feed(step)]
    assert "too easy for one reward ('format' is 1, its highest), out of reach for another ('answer' 0)" in str(finding)


def test_a_penalty_at_zero_is_no_reward_out_of_reach():
    diagnosis = new()
    diagnosis.feed({**HEALTHY, "reward/by_name/overlong": -0.3})
    step = {"reward/by_name/answer": 1.0, "reward/by_name/overlong": 0.0, "zero_spread": 1.0}
    (finding,) = [finding for _ in range(5) for finding in diagnosis.feed(step)]
    assert "too easy ('answer' is 1, its highest)" in str(finding)


def test_truncated_completions():
    diagnosis = new()
    assert feed(diagnosis, 20, truncated=0.3) == []
    assert (
        feed(diagnosis, 1, truncated=0.9)[0].words == "42 % of the completions of 5 steps were cut by the length limit."
    )


@pytest.mark.parametrize(
    ("half", "fine", "bad", "said"), [(False, 9e-4, 1.1e-3, "0.00102"), (True, 4e-2, 6e-2, "0.052")]
)
def test_engine_gap_by_precision(half, fine, bad, said):
    diagnosis = new(half=half)
    assert feed(diagnosis, 20, logp_gap=fine) == []
    (finding,) = feed(diagnosis, STEADY, logp_gap=bad)
    assert str(finding) == (
        f"log-probabilities of the engine and of the trainer differ by {said} nats per token "
        f"(normal is below {0.05 if half else 0.001:g}): stale weights, dropout or other numerics. "
        "Give both sides the same weights, dtype and image size, and train without dropout. [MMP-R203]"
    )


@pytest.mark.parametrize(
    ("half", "exact", "fine", "bad", "limit"),
    [(False, True, 9e-4, 2e-3, 0.001), (True, True, 4e-2, 6e-2, 0.05), (True, False, 0.19, 0.3, 0.2)],
)
def test_the_tail_of_the_engine_gap_counts_too(half, exact, fine, bad, limit):
    diagnosis = Diagnosis({}, half=half, max_grad_norm=1.0, exact=exact)
    assert feed(diagnosis, 20, logp_gap_p99=fine) == []
    (finding,) = feed(diagnosis, 2 * STEADY, logp_gap_p99=bad)
    assert finding.code == "MMP-R203"
    assert "nats on 1 % of the tokens (normal is below " + f"{limit:g})" in finding.words


def test_constant_reward_functions_are_named_one_by_one():
    diagnosis = new()
    found = []
    for index in range(CONSTANT_STEPS + 20):
        found += [
            (index, finding) for finding in diagnosis.feed({"reward/by_name/a": 1.0, "reward/by_name/b": index % 9})
        ]
    ((index, finding),) = found
    assert index == CONSTANT_STEPS - 1
    assert str(finding) == (
        "reward 'a' was 1 in each of 50 steps and contributes nothing. "
        "Leave it out, or see in the samples why it does not change. [MMP-R205]"
    )


def test_a_reward_that_does_not_apply_is_not_constant():
    diagnosis = new()
    for index in range(3 * CONSTANT_STEPS):
        # None is no observation: 49 equal values are not 50.
        assert diagnosis.feed({"reward/by_name/a": 1.0 if index < CONSTANT_STEPS - 1 else None}) == []


def test_entropy_below_a_tenth_of_its_start():
    diagnosis = new()
    assert feed(diagnosis, 30, entropy=2.0) + feed(diagnosis, 30, entropy=0.21) == []
    (finding,) = feed(diagnosis, 10, entropy=0.19)
    assert str(finding) == (
        "entropy fell from 2 to 0.2 nats per token (reward 0.5): nearly all completions of a prompt are the same. "
        "Train again with loss.kl.beta=0.01, which holds the policy near its start. [MMP-R206]"
    )


@pytest.mark.parametrize(("length", "verb"), [(160.0, "grew"), (45.0, "shrank")])
def test_length_drifts_while_the_reward_does_not_rise(length, verb):
    diagnosis = new()
    assert feed(diagnosis, 20) == []
    (finding,) = feed(diagnosis, 30, completion_length=length)
    assert finding.code == "MMP-R212"
    assert finding.words.startswith(f"completions {verb} from 100 to ")
    assert finding.words.endswith(" tokens while the reward did not rise (from 0.5 to 0.5).")


def test_longer_completions_with_a_higher_reward():
    diagnosis = new()
    feed(diagnosis, 20)
    (finding,) = feed(diagnosis, 30, completion_length=160.0, total=0.7)
    assert finding.code == "MMP-R213"
    assert finding.words.startswith("the reward rose from 0.5 to 0.68 while completions grew from 100 to 15")
    assert finding.words.endswith(" tokens: it may pay for length.")


def test_shorter_completions_with_a_higher_reward_are_welcome():
    diagnosis = new()
    assert feed(diagnosis, 20) + feed(diagnosis, 30, completion_length=40.0, total=0.7) == []


def test_length_within_bounds_or_of_a_few_tokens_is_silent():
    for before, after in [(100.0, 149.0), (100.0, 51.0), (4.0, 11.0), (12.0, 5.0)]:
        diagnosis = new()
        assert feed(diagnosis, 20, completion_length=before) + feed(diagnosis, 30, completion_length=after) == []


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_the_reward_is_no_rise(seed):
    diagnosis, draw = new(), random.Random(seed)
    for _ in range(20):
        assert feed(diagnosis, 1, total=draw.gauss(0.5, 0.1)) == []
    found = [feed(diagnosis, 1, completion_length=200.0, total=draw.gauss(0.5, 0.1)) for _ in range(60)]
    assert [finding.code for step in found for finding in step] == ["MMP-R212"]


def test_gradient_spike():
    diagnosis = new()
    assert feed(diagnosis, SPIKE_WARMUP) + feed(diagnosis, 1, grad_norm=4.9) == []
    (finding,) = feed(diagnosis, 1, grad_norm=6.0)
    assert str(finding) == (
        "the gradient norm jumped to 6, 12 times its usual 0.5. "
        "If it happens again, lower train.learning_rate. [MMP-R214]"
    )


def test_spikes_in_a_burst_are_one_finding():
    diagnosis = new()
    feed(diagnosis, 30)
    assert len(feed(diagnosis, 1, grad_norm=9.0)) == 1
    assert feed(diagnosis, 3) + feed(diagnosis, 1, grad_norm=12.0) + feed(diagnosis, SPIKE_WARMUP) == []
    assert len(feed(diagnosis, 1, grad_norm=9.0)) == 1


def test_the_first_gradients_and_those_of_dead_groups_are_no_scale():
    diagnosis = new()
    assert feed(diagnosis, 1, grad_norm=1e-3) + feed(diagnosis, SPIKE_WARMUP - 1, grad_norm=0.9) == []
    diagnosis = new()
    assert feed(diagnosis, 15, grad_norm=0.0) + feed(diagnosis, 15, zero_spread=0.95, grad_norm=1e-3) == []
    assert diagnosis.last("grad_norm") == []


def test_clipped_tokens():
    diagnosis = new()
    assert feed(diagnosis, 40, clip_share=0.3) == []
    (finding,) = feed(diagnosis, 20, clip_share=0.5)
    assert finding.words == "31 % of the tokens of 20 steps were clipped and did not train."


def test_gradients_that_are_nearly_always_cut():
    assert feed(new(max_grad_norm=0.0), 80, grad_norm=6.0) == []
    assert feed(new(max_grad_norm=10.0), 80, grad_norm=6.0) == []
    diagnosis = new(max_grad_norm=1.0)
    assert feed(diagnosis, 49, grad_norm=6.0) == []
    assert str(feed(diagnosis, 1, grad_norm=6.0)[0]) == (
        "the gradient was cut to train.max_grad_norm=1 in 50 of 50 steps (usual norm 6), which gives every step the "
        "same weight. Set train.max_grad_norm=12, so that only outliers are cut. [MMP-R216]"
    )


# What makes each finding appear, beside HEALTHY, and how many healthy steps come first.
TROUBLE = {
    "MMP-R201": (0, {"zero_spread": 1.0, "answer": 0.0}),
    "MMP-R202": (0, {"truncated": 0.5}),
    "MMP-R203": (0, {"logp_gap": 0.01}),
    "MMP-R205": (0, {"answer": 0.7}),
    "MMP-R206": (10, {"entropy": 0.01}),
    "MMP-R212": (20, {"completion_length": 300.0}),
    "MMP-R213": (20, {"completion_length": 300.0, "total": 0.9}),
    "MMP-R214": (20, {"grad_norm": 40.0}),
    "MMP-R215": (0, {"clip_share": 0.6}),
    "MMP-R216": (0, {"grad_norm": 1.5}),
}


def codes(findings):
    return {finding.code for finding in findings}


def test_every_rule_has_its_trouble():
    found = set()
    for before, changes in TROUBLE.values():
        diagnosis = new()
        feed(diagnosis, before)
        found |= codes(feed(diagnosis, 60, **changes))
    assert found == set(TROUBLE)
    assert len(RULES) == len(TROUBLE) - 1  # one rule has two causes, of length


@pytest.mark.parametrize("code", TROUBLE)
def test_a_finding_is_said_once_until_it_clears_and_then_again(code):
    before, changes = TROUBLE[code]
    diagnosis = new()
    feed(diagnosis, max(before, 20))
    said = [finding.code for finding in feed(diagnosis, 200, **changes)]
    assert said.count(code) == 1
    assert feed(diagnosis, 200) == []
    said = [finding.code for finding in feed(diagnosis, 200, **changes)]
    assert said.count(code) == 1


@pytest.mark.parametrize(
    ("name", "limit"), [("truncated", 0.3), ("clip_share", 0.3), ("zero_spread", 0.8), ("logp_gap", 1e-3)]
)
def test_noise_around_a_limit_does_not_repeat(name, limit):
    diagnosis, draw = new(), random.Random(1)
    found = []
    for _ in range(400):
        found += feed(diagnosis, 1, **{name: limit * draw.uniform(0.9, 1.12)})
    assert len(found) == 1


@pytest.mark.parametrize("code", TROUBLE)
def test_a_continued_run_says_what_an_uninterrupted_one_says(code):
    before, changes = TROUBLE[code]
    draw = random.Random(code)
    steps = [{**HEALTHY, "reward/by_name/answer": 0.5 + 0.1 * draw.random()} for _ in range(before)]
    names = {"answer": "reward/by_name/answer", "total": "reward/total"}
    steps += [{**HEALTHY, **{names.get(name, name): value for name, value in changes.items()}} for _ in range(70)]
    whole = new()
    expected = [whole.feed(step) for step in steps]
    assert code in codes(finding for step in expected for finding in step)
    for cut in (1, before + 3, before + 40):
        first = new()
        found = [first.feed(step) for step in steps[:cut]]
        second = new(json.loads(json.dumps(first.memory, allow_nan=False)))
        found += [second.feed(step) for step in steps[cut:]]
        assert found == expected
        assert second.memory == whole.memory


def test_memory_stays_small():
    diagnosis = new()
    for step in walk(3, 100):
        diagnosis.feed(step)
    size = len(json.dumps(diagnosis.memory))
    for step in walk(4, 400):
        diagnosis.feed(step)
    assert len(json.dumps(diagnosis.memory)) < 1.1 * size
    assert len(diagnosis.last("grad_norm")) == 51


def test_words_are_plain():
    said = []
    for before, changes in TROUBLE.values():
        diagnosis = new()
        feed(diagnosis, before)
        said += feed(diagnosis, 60, **changes)
    for finding in said:
        assert any(char.isdigit() for char in finding.words)
        assert finding.words.endswith(".")
        assert finding.advice.endswith(".")
        assert finding.advice[0].isupper()
        assert "nan" not in finding.words
        # What the report shows of an event.
        assert len(str(finding)) < 600
    assert median(len(str(finding)) for finding in said) < 220


def test_feeding_does_not_touch_the_metrics():
    step = copy.deepcopy(HEALTHY)
    new().feed(step)
    assert step == HEALTHY


def useless(prompts, completions, **columns):
    return [0.0] * len(completions)


def test_findings_of_a_real_run_reach_log_report_and_checkpoint(tmp_path):
    from PIL import Image

    from mmpost import GRPOConfig, GRPOTrainer, load_data

    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    row = {"messages": [{"role": "user", "content": "<image>What is it?"}], "images": ["a.png"]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)

    def train(output):
        config = GRPOConfig()
        config.train.output_dir, config.train.max_steps, config.train.save_steps = str(output), 7, 3
        config.grpo.prompts_per_step, config.grpo.num_generations, config.grpo.max_completion_length = 2, 2, 4
        config.log.progress = "none"
        GRPOTrainer("tiny-qwen2.5-vl", useless, config, load_data(tmp_path / "rows.jsonl")).train()
        events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
        return [(event["step"], event["text"]) for event in events if event["kind"] == "diagnosis"]

    whole = train(tmp_path / "whole")
    assert ("MMP-R201" in whole[0][1], whole[0][0]) == (True, STEADY)
    assert "('useless' is 0, its lowest)" in whole[0][1]
    assert "MMP-R201" in (tmp_path / "whole" / "report.html").read_text()
    # Killed in the middle of the five steps: what is known of the first three comes from the checkpoint.
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", parts)
    for folder in ("final", "checkpoints/step-000006"):
        shutil.rmtree(parts / folder)
    (parts / "status.json").unlink()
    assert train(parts) == whole
