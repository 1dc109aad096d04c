"""A folder with one JSON file and one safetensors file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmpost.core.errors import MmpostError
from mmpost.train.checkpoint import PARTIAL, move_into_place
from mmpost_tokenizers.published.files import read_tensors

FILES = ("config.json", "model.safetensors")


def write(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, files: tuple[str, str] = FILES
) -> None:
    """Write the two files into ``folder``, beside what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    # A copy of each: a safetensors file holds no views of other tensors.
    copies = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    save_file(copies, folder / files[1], metadata={"format": "pt"})
    (folder / files[0]).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read(folder: Path, *, files: tuple[str, str] = FILES) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``write`` wrote.

    Raises:
        MmpostError: MMP-E082 no JSON file or no table in it, MMP-E070 no file of tensors, MMP-E073 a damaged one.
    """
    return read_config(folder, files[0]), read_tensors(folder / files[1])


def read_config(folder: Path, file: str = FILES[0]) -> dict[str, Any]:
    """The table in the JSON file.

    Raises:
        MmpostError: MMP-E082 no such file or no table in it.
    """
    try:
        return dict(json.loads((folder / file).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise MmpostError("MMP-E082", f"no {file} in '{folder}'.", "Check the path.") from error
    except (OSError, ValueError, TypeError) as error:
        what = f"'{folder / file}' cannot be read: {error}."
        raise MmpostError("MMP-E082", what, "The file is damaged; save or copy it again.") from error


class Scratch:
    """Context with a folder that takes the place of ``folder`` when the block ends without error."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # The name does not match ``step-*``: a kill before the rename must not leave what looks like a checkpoint.
        self._scratch = folder.with_name(PARTIAL + folder.name)

    def __enter__(self) -> Path:
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        return self._scratch

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            move_into_place(self._scratch, self._folder)
