"""Multimodal post-training: SFT and RL of vision, audio, video and action models in one loop.

Public names are imported on first use; importing ``mmpost`` itself loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "SFTConfig": "mmpost.config.run",
    "GRPOConfig": "mmpost.config.run",
    "MmpostError": "mmpost.core.errors",
    "SFTTrainer": "mmpost.api.trainers",
    "GRPOTrainer": "mmpost.api.trainers",
    "load_data": "mmpost.api.data",
    "load_model": "mmpost.api.model",
    "evaluate": "mmpost.api.evaluate",
}
__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "MmpostError",
    "SFTConfig",
    "SFTTrainer",
    "__version__",
    "evaluate",
    "load_data",
    "load_model",
]

if TYPE_CHECKING:
    from mmpost.api.data import load_data as load_data
    from mmpost.api.evaluate import evaluate as evaluate
    from mmpost.api.model import load_model as load_model
    from mmpost.api.trainers import GRPOTrainer as GRPOTrainer
    from mmpost.api.trainers import SFTTrainer as SFTTrainer
    from mmpost.config.run import GRPOConfig as GRPOConfig
    from mmpost.config.run import SFTConfig as SFTConfig
    from mmpost.core.errors import MmpostError as MmpostError


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mmpost' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
