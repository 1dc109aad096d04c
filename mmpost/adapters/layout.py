"""How the rows of a forward pass lie side by side: padded, or packed into one sequence that shares prompts.

Packed, a prompt that several rows continue is there once, with its media; each completion is a segment behind it. No
padding goes through the model, and a token that predicts nothing trained (the last of a row) is left out.

A picture that several prompts show goes through the tower once: ``same_image`` in the inputs says for each picture
which is the first equal one. Pictures are equal when their tensors are, wherever they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mmpost.core.batch import Batch, Encoded, Segment
from mmpost.core.protocols import Adapter

# Values by which pictures are told apart before they are compared as a whole.
PROBES = 32

# Prompt and completion (int64 [n]), or a whole row and None.
Trajectory = tuple[Encoded, Tensor | None]


@runtime_checkable
class KnowsItems(Protocol):
    """An adapter that can tell the items of the vision tower apart."""

    def tower_items(self, media: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """What the tower sees of a row, item by item in the model's order, by kind (``image``, ``video``)."""
        ...


def pad(adapter: Adapter, rows: Sequence[Trajectory]) -> Batch:
    """Every row with its own prompt, padded to one length. Any model takes it."""
    return adapter.collate([row if tokens is None else row.with_completion(tokens) for row, tokens in rows])


def pack(adapter: Adapter, rows: Sequence[Trajectory]) -> Batch:
    """One sequence; rows with the same ``Encoded`` object and a completion share its tokens and media.

    Args:
        adapter: Joins media.
        rows: Trajectories; any order.
    """
    packing = _Packing(adapter)
    for row, tokens in rows:
        if tokens is None:
            packing.add_row(row)
        else:
            packing.add_completion(row, tokens)
    return packing.batch()


def pack_prompts(adapter: Adapter, prompts: Sequence[Encoded]) -> Batch:
    """Prompts behind each other, each as often as it is listed; ``at`` names the last token of each."""
    packing = _Packing(adapter)
    for prompt in prompts:
        packing.add_prompt(prompt)
    return packing.batch()


class _Packing:
    """A packed sequence under construction."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.segments: list[Segment] = []
        self.ids: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.media: list[dict[str, Tensor]] = []
        self.length = 0
        self.prompts: dict[int, int] = {}
        self.at: list[Tensor] = []
        self.target: list[Tensor] = []

    def add_row(self, row: Encoded) -> None:
        trained = row.train.nonzero()[:, 0]
        keep = len(row)
        if trained.numel():
            # Nothing behind the last target's predecessor is asked for; media must stay with their placeholders.
            end = int(trained[-1])
            keep = keep if _any_media(row.ids[end:], self.adapter.media_token_ids) else end
        segment = self._add(row.ids[:keep], row.positions[:, :keep], None)
        self._add_media(row)
        self.at.append(self.segments[segment].start + trained - 1)
        self.target.append(row.ids[trained])

    def add_prompt(self, prompt: Encoded) -> None:
        segment = self.segments[self._add(prompt.ids, prompt.positions, None)]
        self._add_media(prompt)
        self.at.append(torch.tensor([segment.start + segment.length - 1]))
        self.target.append(prompt.ids[-1:])

    def add_completion(self, prompt: Encoded, tokens: Tensor) -> None:
        # The caller keeps the prompts alive, so that their identities stay distinct.
        if id(prompt) not in self.prompts:
            self.prompts[id(prompt)] = self._add(prompt.ids, prompt.positions, None)
            self._add_media(prompt)
        number = self.prompts[id(prompt)]
        before = self.segments[number]
        count = tokens.numel() - 1
        first = torch.tensor([before.start + before.length - 1])
        after = torch.empty(0, dtype=torch.long)
        if count > 0:
            start = prompt.positions[:, -1].max() + 1
            places = (start + torch.arange(count)).expand(prompt.positions.shape[0], count)
            segment = self._add(tokens[:-1], places, number)
            after = self.segments[segment].start + torch.arange(count)
        self.at.append(torch.cat([first, after])[: tokens.numel()])
        self.target.append(tokens)

    def _add(self, ids: Tensor, positions: Tensor, prefix: int | None) -> int:
        self.segments.append(Segment(self.length, ids.numel(), prefix))
        self.ids.append(ids)
        self.positions.append(positions)
        self.length += ids.numel()
        return len(self.segments) - 1

    def _add_media(self, row: Encoded) -> None:
        if row.media:
            self.media.append(row.media)

    def batch(self) -> Batch:
        positions = torch.cat(self.positions, 1)[:, None]
        inputs = {
            "input_ids": torch.cat(self.ids)[None],
            "position_ids": positions if self.adapter.position_axes > 1 else positions[0],
            **self.adapter.join_media(self.media),
            **_same(self.adapter, self.media),
        }
        sizes = torch.tensor([len(piece) for piece in self.at])
        row = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        return Batch(inputs, row, torch.cat(self.at), torch.cat(self.target), len(sizes), tuple(self.segments))


def _same(adapter: Adapter, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """For each kind with repeated items, the number of the first equal item of each, int64 ``[items]``."""
    if not isinstance(adapter, KnowsItems):
        return {}
    items: dict[str, list[Tensor]] = {}
    for row in rows:
        for kind, found in adapter.tower_items(row).items():
            items.setdefault(kind, []).extend(found)
    firsts = {f"same_{kind}": first_equal(found) for kind, found in items.items()}
    return {name: torch.tensor(first) for name, first in firsts.items() if len(set(first)) < len(first)}


def first_equal(items: Sequence[Tensor]) -> list[int]:
    """For each tensor the number of the first that has the same shape and values.

    A few values tell most apart; only where they agree all are compared.
    """
    seen: dict[tuple[object, ...], list[int]] = {}
    out = []
    for number, item in enumerate(items):
        flat = item.reshape(-1)
        values = flat[:: max(1, flat.numel() // PROBES)].tolist()
        alike = seen.setdefault((item.shape, *values), [])
        found = next((i for i in alike if items[i].data_ptr() == item.data_ptr() or torch.equal(items[i], item)), None)
        if found is None:
            alike.append(number)
        out.append(number if found is None else found)
    return out


def _any_media(ids: Tensor, media: tuple[int, ...]) -> bool:
    return bool(torch.isin(ids, torch.tensor(media, dtype=ids.dtype)).any())
