"""Run a model over the rows of a task: greedy answers, accuracy with interval, per group, with every sample kept.

Beside the accuracy stand those of the same rows without what they show or play, where such rows are given: what a model
knows without listening or looking is no understanding of sounds or pictures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmpost.core.rollout import Group
from mmpost.core.sample import Kind, Sample
from mmpost.eval.stats import paired_bootstrap, wilson
from mmpost.models.load import LoadedModel
from mmpost.rewards.extract import extract
from mmpost.rewards.score import Reward, score
from mmpost.rollout.generate import Sampling, complete


def evaluate(
    model: LoadedModel,
    samples: Sequence[Sample],
    metric: Reward,
    *,
    task: str,
    version: str,
    group_by: str | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    progress: Callable[[int, int], None] | None = None,
    ablations: Mapping[tuple[Kind, str], Mapping[int, Sample]] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Answer every row greedily and score it.

    Args:
        model: The checkpoint.
        samples: Rows; a final assistant turn is left out of the prompt and kept as the target.
        metric: Reward whose score (0 or 1) is the accuracy.
        task: Name for the result.
        version: Version of the task.
        group_by: Column whose values get their own accuracies.
        batch_size: Prompts decoded together.
        max_new_tokens: Length limit.
        progress: Called with rows done and rows in all.
        ablations: By kind of medium and what replaces it, the replaced rows by their place in ``samples``.

    Returns:
        The result (schema 1, see ``RunFolder.write_eval``) and one record per row. With ``ablations`` the result has
        ``{kind: {replacement: {"with", "without", "difference"}}}`` over the rows that are in it: two shares and the
        paired difference, with minus without.
    """
    clock = time.perf_counter()
    ablations = ablations or {}
    total = len(samples) + sum(len(rows) for rows in ablations.values())

    def answer(rows: Mapping[int, Sample], before: int) -> list[Group]:
        shown = None if progress is None else lambda done: progress(before + done, total)
        groups = _answer(model, rows, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=shown)
        score(groups, [metric])
        return groups

    groups = answer(dict(enumerate(samples)), 0)
    records = [
        _record(group, sample, index, metric.name, group_by)
        for index, (group, sample) in enumerate(zip(groups, samples, strict=True))
    ]
    judged = [record for record in records if record["accuracy"] is not None]
    by_group = {
        name: _share([r for r in judged if r["group"] == name])
        for name in sorted({str(r["group"]) for r in judged if r["group"] is not None})
    }
    result: dict[str, Any] = {
        "schema": 1,
        "model": {"name": model.name, "params": model.policy.num_parameters()},
        "task": {"name": task, "version": version},
        "n": len(judged),
        "metrics": {"accuracy": {**_share(judged), "unparsed": sum(not r["filtered_resps"] for r in judged)}},
        "by_group": by_group,
    }
    done = len(samples)
    for (kind, null), rows in ablations.items():
        replaced = answer(rows, done)
        done += len(rows)
        for place, group in zip(rows, replaced, strict=True):
            accuracy = group.rollouts[0].score_parts[metric.name]
            kept = records[place].setdefault("ablations", {})
            kept[f"{kind}:{null}"] = {"resps": [group.rollouts[0].text], "accuracy": accuracy}
        pairs = [(records[place], records[place]["ablations"][f"{kind}:{null}"]) for place in rows]
        result.setdefault("ablations", {}).setdefault(kind, {})[null] = _compared(pairs)
    result["seconds"] = round(time.perf_counter() - clock, 3)
    return result, records


def _answer(
    model: LoadedModel,
    rows: Mapping[int, Sample],
    *,
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[int], None] | None,
) -> list[Group]:
    """Greedy answers of rows by their number."""
    sampling = Sampling(max_new_tokens, temperature=0.0)
    numbers = list(rows)
    groups: list[Group] = []
    for start in range(0, len(numbers), batch_size):
        uids = numbers[start : start + batch_size]
        part = [rows[uid].prompt() for uid in uids]
        encoded = model.adapter.encode_prompts(part)
        answers = complete(model.policy, model.adapter, encoded, uids, n=1, sampling=sampling, batch_size=batch_size)
        groups.extend(Group(p, a, u) for p, a, u in zip(part, answers, uids, strict=True))
        if progress is not None:
            progress(len(groups))
    return groups


def _compared(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Accuracy with and without a medium on the same rows, and the difference with its interval."""
    known = [(one, bare) for one, bare in pairs if one["accuracy"] is not None and bare["accuracy"] is not None]
    full, bare = [one for one, _ in known], [other for _, other in known]
    value, interval = 0.0, (0.0, 0.0)
    if known:
        value, interval = paired_bootstrap(
            [[one["accuracy"] for one in bare]], [[one["accuracy"] for one in full]], seed=0
        )
    return {
        "with": _share(full),
        "without": _share(bare),
        "difference": {"value": value, "ci": list(interval), "n": len(known)},
    }


def _share(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    right = sum(record["accuracy"] for record in records)
    return {"value": right / max(len(records), 1), "ci": list(wilson(right, len(records))), "n": len(records)}


def _record(group: Group, sample: Sample, index: int, metric: str, group_by: str | None) -> dict[str, Any]:
    rollout = group.rollouts[0]
    found = extract(rollout.text)
    return {
        "doc_id": index,
        "row_id": sample.id,
        "input": "\n".join(turn.text for turn in group.prompt.turns),
        "target": sample.columns.get("solution"),
        "resps": [rollout.text],
        "filtered_resps": [found] if found is not None else [],
        "accuracy": rollout.score_parts[metric],
        "truncated": rollout.truncated,
        "group": sample.columns.get(group_by) if group_by else None,
        "media": [{"type": part.kind, "ref": part.ref} for part in sample.media()],
    }
