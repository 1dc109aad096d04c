"""One optimiser step: micro-batches through the policy, coefficients, gradients, update.

Knows neither a modality nor a method: it gets rows with advantages and a ``Parts`` value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpost.core.protocols import Adapter
from mmpost.models.policy import Policy
from mmpost.train import estimator
from mmpost.train.distributed import Processes
from mmpost.train.estimator import Counts
from mmpost.train.parts import Parts, Positions, terms
from mmpost.train.rows import Row, Update

# Sums over positions that every update reports; the order of the vector that is reduced over processes.
SUMS = ("nll", "entropy", "objective", "surrogate", "kl", "removed", "gap", "positions")


class Learner:
    """Policy, optimiser and method.

    Attributes:
        policy: The module as prepared for the processes (DDP and the like).
        parts: The method.
    """

    def __init__(
        self,
        policy: Any,
        adapter: Adapter,
        optimizer: torch.optim.Optimizer,
        processes: Processes,
        parts: Parts,
        *,
        micro_batch: int,
        temperature: float = 1.0,
        max_grad_norm: float = 1.0,
        max_length: int = 1,
    ) -> None:
        self.policy, self.adapter, self.optimizer, self.processes = policy, adapter, optimizer, processes
        self.parts, self.micro_batch, self.temperature = parts, micro_batch, temperature
        self.max_grad_norm, self.max_length = max_grad_norm, max_length

    def update(self, work: Update, learning_rate: float) -> dict[str, float]:
        """Take one optimiser step.

        Args:
            work: This process's rows.
            learning_rate: Of this step.

        Returns:
            Means over the step: the keys of ``SUMS`` per position (NaN when no position was run), and ``grad_norm``.
            Nothing is updated when the gradient norm is not finite.
        """
        rows = work.rows
        total = self.processes.sum([work.positions, work.row_count])
        counts = Counts(int(total[0]), int(total[1]), self.max_length)
        batches = [rows[i : i + self.micro_batch] for i in range(0, len(rows), self.micro_batch)]
        steps = self.processes.max(len(batches))
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        self.policy.train()
        self.optimizer.zero_grad(set_to_none=True)
        for index in range(steps):
            # Every process makes the same number of passes; one that has run out repeats its first with weight 0.
            real = index < len(batches)
            batch = batches[index] if real else (batches or [[work.spare]])[0]
            with self.processes.accumulate(self.policy, last=index + 1 == steps):
                sums += self._backward(batch, counts, active=real)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._clip()
        if np.isfinite(norm):
            self.optimizer.step()
        reduced = self.processes.sum(sums.tolist())
        # Without any position (all advantages zero) there is no mean to report; 0 would read as a collapse.
        seen = reduced[-1] or float("nan")
        report = {name: value / seen for name, value in zip(SUMS, reduced, strict=True)}
        # These two are sums of already weighted positions, not means.
        report["objective"], report["surrogate"] = reduced[2], reduced[3]
        return {**report, "positions": float(counts.positions), "grad_norm": norm}

    def _backward(self, rows: Sequence[Row], counts: Counts, *, active: bool) -> Tensor:
        batch = self.adapter.collate([row.encoded for row in rows]).to(self.processes.device)
        with self.processes.autocast():
            logp, entropy = self.policy(batch, self.temperature)
        positions, lengths = self._positions(rows, logp, batch.row)
        weight = estimator.aggregation_weight(self.parts.aggregate, batch.row, lengths, counts).to(logp.dtype)
        said = terms(self.parts, positions)
        kappa = estimator.coefficient(weight, said)
        if not active:
            kappa = torch.zeros_like(kappa)
        loss = estimator.surrogate(logp, kappa)
        # DDP averages gradients over processes; the counts are global already, so the average is undone.
        self.processes.backward(loss * self.processes.world)
        if not active:
            return torch.zeros(len(SUMS), dtype=torch.float64)
        detached = logp.detach()
        objective = said.objective if said.objective is not None else detached
        kl = estimator.kl_value(detached, positions.reference) if positions.reference is not None else None
        values = (
            -detached.sum(),
            entropy.sum(),
            (weight * objective).sum() - (self.parts.beta * (weight * kl).sum() if kl is not None else 0.0),
            loss.detach(),
            kl.sum() if kl is not None else detached.new_zeros(()),
            (said.stabiliser == 0).sum(),
            self._gap(rows, detached),
            torch.tensor(len(detached)),
        )
        return torch.stack([value.double().cpu() for value in values])

    def _positions(self, rows: Sequence[Row], logp: Tensor, row: Tensor) -> tuple[Positions, Tensor]:
        """Row facts spread over positions, and trained positions per row."""
        detached = logp.detach()
        device = detached.device
        lengths = torch.bincount(row, minlength=len(rows))
        advantage = torch.tensor([r.advantage for r in rows], dtype=detached.dtype, device=device)[row]

        def spread(name: str) -> Tensor | None:
            parts = [getattr(r, name) for r in rows]
            if any(part is None for part in parts):
                return None
            return torch.from_numpy(np.concatenate(parts)).to(device, detached.dtype)

        old = spread("old")
        return Positions(detached, detached if old is None else old, advantage, spread("reference")), lengths

    def _gap(self, rows: Sequence[Row], logp: Tensor) -> Tensor:
        """Sum of |log-probability here - log-probability that the engine reported|."""
        if any(row.engine is None for row in rows):
            return logp.new_zeros(())
        engine = torch.from_numpy(np.concatenate([row.engine for row in rows if row.engine is not None]))
        return (logp - engine.to(logp)).abs().sum()

    def log_probs(self, rows: Sequence[Row], *, module: Policy | None = None) -> list[np.ndarray]:
        """Log-probabilities of each row's trained positions without gradient, float32 ``[n]`` each.

        Args:
            rows: Rows of this process.
            module: Another policy, for example the reference; default the one that trains.
        """
        policy = module if module is not None else self.processes.unwrap(self.policy)
        was_training = policy.training
        policy.eval()
        out: list[np.ndarray] = []
        with torch.no_grad(), self.processes.autocast():
            for start in range(0, len(rows), self.micro_batch):
                part = rows[start : start + self.micro_batch]
                batch = self.adapter.collate([row.encoded for row in part]).to(self.processes.device)
                logp, _ = policy(batch, self.temperature)
                sizes = torch.bincount(batch.row, minlength=len(part)).tolist()
                out.extend(piece.float().cpu().numpy() for piece in logp.split(sizes))
        policy.train(was_training)
        return out

    def _clip(self) -> float:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                # A step without any gradient still moves the optimiser's averages, as it would with zero rows.
                parameter.grad = torch.zeros_like(parameter)
        return self.processes.clip(parameters, self.max_grad_norm or float("inf"))
