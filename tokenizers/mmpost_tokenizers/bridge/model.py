"""What a model of index maps is for its trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpost_tokenizers.bridge import checkpoint


class IndexModel(nn.Module):
    """Likelihood of index maps ``[N, H, W, C]``, given a class."""

    def check(self, indices: Tensor, labels: Tensor) -> None:
        """Raise an ``MmpostError`` when the data cannot be of this model; called once before training."""

    def nats(self, indices: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Negative log-likelihood of the indices that are predicted, in nats; the loss is its mean.

        Args:
            indices: int64 ``[N, H, W, C]``.
            labels: int64 ``[N]``.
            generator: On the CPU; for whatever the model draws.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Configuration as JSON."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        checkpoint.write(Path(folder), self.describe(), self.state_dict())
