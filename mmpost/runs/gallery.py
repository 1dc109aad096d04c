"""Which samples a report shows, and what of each: pictures, question, answer, gold, rewards, mark."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpost.runs.records import is_number, read_jsonl
from mmpost.runs.thumbs import data_uri

MAX_TEXT = 1500  # characters of one text; the rest is in the sample file
MAX_PICTURES = 4  # per sample


@dataclass(frozen=True, slots=True)
class Card:
    """One sample as the page shows it.

    Attributes:
        title: Step or number, and group.
        pictures: Data URIs.
        texts: (label, text) pairs: question, answer, gold.
        rewards: Name to value; None means that the reward does not apply.
        facts: Short remarks such as ``truncated``.
        correct: The mark, or None when nothing says so.
        score: What best and worst are sorted by, or None.
    """

    title: str
    pictures: list[str]
    texts: list[tuple[str, str]]
    rewards: dict[str, float | None]
    facts: list[str]
    correct: bool | None
    score: float | None


@dataclass(frozen=True, slots=True)
class Wall:
    """A titled row of cards."""

    title: str
    cards: list[Card] = field(default_factory=list)


def training_walls(samples: Sequence[dict[str, Any]], folder: Path, count: int) -> list[Wall]:
    """Best, worst and random samples of a run.

    Args:
        samples: Rows of samples/step-*.jsonl in order of step.
        folder: Run folder, where thumbnails are relative to.
        count: Cards per wall.
    """
    scored = [row for row in samples if reward_of(row) is not None]
    # Among equal rewards the later step is shown: it is closer to the model one gets. Sorting is stable.
    scored.reverse()
    high = sorted(scored, key=lambda row: -(reward_of(row) or 0.0))[:count]
    taken = {id(row) for row in high}
    low = [row for row in sorted(scored, key=lambda row: reward_of(row) or 0.0) if id(row) not in taken][:count]
    taken |= {id(row) for row in low}
    rest = [row for row in samples if id(row) not in taken]
    drawn = random.Random(0).sample(rest, min(count, len(rest)))
    walls = [("Highest reward", high), ("Lowest reward", low), ("Drawn at random", drawn)]
    return [Wall(title, [_training_card(row, folder) for row in rows]) for title, rows in walls if rows]


def evaluation_walls(result: dict[str, Any], file: Path, count: int) -> list[Wall]:
    """Wrong, right and random answers of an evaluation.

    Args:
        result: Content of eval/NAME.json.
        file: Its path; the sample file lies beside it.
        count: Cards per wall.
    """
    name = str(result.get("samples") or "")
    if not name or Path(name).name != name:
        return []
    rows, _ = read_jsonl(file.parent / name)
    dice = random.Random(0)
    wrong = [row for row in rows if _mark(row) is False]
    right = [row for row in rows if _mark(row) is True]
    walls = []
    for title, group in (("Wrong", wrong), ("Right", right)):
        chosen = dice.sample(group, min(count, len(group)))
        share = f"{title} answers ({len(group)} of {len(rows)})"
        if chosen:
            walls.append(Wall(share, [_evaluation_card(row, file.parent.parent) for row in chosen]))
    if not walls and rows:
        chosen = dice.sample(rows, min(count, len(rows)))
        walls.append(Wall(f"Answers ({len(rows)})", [_evaluation_card(row, file.parent.parent) for row in chosen]))
    return walls


def reward_of(row: dict[str, Any]) -> float | None:
    """The weighted reward of a sample (``score``) or, when it was not written, the sum of its parts."""
    if is_number(row.get("score")):
        return float(row["score"])
    parts = [value for value in (row.get("rewards") or {}).values() if is_number(value)]
    return float(sum(parts)) if parts else None


def picture(folder: Path, thumb: Any) -> str | None:
    """Data URI of a thumbnail inside ``folder``; None when it is missing or lies elsewhere."""
    if not isinstance(thumb, str):
        return None
    file = (folder / thumb).resolve()
    if not file.is_relative_to(folder.resolve()) or not file.is_file():
        return None
    return data_uri(file.read_bytes())


def _training_card(row: dict[str, Any], folder: Path) -> Card:
    texts = [("Question", _text(row.get("prompt"))), ("Answer", _text(row.get("completion")))]
    gold = {name: _text(row.get(name)) for name in ("answer", "solution") if row.get(name) is not None}
    if len(set(gold.values())) == 1:
        gold = {"Gold": next(iter(gold.values()))}
    texts += [(name.capitalize() if name == "Gold" else f"Gold ({name})", text) for name, text in gold.items()]
    facts = [f"{row['tokens']} tokens"] if is_number(row.get("tokens")) else []
    facts += [f"advantage {row['advantage']:+.2f}"] if is_number(row.get("advantage")) else []
    facts += ["truncated"] if row.get("truncated") else []
    rewards = {str(k): v if is_number(v) else None for k, v in (row.get("rewards") or {}).items()}
    title = f"step {row.get('step', '?')}" + (f" · {row['source']}" if row.get("source") else "")
    shown = [(label, text) for label, text in texts if text or label == "Answer"]
    return Card(title, _pictures(row, folder), shown, rewards, facts, _mark(row), reward_of(row))


def _evaluation_card(row: dict[str, Any], folder: Path) -> Card:
    answer = _first(row.get("filtered_resps"))
    said = _first(row.get("resps"))
    texts = [("Question", _text(row.get("input"))), ("Answer", _text(said))]
    if answer is not None and _text(answer) != _text(said):
        texts.append(("Read as", _text(answer)))
    texts.append(("Gold", _text(row.get("target"))))
    title = f"#{row.get('doc_id', '?')}" + (f" · {row['group']}" if row.get("group") else "")
    return Card(title, _pictures(row, folder), texts, {}, [], _mark(row), None)


def _pictures(row: dict[str, Any], folder: Path) -> list[str]:
    media = row.get("media")
    items = [item for item in media if isinstance(item, dict)] if isinstance(media, list) else []
    found = [picture(folder, item.get("thumb")) for item in items[:MAX_PICTURES]]
    return [uri for uri in found if uri is not None]


def _mark(row: dict[str, Any]) -> bool | None:
    """Right or wrong, when a value that is exactly 1 or 0 says so."""
    values = [row.get("correct"), row.get("accuracy")]
    rewards = row.get("rewards") or {}
    values += [value for name, value in rewards.items() if any(word in name for word in ("accura", "correct", "exact"))]
    values += rewards.values() if len(rewards) == 1 else []
    value = next((value for value in values if value is not None), None)
    return bool(value) if isinstance(value, bool | int | float) and value in {0, 1} else None


def _first(value: Any) -> Any:
    return (value[0] if value else None) if isinstance(value, list) else value


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text) - MAX_TEXT} more characters)"
