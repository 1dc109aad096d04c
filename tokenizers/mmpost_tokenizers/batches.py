"""Batches of pictures: an endless order that the seed determines, workers, and the time spent waiting for them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmpost.core.errors import MmpostError
from mmpost.data.sampler import Sampler
from mmpost_tokenizers.images import ImageSet, Item

Batch = tuple[Tensor, Tensor, list[str]]


class Waiting:
    """How long the loop stood still for data.

    Attributes:
        first_s: Seconds until the first batch, when workers start; not part of the share.
        waited_s: Seconds inside ``next`` since then.
        worked_s: Seconds between calls of ``next``.
    """

    def __init__(self) -> None:
        self.first_s = self.waited_s = self.worked_s = 0.0

    @property
    def share(self) -> float:
        """Share of the time that was spent waiting, 0 to 1."""
        total = self.waited_s + self.worked_s
        return self.waited_s / total if total else 0.0

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same items; their waiting times are added here."""
        asked = time.perf_counter()
        first = True
        for batch in batches:
            got = time.perf_counter()
            if first:
                self.first_s, first = got - asked, False
            else:
                self.waited_s += got - asked
            yield batch
            asked = time.perf_counter()
            self.worked_s += asked - got


class _Guarded(Dataset[Any]):
    """Gives errors instead of raising them: a worker's MmpostError would reach the user as a RuntimeError."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, item: int | tuple[int, int]) -> Item | MmpostError:
        try:
            return self.images[item]
        except MmpostError as error:
            return error


def _collate(items: list[Item | MmpostError]) -> Batch | MmpostError:
    good: list[Item] = []
    for item in items:
        if isinstance(item, MmpostError):
            return item
        good.append(item)
    images, labels, keys = zip(*good, strict=True)
    return torch.stack(images), torch.tensor(labels), list(keys)


def _raised(batches: Iterator[Batch | MmpostError]) -> Iterator[Batch]:
    for batch in batches:
        if isinstance(batch, MmpostError):
            raise batch
        yield batch


class ImageBatches:
    """Endless batches for training, each epoch in a new order.

    The order does not depend on workers, and on the number of processes only in how a step's batch is divided.

    Attributes:
        images: The data set.
        waiting: Time spent waiting.
        given: Batches that were given out; what a checkpoint has to keep.
    """

    def __init__(
        self, images: ImageSet, *, batch_size: int, seed: int, workers: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            images: The data set.
            batch_size: Pictures per batch and process.
            seed: Seed of the order.
            workers: Processes that decode; 0 decodes in this one.
            rank: Number of this process.
            world: Number of processes.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}")
        self.images, self._seed, self._workers = images, seed, workers
        self._batch, self._rank, self._world = batch_size, rank, world
        self.waiting = Waiting()
        self.given = 0

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.given * self._batch * self._world / len(self.images)

    def _rows(self) -> Iterator[list[tuple[int, int]]]:
        sampler = Sampler([len(self.images)], [1.0], seed=self._seed)
        step = self._batch * self._world
        sampler.load_state_dict({**sampler.state_dict(), "drawn": [self.given * step]})
        while True:
            draws = sampler.draw(step)[self._rank * self._batch : (self._rank + 1) * self._batch]
            yield [(draw.epoch, draw.row) for draw in draws]

    def __iter__(self) -> Iterator[Batch]:
        """Go on behind the last batch that was given out."""
        loader: DataLoader[Any] = DataLoader(
            _Guarded(self.images),
            batch_sampler=self._rows(),
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in self.waiting.timed(_raised(iter(loader))):
            # Counted before it is used: a checkpoint after the step must not give it out again.
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs, ready for JSON."""
        return {
            "pictures": self.given * self._batch * self._world,
            "seed": self._seed,
            "size": len(self.images),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken, also with another number of processes if it divides the pictures seen.

        Raises:
            MmpostError: MMP-D036 when the order would not be the same.
        """
        step = self._batch * self._world
        for name, now in (("seed", self._seed), ("size", len(self.images))):
            if state[name] != now:
                raise _other_data(f"{name} was {state[name]} and is {now}")
        if state["pictures"] % step:
            raise _other_data(f"{state['pictures']} pictures were seen, which no number of steps of {step} gives")
        self.given = state["pictures"] // step


def _other_data(why: str) -> MmpostError:
    return MmpostError(
        "MMP-D036",
        f"the data are not those of the saved state: {why}.",
        "Resume with the same images, seed and batch size, or start a new run",
    )


def evaluation_batches(images: ImageSet, *, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Every picture once, in order; the last batch may be smaller."""
    loader: DataLoader[Any] = DataLoader(
        _Guarded(images),
        batch_sampler=[
            list(range(start, min(start + batch_size, len(images)))) for start in range(0, len(images), batch_size)
        ],
        num_workers=workers,
        collate_fn=_collate,
    )
    return _raised(iter(loader))
