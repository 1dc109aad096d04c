"""Run a model over the rows of a task: greedy answers, accuracy with interval, per group, with every sample kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from mmpost.core.rollout import Group
from mmpost.core.sample import Sample
from mmpost.eval.stats import wilson
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

    Returns:
        The result (schema 1, see ``RunFolder.write_eval``) and one record per row.
    """
    clock = time.perf_counter()
    sampling = Sampling(max_new_tokens, temperature=0.0)
    groups: list[Group] = []
    for start in range(0, len(samples), batch_size):
        part = [sample.prompt() for sample in samples[start : start + batch_size]]
        encoded = [model.adapter.encode_prompt(sample) for sample in part]
        uids = list(range(start, start + len(part)))
        answers = complete(model.policy, model.adapter, encoded, uids, n=1, sampling=sampling, batch_size=batch_size)
        groups.extend(Group(p, a, u) for p, a, u in zip(part, answers, uids, strict=True))
        if progress is not None:
            progress(len(groups), len(samples))
    score(groups, [metric])
    records = [
        _record(group, sample, index, metric.name, group_by)
        for index, (group, sample) in enumerate(zip(groups, samples, strict=True))
    ]
    judged = [record for record in records if record["accuracy"] is not None]
    by_group = {
        name: _share([r for r in judged if r["group"] == name])
        for name in sorted({str(r["group"]) for r in judged if r["group"] is not None})
    }
    result = {
        "schema": 1,
        "model": {"name": model.name, "params": model.policy.num_parameters()},
        "task": {"name": task, "version": version},
        "n": len(judged),
        "metrics": {"accuracy": {**_share(judged), "unparsed": sum(not r["filtered_resps"] for r in judged)}},
        "by_group": by_group,
        "seconds": round(time.perf_counter() - clock, 3),
    }
    return result, records


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
