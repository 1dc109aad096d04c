"""Trainer classes in TRL's manner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmpost.api.data import Data, load_data
from mmpost.api.model import load_model
from mmpost.api.training import Training, _Encode
from mmpost.config.run import GRPOConfig, SFTConfig
from mmpost.core.errors import MmpostError
from mmpost.models.load import LoadedModel


class _Trainer:
    config_class: type[SFTConfig] | type[GRPOConfig]

    def __init__(
        self,
        model: LoadedModel | str,
        args: Any = None,
        train_dataset: Any = None,
        *,
        reward_funcs: Sequence[str | Callable[..., Any]] | None = None,
    ) -> None:
        self.args = args if args is not None else self.config_class()
        self.model = load_model(model, seed=self.args.train.seed) if isinstance(model, str) else model
        if train_dataset is None and not self.args.data.train:
            raise MmpostError("MMP-C031", "no training data.", "Pass train_dataset=load_data(FILE).")
        data = None
        if train_dataset is not None:
            given = train_dataset if _is_list_of_data(train_dataset) else [train_dataset]
            data = [item if isinstance(item, Data) else load_data(item) for item in given]
        self.args.model = self.model.section
        if self.model.peft is not None:
            self.args.peft = self.model.peft
        self._training = Training(self.args, model=self.model, data=data, rewards=reward_funcs)

    def train(self) -> Path:
        """Run to the last step; an unfinished run in ``output_dir`` goes on. Returns the run folder."""
        folder = self._training.run()
        if self._training.was_finished:
            # The weights of that run, not those that were opened for it.
            self.model = load_model(str(folder / "final"), peft=self.args.peft)
        else:
            assert self._training.model is not None
            self.model = self._training.model
        return folder

    def save_model(self, folder: str | Path) -> Path:
        """Write a folder that plain transformers opens."""
        self.model.save(Path(folder))
        return Path(folder)

    def estimate(self) -> dict[str, Any]:
        """Tokens per row, steps and memory of weights, gradients and optimiser, before anything runs."""
        data = self._training.data or []
        loss_on = None if isinstance(self.args, GRPOConfig) else self.args.train.loss_on
        encode = _Encode(self.model.adapter, loss_on)
        rows = [encode(sample) for source in data for sample in source.samples[:256]]
        lengths = np.array([len(row) for row in rows] or [0])
        trainable = self.model.policy.num_parameters(trainable=True)
        weight_bytes = sum(p.numel() * p.element_size() for p in self.model.policy.parameters())
        return {
            "rows": sum(len(source) for source in data),
            "tokens_per_row": {f"p{q}": int(np.quantile(lengths, q / 100)) for q in (50, 90, 99, 100)},
            "trained_share": float(sum(row.num_trained for row in rows) / max(lengths.sum(), 1)),
            "steps": self._training._steps(list(data)),
            "params": self.model.policy.num_parameters(),
            "trainable_params": trainable,
            # Gradient 4 bytes, AdamW moments 8 bytes per trained weight; activations are not in here.
            "memory_mb": round((weight_bytes + 12 * trainable) / 1e6, 1),
        }


def _is_list_of_data(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Data)


class SFTTrainer(_Trainer):
    """Supervised fine-tuning.

    Args:
        model: An open model or a name.
        args: Options; default those of ``SFTConfig``.
        train_dataset: ``load_data(...)``, several of them, a path, rows, or a ``datasets.Dataset``.
    """

    config_class = SFTConfig

    def __init__(self, model: LoadedModel | str, args: SFTConfig | None = None, train_dataset: Any = None) -> None:
        super().__init__(model, args, train_dataset)


class GRPOTrainer(_Trainer):
    """Group relative policy optimisation with verifiable rewards.

    Args:
        model: An open model or a name.
        reward_funcs: Functions in TRL's signature, or names of built-in rewards.
        args: Options; default those of ``GRPOConfig``.
        train_dataset: Prompts, as for ``SFTTrainer``; extra columns reach the rewards by name.
    """

    config_class = GRPOConfig

    def __init__(
        self,
        model: LoadedModel | str,
        reward_funcs: str | Callable[..., Any] | Sequence[str | Callable[..., Any]],
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
    ) -> None:
        functions = [reward_funcs] if isinstance(reward_funcs, str) or callable(reward_funcs) else list(reward_funcs)
        super().__init__(model, args, train_dataset, reward_funcs=functions)
