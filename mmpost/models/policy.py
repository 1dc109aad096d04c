"""The policy as a module: log-probabilities of chosen positions, and nothing else.

It wraps a Hugging Face model so that DDP and FSDP see one forward call that ends in ``[M]`` numbers. Hidden states of
the trained positions are picked before the language-model head runs, so logits exist only for those positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmpost.core.batch import Batch
from mmpost.models import attention, towers

# Float32 logits that may exist at a time, in bytes; at a vocabulary of 152,000 these are 441 positions.
HEAD_BYTES = 256 << 20


def upcast(logits: Tensor) -> Tensor:
    """Log-probabilities are float32 whatever the model's dtype; float64 models (tests) stay float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


@dataclass(frozen=True, slots=True)
class Other:
    """What another model says at the same positions.

    Attributes:
        hidden: ``[M, d']`` its hidden states, without gradient.
        head: Its language-model head, from d' to the same vocabulary.
        kind: Distance that is asked for: ``forward_kl`` KL(other || policy) or ``reverse_kl`` KL(policy || other).
    """

    hidden: Tensor
    head: nn.Module
    kind: Literal["forward_kl", "reverse_kl"]


def token_logprob(
    hidden: Tensor,
    head: nn.Module,
    target: Tensor,
    temperature: float,
    others: Sequence[Other] = (),
    entropy_gradient: bool = False,
) -> tuple[Tensor, ...]:
    """Log-probability of the targets, entropy of the distribution, and its distances to others.

    Args:
        hidden: ``[M, d]`` hidden states that predict the targets.
        head: Language-model head, ``d`` to vocabulary.
        target: int64 ``[M]``.
        temperature: Logits are divided by it, those of others, too.
        others: Models to compare with.
        entropy_gradient: Whether the entropies have a gradient.

    Returns:
        ``[M]`` log-probabilities in nats with gradient, ``[M]`` entropies in nats, and for each other model ``[M]``
        divergences in nats with gradient.
    """
    logits = upcast(head(hidden)) / temperature
    logp = logits.log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(logp.exp() * logp).sum(-1)
    distances = [_divergence(logp, other, temperature) for other in others]
    return (logp.gather(-1, target[:, None])[:, 0], entropy, *distances)


def _divergence(logp: Tensor, other: Other, temperature: float) -> Tensor:
    """``[M]`` distance of distributions, in nats, at least 0."""
    with torch.no_grad():
        theirs = (upcast(other.head(other.hidden)) / temperature).log_softmax(-1).to(logp.dtype)
    first, second = (theirs, logp) if other.kind == "forward_kl" else (logp, theirs)
    return (first.exp() * (first - second)).sum(-1)


class Policy(nn.Module):
    """A Hugging Face model that answers with log-probabilities.

    Attributes:
        model: The wrapped model, possibly a PEFT model.
        packs: Whether the model takes packed batches; else only padded ones.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.packs = attention.install(model)
        towers.install(model)

    @property
    def inner(self) -> Any:
        """The Hugging Face model itself, without the PEFT wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def head(self) -> nn.Module:
        """The language-model head."""
        return self.inner.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def hidden(self, inputs: dict[str, Tensor], plan: attention.Plan | None = None) -> Tensor:
        """Last hidden states, ``[B * T, d]``.

        Args:
            inputs: Arguments of the forward call, including ``position_ids``: nothing is left for the model to infer
                from state of an earlier call. ``same_*`` name equal pictures, see ``towers``.
            plan: How the tokens attend; None for what ``inputs['attention_mask']`` says.
        """
        with towers.sharing(inputs) as plain:
            if plan is None:
                out = self.inner.base_model(**plain, use_cache=False)
            else:
                with attention.planned():
                    out = self.inner.base_model(**plain, use_cache=False, plan=plan)
        states: Tensor = out.last_hidden_state
        return states.flatten(0, 1)

    def continued(self, ids: Tensor, positions: Tensor, plan: attention.Plan) -> Tensor:
        """Last hidden states of text that goes on behind what the plan has seen, ``[T, d]``.

        Args:
            ids: int64 ``[1, T]``.
            positions: ``[A, 1, T]`` or ``[1, T]``.
            plan: How the tokens attend.
        """
        # A mask of four axes is taken as it is, so that none is made, and the plan does not look at it. Unlike
        # ``planned`` this can be compiled.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
        out = attention.language_model(self.model)(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False, plan=plan
        )
        states: Tensor = out.last_hidden_state
        return states[0]

    def logits(self, states: Tensor) -> Tensor:
        """``[rows, V]`` logits, float32 or wider, from hidden states ``[rows, d]``."""
        return upcast(self.head(states))

    def head_chunk(self, models: int = 1) -> int:
        """Positions that go through the head at a time, so that logits of ``models`` models fit ``HEAD_BYTES``."""
        return max(1, HEAD_BYTES // (4 * models * self.inner.config.get_text_config().vocab_size))

    def picked(self, batch: Batch) -> Tensor:
        """Hidden states that predict the trained positions of a batch, ``[M, d]``."""
        plan = attention.Packed(batch.segments, batch.at.device) if batch.segments is not None else None
        return self.hidden(batch.inputs, plan)[batch.at]

    def forward(
        self, batch: Batch, temperature: float = 1.0, others: Sequence[Other] = (), entropy_gradient: bool = False
    ) -> tuple[Tensor, ...]:
        """What ``token_logprob`` says about the trained positions of a batch, ``[M]`` each.

        ``[M, V]`` is never made as a whole unless it is small: positions go through the head in chunks.
        """
        picked = self.picked(batch)
        chunk = self.head_chunk(1 + len(others))
        if len(picked) <= chunk:
            return token_logprob(picked, self.head, batch.target, temperature, others, entropy_gradient)
        parts = []
        for start in range(0, len(picked), chunk):
            here = slice(start, start + chunk)
            near = [replace(other, hidden=other.hidden[here]) for other in others]
            # Logits of a chunk are made again for its gradient, so that only one chunk's exist at a time.
            parts.append(
                checkpoint(
                    token_logprob,
                    picked[here],
                    self.head,
                    batch.target[here],
                    temperature,
                    near,
                    entropy_gradient,
                    use_reentrant=False,
                )
            )
        return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))

    def num_parameters(self, *, trainable: bool = False) -> int:
        """Number of weights, all or those that train."""
        # DeepSpeed leaves empty tensors where weights are spread, and notes their size.
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.parameters() if p.requires_grad or not trainable)
