"""Groups that wait for the next step, as a checkpoint keeps them: ids and numbers; prompts are read again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmpost.core.rollout import Group, Rollout
from mmpost.train.draw import Candidate
from mmpost.train.rows import RowStream

_COUNTS = ("threshold", "seen", "scored", "positive")


def to_json(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Candidates as plain JSON. Float32 log-probabilities survive it to the last bit."""
    return [
        {
            "uid": candidate.uid,
            "place": list(candidate.drawn.place),
            **{name: getattr(candidate, name) for name in _COUNTS},
            "rollouts": [
                {
                    "tokens": rollout.tokens.tolist(),
                    "logp": rollout.logp.tolist(),
                    "text": rollout.text,
                    "truncated": bool(rollout.truncated),
                    "score_parts": dict(rollout.score_parts),
                    "score": rollout.score,
                }
                for rollout in candidate.group.rollouts
            ],
        }
        for candidate in candidates
    ]


def from_json(saved: Sequence[dict[str, Any]], stream: RowStream) -> list[Candidate]:
    """Candidates again, with prompts from the stream's sources."""
    out = []
    for item in saved:
        drawn = stream.again((int(item["place"][0]), int(item["place"][1])), item["uid"])
        rollouts = [
            Rollout(
                np.array(one["tokens"], dtype=np.int64),
                np.array(one["logp"], dtype=np.float32),
                one["text"],
                one["truncated"],
                one["score_parts"],
                one["score"],
            )
            for one in item["rollouts"]
        ]
        counts = {name: item[name] for name in _COUNTS}
        out.append(Candidate(drawn, Group(drawn.sample, rollouts, drawn.uid), is_stale=True, **counts))
    return out
