"""Reading and writing tokenizer files: a folder of ours, or tensors that others saved. Nothing is ever unpickled."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost_tokenizers import TOKENIZERS

if TYPE_CHECKING:
    from mmpost_tokenizers.base import DiscreteTokenizer

    T = TypeVar("T", bound=DiscreteTokenizer)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1
# Names shown of each kind in one message.
SHOWN = 5


def save(tokenizer: DiscreteTokenizer, folder: Path) -> None:
    """Write configuration and weights; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tokenizer.state_dict().items()}
    temporary = folder / f"{WEIGHTS}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / WEIGHTS)
    table = {"mmpost_format": FORMAT, **tokenizer.config.to_json()}
    temporary = folder / f"{CONFIG}.tmp"
    temporary.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / CONFIG)


def open_as(kind: type[T], name_or_path: str, *, revision: str | None = None) -> T:
    """Open a tokenizer of class ``kind`` or of a class below it; see ``DiscreteTokenizer.from_pretrained``."""
    config_file = locate(name_or_path, CONFIG, revision)
    try:
        table = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _bad_config(config_file, f"cannot be read as JSON: {error}") from error
    if not isinstance(table, dict) or table.get("mmpost_format") != FORMAT:
        raise _bad_config(config_file, f"is no tokenizer configuration of this toolkit (mmpost_format: {FORMAT})")
    del table["mmpost_format"]
    found = Catalog("tokenizers", TOKENIZERS).get(str(table.get("kind")))
    if not issubclass(found, kind):
        raise _bad_config(config_file, f"is of a {found.__name__}, not of a {kind.__name__}")
    tokenizer: T = found(found.config_class.from_json(table))
    weights_file = locate(name_or_path, WEIGHTS, revision)
    load_strictly(tokenizer, read_tensors(weights_file), str(weights_file))
    return tokenizer.eval()


def _bad_config(path: Path, problem: str) -> MmpostError:
    return MmpostError("MMP-E072", f"{path} {problem}.", "Name a folder written by save_pretrained.")


def locate(name_or_path: str, file: str, revision: str | None) -> Path:
    """Path of ``file`` in a folder, or in the local copy of a repository of the hub.

    Raises:
        MmpostError: MMP-E070 when there is none.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if (folder / file).is_file():
            return folder / file
        raise MmpostError("MMP-E070", f"no {file} in '{folder}'.", "Name a folder written by save_pretrained.")
    fix = "Give a folder written by save_pretrained, or a hub id of one (needs network or the local cache)."
    if missing := missing_place(name_or_path):
        raise MmpostError("MMP-E070", f"no tokenizer '{name_or_path}': {missing}.", fix)
    try:
        return Path(hf_hub_download(name_or_path, file, revision=revision))
    except (HFValidationError, HfHubHTTPError, EntryNotFoundError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MmpostError("MMP-E070", f"no tokenizer '{name_or_path}': {reason}", fix) from error


def missing_place(name_or_path: str) -> str:
    """What is wrong with a name that can only be a place on this machine, in words; empty where it may be a hub id.

    A hub id is ``OWNER/NAME``. A name of that form is a place when the folder before the slash exists: asking the hub
    for a mistyped path would wait for its retries and then answer about the network.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return ""
    if path.exists():
        return "it is a file, not a folder"
    is_place = name_or_path.count("/") != 1 or name_or_path[0] in "./~" or path.parent.is_dir()
    return "there is no such folder" if is_place else ""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, or of a ``.pt``/``.pth``/``.bin`` file that holds nothing but tensors.

    A table of tables is searched for the weights in the published order: ``ema``, ``model``, ``state_dict``.

    Raises:
        MmpostError: MMP-E070 when there is no such file, MMP-E073 when it is damaged or holds more than plain data.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MmpostError("MMP-E070", f"no file '{path}'.", "Check the path.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training scripts put their parsed arguments beside the weights: a plain bag of attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = f"'{path}' holds more than tensors, or is no checkpoint; it was not opened, because that could run code."
        raise MmpostError("MMP-E073", what, "Convert it to safetensors where you trust it.") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        what = f"'{path}' cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}."
        raise MmpostError("MMP-E073", what, "Copy or download it again.") from error
    return _weights_of(content, path)


def _weights_of(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for name in ("ema", "model", "state_dict"):
            if isinstance(content.get(name), Mapping):
                content = content[name]
                break
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {str(name): value for name, value in content.items()}
    raise MmpostError("MMP-E073", f"'{path}' holds no table of tensors.", "Name a file of model weights.")


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], place: str) -> None:
    """Copy ``tensors`` into ``module``; all names and shapes must agree.

    Raises:
        MmpostError: MMP-E071, naming what is missing, unexpected or of another shape.
    """
    expected = module.state_dict()
    problems = differences({name: tuple(tensor.shape) for name, tensor in expected.items()}, tensors)
    if problems:
        raise MmpostError("MMP-E071", f"{place} does not fit the model: {problems}.", "Check model and checkpoint.")
    module.load_state_dict(tensors)


def differences(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> str:
    """What of ``tensors`` is missing, unexpected or of another shape than ``shapes`` says; empty if nothing."""
    missing = sorted(set(shapes) - set(tensors))
    unexpected = sorted(set(tensors) - set(shapes))
    reshaped = [
        f"{name} {list(tensors[name].shape)} instead of {list(shapes[name])}"
        for name in sorted(set(shapes) & set(tensors))
        if tuple(tensors[name].shape) != tuple(shapes[name])
    ]
    found = [("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)]
    return "; ".join(f"{word} {_list(names)}" for word, names in found if names)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
