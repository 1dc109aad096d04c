"""Which groups make a step: the same ones for every number of processes, in the order of the prompts."""

import itertools
import math
import threading

import numpy as np
import pytest

from mmpost.core.rollout import Group, Rollout
from mmpost.core.sample import Sample
from mmpost.core.seeding import uniform
from mmpost.train.draw import Adaptive, Candidate, Draw, Dynamic, balanced
from mmpost.train.rows import Drawn


class Office:
    """Desks of several processes that run as threads and see each other's numbers."""

    def __init__(self, world, count, n, score):
        self.world, self.count, self.n, self.score = world, count, n, score
        self.barrier = threading.Barrier(world)
        self.slots = [None] * world
        self.asked = []

    def run(self, draw, steps=1):
        """What every process has collected, per step."""
        out = [[None] * self.world for _ in range(steps)]

        def work(rank):
            desk, carried = Desk(self, rank), []
            for step in range(steps):
                collected = draw.collect(desk, carried)
                carried = collected.surplus
                out[step][rank] = collected

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        return out


class Desk:
    def __init__(self, office, rank):
        self.office, self.rank, self.next = office, rank, 0
        self.prompts_wanted, self.num_generations = office.count, office.n

    def prompts(self):
        uids = range(self.next, self.next + self.office.count)
        self.next += self.office.count
        share = np.array_split(np.array(uids), self.office.world)[self.rank]
        return [Drawn(Sample(str(uid), ()), None, int(uid)) for uid in share]

    def complete(self, candidates, n):
        for candidate in candidates:
            numbers = range(candidate.seen, candidate.seen + n)
            self.office.asked.append((candidate.uid, candidate.seen, n))
            scores = [self.office.score(candidate.uid, g) for g in numbers]
            candidate.add([Rollout(np.zeros(1), np.zeros(1), "", False, {}, score) for score in scores])

    def gather(self, values):
        self.office.slots[self.rank] = list(values)
        self.office.barrier.wait(timeout=20)
        out = [value for part in self.office.slots for value in part]
        self.office.barrier.wait(timeout=20)
        return out


def _uids(collected):
    return sorted(candidate.uid for part in collected for candidate in part.candidates)


def _coin(p):
    return lambda uid, g: float(uniform(3, "coin", uid, g) < p)


def test_the_plain_draw_takes_every_prompt_once():
    (step,) = Office(2, 5, 3, _coin(0.5)).run(Draw())
    assert _uids(step) == [0, 1, 2, 3, 4]
    assert all(len(c.group.rollouts) == c.seen == 3 for part in step for c in part.candidates)


@pytest.mark.parametrize("carry", [False, True])
def test_dynamic_sampling_keeps_the_same_prompts_for_every_number_of_processes(carry):
    found = {}
    for world in (1, 2, 3):
        steps = Office(world, 6, 4, _coin(0.15)).run(Dynamic(carry=carry), steps=3)
        found[world] = [(_uids(step), step[0].metrics) for step in steps]
    assert found[1] == found[2] == found[3]
    assert all(len(uids) == 6 for uids, _ in found[1])


def test_dynamic_sampling_takes_the_first_groups_with_spread_and_counts_its_rounds():
    # Groups 1, 4, 7, ... have spread.
    office = Office(1, 4, 2, lambda uid, g: float(uid % 3 == 1 and g == 1))
    (one,), (two,) = office.run(Dynamic(), steps=2)
    assert _uids([one]) == [1, 4, 7, 10]
    assert one.metrics == {"kept": 4.0, "resampled": 8.0, "rounds": 3.0, "dynamic_short": 0.0}
    # Group 12 begins the next step; 10 was the last one of the first.
    assert _uids([two]) == [13, 16, 19, 22]
    assert one.surplus == []


def test_surplus_groups_come_first_in_the_next_step():
    office = Office(1, 4, 2, lambda uid, g: float(uid % 4 != 0 and g == 1))
    (one,), (two,) = office.run(Dynamic(carry=True), steps=2)
    assert _uids([one]) == [1, 2, 3, 5]
    assert [candidate.uid for candidate in one.surplus] == [6, 7]
    assert _uids([two]) == [6, 7, 9, 10]
    assert two.metrics["rounds"] == 1


def test_dynamic_sampling_ends_after_its_rounds_with_what_there_is():
    office = Office(2, 4, 2, lambda uid, g: float(uid == 5 and g == 0))
    (step,) = office.run(Dynamic(max_rounds=3))
    assert _uids(step) == [5]
    assert step[0].metrics == {"kept": 1.0, "resampled": 8.0, "rounds": 3.0, "dynamic_short": 3.0}


def test_the_share_of_useful_prompts_is_told_by_source():
    class TwoSources(Desk):
        def prompts(self):
            return [
                Drawn(Sample(str(item.uid), (), source="ab"[item.uid % 2]), None, item.uid)
                for item in super().prompts()
            ]

    office = Office(1, 4, 2, lambda uid, g: float(uid % 4 == 1 and g == 0))
    collected = Dynamic(max_rounds=2).collect(TwoSources(office, 0))
    assert collected.metrics["spread_by_source"] == {"a": 0.0, "b": 0.5}


def test_groups_without_scores_have_no_spread():
    candidate = Candidate(Drawn(Sample("a", ()), None, 0), Group(Sample("a", ()), [], 0))
    rollouts = [Rollout(np.zeros(1), np.zeros(1), "", False, {}, score) for score in (None, 1.0, None, 1.0)]
    candidate.add(rollouts)
    assert not candidate.has_spread
    assert (candidate.seen, candidate.scored, candidate.positive) == (4, 2, 2)


# -- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positive", "negative"), list(itertools.product(range(9), range(9))))
def test_stop_rules(positive, negative):
    assert Adaptive().is_done(positive, negative, 4) == (positive >= 2 and negative >= 2)
    assert Adaptive(rule="positive_focused").is_done(positive, negative, 4) == (
        positive >= 1 and positive + negative >= 4
    )


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_kept_completions_are_as_balanced_as_they_can_be(n):
    for positive, negative in itertools.product(range(9), range(9)):
        flags = [True] * positive + [False] * negative
        kept = balanced(flags, n)
        good = sum(flags[i] for i in kept)
        assert len(kept) == len(set(kept)) == min(n, positive + negative)
        best = min(
            (abs(g - (len(kept) - g)) for g in range(len(kept) + 1) if g <= positive and len(kept) - g <= negative),
            default=0,
        )
        assert abs(good - (len(kept) - good)) == best


def test_kept_completions_are_the_first_of_either_kind():
    assert balanced([False, False, True, False, True, True], 4) == [0, 1, 2, 4]
    assert balanced([False, False, False, True], 4) == [0, 1, 2, 3]


def _expected_samples(p, n, per_round, rounds):
    """Rounds that begin, times completions of a round; a round begins when the ones before were not enough."""
    total = 0.0
    for done in range(rounds):
        drawn = done * per_round
        chances = [math.comb(drawn, k) * p**k * (1 - p) ** (drawn - k) for k in range(drawn + 1)]
        total += per_round * sum(c for k, c in enumerate(chances) if not (k >= n / 2 and drawn - k >= n / 2))
    return total


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_the_number_of_samples_is_the_expected_one(p):
    count = 3000
    office = Office(1, count, 4, _coin(p))
    ((step,),) = office.run(Adaptive(rounds=4, per_round=4))
    seen = np.array([candidate.seen for candidate in step.candidates])
    assert set(seen) <= {4, 8, 12, 16}
    error = seen.std() / np.sqrt(count)
    assert abs(seen.mean() - _expected_samples(p, 4, 4, 4)) < 4 * error + 1e-9
    assert step.metrics["samples_per_prompt"] == pytest.approx(seen.mean())


def test_rounds_go_on_with_fresh_generation_numbers_and_stop_prompt_by_prompt():
    # Prompt 0 is right every other time, prompt 1 never.
    office = Office(1, 2, 4, lambda uid, g: float(uid == 0 and g % 2 == 0))
    ((step,),) = office.run(Adaptive(rounds=3, per_round=4))
    assert office.asked == [(0, 0, 4), (1, 0, 4), (1, 4, 4), (1, 8, 4)]
    assert [(c.seen, c.positive, len(c.group.rollouts)) for c in step.candidates] == [(4, 2, 4), (12, 0, 4)]
    assert step.metrics == {"kept": 2.0, "rounds": 3.0, "samples_per_prompt": 8.0, "solved": 0.5}


def test_adaptive_rounds_do_not_depend_on_the_number_of_processes():
    def collected(world):
        (step,) = Office(world, 7, 4, _coin(0.2)).run(Adaptive(per_round=3))
        return sorted((c.uid, c.seen, c.positive) for part in step for c in part.candidates), step[0].metrics

    assert collected(1) == collected(2) == collected(3)
