"""scikit-learn's scanned digits as sheets of pictures, which is what the tokenizer commands read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

SIDE = 16  # px; the scans have 8


def digit_sheets() -> Path:
    """The description of the sheets, written into the cache folder on first use.

    A sheet per digit holds the splits of ``mmpost_tasks.tiles`` one behind the other.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "mmpost" / f"digits-{SIDE}-v1"
    if not (folder / "digits.json").is_file():
        scratch = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        _write(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            # Another process was first, with the same content.
            shutil.rmtree(scratch, ignore_errors=True)
    return folder / "digits.json"


def _write(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    from mmpost_tasks.tiles import DIGITS, SPLITS, scaled

    splits = {split: scaled("digits", split, SIDE) for split in SPLITS}
    sheets = []
    for label in DIGITS:
        pictures = np.concatenate([splits[split][label].pixels for split in SPLITS])
        # One column: a last row that is not full would hold pictures that are none.
        rows = pictures.reshape(-1, SIDE)
        file = folder / f"digit_{label}.png"
        Image.fromarray(rows).save(file)
        places = {split: [int(name.rpartition("/")[2]) for name in splits[split][label].ids] for split in SPLITS}
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        sheets.append({"file": file.name, "label": label, "sha256": digest, "official_positions": places})
    (folder / "digits.json").write_text(json.dumps({"side_px": SIDE, "sheets": sheets}) + "\n")
