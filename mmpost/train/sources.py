"""Where the rows of a step come from: demonstrations of a file, or completions of the policy itself.

Both yield ``Update``s; the loop cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from mmpost.core.protocols import Adapter
from mmpost.core.sample import Sample
from mmpost.train.distributed import Processes
from mmpost.train.method import Method
from mmpost.train.rows import Row, RowStream, Update

# Log-probabilities and entropies of the trained positions of rows, float32 ``[n]`` each.
Measure = Callable[[Sequence[Row]], list[tuple[np.ndarray, np.ndarray]]]


class Source(Protocol):
    """Yields the updates of one rollout batch (one update for demonstrations)."""

    stream: RowStream
    updates_per_batch: int

    def updates(self) -> Iterator[Update]:
        """Updates in order; the policy changes between them."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the source is, as plain JSON; every process calls it."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        ...


class Demonstrations:
    """Rows whose assistant turns are the target.

    Args:
        stream: Whole rows.
        num_samples: Records for people to look at, per step.
        method: May change rows (``encode``) and leave out positions (``keep``).
        adapter: Passed to ``Method.encode``.
        processes: Needed by ``Method.keep``, which decides over all rows of a step.
        measure: Likewise.
    """

    updates_per_batch = 1

    def __init__(
        self,
        stream: RowStream,
        *,
        num_samples: int,
        method: Method | None = None,
        adapter: Adapter | None = None,
        processes: Processes | None = None,
        measure: Measure | None = None,
    ) -> None:
        self.stream, self.num_samples = stream, num_samples
        self.method, self.adapter = method or Method(), adapter
        self.processes, self.measure = processes, measure
        self._last: Row | None = None

    def updates(self) -> Iterator[Update]:
        """One update per batch."""
        drawn = self.stream.next()
        rows = [Row(item.encoded, demo=True) for item in drawn]
        if self.method.encode is not None:
            rows = [
                Row(self.method.encode(row.encoded, self.adapter, item.uid), demo=True)
                for row, item in zip(rows, drawn, strict=True)
            ]
        rows = [row for row in rows if row.num_trained]
        if rows:
            self._last = rows[0]
        if self._last is None:
            self._last = Row(self.stream.any_row(), demo=True)
        samples = [
            sample_record(item.sample, item.sample.turns[-1].text, tokens=item.encoded.num_trained)
            for item in drawn[: self.num_samples]
        ]
        metrics: dict[str, Any] = {}
        if self.method.keep is not None:
            rows, metrics = self._kept(rows, self.method.keep)
        positions = sum(row.num_trained for row in rows)
        yield Update(
            rows, 0, 0, self._last, demo_positions=positions, demo_row_count=len(rows), metrics=metrics, samples=samples
        )

    def _kept(self, rows: list[Row], keep: Callable[..., Any]) -> tuple[list[Row], dict[str, Any]]:
        """Rows with the positions that the method keeps; one forward pass over all rows decides."""
        assert self.processes is not None
        assert self.measure is not None
        mine = self.measure(rows)
        everything = self.processes.gather(mine)
        table = [pair for part in everything for pair in part]
        masks = keep({"logp": [logp for logp, _ in table], "entropy": [entropy for _, entropy in table]})
        first = sum(len(part) for part in everything[: self.processes.rank])
        out = []
        for row, mask in zip(rows, masks[first : first + len(rows)], strict=True):
            if mask.any():
                train = row.encoded.train.clone()
                train[train.nonzero()[:, 0][torch.from_numpy(~mask)]] = False
                out.append(replace(row, encoded=replace(row.encoded, train=train)))
        total = sum(len(logp) for logp, _ in table)
        return out, {
            "kept_rows": float(np.mean([mask.any() for mask in masks])) if masks else 0.0,
            "kept_positions": sum(int(mask.sum()) for mask in masks) / max(total, 1),
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self.stream.load_state_dict(state["stream"])


def sample_record(sample: Sample, completion: str, *, tokens: int) -> dict[str, Any]:
    """What people look at: pictures, question, answer."""
    return {
        "row_id": sample.id,
        "source": sample.source,
        "prompt": "\n".join(turn.text for turn in sample.prompt().turns),
        "media": [{"type": part.kind, "ref": part.ref} for part in sample.media()],
        "completion": completion,
        "tokens": tokens,
        "solution": sample.columns.get("solution"),
    }
