"""Reward functions over groups: columns in, scores out, and what happens when a function fails."""

import asyncio
import functools
import time
from pathlib import Path

import numpy as np
import pytest

from mmpost.config.schema import RewardSpec
from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Group, Rollout
from mmpost.core.sample import Part, Sample, Turn
from mmpost.rewards import REWARDS
from mmpost.rewards.score import Reward, check_columns, needed_columns, resolve, score
from mmpost.rewards.stats import RewardStats

HERE = Path(__file__)

# -- running functions -----------------------------------------------------------------------------------------------


def _groups(texts=(("a", "bb"), ("ccc",)), columns=({"solution": "a"}, {"solution": "b"})):
    groups = []
    for k, (answers, column) in enumerate(zip(texts, columns, strict=True)):
        parts = (Part("image", ref=b"x"), Part("text", "hi")) if k == 0 else (Part("text", "ho"),)
        prompt = Sample(f"p{k}", (Turn("user", parts),), column, f"rows.jsonl:{k + 1}")
        rollouts = [Rollout(np.arange(len(t)), np.zeros(len(t)), t, False) for t in answers]
        groups.append(Group(prompt, rollouts, k))
    return groups


def _scores(groups):
    return [rollout.score for group in groups for rollout in group.rollouts]


def _reward(function, **spec):
    return Reward(function.__name__, function, RewardSpec(name=function.__name__, **spec))


def _error(function, **spec):
    with pytest.raises(MmpostError) as caught:
        score(_groups(), [_reward(function, **spec)])
    return caught.value


def test_functions_are_called_as_by_trl():
    seen = {}

    def length(prompts, completions, completion_ids, solution, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, solution=solution, columns=columns)
        return [len(message[0]["content"]) for message in completions]

    groups = _groups()
    score(groups, [_reward(length)])
    assert _scores(groups) == [1.0, 2.0, 3.0]
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in ("a", "bb", "ccc")]
    assert seen["ids"] == [[0], [0, 1], [0, 1, 2]]
    assert seen["solution"] == ["a", "a", "b"]
    assert seen["prompts"][0] == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]
    assert seen["prompts"][2] == [{"role": "user", "content": "ho"}]
    assert seen["columns"] == {}


def test_columns_of_some_rows_are_none_in_the_others():
    seen = []

    def look(completions, extra, **columns):
        seen.extend(extra)
        return [0.0] * len(completions)

    score(_groups(columns=({"extra": 1}, {})), [_reward(look)])
    assert seen == [1, 1, None]


def test_a_data_column_cannot_replace_what_the_policy_wrote():
    def count(prompts, completions, completion_ids, **columns):
        assert len(prompts) == len(completions) == len(completion_ids) == 3
        return [len(completion[0]["content"]) for completion in completions]

    mine = {"prompts": "x", "completions": "y", "completion_ids": "z"}
    groups = _groups(columns=(mine, mine))
    score(groups, [_reward(count)])
    assert _scores(groups) == [1.0, 2.0, 3.0]


def test_options_go_before_columns_of_that_name():
    def add(completions, bonus, **columns):
        return [bonus] * len(completions)

    groups = _groups(columns=({"bonus": 1}, {"bonus": 2}))
    score(groups, [_reward(add, args={"bonus": 9})])
    assert _scores(groups) == [9.0, 9.0, 9.0]


def test_scores_are_weighted_sums_of_what_applies():
    def first(completions, **columns):
        return [1.0, None, None]

    def second(completions, **columns):
        return [2.0, float("nan"), 3]

    groups = _groups()
    score(groups, [_reward(first, weight=0.5), _reward(second, weight=-1)])
    assert _scores(groups) == [-1.5, None, -3.0]
    parts = [dict(rollout.score_parts) for group in groups for rollout in group.rollouts]
    assert parts == [{"first": 1.0, "second": 2.0}, {"first": None, "second": None}, {"first": None, "second": 3.0}]


def test_scores_may_come_as_arrays_and_flags():
    def array(completions, **columns):
        return np.array([0.5, np.nan, 1.0], dtype=np.float32)

    def flags(completions, **columns):
        return (True, False, True)

    groups = _groups()
    score(groups, [_reward(array), _reward(flags)])
    assert _scores(groups) == [1.5, 0.0, 2.0]


def test_an_error_names_the_line_of_the_user():
    def broken(completions, **columns):
        return [1 / 0 for _ in completions]

    line = broken.__code__.co_firstlineno + 1
    assert str(_error(broken)) == (
        f"reward 'broken' raised ZeroDivisionError: division by zero ({HERE}:{line}). Correct the function, or set "
        "rewards.on_error=null to leave its score out. [MMP-R120]"
    )


def test_an_error_inside_a_library_names_the_line_of_the_user_that_called_it():
    import json

    def parses(completions, **columns):
        return [json.loads("{") for _ in completions]

    class Callable:
        def __call__(self, completions, **columns):
            return [json.loads("{") for _ in completions]

    async def later(completions, **columns):
        await asyncio.sleep(0)
        return [json.loads("{") for _ in completions]

    @functools.wraps(parses)
    def wrapped(*args, **columns):
        return parses(*args, **columns)

    for function, code, offset in (
        (parses, parses.__code__, 1),
        (Callable(), Callable.__call__.__code__, 1),
        (later, later.__code__, 2),
        (wrapped, parses.__code__, 1),
    ):
        with pytest.raises(MmpostError) as caught:
            score(_groups(), [Reward("r", function, RewardSpec(name="r"))])
        assert f"({HERE}:{code.co_firstlineno + offset})." in str(caught.value)


def test_an_error_in_a_file_of_the_user_names_that_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def mine(completions, **columns):\n    x = 1\n    raise KeyError('gone')\n")
    (reward,) = resolve([RewardSpec(name=f"{file}:mine")])
    assert reward.name == "mine"
    with pytest.raises(MmpostError) as caught:
        score(_groups(), [reward])
    assert f"reward 'mine' raised KeyError: 'gone' ({file}:3)." in str(caught.value)


def test_a_refused_call_names_no_line_of_ours():
    def narrow(completions):
        return [0.0] * len(completions)

    text = str(_error(narrow))
    assert text.startswith("reward 'narrow' raised TypeError: ")
    assert "score.py" not in text
    assert text.endswith("[MMP-R120]")


def test_even_an_exit_is_reported():
    def leaves(completions, **columns):
        raise SystemExit(3)

    assert str(_error(leaves)).startswith("reward 'leaves' raised SystemExit: 3 (")


@pytest.mark.parametrize(
    ("returned", "got"),
    [([1.0], "1 scores"), ([], "0 scores"), ([1.0] * 4, "4 scores"), (1.0, "float"), (None, "NoneType")],
)
def test_a_wrong_number_of_scores_is_refused(returned, got):
    def short(completions, **columns):
        return returned

    assert str(_error(short)) == (
        f"reward 'short' returned {got} for 3 completions. Return one number or None per completion. [MMP-R121]"
    )


@pytest.mark.parametrize(("value", "shown"), [("good", "'good'"), (float("inf"), "inf"), ([1], "[1]")])
def test_a_score_that_is_no_number_is_refused(value, shown):
    def odd(completions, **columns):
        return [1.0, value, 0.0]

    assert str(_error(odd)) == (
        f"reward 'odd' returned {shown} for completion 2; expected a finite number or None. Return one number or None "
        "per completion. [MMP-R121]"
    )


def test_a_slow_function_is_left_behind():
    def slow(completions, **columns):
        time.sleep(3)
        return [0.0] * len(completions)

    clock = time.perf_counter()
    text = str(_error(slow, timeout=0.05))
    assert time.perf_counter() - clock < 2
    assert text == "reward 'slow' took longer than 0.05 s. Make it faster or raise rewards.timeout. [MMP-R122]"


def test_a_slow_coroutine_is_left_behind_too():
    async def sleepy(completions, **columns):
        await asyncio.sleep(3)

    assert _error(sleepy, timeout=0.05).code == "MMP-R122"


def test_failures_may_be_left_out_and_are_counted_never_zero():
    def broken(completions, **columns):
        raise ValueError("no")

    def short(completions, **columns):
        return [1.0]

    def slow(completions, **columns):
        time.sleep(1)

    def fine(completions, **columns):
        return [1.0] * len(completions)

    rewards = [_reward(f, on_error="null", timeout=0.1) for f in (broken, short, slow)] + [_reward(fine)]
    groups = _groups()
    score(groups, rewards)
    score(groups, rewards)
    assert [reward.failures for reward in rewards] == [2, 2, 2, 0]
    assert _scores(groups) == [1.0, 1.0, 1.0]
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.score_parts == {"broken": None, "short": None, "slow": None, "fine": 1.0}
    score(groups, rewards[:1])
    assert _scores(groups) == [None, None, None]


def test_async_functions_are_awaited_even_inside_a_running_loop():
    async def later(completions, **columns):
        await asyncio.sleep(0.001)
        return [float(len(c[0]["content"])) for c in completions]

    async def outside():
        groups = _groups()
        score(groups, [_reward(later)])
        return _scores(groups)

    assert asyncio.run(outside()) == [1.0, 2.0, 3.0]


def test_async_functions_wait_beside_each_other():
    async def later(completions, **columns):
        await asyncio.sleep(0.4)
        return [1.0] * len(completions)

    rewards = [Reward(f"r{k}", later, RewardSpec(name=f"r{k}")) for k in range(5)]
    clock = time.perf_counter()
    groups = _groups()
    score(groups, rewards)
    assert time.perf_counter() - clock < 1.2
    assert _scores(groups) == [5.0] * 3
    assert list(groups[0].rollouts[0].score_parts) == [f"r{k}" for k in range(5)]


def test_a_late_coroutine_is_cancelled_but_its_own_timeout_is_an_error():
    ended = []

    async def sleepy(completions, **columns):
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(True)

    async def own(completions, **columns):
        raise TimeoutError("no reply")

    assert _error(sleepy, timeout=0.1).code == "MMP-R122"
    until = time.perf_counter() + 5
    while not ended and time.perf_counter() < until:
        time.sleep(0.01)
    assert ended == [True]
    assert "raised TimeoutError: no reply (" in str(_error(own))


def test_statistics_say_what_happened_to_every_completion():
    def some(completions, **columns):
        return [1.0, None, 0.0]

    def broken(completions, **columns):
        raise ValueError("no")

    def slow(completions, **columns):
        time.sleep(0.5)

    rewards = [_reward(f, on_error="null", timeout=0.1) for f in (some, broken, slow)]
    stats = score(_groups(), rewards)
    assert list(stats) == ["some", "broken", "slow"]
    assert [(s.completions, s.scored, s.failed, s.timed_out) for s in stats.values()] == [
        (3, 2, 0, 0),
        (3, 0, 3, 0),
        (3, 0, 0, 3),
    ]
    assert (stats["some"].mean, stats["some"].std) == (0.5, 0.5)
    assert [s.share_not_applicable for s in stats.values()] == [pytest.approx(1 / 3), 0.0, 0.0]
    assert (stats["slow"].mean, stats["slow"].std) == (None, None)
    assert 0.1 <= stats["slow"].seconds < 0.5
    assert rewards[0].stats is stats["some"]
    assert score([], rewards)["some"] == RewardStats()


def test_statistics_of_parts_add_up_to_those_of_the_whole():
    values = [1.0, 0.25, None, -3.0, 0.1, 0.1, None]
    parts = []
    for some in (values[:3], values[3:], []):
        parts.append(RewardStats(seconds=1.0, failed=1))
        parts[-1].add_scores(some)
    whole = parts[0] + parts[1] + parts[2]
    known = [value for value in values if value is not None]
    assert (whole.completions, whole.scored, whole.failed, whole.seconds) == (7, 5, 3, 3.0)
    assert whole.mean == pytest.approx(np.mean(known))
    assert whole.std == pytest.approx(np.std(known))
    same = RewardStats()
    same.add_scores([0.1] * 7)
    assert same.std == pytest.approx(0.0, abs=1e-8)


def test_no_completions_need_no_function():
    score([], [])
    score([Group(Sample("a", ()), [], 0)], [])


# -- names and columns -----------------------------------------------------------------------------------------------


ODD = (
    "", " ", "\0", "\\", "\\boxed{", "}{", "<answer>", "</answer>", "$", "%", "nan", "1e999", "-", "½", "²", "(", "[",
    "{}", "<answer>[1, 2</answer>", "[[[", "٣", "\U0001f600", "```json\n{```", "\ud800", "9" * 5000, "\\frac{1}{0}",
)  # fmt: skip
OPTIONS = {"regex": {"pattern": "(a|b)+c"}}
SOLUTIONS = {
    "boxes": [[0, 0, 1, 1]],
    "points": [[0, 0]],
    "temporal_iou": [1, 2],
    "ordering": ["a", "b"],
    "tubes": {"1": [0, 0, 1, 1]},
}


@pytest.mark.parametrize("name", list(REWARDS))
def test_every_shipped_function_scores_odd_texts_and_keeps_their_order(name):
    (reward,) = resolve([RewardSpec(name=name, args=OPTIONS.get(name, {}))])
    assert reward.name == name
    assert set(needed_columns(reward)) <= {"solution"}

    def scores(texts):
        groups = _groups((texts,), ({"solution": SOLUTIONS.get(name, "3")},))
        for rollout in groups[0].rollouts:
            rollout.tokens = np.arange(len(rollout.text))
        score(groups, [reward])
        return _scores(groups)

    first = scores(ODD)
    assert all(value is None or -1 <= value <= 1 for value in first)
    assert first == scores(ODD[::-1])[::-1]
    assert reward.stats.timed_out == reward.stats.failed == 0


SLOW_TEXTS = [
    part * (20_000 // len(part))
    for part in (" ", "answer is ", "answer is", "<answer>", "</answer>", "\\boxed{", "{", "[", "[1,", "1,", "<think> ")
]


@pytest.mark.parametrize("name", [name for name in REWARDS if name not in ("regex", "math")])
def test_no_text_holds_an_inline_function_up(name):
    (reward,) = resolve([RewardSpec(name=name, timeout=2)])
    score(_groups((SLOW_TEXTS,), ({"solution": SOLUTIONS.get(name, "3")},)), [reward])


def test_a_reward_listed_twice_is_refused():
    with pytest.raises(MmpostError) as caught:
        resolve([RewardSpec(name="answer"), RewardSpec(name="answer", weight=2)])
    assert str(caught.value) == "reward 'answer' is listed twice. Give each function its own name. [MMP-C030]"


def test_an_unknown_reward_is_named():
    with pytest.raises(MmpostError) as caught:
        resolve([RewardSpec(name="anser")])
    assert str(caught.value).startswith("unknown name 'anser' among rewards. Did you mean 'answer'? Known: answer, ")


def test_needed_columns_are_what_has_no_default_and_no_option():
    def function(prompts, completions, solution, level, completion_ids, trainer_state, note="x", **columns):
        return []

    assert needed_columns(_reward(function)) == ["solution", "level"]
    assert needed_columns(_reward(function, args={"level": 3})) == ["solution"]
    assert [needed_columns(r) for r in resolve([RewardSpec(name=n) for n in ("answer", "format")])] == [
        ["solution"],
        [],
    ]


def test_a_missing_column_is_named_before_training():
    samples = [Sample(f"{i}", (), {"gold": "1"} if i else {"gold": "1", "solution": "1"}) for i in range(5)]
    rewards = resolve([RewardSpec(name="format"), RewardSpec(name="answer")])
    with pytest.raises(MmpostError) as caught:
        check_columns(rewards, samples)
    assert str(caught.value) == (
        "reward 'answer' needs column 'solution', which 4 of 5 rows lack; columns: gold, solution. Add the column, or "
        "map yours with data.columns. [MMP-D019]"
    )
    with pytest.raises(MmpostError, match=r"which 1 of 1 rows lack; columns: none\."):
        check_columns(rewards, [Sample("a", ())])
    check_columns(rewards, samples[:1])
