"""Rows on their way to the model: draw, encode (here or in worker processes), and leave out what does not fit."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader, Dataset

from mmpost.core.batch import Encoded
from mmpost.core.errors import MmpostError, raise_all
from mmpost.core.sample import Sample
from mmpost.data.sampler import Sampler

# Memory that encoded rows may take while they wait to be drawn again.
CACHE_BYTES = 512 << 20


@dataclass(slots=True)
class Row:
    """One trajectory of an optimiser step.

    Attributes:
        encoded: Prompt and answer; with ``completion`` the prompt alone, the same object for all rows of a group.
        advantage: Credit of every trained position of the row.
        completion: Token ids that follow the prompt, int64 ``[n]``; exactly these train. None when ``encoded`` says
            itself what trains.
        demo: True for a demonstration, False for a completion of the policy.
        old: Log-probabilities under the fixed policy, float32 ``[n]``; None when the step is on-policy.
        reference: Log-probabilities under the reference model, float32 ``[n]``.
        teacher: Log-probabilities under the teacher, float32 ``[n]``.
        engine: Log-probabilities that the rollout engine reported, float32 ``[n]``; None for demonstrations.
        penalised: False on a row that the KL penalty leaves alone.
    """

    encoded: Encoded
    advantage: float = 1.0
    completion: np.ndarray | None = None
    demo: bool = False
    old: np.ndarray | None = None
    reference: np.ndarray | None = None
    teacher: np.ndarray | None = None
    engine: np.ndarray | None = None
    penalised: bool = True

    @property
    def num_trained(self) -> int:
        """Number of trained positions."""
        return self.encoded.num_trained if self.completion is None else len(self.completion)


@dataclass(slots=True)
class Update:
    """What one optimiser step of this process works on.

    Attributes:
        rows: Rows that go through the model.
        positions: Trained positions of completions for the step's mean, rows skipped for their zero advantage included.
        row_count: Completions for the step's mean, likewise.
        spare: Any row, for passes that only keep processes in step.
        demo_positions: Trained positions of demonstrations.
        demo_row_count: Demonstrations with trained positions.
        metrics: What is known before the pass: rewards, lengths, shares. Means over all processes.
        samples: Records for people to look at.
    """

    rows: list[Row]
    positions: int
    row_count: int
    spare: Row
    demo_positions: int = 0
    demo_row_count: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A row of the data with its number in the run.

    Attributes:
        sample: The row, its answer included.
        encoded: What the stream encodes of it: the whole row, or the prompt alone.
        uid: Number of the draw in the run.
        place: Source and row, from which the same sample can be had again.
    """

    sample: Sample
    encoded: Encoded
    uid: int
    place: tuple[int, int] = (0, 0)


class EncodeCache:
    """Encodes a sample once and remembers it while memory lasts, if it will be asked for again."""

    def __init__(self, encode: Callable[[Sample], Encoded], *, reuse: bool) -> None:
        self._encode, self.reuse = encode, reuse
        self._kept: OrderedDict[tuple[int, int], Encoded] = OrderedDict()
        self._bytes = 0

    def __call__(self, place: tuple[int, int], sample: Sample) -> Encoded:
        """Encoded form of the sample at ``place`` (source, row)."""
        if place in self._kept:
            self._kept.move_to_end(place)
            return self._kept[place]
        encoded = self._encode(sample)
        if not self.reuse:
            return encoded
        self._kept[place] = encoded
        self._bytes += _size(encoded)
        while self._bytes > CACHE_BYTES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= _size(dropped)
        return encoded


def _size(encoded: Encoded) -> int:
    tensors = [encoded.ids, encoded.train, encoded.positions, *encoded.media.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _WorkerRows(Dataset[Any]):
    """Encodes in a worker process. An error travels as a value, because torch rebuilds exceptions from text."""

    def __init__(self, sources: Sequence[Sequence[Sample]], encode: Callable[[Sample], Encoded]) -> None:
        self.sources, self.encode = sources, encode

    def __getitem__(self, place: tuple[int, int]) -> Encoded | MmpostError:
        try:
            return self.encode(self.sources[place[0]][place[1]])
        except MmpostError as error:
            return error


class RowStream:
    """Endless rows of this process, drawn in an order that does not depend on the number of processes.

    Every step draws ``count`` rows for all processes together; each process encodes only its own slice. With ``reuse``
    encoded rows are remembered for the next time that they are drawn.

    Attributes:
        dropped: Errors of rows that were left out, each row once.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Sample]],
        weights: Sequence[float],
        encode: Callable[[Sample], Encoded],
        *,
        count: int,
        rank: int,
        world: int,
        seed: int,
        workers: int = 0,
        on_bad_row: Literal["error", "skip", "quarantine"] = "error",
        on_long: Literal["error", "drop"] = "error",
        reuse: bool = True,
    ) -> None:
        self.sources, self.count, self.rank, self.world = sources, count, rank, world
        self._sampler_args = ([len(source) for source in sources], weights, seed)
        self._sampler = self._new_sampler()
        self._encode = EncodeCache(encode, reuse=reuse)
        self._raw_encode = encode
        self._workers = workers
        self._loader: Iterator[Any] | None = None
        self._skip_codes = (("MMP-D014",) if on_long == "drop" else ()), on_bad_row != "error"
        self.dropped: list[MmpostError] = []
        self._left_out: set[tuple[int, int]] = set()
        self.epoch = 0.0

    def _new_sampler(self) -> Sampler:
        sizes, weights, seed = self._sampler_args
        return Sampler(sizes, weights, seed=seed)

    def check_all(self) -> None:
        """Encode every row once, so that rows that do not fit are named before training starts.

        Raises:
            MmpostError: All faults at once.
        """
        faults = []
        self._encode.reuse = True
        for s, source in enumerate(self.sources):
            for r, sample in enumerate(source):
                try:
                    self._encode((s, r), sample)
                except MmpostError as error:
                    if not self._may_skip(error):
                        faults.append(error)
                    else:
                        self._leave_out((s, r), error)
        raise_all(faults)
        if len(self._left_out) == sum(len(source) for source in self.sources):
            raise_all(self.dropped)

    def any_row(self) -> Encoded:
        """The first row that can be encoded, for passes that only keep processes in step.

        Raises:
            MmpostError: What is wrong with the rows, when there is none.
        """
        for s, source in enumerate(self.sources):
            for r, sample in enumerate(source):
                try:
                    return self._encode((s, r), sample)
                except MmpostError as error:
                    if not self._may_skip(error):
                        raise
                    self._leave_out((s, r), error)
        raise_all(self.dropped)
        raise AssertionError("a stream without rows cannot be made")

    def next(self) -> list[Drawn]:
        """This process's rows of the next step."""
        first = self._sampler.position
        draws = self._sampler.draw(self.count)
        total = sum(len(source) for source in self.sources)
        self.epoch = self._sampler.position / max(total, 1)
        mine = _share(self.count, self.rank, self.world)
        if self._workers and self._loader is None:
            self._loader = self._start_workers(first)
        rows = []
        for offset in mine:
            draw = draws[offset]
            sample = self.sources[draw.source][draw.row]
            try:
                encoded = self._fetch((draw.source, draw.row), sample)
            except MmpostError as error:
                if not self._may_skip(error):
                    raise
                self._leave_out((draw.source, draw.row), error)
                continue
            rows.append(Drawn(sample, encoded, first + offset, (draw.source, draw.row)))
        return rows

    def again(self, place: tuple[int, int], uid: int) -> Drawn:
        """A row that was drawn before, for groups that a checkpoint keeps."""
        sample = self.sources[place[0]][place[1]]
        return Drawn(sample, self._encode(place, sample), uid, place)

    def _leave_out(self, place: tuple[int, int], error: MmpostError) -> None:
        """Remember a row that does not fit; it is named once, however often it is drawn."""
        if place not in self._left_out:
            self._left_out.add(place)
            self.dropped.append(error)

    def _may_skip(self, error: MmpostError) -> bool:
        codes, any_data_fault = self._skip_codes
        if error.code == "MMP-D014":
            return error.code in codes
        return any_data_fault and error.code.startswith("MMP-D")

    def _fetch(self, place: tuple[int, int], sample: Sample) -> Encoded:
        if self._loader is None:
            return self._encode(place, sample)
        result = next(self._loader)
        if isinstance(result, MmpostError):
            raise result
        return result

    def _start_workers(self, position: int) -> Iterator[Any]:
        """A loader that runs ahead of the steps with a sampler of its own."""
        ahead = self._new_sampler()
        ahead.draw(position)

        def places() -> Iterator[tuple[int, int]]:
            while True:
                draws = ahead.draw(self.count)
                for offset in _share(self.count, self.rank, self.world):
                    yield draws[offset].source, draws[offset].row

        return iter(
            DataLoader(
                _WorkerRows(self.sources, self._raw_encode),
                sampler=_Endless(places),
                batch_size=None,
                num_workers=self._workers,
                prefetch_factor=4,
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is; plain JSON."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._sampler.load_state_dict(state)


class _Endless:
    """An iterable that restarts its generator when asked; torch wants a sampler object."""

    def __init__(self, make: Callable[[], Iterator[tuple[int, int]]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self._make()


def _share(count: int, rank: int, world: int) -> range:
    """Consecutive part of ``range(count)`` that belongs to a rank; sizes differ by at most one."""
    edges = list(itertools.accumulate([count // world + (r < count % world) for r in range(world)], initial=0))
    return range(edges[rank], edges[rank + 1])
