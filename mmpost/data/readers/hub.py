"""Data sets of the ``datasets`` library: folders of ``save_to_disk`` and ids of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from mmpost.core.errors import MmpostError
from mmpost.data.readers.features import undecoded
from mmpost.data.readers.row import RawRow, rows_of


def read_saved(path: Path, shown: str, split: str | None) -> Iterator[RawRow]:
    """Rows of a folder that ``save_to_disk`` wrote.

    Args:
        path: The folder.
        shown: Its name in messages.
        split: Split to read; None takes the only one, or ``train``.

    Raises:
        MmpostError: MMP-D033 for an unknown split, MMP-D034 when the folder is damaged.
    """
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise MmpostError("MMP-D034", f"{shown}: cannot be read as a saved data set: {error}") from error
    return rows_of(shown, iter(undecoded(_choose(found, split, shown), name=shown)))


def read_hub(identity: str, split: str | None) -> Iterator[RawRow]:
    """Rows of a hub data set, from the local cache where it has them.

    Raises:
        MmpostError: MMP-D026 offline and not cached, MMP-D030 unknown on the hub, MMP-D033 for an unknown
            split.
    """
    try:
        found = datasets.load_dataset(identity, split=split)
    except (ConnectionError, OfflineModeIsEnabled) as error:
        raise _not_cached(identity) from error
    except (FileNotFoundError, HfHubHTTPError) as error:
        if datasets.config.HF_HUB_OFFLINE:
            raise _not_cached(identity) from error
        raise MmpostError(
            "MMP-D030", f"{identity}: no such file or folder, and the hub has no such data set."
        ) from error
    except ValueError as error:
        if split is not None and "split" in str(error).lower():
            raise MmpostError("MMP-D033", f"{identity}: {error}", "Choose one with Source.split") from error
        raise MmpostError("MMP-D034", f"{identity}: cannot be read as a hub data set: {error}") from error
    chosen = found if split else _choose(found, None, identity)
    return rows_of(identity, iter(undecoded(chosen, name=identity)))


def _choose(found: Any, split: str | None, shown: str) -> Any:
    if not isinstance(found, dict):
        if split is not None:
            raise MmpostError("MMP-D033", f"{shown}: has no splits, so '{split}' cannot be chosen.", "Remove split")
        return found
    name = split or (next(iter(found)) if len(found) == 1 else "train")
    if name not in found:
        wanted = f"has no split '{name}'; it has" if split else "has the splits"
        raise MmpostError("MMP-D033", f"{shown}: {wanted} {', '.join(found)}.", "Choose one with Source.split")
    return found[name]


def _not_cached(identity: str) -> MmpostError:
    cache = datasets.config.HF_DATASETS_CACHE
    why = "offline mode is on" if datasets.config.HF_HUB_OFFLINE else "the hub cannot be reached"
    return MmpostError("MMP-D026", f"{identity} is not in the local cache and {why}; expected under {cache}")
