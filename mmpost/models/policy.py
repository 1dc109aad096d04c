"""The policy as a module: log-probabilities of chosen positions, and nothing else.

It wraps a Hugging Face model so that DDP and FSDP see one forward call that ends in ``[M]`` numbers. Hidden states of
the trained positions are picked before the language-model head runs, so logits exist only for those positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmpost.core.batch import Batch

# Positions per call of the head: at a vocabulary of 152,000 this is 622 MB of float32 logits.
HEAD_CHUNK = 1024


def upcast(logits: Tensor) -> Tensor:
    """Log-probabilities are float32 whatever the model's dtype; float64 models (tests) stay float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def token_logprob(hidden: Tensor, head: nn.Module, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets and entropy of the distribution.

    Args:
        hidden: ``[M, d]`` hidden states that predict the targets.
        head: Language-model head, ``d`` to vocabulary.
        target: int64 ``[M]``.
        temperature: Logits are divided by it.

    Returns:
        ``[M]`` log-probabilities in nats with gradient, ``[M]`` entropies in nats without.
    """
    logits = upcast(head(hidden)) / temperature
    logp = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, target[:, None])[:, 0], entropy


class Policy(nn.Module):
    """A Hugging Face model that answers with log-probabilities.

    Attributes:
        model: The wrapped model, possibly a PEFT model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

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

    def hidden(self, inputs: dict[str, Tensor], **options: Any) -> Any:
        """Run the model up to its last hidden state.

        Args:
            inputs: Arguments of the forward call, including ``position_ids``: nothing is left for the model to infer
                from state of an earlier call.
            options: ``past_key_values`` and ``use_cache`` in generation.
        """
        return self.inner.base_model(**inputs, **options)

    def forward(self, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the trained positions of a batch, both ``[M]``."""
        states = self.hidden(batch.inputs, use_cache=False).last_hidden_state
        picked = states[batch.row, batch.at]
        if len(picked) <= HEAD_CHUNK:
            return token_logprob(picked, self.head, batch.target, temperature)
        parts = [
            checkpoint(token_logprob, h, self.head, y, temperature, use_reentrant=False)
            for h, y in zip(picked.split(HEAD_CHUNK), batch.target.split(HEAD_CHUNK), strict=True)
        ]
        logp, entropy = zip(*parts, strict=True)
        return torch.cat(logp), torch.cat(entropy)

    def num_parameters(self, *, trainable: bool = False) -> int:
        """Number of weights, all or those that train."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)
