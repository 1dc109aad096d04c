"""Which files a path stands for, what their hash is, and what was probably meant when there are none."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path

from mmpost.core.errors import MmpostError

SUFFIXES = (".parquet", ".jsonl", ".json")
_CHUNK_BYTES = 1 << 20
_LISTED = 8


def saved_data_set(path: Path) -> bool:
    """True for a folder that ``datasets.save_to_disk`` wrote."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def data_files(path: Path, shown: str, split: str | None) -> list[Path]:
    """The data files of a path: itself, or the files of one suffix in the folder or its folder ``data``.

    Args:
        path: Existing file or folder.
        shown: Its name in messages.
        split: Take only files whose name is the split or starts with it and ``-``, ``.`` or ``_``.

    Raises:
        MmpostError: MMP-D033 when no file belongs to the split, MMP-D034 for an unknown suffix or a folder of
            several kinds, or without data files.
    """
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise _not_data(shown, f"the suffix '{path.suffix}' is not known")
        if split is not None:
            raise MmpostError(
                "MMP-D033", f"{shown}: a file has no splits, so '{split}' cannot be chosen.", "Remove split"
            )
        return [path]
    for folder in (path, path / "data"):
        found = {suffix: sorted(folder.glob(f"*{suffix}")) for suffix in SUFFIXES}
        if found[".parquet"] and found[".jsonl"]:
            raise _not_data(shown, "the folder holds both .parquet and .jsonl files")
        files = next((found[suffix] for suffix in SUFFIXES if found[suffix]), [])
        if files:
            return files if split is None else _of_split(files, split, shown)
    raise _not_data(shown, "the folder holds no data files")


def _of_split(files: Sequence[Path], split: str, shown: str) -> list[Path]:
    chosen = [
        file for file in files if file.stem == split or file.name.startswith((f"{split}-", f"{split}.", f"{split}_"))
    ]
    if not chosen:
        names = ", ".join(file.name for file in files[:_LISTED])
        raise MmpostError("MMP-D033", f"{shown}: no file of the split '{split}' among {names}.", "Check Source.split")
    return chosen


def _not_data(shown: str, why: str) -> MmpostError:
    return MmpostError(
        "MMP-D034", f"{shown}: {why}.", f"Give a {', '.join(sorted(SUFFIXES))} file or a folder of one kind"
    )


def missing_source(shown: str) -> MmpostError:
    """The MMP-D030 of a path that does not exist, with names near to it."""
    path = Path(shown)
    parent = next((folder for folder in path.parents if folder.is_dir()), Path())
    lost = path.relative_to(parent).parts[0] if path != parent else path.name
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(lost, names, n=3)
    if near:
        fix = f"Did you mean {' or '.join(repr(str(parent / name)) for name in near)}?"
    else:
        data = [name for name in names if Path(name).suffix.lower() in SUFFIXES][:_LISTED]
        fix = f"Data files in '{parent}': {', '.join(data) or 'none'}"
    return MmpostError("MMP-D030", f"{shown}: no such file or folder.", fix)


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of one file's bytes, or of the list of hashes and names of several."""
    if len(files) == 1:
        return _file_digest(files[0])
    lines = (f"{_file_digest(file)}  {file.name}\n" for file in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            total.update(chunk)
    return total.hexdigest()
