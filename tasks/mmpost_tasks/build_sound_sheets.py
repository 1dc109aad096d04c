"""Write the sound sheets of ``data/`` from the samples of Sonic Pi, to check or redo them.

    python -m mmpost_tasks.build_sound_sheets FOLDER_WITH_FLAC_FILES OUTPUT_FOLDER

Selection rule, per class: all recordings whose names match, sorted by the SHA-256 of the file's bytes; the first third
(rounded down, at least two) is ``heldout``, the rest ``train``. A recording is averaged to one channel, brought to
16 kHz, cut to its first second with the last 50 ms faded where it goes on, and scaled to a peak of 0.9. Recordings
shorter than 80 ms are left out.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16000
SECONDS = 1.0
MIN_SECONDS = 0.08
PEAK = 0.9
CLASSES: dict[str, tuple[str, ...]] = {
    "kick": ("bd_*", "drum_bass_*", "drum_heavy_kick", "elec_hollow_kick", "elec_soft_kick"),
    "snare": ("sn_*", "drum_snare_*", "elec_*snare"),
    "cymbal": ("drum_cymbal_*", "drum_splash_*", "elec_cymbal"),
    "tabla": ("tabla_*",),
    "bass": ("bass_*",),
    "robot": ("mehackit_robot*", "glitch_robot*"),
}


def prepared(path: Path) -> np.ndarray:
    """Samples float ``[n]`` of one recording after the rule above."""
    import soundfile  # noqa: PLC0415
    import soxr  # noqa: PLC0415

    samples, rate = soundfile.read(path, always_2d=True)
    mono = soxr.resample(samples.mean(1), rate, RATE)
    limit = round(SECONDS * RATE)
    if len(mono) > limit:
        fade = RATE // 20
        mono = mono[:limit].copy()
        mono[-fade:] *= np.linspace(1.0, 0.0, fade)
    return mono * (PEAK / np.abs(mono).max())


def select(source: Path, patterns: tuple[str, ...]) -> list[tuple[Path, str]]:
    """Recordings of one class with their split."""
    files = [file for file in source.glob("*.flac") if any(fnmatch.fnmatch(file.stem, one) for one in patterns)]
    ordered = sorted(files, key=lambda file: hashlib.sha256(file.read_bytes()).hexdigest())
    ordered = [file for file in ordered if len(prepared(file)) >= MIN_SECONDS * RATE]
    held = max(2, len(ordered) // 3)
    return [(file, "heldout" if place < held else "train") for place, file in enumerate(ordered)]


def build(source: Path, target: Path) -> None:
    """Write one FLAC per class and ``sounds.json`` into ``target``."""
    import soundfile  # noqa: PLC0415

    sheets: list[dict[str, Any]] = []
    for label, patterns in CLASSES.items():
        clips, notes, start = [], [], 0
        for file, split in select(source, patterns):
            clip = prepared(file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            notes.append({"name": file.stem, "split": split, "start": start, "samples": len(clip), "sha256": digest})
            clips.append(clip)
            start += len(clip)
        path = target / f"sounds_{label}.flac"
        soundfile.write(path, np.concatenate(clips), RATE, subtype="PCM_16")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        sheets.append({"file": path.name, "label": label, "sha256": digest, "recordings": notes})
    text = json.dumps({"rate": RATE, "sheets": sheets}, indent=1)
    (target / "sounds.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
