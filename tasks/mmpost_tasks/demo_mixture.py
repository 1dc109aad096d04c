"""Three small domains of real pictures for choosing a mixture, two of which are planted to interfere.

==========  =============  ======================================  =======  ======  ===================
task        pictures       question                                answers  chance  verifier
==========  =============  ======================================  =======  ======  ===================
mix_digits  one digit      Which digit is this?                    0 to 9   10 %    ``number``
mix_shoes   three clothes  How many pieces count? (shoes do)       0 to 3   25 %    ``counting``
mix_tops    three clothes  How many pieces count? (tops do)        0 to 3   25 %    ``answer``
==========  =============  ======================================  =======  ======  ===================

The questions of ``mix_shoes`` and ``mix_tops`` are the same words over the same kind of picture, but the two sets
follow different label conventions. A model can follow one of them only: every row of the one takes something from
the other, as real sources do that were labelled by different people. ``mix_digits`` shares neither pictures nor
answers with them and competes for steps alone.

Rows, pictures and splits follow ``mmpost_tasks.demo_vqa``: held-out pictures are never trained on, answers are dealt
from shuffled blocks, and ``seed`` recomposes ``train`` only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from mmpost.core.sample import Sample
from mmpost.core.seeding import uniform
from mmpost_tasks import tiles
from mmpost_tasks.demo_vqa import ANSWER, SHOES, TASK, Draws, Question, _turns
from mmpost_tasks.task import Task

ROWS = {"train": 1000, "unlabelled": 500, "heldout": 300}
TOPS = ("t-shirt", "pullover", "coat", "shirt", "dress")
_DRAWS_PER_ROW = 24


def _digit(target: str, draws: Draws) -> Question:
    text = draws.one(("Which digit is this?", "What digit do you see?", "Read the digit."))
    return Question((target,), f"{text} {ANSWER}", target)


def _count(counted: tuple[str, ...], target: str, draws: Draws) -> Question:
    """Three pieces of which ``target`` are among ``counted``."""
    others = [label for label in tiles.CLOTHES if label not in counted]
    labels = [draws.one(counted if piece < int(target) else others) for piece in range(3)]
    text = draws.one(("How many pieces count?", "How many of the pieces count?", "Count the pieces that count."))
    return Question(tuple(draws.some(labels, 3)), f"{text} {ANSWER}", target)


@dataclass(frozen=True, slots=True)
class Domain:
    """One of the three.

    Attributes:
        name: Name of the task.
        pictures: Domain of ``mmpost_tasks.tiles``.
        targets: Answers, equally often.
        compose: Makes a question with that answer.
        reward: Its verifier in ``mmpost.rewards``.
        description: One line for people.
    """

    name: str
    pictures: str
    targets: tuple[str, ...]
    compose: Callable[[str, Draws], Question]
    reward: str
    description: str


_COUNTS = ("0", "1", "2", "3")
DOMAINS = (
    Domain("mix_digits", "digits", tiles.DIGITS, _digit, "number", "name one handwritten digit"),
    Domain("mix_shoes", "clothes", _COUNTS, partial(_count, SHOES), "counting", "count pieces; shoes count"),
    Domain("mix_tops", "clothes", _COUNTS, partial(_count, TOPS), "answer", "count pieces; tops count"),
)


def load(domain: Domain, split: str, *, limit: int | None = None, seed: int = 0) -> list[Sample]:
    """Rows of one domain; see ``mmpost_tasks.task.Load``.

    Raises:
        MmpostError: MMP-C006 for an unknown split.
    """
    tiles.known(split, tuple(ROWS), f"splits of {domain.name}")
    count = ROWS[split] if limit is None else limit
    return list(_rows(domain, split, count, seed if split == "train" else 0))


def _rows(domain: Domain, split: str, count: int, seed: int) -> Iterator[Sample]:
    purpose = f"{domain.name}/{split}"
    pixels = tiles.scaled(domain.pictures, split, 28)
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for row in range(count):
        block, place = divmod(row, len(domain.targets))
        order = np.argsort(uniform(seed, f"{purpose}/order", block, np.arange(len(domain.targets))), kind="stable")
        attempt = 0
        while True:
            draws = Draws(uniform(seed, purpose, row, attempt, np.arange(_DRAWS_PER_ROW)))
            question = domain.compose(domain.targets[order[place]], draws)
            chosen = [(label, draws.below(len(pixels[label].ids))) for label in question.labels]
            pictures = tuple(pixels[label].ids[index] for label, index in chosen)
            if (question.text, pictures) not in seen:
                break
            attempt += 1
        seen.add((question.text, pictures))
        image = np.concatenate([pixels[label].pixels[index] for label, index in chosen], axis=1)
        columns = {"solution": question.solution, "answers": domain.name, "pictures": list(pictures)}
        origin = f"task:{domain.name}/{split}:{row + 1}"
        yield Sample(f"{split}-{seed}-{row + 1}", _turns(image, question), columns, origin, domain.name)


def _task(domain: Domain) -> Task:
    return Task(
        name=domain.name,
        version="1",
        description=domain.description,
        splits=ROWS,
        load=partial(load, domain),
        rewards=(domain.reward, "format"),
        group_by="solution",
        licence=TASK.licence,
        citation=TASK.citation,
    )


DIGITS, SHOES_TASK, TOPS_TASK = map(_task, DOMAINS)
