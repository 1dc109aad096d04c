"""What a task is: rows by split, the rewards that judge an answer, and where the data come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from mmpost.core.sample import Sample


class Load(Protocol):
    """Rows of one split."""

    def __call__(self, split: str, *, limit: int | None = None, seed: int = 0) -> list[Sample]:
        """Rows in a fixed order.

        Args:
            split: One of the task's splits.
            limit: Number of rows from the start, 0 or more; None gives the split's usual size.
            seed: Composition of the training rows; other splits do not depend on it.

        Raises:
            MmpostError: MMP-C006 for an unknown split.
        """
        ...


@dataclass(frozen=True, slots=True)
class Task:
    """One task, the same for training and evaluation.

    Attributes:
        name: Name in ``mmpost_tasks.TASKS``.
        version: Changes whenever a held-out row changes; scores of two versions do not compare.
        description: One line for people.
        splits: Known splits and their usual number of rows.
        load: Rows of one split.
        rewards: Names in ``mmpost.rewards`` that judge an answer, the main one first.
        group_by: Column that splits a score into rows of a table.
        licence: Licences of the data that the rows are made of.
        citation: Sources to cite.
    """

    name: str
    version: str
    description: str
    splits: Mapping[str, int]
    load: Load
    rewards: tuple[str, ...]
    group_by: str
    licence: str
    citation: str
