"""Votes of a model about rows, with their media and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmpost.contribution.nulls import Null, Replacer
from mmpost.core.rollout import Group
from mmpost.core.sample import Kind, Sample
from mmpost.models.load import LoadedModel
from mmpost.rewards.call import Reward
from mmpost.rewards.extract import extract
from mmpost.rewards.score import score
from mmpost.rollout.generate import Sampling, complete
from mmpost.train.draw import THRESHOLD

WITH = "with"
_ANSWER_CHARS = 120  # kept of an answer that no extractor finds, for people to read


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked about every row; with the rows and the weights it decides the result to the bit.

    Attributes:
        modality: Which media are taken away.
        nulls: What comes in their place.
        k: Votes of each model with the medium, and for each null.
        reward: Name of the verifier; a vote is right when it scores above one half.
        sampling: How answers are drawn; with temperature 0 equal prompts get one vote.
        batch_size: Answers decoded together.
    """

    modality: Kind
    nulls: tuple[Null, ...]
    k: int
    reward: str
    sampling: Sampling
    batch_size: int

    def votes(self, null: Null | None) -> int:
        """Votes of a model under a null, or with the medium: repeating a greedy answer says nothing new."""
        greedy = self.sampling.temperature == 0 and not (null is not None and null.varies)
        return 1 if greedy else self.k


def score_rows(
    model: LoadedModel,
    rows: Sequence[Sample],
    numbers: Sequence[int],
    plan: Plan,
    rewards: Sequence[Reward],
) -> list[dict[str, Any]]:
    """Votes about some rows.

    The draws of a vote are the same with the medium and under every null: a model that does not look at its media
    gives the same answers, and their difference is exactly 0.

    Args:
        model: The voter.
        rows: All rows.
        numbers: Places of those that are asked about; they key the random draws.
        plan: What is asked.
        rewards: The verifier.

    Returns:
        One record per row: condition (``with`` or the name of a null) to ``{"right": [1, 0, null, ...], "answer":
        first answer}``; null where the verifier does not apply.
    """
    replace = Replacer(rows, plan.modality, section=model.adapter.section, seed=plan.sampling.seed)
    found: list[dict[str, Any]] = [{} for _ in numbers]
    for null in (None, *plan.nulls):
        asked, uids, votes = _prompts(rows, numbers, plan, null, replace)
        per_prompt = 1 if null is not None and null.varies else plan.votes(null)
        answers = complete(
            model.policy,
            model.adapter,
            model.adapter.encode_prompts(asked),
            uids,
            n=per_prompt,
            sampling=plan.sampling,
            batch_size=plan.batch_size,
            first_generation=votes,
        )
        groups = [Group(prompt, drawn, uid) for prompt, drawn, uid in zip(asked, answers, uids, strict=True)]
        score(groups, rewards)
        drawn = [rollout for group in groups for rollout in group.rollouts]
        each = len(drawn) // len(numbers)
        for place, record in enumerate(found):
            mine = drawn[place * each : (place + 1) * each]
            right = [None if one.score is None else int(one.score > THRESHOLD) for one in mine]
            answer = extract(mine[0].text) or mine[0].text[:_ANSWER_CHARS]
            record[WITH if null is None else null.name] = {"right": right, "answer": answer}
    return found


def _prompts(
    rows: Sequence[Sample], numbers: Sequence[int], plan: Plan, null: Null | None, replace: Replacer
) -> tuple[list[Sample], list[int], list[int]]:
    """Prompts, their row numbers, and the number of the first vote of each."""
    if null is None:
        return [rows[number].prompt() for number in numbers], list(numbers), [0] * len(numbers)
    times = plan.votes(null) if null.varies else 1
    pairs = [(number, vote) for number in numbers for vote in range(times)]
    prompts = [replace(number, null, vote).prompt() for number, vote in pairs]
    return prompts, [number for number, _ in pairs], [vote for _, vote in pairs]
