"""Post-train and test a CLAP model from folders: sounds by class in, weights and scores out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, ClapModel

from mmpost.config.schema import MediaSection
from mmpost.contrastive.scenes import Waveform, draw
from mmpost.contrastive.teminal import Clap, Stage, similarity, train
from mmpost.contrastive.zste import zste
from mmpost.core.errors import MmpostError
from mmpost.core.seeding import generator, uniform
from mmpost.media import audio

MIN_CLASSES = 4
HELD_OUT = 0.25  # share of the recordings of a class that are played in tests alone, at least one
_ENDS = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".aif", ".aiff")


def open_clap(name: str) -> Clap:
    """A model with its processor.

    Raises:
        MmpostError: MMP-E030 when there is none, or another kind of model.
    """
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = ClapModel.from_pretrained(name)
        return Clap(model, processor)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        why = str(error).strip().splitlines()
        raise MmpostError(
            "MMP-E030",
            f"cannot open '{name}' as a CLAP model: {why[0] if why else type(error).__name__}.",
            "Name a folder with the weights of a ClapModel and its processor.",
        ) from error


def read_sounds(
    folder: Path, rate: int, *, max_seconds: float
) -> tuple[dict[str, list[Waveform]], dict[str, list[Waveform]]]:
    """Recordings by class, for training and for tests; which is which depends on the names of the files alone.

    Args:
        folder: One folder per class, named as captions shall name it (``_`` is a space), with at least two files each.
        rate: Samples per second that the model wants.
        max_seconds: Longer recordings are cut to their beginning.

    Raises:
        MmpostError: MMP-D095 for a folder of another form, or what decoding raises.
    """
    training: dict[str, list[Waveform]] = {}
    tests: dict[str, list[Waveform]] = {}
    classes = sorted(place for place in folder.iterdir() if place.is_dir()) if folder.is_dir() else []
    if len(classes) < MIN_CLASSES:
        raise MmpostError(
            "MMP-D095",
            f"'{folder}' has {len(classes)} class folders; at least {MIN_CLASSES} are needed.",
            "Put the files of each class into a folder of its name.",
        )
    section = MediaSection(sample_rate=rate)
    for place in classes:
        files = sorted(file for file in place.iterdir() if file.suffix.lower() in _ENDS)
        if len(files) < 2:
            raise MmpostError(
                "MMP-D095",
                f"'{place}' has {len(files)} sound files; at least 2 are needed, one of which is kept for tests.",
                f"Add files ({', '.join(_ENDS)}), or remove the folder.",
            )
        heard = {
            file: audio.load(str(file), section=section, origin=str(file), end=max_seconds).samples for file in files
        }
        order = sorted(files, key=lambda file: float(uniform(0, f"teminal/{file.parent.name}/{file.name}")))
        count = max(1, round(HELD_OUT * len(files)))
        name = place.name.replace("_", " ")
        tests[name], training[name] = [heard[f] for f in order[:count]], [heard[f] for f in order[count:]]
    return training, tests


def post_train(
    model: str, folder: Path, out: Path, stages: Sequence[Stage], *, scenes: int = 500, seed: int = 0
) -> dict[str, Any]:
    """Run the stages and write the model, and ZSTE before and after, to ``out``.

    Args:
        model: Folder of a ``ClapModel``.
        folder: See ``read_sounds``.
        out: ``final/`` and ``zste.json`` are written here.
        stages: In order.
        scenes: Played in a test.
        seed: Of scenes in training and tests.

    Returns:
        What ``zste.json`` says: ``before``, ``after``, and the ``stages`` with their first and last losses.
    """
    towers = open_clap(model)
    training, tests = read_sounds(folder, towers.extractor.sampling_rate, max_seconds=_half_window(towers))
    result: dict[str, Any] = {"before": scores(towers, tests, scenes=scenes, seed=seed), "stages": []}
    for stage in stages:
        towers.model.train()
        losses = train(towers, training, stage, seed=seed)
        result["stages"].append({**asdict(stage), "first_loss": losses[0], "last_loss": losses[-1]})
    result["after"] = scores(towers, tests, scenes=scenes, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    towers.model.save_pretrained(out / "final")
    towers.processor.save_pretrained(out / "final")
    (out / "zste.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def evaluate(model: str, folder: Path, *, scenes: int = 500, seed: int = 0) -> dict[str, Any]:
    """ZSTE of a model on the test recordings of a folder."""
    towers = open_clap(model)
    _, tests = read_sounds(folder, towers.extractor.sampling_rate, max_seconds=_half_window(towers))
    return scores(towers, tests, scenes=scenes, seed=seed)


def scores(towers: Clap, sounds: dict[str, list[Waveform]], *, scenes: int, seed: int) -> dict[str, Any]:
    """ZSTE on scenes of the test recordings."""
    towers.model.eval()
    played = draw(sorted(sounds), scenes, "A", random=generator(seed, "zste/scenes"))
    return zste(similarity(towers, sounds, seed=seed), played, sorted(sounds), seed=seed)


def _half_window(towers: Clap) -> float:
    """Longest recording: two of them have to fit the model's window, which would cut the second one."""
    return float(towers.extractor.max_length_s) / 2
