"""Keep the rows from which a policy can learn, by asking it several times about each.

Source: "Reinforcement Fine-Tuning Naturally Mitigates Forgetting in Continual Post-Training", arXiv 2507.05386
(rollout-based instance filtering, RIF-RFT): instances without a learning signal are left out before the training.
Differs: the paper's public text has no threshold and no number of rollouts; ``any_correct`` and 8 are our choice. With
the reward ``majority_vote`` a rollout counts as correct when it agrees with the majority, and no label is read.

With success probability p a row is kept by ``any_correct`` with probability 1 - (1 - p)^K.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmpost.api.data import Data
from mmpost.api.model import load_model
from mmpost.api.rollouts import PIECE, Progress, ask, fingerprint, journal_of, model_fingerprint, rows_of, write_rows
from mmpost.config.schema import RewardSpec
from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Group
from mmpost.models.load import LoadedModel
from mmpost.rewards.score import check_columns, resolve, score
from mmpost.rollout.generate import Sampling
from mmpost.runs.journal import Journal
from mmpost.train.draw import THRESHOLD

Keep = Literal["any_correct", "mixed", "band"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Which rows stay.

    Attributes:
        keep: ``any_correct`` at least one correct rollout; ``mixed`` some correct and some not; ``band`` a share of
            correct ones within [low, high].
        low: Lowest share.
        high: Highest share.
    """

    keep: Keep = "any_correct"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.keep not in ("any_correct", "mixed", "band") or not 0 <= self.low <= self.high <= 1:
            raise MmpostError(
                "MMP-R229",
                f"the rule keep={self.keep} with the band [{self.low:g}, {self.high:g}] means nothing.",
                "Use keep any_correct, mixed, or band with 0 <= low <= high <= 1.",
            )

    def __call__(self, correct: int, k: int) -> bool:
        """Whether a row with so many correct ones of ``k`` scored rollouts stays."""
        if self.keep == "any_correct":
            return correct > 0
        if self.keep == "mixed":
            return 0 < correct < k
        return k > 0 and self.low <= correct / k <= self.high


def filter_rows(
    data: Sequence[Data],
    model: str | LoadedModel,
    out: Path,
    *,
    rule: Rule,
    k: int = 8,
    reward: str = "answer",
    sampling: Sampling,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the questions that stay, each with ``rif: {k, scored, correct, mean_len}``; resumable.

    The rollouts stay beside the file, so that another rule needs no model.

    Args:
        data: Sources.
        model: Name or folder of the policy that is to be trained, or the open model.
        out: JSONL file.
        rule: Which rows stay.
        k: Rollouts per row.
        reward: Says whether a rollout is correct (a score above 0.5).
        sampling: How rollouts are drawn.
        batch_size: Rollouts decoded together.
        progress: Called with pieces done and pieces in all.

    Returns:
        By source name ``{"rows", "kept", "unscored"}``.

    Raises:
        MmpostError: MMP-R226 to MMP-R229, and what model, data and reward raise.
    """
    rows = rows_of(data)
    rewards = resolve([RewardSpec(name=reward)])
    check_columns(rewards, rows)
    name = model if isinstance(model, str) else model.name
    work = {"rows": fingerprint(rows), "model": model_fingerprint(name), "k": k, "reward": reward}
    work |= {"sampling": dataclasses.asdict(sampling), "piece": PIECE}
    journal = Journal(journal_of(out), work)
    opened: list[LoadedModel] = [] if isinstance(model, str) else [model]

    def piece(number: int) -> list[dict[str, Any]]:
        if not opened:
            opened.append(load_model(name, peft=None))
        uids = range(number * PIECE, min((number + 1) * PIECE, len(rows)))
        part = [rows[uid] for uid in uids]
        groups = ask(opened[0], part, uids=uids, n=k, sampling=sampling, batch_size=batch_size)
        score(groups, rewards)
        return [facts(group) for group in groups]

    journal.complete(-(-len(rows) // PIECE), piece, progress)
    found = [entry for entries in journal.pieces for entry in entries]
    kept = [
        dataclasses.replace(row, columns={**row.columns, "rif": entry})
        for row, entry in zip(rows, found, strict=True)
        if rule(entry["correct"], entry["scored"])
    ]
    write_rows(kept, out)
    table = {source.name: {"rows": len(source), "kept": 0, "unscored": 0} for source in data}
    for row, entry in zip(rows, found, strict=True):
        table[row.source]["unscored"] += not entry["scored"]
    for row in kept:
        table[row.source]["kept"] += 1
    return table


def facts(group: Group) -> dict[str, Any]:
    """What the rollouts of a row say about it."""
    scores = [rollout.score for rollout in group.rollouts if rollout.score is not None]
    return {
        "k": len(group.rollouts),
        "scored": len(scores),
        "correct": sum(value > THRESHOLD for value in scores),
        "mean_len": sum(len(rollout.tokens) for rollout in group.rollouts) / max(len(group.rollouts), 1),
    }
