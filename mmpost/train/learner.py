"""One optimiser step: micro-batches through the policy, coefficients, gradients, update.

Knows neither a modality nor a method: it gets rows with advantages and a ``Method`` that says what to do with them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from mmpost.adapters.layout import pack, pad
from mmpost.core.batch import Batch
from mmpost.core.protocols import Adapter
from mmpost.models.policy import Other, Policy
from mmpost.train import estimator
from mmpost.train.distributed import Processes
from mmpost.train.estimator import Counts
from mmpost.train.method import Method
from mmpost.train.mismatch import GAP_BINS, gap_counts, gap_quantile
from mmpost.train.parts import Parts, terms
from mmpost.train.positions import Positions
from mmpost.train.rows import Row, Update
from mmpost.train.stabilisers import Survey

# Sums over positions that every update reports; the order of the vector that is reduced over processes.
SUMS = ("nll", "entropy", "objective", "surrogate", "kl", "removed", "gap", "compared", "lost", "demo_nll", "demos")


class View(Protocol):
    """Another model, as far as terms over the whole vocabulary need it."""

    def view(self, batch: Batch, kind: Literal["forward_kl", "reverse_kl"]) -> Other:
        """What it says at each trained position of a batch."""
        ...


@dataclass(frozen=True, slots=True)
class _Step:
    """What is known of a step before its first pass: by kind of row (True for demonstrations) sizes and surveys."""

    counts: Mapping[bool, Counts]
    facts: Mapping[bool, Mapping[str, Mapping[str, float]]]
    progress: float


@dataclass(frozen=True, slots=True)
class _Said:
    """Of a micro-batch: coefficients, shares in the mean, values, ``[M]`` each; sums for the log."""

    kappa: Tensor
    weight: Tensor
    value: Tensor
    kl: Tensor
    clipped: Tensor
    shares: list[Tensor]


class Learner:
    """Policy, optimiser and method.

    Attributes:
        policy: The module as prepared for the processes (DDP and the like).
        method: Parts of both kinds of rows, and terms over the whole vocabulary.
        others: Models that those terms compare with.
    """

    def __init__(
        self,
        policy: Any,
        adapter: Adapter,
        optimizer: torch.optim.Optimizer,
        processes: Processes,
        method: Method,
        *,
        micro_batch: int,
        temperature: float = 1.0,
        max_grad_norm: float = 1.0,
        max_length: int = 1,
        tokens: int | None = None,
        others: Mapping[str, View] | None = None,
    ) -> None:
        self.policy, self.adapter, self.optimizer, self.processes = policy, adapter, optimizer, processes
        self.method, self.micro_batch, self.temperature = method, micro_batch, temperature
        self.max_grad_norm, self.max_length, self.others = max_grad_norm, max_length, dict(others or {})
        self.tokens = tokens
        self._soft = tuple(soft for soft in method.soft if soft.weight)

    @property
    def penalises(self) -> bool:
        """Whether the distance to another model is part of the loss and thus worth showing."""
        return any(parts.kl.is_on for parts in self.method.parts)

    def _parts(self) -> dict[bool, Parts]:
        """Parts by kind of row: False for completions, True for demonstrations."""
        both = {False: self.method.rollout, True: self.method.demo}
        return {kind: parts for kind, parts in both.items() if parts is not None}

    def update(self, work: Update, learning_rate: float, *, progress: float = 0.0) -> dict[str, float]:
        """Take one optimiser step.

        Args:
            work: This process's rows.
            learning_rate: Of this step.
            progress: Share of the run that is done, in [0, 1].

        Returns:
            Means over the step: ``nll``, ``entropy``, ``kl``, ``removed`` (share that went too far for a stabiliser),
            ``removed/NAME`` of each of several, ``lost`` (share without a finite log-probability of the engine),
            ``gap`` to the engine and ``demo_nll``, per position they are about, NaN without any; ``gap_p99`` and
            ``gap_max``, at most 6 % too large; ``objective`` and ``surrogate`` of the step; ``positions`` and
            ``grad_norm``. Nothing is updated when the gradient norm is
            not finite.
        """
        packs = self.processes.unwrap(self.policy).packs
        batches = micro_batches(work.rows if packs else by_length(work.rows), self.micro_batch, self.tokens)
        step = self._measure(work, batches, progress)
        steps = self.processes.max(len(batches))
        sums = torch.zeros(len(SUMS) + len(self._names()) + 1 + GAP_BINS, dtype=torch.float64)
        self.policy.train()
        self.optimizer.zero_grad(set_to_none=True)
        for index in range(steps):
            # Every process makes the same number of passes; one that has run out repeats its first with weight 0.
            real = index < len(batches)
            batch = batches[index] if real else (batches or [[work.spare]])[0]
            with self.processes.accumulate(self.policy, last=index + 1 == steps):
                sums += self._backward(batch, step, active=real)
        report = self._report(self.processes.sum(sums.tolist()))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._clip()
        if np.isfinite(norm):
            self.optimizer.step()
        positions = sum(counts.positions for counts in step.counts.values())
        return {**report, "positions": float(positions), "grad_norm": norm}

    def _measure(self, work: Update, batches: Sequence[Sequence[Row]], progress: float) -> _Step:
        """Sizes of the whole step, and what stabilisers want to know of it."""
        total = self.processes.sum(
            [work.positions, work.row_count, work.demo_positions, work.demo_row_count, len(batches)]
        )
        sizes = [int(value) for value in total]
        counts = {
            False: Counts(sizes[0], sizes[1], self.max_length, sizes[4]),
            True: Counts(sizes[2], sizes[3], self.max_length, sizes[4]),
        }
        facts: dict[bool, dict[str, dict[str, float]]] = {}
        for kind, parts in self._parts().items():
            if parts.surveyors:
                survey = self._survey([row for row in work.rows if row.demo == kind])
                facts[kind] = {type(part).__name__: part.survey(survey) for part in parts.surveyors}
        return _Step(counts, facts, progress)

    def _survey(self, rows: Sequence[Row]) -> Survey:
        """Every position of the step over all processes, in one more pass without gradient."""
        mine = [
            (logp, entropy, np.full(len(logp), row.advantage))
            for row, (logp, entropy) in zip(rows, self.measure(rows), strict=True)
        ]
        everywhere = [piece for pieces in self.processes.gather(mine) for piece in pieces] or [(np.empty(0),) * 3]
        return Survey(*(np.concatenate(column).astype(np.float64) for column in zip(*everywhere, strict=True)))

    def _names(self) -> list[str]:
        """Stabilisers in the order in which their shares are summed."""
        return [_name(part) for parts in self._parts().values() for part in parts.stabilise]

    def _report(self, sums: Sequence[float]) -> dict[str, float]:
        """Means from sums over all processes."""
        sums, counts = sums[:-GAP_BINS], sums[-GAP_BINS:]
        positions, shares = sums[-1], sums[len(SUMS) : -1]
        found = dict(zip(SUMS, sums, strict=False))
        # Without any position (all advantages zero) there is no mean to report; 0 would read as a collapse.
        nan = float("nan")
        report = {name: found[name] / (positions or nan) for name in ("nll", "entropy", "kl", "removed", "lost")}
        # These two are sums of already weighted positions, not means.
        report |= {"objective": found["objective"], "surrogate": found["surrogate"]}
        report["gap"] = found["gap"] / (found["compared"] or nan)
        report |= {"gap_p99": gap_quantile(counts, 0.99), "gap_max": gap_quantile(counts, 1.0)}
        report["demo_nll"] = found["demo_nll"] / (found["demos"] or nan)
        names = self._names()
        if len(names) > 1:
            removed = zip(names, shares, strict=True)
            report |= {f"removed/{name}": share / (positions or nan) for name, share in removed}
        return report

    def _backward(self, rows: Sequence[Row], step: _Step, *, active: bool) -> Tensor:
        """Gradient of a micro-batch; returns its sums."""
        batch = self._batch(rows)
        compared = [soft for soft in self._soft if soft.kind != "entropy"]
        others = [self._view(soft.to, soft.kind, batch) for soft in compared]
        bonus = len(compared) < len(self._soft)
        with self.processes.autocast():
            logp, entropy, *distances = self.policy(batch, self.temperature, others, bonus)
        every = self._positions(rows, logp, entropy, batch.row, step.progress)
        demo = torch.tensor([row.demo for row in rows], device=logp.device)[batch.row]
        said = self._coefficients(every, demo, step)
        loss = estimator.surrogate(logp, said.kappa)
        objective = (said.weight * said.value).sum()
        queue = iter(distances)
        for soft in self._soft:
            term = entropy if soft.kind == "entropy" else next(queue)
            acts = said.weight if soft.rows == "all" else torch.where(demo == (soft.rows == "demo"), said.weight, 0.0)
            total = soft.sign * soft.weight * (acts * term).sum()
            loss, objective = loss + total, objective - total.detach()
        # DDP averages gradients over processes; the counts are global already, so the average is undone. A pass that
        # only keeps processes in step has a gradient of exactly 0.
        self.processes.backward(loss * (self.processes.world if active else 0.0))
        size = len(SUMS) + len(said.shares) + 1 + GAP_BINS
        if not active:
            return torch.zeros(size, dtype=torch.float64)
        nll, is_demo = -every.logp, demo.to(logp.dtype)
        gap = self._gap(every, ~demo)
        values = (
            *(nll.sum(), entropy.detach().sum(), objective, loss.detach(), said.kl, said.clipped, *gap),
            *((nll * is_demo).sum(), is_demo.sum(), *said.shares, torch.tensor(len(logp))),
        )
        counts = gap_counts(every, ~demo).cpu()
        return torch.cat([torch.stack([value.double().cpu() for value in values]), counts])

    def _coefficients(self, every: Positions, demo: Tensor, step: _Step) -> _Said:
        """What the parts of both kinds of rows say about the positions of a micro-batch."""
        kappa, weight, value = (torch.zeros_like(every.logp) for _ in range(3))
        kl, clipped = every.logp.new_zeros(()), every.logp.new_zeros(())
        shares: list[Tensor] = []
        for kind, parts in self._parts().items():
            mask = demo == kind
            here = replace(every.select(mask), facts=step.facts.get(kind, {}))
            share = estimator.aggregation_weight(parts.aggregate, here.row, here.lengths, step.counts[kind])
            weight[mask] = share.to(weight.dtype) * (self.method.demo_weight if kind else 1.0)
            said = terms(parts, here)
            kappa[mask] = estimator.coefficient(weight[mask], said)
            value[mask] = said.objective if said.objective is not None else here.logp
            clipped += said.clipped if said.clipped is not None else 0
            shares += said.removed
            other = parts.kl.other(here)
            if other is not None:
                kl += estimator.kl_value(here.logp, other).sum()
        return _Said(kappa, weight, value, kl, clipped, shares)

    def _view(self, to: str, kind: Any, batch: Batch) -> Other:
        with self.processes.autocast():
            return self.others[to].view(batch, kind)

    def _batch(self, rows: Sequence[Row]) -> Batch:
        """Rows as one forward pass: packed with shared prompts where the model allows it."""
        trajectories = [
            (row.encoded, None if row.completion is None else torch.from_numpy(row.completion)) for row in rows
        ]
        packs = self.processes.unwrap(self.policy).packs
        return (pack if packs else pad)(self.adapter, trajectories).to(self.processes.device)

    def _positions(self, rows: Sequence[Row], logp: Tensor, entropy: Tensor, row: Tensor, progress: float) -> Positions:
        """Row facts spread over positions. A row that lacks one (a demonstration) counts as equal to the policy."""
        logp, entropy = logp.detach(), entropy.detach()
        lengths = torch.bincount(row, minlength=len(rows))
        advantage = torch.tensor([r.advantage for r in rows], dtype=logp.dtype, device=logp.device)[row]
        penalised = torch.tensor([r.penalised for r in rows], device=logp.device)[row]

        def spread(get: Callable[[Row], np.ndarray | None]) -> Tensor | None:
            given = [get(r) for r in rows]
            if all(values is None for values in given):
                return None
            sizes = lengths.tolist()
            filled = [np.zeros(n) if values is None else values for values, n in zip(given, sizes, strict=True)]
            missing = torch.tensor([values is None for values in given], device=logp.device)[row]
            return torch.where(missing, logp, torch.from_numpy(np.concatenate(filled)).to(logp))

        old = spread(lambda r: r.old)
        if old is not None:
            # What an engine sampled for an earlier step may lack a number here and there.
            old = torch.where(old.isfinite(), old, logp)
        return Positions(
            logp,
            logp if old is None else old,
            advantage,
            row,
            lengths,
            reference=spread(lambda r: r.reference),
            teacher=spread(lambda r: r.teacher),
            engine=spread(lambda r: r.engine),
            entropy=entropy,
            penalised=penalised,
            progress=progress,
        )

    def _gap(self, p: Positions, sampled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of |log-probability here - the engine's|, positions that have both, positions that the engine lost."""
        if p.engine is None:
            return p.logp.new_zeros(()), p.logp.new_zeros(()), p.logp.new_zeros(())
        finite = p.engine.isfinite()
        gap = torch.where(finite & sampled, (p.logp - p.engine).abs(), 0.0)
        return gap.sum(), (finite & sampled).sum(), (~finite).sum()

    def log_probs(self, rows: Sequence[Row], *, module: Policy | None = None) -> list[np.ndarray]:
        """Log-probabilities of each row's trained positions without gradient, float32 ``[n]`` each.

        Args:
            rows: Rows of this process.
            module: Another policy, for example the reference; default the one that trains.
        """
        return [logp for logp, _ in self.measure(rows, module=module)]

    def measure(self, rows: Sequence[Row], *, module: Policy | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """The same with the entropy of the distribution at each position."""
        policy = module if module is not None else self.processes.unwrap(self.policy)
        was_training = policy.training
        policy.eval()
        out: list[tuple[np.ndarray, np.ndarray]] = []
        with torch.no_grad(), self.processes.whole(policy), self.processes.autocast():
            for part in micro_batches(rows, self.micro_batch, self.tokens):
                batch = self._batch(part)
                sizes = torch.bincount(batch.row, minlength=len(part)).tolist()
                found = [value.float().cpu().split(sizes) for value in policy(batch, self.temperature)]
                out.extend((logp.numpy(), entropy.numpy()) for logp, entropy in zip(*found, strict=True))
        policy.train(was_training)
        return out

    def _clip(self) -> float:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                # A step without any gradient still moves the optimiser's averages, as it would with zero rows.
                parameter.grad = torch.zeros_like(parameter)
        return self.processes.clip(parameters, self.max_grad_norm or float("inf"))


def _name(part: Any) -> str:
    """Of a stabiliser: its class, or its own name where it is a function."""
    return str(getattr(part, "__name__", type(part).__name__)).lower()


def by_length(rows: Sequence[Row]) -> list[Row]:
    """Rows of similar length side by side, so that padding wastes little; rows of one prompt stay neighbours."""
    order: dict[int, int] = {}
    for row in rows:
        order.setdefault(id(row.encoded), len(order))
    return sorted(rows, key=lambda row: (len(row.encoded), order[id(row.encoded)]))


def micro_batches(rows: Sequence[Row], limit: int, tokens: int | None = None) -> list[list[Row]]:
    """Rows in order, at most ``limit`` and about ``tokens`` tokens together.

    Rows of one prompt are parted only when they exceed a limit by themselves. Each part then carries the prompt again,
    which is exact and only slower. A single row may exceed ``tokens``.
    """
    out: list[list[Row]] = []
    room = tokens or sys.maxsize
    used = 0
    for _, found in itertools.groupby(rows, key=lambda row: id(row.encoded)):
        for piece in _pieces(list(found), limit, room):
            size = _tokens(piece)
            if out and len(out[-1]) + len(piece) <= limit and used + size <= room:
                out[-1].extend(piece)
                used += size
            else:
                out.append(piece)
                used = size
    return out


def _pieces(group: Sequence[Row], limit: int, room: int) -> list[list[Row]]:
    """Rows of one prompt, parted where they exceed a limit."""
    out: list[list[Row]] = []
    for row in group:
        if out and len(out[-1]) < limit and _tokens([*out[-1], row]) <= room:
            out[-1].append(row)
        else:
            out.append([row])
    return out


def _tokens(rows: Sequence[Row]) -> int:
    """Tokens of rows of one prompt: the prompt once, whole conversations each by itself."""
    shared = any(row.completion is not None for row in rows)
    alone = sum(row.completion is None for row in rows)
    behind = sum(len(row.completion) for row in rows if row.completion is not None)
    return (alone + shared) * len(rows[0].encoded) + behind
