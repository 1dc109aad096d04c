"""Visual questions over real pictures, with answers that a program can check.

One to three pictures of one domain stand side by side, one ``tile_px`` square each, as a grey PNG. Kinds:

========  =======  ====================================================  ============  ========
kind      domain   question                                              answers       chance
========  =======  ====================================================  ============  ========
read      digits   Which digit is this / on the left / right / in the    0 to 9        10 %
                   middle?
larger    digits   Which digit is larger? (two different digits)         1 to 9        11 %
sum       digits   What is the sum of the two digits?                    0 to 18       5.3 %
name      clothes  Which piece of clothing is this? (A) bag (B) coat ..  A to D        25 %
count     clothes  How many pieces are shoes? (three pieces)             0 to 3        25 %
========  =======  ====================================================  ============  ========

Measured on ``heldout`` (1,000 rows, 200 a kind), in per cent, in the order of the table:

* best constant answer 10.0, 11.5, 5.5, 25.0, 25.0;
* text only (logistic regression on 1- to 3-grams and option slots, fitted on ``train``) 8.5, 12.5, 4.5, 21.0, 24.5;
* a small convolutional network per domain, fitted on single training pictures, with the rule applied by a program:
  98.5, 98.0, 94.0, 93.0, 99.0; all 96.5. By picture it is right in 97.8 (digits) and 83.2 (clothes), a logistic
  regression in 94.8 and 81.5; the network's usual mistakes are shirt, coat and pullover for each other.

The answer of a row is dealt from shuffled blocks that hold every answer of its kind once (``name``: every class
at every letter), so that no prefix of a split favours an answer. Everything else is drawn by row number. A
question that repeats an earlier one of the split, in words and pictures, is drawn again.

``heldout`` and ``unlabelled`` are always the same rows; ``seed`` recomposes ``train`` only. Rows of ``unlabelled``
carry their answer too, to measure label-free training against it; train on them through ``Sample.prompt``.

``TASK_READING`` is the same task, but its demonstrations write down what they read before they answer, one picture
after the other in an order that is drawn by row: ``R3L9<answer>12</answer>`` reads 3 on the right, then 9 on the left;
of pieces to count, 1 is a shoe and 0 another piece (``M0R1L1<answer>2</answer>``); of a single picture the name stands
alone. Where several readings lead to one answer, a vote over answers can know more than the most likely reading.

Pictures never cross splits, see ``mmpost_tasks.tiles``. Draws use ``mmpost.core.seeding.uniform``, whose arithmetic
cannot change with a library; the bytes of a PNG may differ between builds of zlib, its pixels do not.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mmpost.core.sample import Part, Sample, Turn
from mmpost.core.seeding import uniform
from mmpost_tasks import tiles
from mmpost_tasks.task import Task

ROWS = {"train": 6000, "unlabelled": 2000, "heldout": 1000}
SHOES = ("sandal", "sneaker", "ankle boot")
LETTERS = ("A", "B", "C", "D")
ANSWER = "Answer in <answer> tags."
ANSWER_LETTER = "Answer with the letter in <answer> tags."

_PLACES = {1: ("",), 2: ("on the left", "on the right"), 3: ("on the left", "in the middle", "on the right")}
_DRAWS_PER_ROW = 24
Item = TypeVar("Item")


class Draws:
    """Random choices of one row, from numbers in [0, 1) that are used up in order."""

    def __init__(self, uniforms: np.ndarray) -> None:
        self._uniforms = iter(uniforms.tolist())

    def below(self, n: int) -> int:
        """Integer in ``0 .. n - 1``."""
        return int(next(self._uniforms) * n)

    def one(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        """``count`` different items in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Question:
    """A question before its pictures are drawn.

    Attributes:
        labels: What the pictures show, left to right.
        text: The words.
        solution: The right answer.
        choices: Options in order, for multiple choice.
    """

    labels: tuple[str, ...]
    text: str
    solution: str
    choices: tuple[str, ...] | None = None


def _read(target: str, draws: Draws) -> Question:
    labels = [draws.one(tiles.DIGITS) for _ in range(1 + draws.below(3))]
    position = draws.below(len(labels))
    labels[position] = target
    place = _PLACES[len(labels)][position]
    if place:
        text = draws.one(("Which digit is {}?", "What digit do you see {}?", "Read the digit {}.")).format(place)
    else:
        text = draws.one(("Which digit is this?", "What digit do you see?", "Read the digit."))
    return Question(tuple(labels), f"{text} {ANSWER}", target)


def _larger(target: str, draws: Draws) -> Question:
    pair = draws.some((target, str(draws.below(int(target)))), 2)
    words = ("Which digit is larger?", "What is the larger digit?", "Name the bigger digit.")
    return Question(tuple(pair), f"{draws.one(words)} {ANSWER}", target)


def _sum(target: str, draws: Draws) -> Question:
    total = int(target)
    left = draws.one(range(max(0, total - 9), min(9, total) + 1))
    words = ("What is the sum of the two digits?", "Add the two digits.", "What do the two digits add up to?")
    return Question((str(left), str(total - left)), f"{draws.one(words)} {ANSWER}", target)


def _name(target: str, draws: Draws) -> Question:
    letter, label = target.split(" ", 1)
    choices = draws.some([other for other in tiles.CLOTHES if other != label], 3)
    choices.insert(LETTERS.index(letter), label)
    words = ("Which piece of clothing is this?", "What does the picture show?", "What is this?")
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return Question((label,), f"{draws.one(words)} {options} {ANSWER_LETTER}", letter, tuple(choices))


def _count(target: str, draws: Draws) -> Question:
    others = [label for label in tiles.CLOTHES if label not in SHOES]
    labels = [draws.one(SHOES if piece < int(target) else others) for piece in range(3)]
    words = ("How many pieces are shoes?", "How many of the pieces are shoes?", "Count the shoes.")
    return Question(tuple(draws.some(labels, 3)), f"{draws.one(words)} {ANSWER}", target)


@dataclass(frozen=True, slots=True)
class QuestionKind:
    """One kind of question.

    Attributes:
        name: Value of the column ``kind``.
        domain: Where its pictures come from.
        targets: What ``compose`` may be asked for, equally often.
        compose: Makes a question with that answer.
    """

    name: str
    domain: str
    targets: tuple[str, ...]
    compose: Callable[[str, Draws], Question]


KINDS = (
    QuestionKind("read", "digits", tiles.DIGITS, _read),
    QuestionKind("name", "clothes", tuple(f"{a} {b}" for a in LETTERS for b in tiles.CLOTHES), _name),
    QuestionKind("larger", "digits", tiles.DIGITS[1:], _larger),
    QuestionKind("count", "clothes", ("0", "1", "2", "3"), _count),
    QuestionKind("sum", "digits", tuple(str(n) for n in range(19)), _sum),
)


def load(
    split: str, *, limit: int | None = None, seed: int = 0, tile_px: int = 28, reading: bool = False
) -> list[Sample]:
    """Questions of one split; see ``Load`` for the arguments.

    Args:
        split: ``train``, ``unlabelled`` or ``heldout``.
        limit: Rows from the start; None gives 6,000, 2,000 or 1,000. Kinds take turns: a prefix is balanced.
        seed: Composition of ``train``; ignored by the other splits.
        tile_px: Side of one picture. Images are ``tile_px`` high and 1 to 3 times as wide.
        reading: Demonstrations write down what they read before they answer.

    Raises:
        MmpostError: MMP-C006 for an unknown split.
    """
    tiles.known(split, tuple(ROWS), "splits of demo_vqa")
    count = ROWS[split] if limit is None else limit
    fixed_seed = seed if split == "train" else 0
    return list(_rows(split, count, fixed_seed, tile_px, reading=reading))


def _rows(split: str, count: int, seed: int, tile_px: int, *, reading: bool) -> Iterator[Sample]:
    first = _uniforms(split, seed, np.arange(count)[:, None], 0)  # at once: row by row it would take longer than PNG
    pixels = {domain: tiles.scaled(domain, split, tile_px) for domain in tiles.LABELS}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for row in range(count):
        turn, number = divmod(row, len(KINDS))
        kind, attempt = KINDS[number], 0
        target = _target(kind, split, seed, turn)
        while True:
            draws = Draws(first[row] if attempt == 0 else _uniforms(split, seed, row, attempt))
            question = kind.compose(target, draws)
            chosen = [(label, draws.below(len(pixels[kind.domain][label].ids))) for label in question.labels]
            pictures = tuple(pixels[kind.domain][label].ids[i] for label, i in chosen)
            if (question.text, pictures) not in seen:
                break
            attempt += 1
        seen.add((question.text, pictures))
        image = np.concatenate([pixels[kind.domain][label].pixels[i] for label, i in chosen], axis=1)
        columns = {
            "solution": question.solution,
            "kind": kind.name,
            "domain": kind.domain,
            "choices": list(question.choices) if question.choices else None,
            "pictures": list(pictures),
        }
        origin = f"task:demo_vqa/{split}:{row + 1}"
        order = uniform(seed, f"demo_vqa/{split}/reading", row, np.arange(3))
        turns = _turns(image, question, _read_aloud(question, kind, order) if reading else "")
        yield Sample(f"{split}-{seed}-{row + 1}", turns, columns, origin)


def _uniforms(split: str, seed: int, rows: int | np.ndarray, attempt: int) -> np.ndarray:
    """Numbers for the draws of a row ``[24]`` or of a column of rows ``[N, 24]``."""
    return uniform(seed, f"demo_vqa/{split}", rows, attempt, np.arange(_DRAWS_PER_ROW))


def _target(kind: QuestionKind, split: str, seed: int, turn: int) -> str:
    """What question number ``turn`` of a kind asks for: blocks of all targets, each shuffled by itself."""
    block, place = divmod(turn, len(kind.targets))
    return kind.targets[_block_order(kind.name, len(kind.targets), split, seed, block)[place]]


@functools.cache
def _block_order(kind_name: str, size: int, split: str, seed: int, block: int) -> tuple[int, ...]:
    keys = uniform(seed, f"demo_vqa/{split}/{kind_name}", block, np.arange(size))
    return tuple(np.argsort(keys, kind="stable").tolist())


def _read_aloud(question: Question, kind: QuestionKind, uniforms: np.ndarray) -> str:
    """What the pictures show, one after the other in ascending order of their numbers in [0, 1)."""
    count = len(question.labels)
    if count == 1:
        return question.labels[0]
    said = [str(int(label in SHOES)) for label in question.labels] if kind.name == "count" else question.labels
    places = "LR" if count == 2 else "LMR"
    return "".join(f"{places[piece]}{said[piece]}" for piece in np.argsort(uniforms[:count], kind="stable"))


def _turns(image: np.ndarray, question: Question, reading: str = "") -> tuple[Turn, Turn]:
    """The question under its image, uint8 ``[height, width]``, and the answer in tags behind the reading."""
    shown, asked = Part("image", ref=_png(image)), Part("text", question.text)
    answer = Part("text", f"{reading}<answer>{question.solution}</answer>")
    return Turn("user", (shown, asked)), Turn("assistant", (answer,))


def _png(pixels: np.ndarray) -> bytes:
    """Grey pixels uint8 ``[height, width]`` as a PNG file; on pictures this small, faster than Pillow."""
    height, width = pixels.shape
    lines = np.zeros((height, width + 1), np.uint8)  # each line starts with its filter type, 0
    lines[:, 1:] = pixels
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


TASK = Task(
    name="demo_vqa",
    version="1",
    description="questions about real handwritten digits and photographs of clothes; needs no download",
    splits=ROWS,
    load=load,
    rewards=("answer", "format"),
    group_by="kind",
    licence="digits: CC BY 4.0 (UCI), shipped by scikit-learn under BSD-3-Clause; clothes: MIT (Zalando SE)",
    citation=(
        "Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI, doi:10.24432/C50P49; "
        "Xiao, Rasul and Vollgraf 2017, Fashion-MNIST, arXiv:1708.07747"
    ),
)

TASK_READING = dataclasses.replace(
    TASK,
    name="demo_vqa_reading",
    description="demo_vqa, with demonstrations that write down what they read before they answer",
    load=functools.partial(load, reading=True),
)
