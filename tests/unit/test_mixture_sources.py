"""Sources with verifiers of their own in one run."""

import numpy as np
import pytest

from mmpost.api.data import open_source
from mmpost.config.run import GRPOConfig
from mmpost.config.schema import DataSection, RewardSpec, Source
from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Group, Rollout
from mmpost.core.sample import Part, Sample, Turn
from mmpost.rewards.call import Reward
from mmpost.rewards.score import check_columns, check_sources, resolve, score
from mmpost_tasks import TASKS


def sample(source, **columns):
    return Sample("1", (Turn("user", (Part("text", "?"),)),), columns, "f:1", source)


def groups(*sources):
    rollouts = [
        [Rollout(np.arange(2), np.zeros(2), f"<answer>{text}</answer>", False) for text in ("2", "B")] for _ in sources
    ]
    return [
        Group(sample(source, solution="B" if source == "letters" else "2"), own, uid)
        for uid, (source, own) in enumerate(zip(sources, rollouts, strict=True))
    ]


SPECS = [RewardSpec(name="counting", sources=["counts"]), RewardSpec(name="choice", sources=["letters"], weight=3)]


def test_every_source_is_scored_by_its_own_verifier():
    made = groups("counts", "letters", "counts")
    stats = score(made, rewards := resolve([*SPECS, RewardSpec(name="format", weight=0.5)]))
    assert [[r.score for r in group.rollouts] for group in made] == [[1.5, 0.5], [0.5, 3.5], [1.5, 0.5]]
    parts = made[1].rollouts[1].score_parts
    assert (parts["counting"], parts["choice"], parts["format"]) == (None, 1.0, 1.0)
    assert {name: one.completions for name, one in stats.items()} == {"counting": 4, "choice": 2, "format": 6}
    assert stats["counting"].share_not_applicable == 0
    # A step without a row of a source leaves its verifier out instead of calling it with nothing.
    stats = score(made := groups("letters"), rewards)
    assert stats["counting"].completions == 0
    assert [rollout.score for rollout in made[0].rollouts] == [0.5, 3.5]


def test_a_verifier_never_sees_rows_of_other_sources():
    seen = []

    def spy(prompts, completions, solution, **columns):
        seen.extend(solution)
        return [0.0] * len(completions)

    async def late(prompts, completions, solution, **columns):
        return [float(gold == "B") for gold in solution]

    own = [Reward("spy", spy, RewardSpec(name="spy", sources=["counts"]))]
    own.append(Reward("late", late, RewardSpec(name="late", sources=["letters"])))
    made = groups("letters", "counts", "letters")
    score(made, own)
    assert seen == ["2", "2"]
    assert [group.rollouts[0].score for group in made] == [1.0, 0.0, 1.0]


def test_columns_are_needed_in_the_rows_that_are_scored_only():
    rewards = resolve(SPECS)
    check_columns(rewards, [sample("counts", solution="1"), sample("plain")])
    with pytest.raises(MmpostError, match="reward 'choice' needs column 'solution', which 1 of 1 rows lack"):
        check_columns(rewards, [sample("counts", solution="1"), sample("letters")])


def test_sources_that_do_not_exist_or_that_nothing_scores_are_told():
    rewards = resolve(SPECS)
    check_sources(rewards, {"counts": 1.0, "letters": 0.5, "unused": 0.0})
    with pytest.raises(MmpostError) as caught:
        check_sources(rewards, {"counts": 1.0, "letter": 1.0})
    assert str(caught.value) == (
        "unknown name 'letters' among sources of reward 'choice'. Known: counts, letter [MMP-C006]"
    )
    with pytest.raises(MmpostError) as caught:
        check_sources(rewards, {"counts": 1.0, "letters": 1.0, "third": 0.1})
    assert str(caught.value) == (
        "no reward scores the rows of source 'third'. Add its name to rewards.sources of one, or leave "
        "rewards.sources of one empty. [MMP-C032]"
    )


def test_the_option_is_read_from_a_configuration():
    config = GRPOConfig(rewards=[{"name": "counting", "sources": ["a", "b"]}, "format"])
    assert [reward.sources for reward in config.rewards] == [["a", "b"], []]


def test_rows_of_a_task_know_their_source():
    data = open_source(Source(path="task:mix_shoes", limit=3, name="shoes"), DataSection(), seed=0)
    assert {row.source for row in data} == {"shoes"}
    assert open_source(Source(path="task:demo_vqa", limit=1), DataSection(), seed=0)[0].source == "demo_vqa"


DEMO = ("mix_digits", "mix_shoes", "mix_tops")


@pytest.mark.parametrize("name", DEMO)
def test_domains_of_the_demo_are_balanced_verifiable_and_apart(name):
    from mmpost.core.catalog import Catalog

    task = Catalog("tasks", TASKS).get(name)
    train, held = task.load("train", limit=80), task.load("heldout", limit=80)
    answers = [row.columns["solution"] for row in train]
    assert len({answers.count(answer) for answer in set(answers)}) == 1
    shown = [{picture for row in rows for picture in row.columns["pictures"]} for rows in (train, held)]
    assert not shown[0] & shown[1]
    assert [row.id for row in task.load("heldout", limit=80, seed=5)] == [row.id for row in held]
    assert task.load("heldout", limit=5) == held[:5]
    made = [
        Group(row.prompt(), [Rollout(np.arange(1), np.zeros(1), row.turns[-1].text, False)], i)
        for i, row in enumerate(held)
    ]
    score(made, resolve([RewardSpec(name=task.rewards[0])]))
    assert {group.rollouts[0].score for group in made} == {1.0}


def test_interference_is_planted_by_equal_words_over_equal_pictures():
    from mmpost.core.catalog import Catalog

    shoes, tops = (Catalog("tasks", TASKS).get(name).load("train", limit=200) for name in DEMO[1:])
    words = [{row.turns[0].text for row in rows} for rows in (shoes, tops)]
    assert words[0] == words[1]
    assert all(len(row.columns["pictures"]) == 3 for row in (*shoes, *tops))
