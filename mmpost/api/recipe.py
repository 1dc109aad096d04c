"""Two-stage training on the split of a contribution filter: supervised on one part, reinforced on the other.

Source: "Measuring Audio's Impact on Correctness: Audio-Contribution-Aware Post-Training of Large Audio Language
Models", arXiv 2509.21060. The supervised part is always as large as the weak part, and no row is in both.

================  =================================  ==================================
recipe            supervised fine-tuning             reinforcement learning
================  =================================  ==================================
weak-to-strong    weak rows                          strong rows
mixed-to-strong   a random mix, as many              strong rows that are not in the mix
mixed-to-mixed    the same mix                       all rows that are not in the mix
================  =================================  ==================================
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmpost.api.training import Training
from mmpost.config.load import load, resolved_yaml
from mmpost.config.run import GRPOConfig, SFTConfig
from mmpost.core import seeding
from mmpost.core.errors import MmpostError
from mmpost.core.files import write_whole

RECIPES = {
    "weak-to-strong": ("weak", "strong"),
    "mixed-to-strong": ("mix", "strong_rest"),
    "mixed-to-mixed": ("mix", "rest"),
}
FILES = ("weak", "strong", "other")


@dataclass(frozen=True, slots=True)
class TwoStages:
    """What a recipe trains with.

    Attributes:
        configs: Folder or shipped recipe folder with ``sft.yaml`` and ``grpo.yaml``.
        model: Weights that the first stage starts from; None for what its configuration says.
        seed: Of both runs and of the mix.
        sft: Further options of the first stage.
        grpo: Further options of the second.
    """

    configs: str
    model: str | None = None
    seed: int = 0
    sft: tuple[str, ...] = ()
    grpo: tuple[str, ...] = ()


def run_recipe(name: str, filtered: Path, out: Path, stages: TwoStages) -> dict[str, Any]:
    """Train both stages; a stage that is finished is taken as it is, an interrupted one goes on.

    Args:
        name: One of ``RECIPES``.
        filtered: Folder that ``mmpost data contribution`` wrote.
        out: Folder for ``rows``, the runs ``sft`` and ``grpo``, and ``recipe.json``.
        stages: What is trained with.

    Returns:
        Number of rows and results of the held-out tasks by stage; also in ``recipe.json``.

    Raises:
        MmpostError: MMP-C006 for an unknown recipe, MMP-D062 when a part is missing or empty, and what training raises.
    """
    if name not in RECIPES:
        raise MmpostError("MMP-C006", f"unknown name '{name}' among recipes.", f"Known: {', '.join(RECIPES)}")
    first, second = RECIPES[name]
    parts = write_parts(filtered, out / "rows", (first, second), stages.seed)
    sft, grpo = out / "sft", out / "grpo"
    words = [*_words(parts[first], filtered, sft, stages.model, stages.seed), *stages.sft]
    _stage(SFTConfig, f"{stages.configs}/sft.yaml", words)
    words = [*_words(parts[second], filtered, grpo, str(sft / "final"), stages.seed), *stages.grpo]
    _stage(GRPOConfig, f"{stages.configs}/grpo.yaml", words)
    found = {
        "recipe": name,
        "sft": {"part": first, "rows": _count(parts[first]), "eval": _results(sft)},
        "grpo": {"part": second, "rows": _count(parts[second]), "eval": _results(grpo)},
    }
    write_whole(out / "recipe.json", json.dumps(found, indent=1) + "\n")
    return found


def write_parts(filtered: Path, out: Path, names: Sequence[str], seed: int) -> dict[str, Path]:
    """Write parts of a filtered data set as files; media paths in them start from ``filtered``.

    Raises:
        MmpostError: MMP-D062.
    """
    lines = {}
    for name in FILES:
        file = filtered / f"{name}.jsonl"
        if not file.is_file():
            raise MmpostError(
                "MMP-D062",
                f"'{filtered}' holds no {file.name}.",
                "Run first: mmpost data contribution DATA --model MODEL --out FOLDER",
            )
        lines[name] = file.read_text(encoding="utf-8").split("\n")[:-1]
    every = [line for name in FILES for line in lines[name]]
    order = np.argsort(seeding.uniform(seed, "recipe/mix", np.arange(len(every))), kind="stable")
    chosen = set(order[: len(lines["weak"])].tolist())
    strong = range(len(lines["weak"]), len(lines["weak"]) + len(lines["strong"]))
    parts = {
        "weak": lines["weak"],
        "strong": lines["strong"],
        "mix": [every[i] for i in sorted(chosen)],
        "strong_rest": [every[i] for i in strong if i not in chosen],
        "rest": [line for i, line in enumerate(every) if i not in chosen],
    }
    paths = {}
    for name in names:
        if not parts[name]:
            counts = ", ".join(f"{len(lines[file])} {file}" for file in FILES)
            raise MmpostError(
                "MMP-D062", f"the part '{name}' of '{filtered}' has no rows ({counts}).", "Filter more rows."
            )
        paths[name] = out / f"{name}.jsonl"
        write_whole(paths[name], "".join(f"{line}\n" for line in parts[name]))
    return paths


def _words(rows: Path, filtered: Path, folder: Path, model: str | None, seed: int) -> list[str]:
    source = json.dumps([{"path": str(rows), "media_root": str(filtered)}])
    words = [f"data.train={source}", f"train.output_dir={folder}", f"train.seed={seed}"]
    return words if model is None else [*words, f"model.model_name_or_path={model}"]


def _stage(config_class: type[SFTConfig] | type[GRPOConfig], config: str, words: Sequence[str]) -> None:
    loaded = load(config_class, [config], words)
    command = ["mmpost", config_class.command, config, *words]
    Training(loaded.config, command=command, config_yaml=resolved_yaml(loaded), sources=loaded.sources).run()


def _count(rows: Path) -> int:
    return rows.read_text(encoding="utf-8").count("\n")


def _results(folder: Path) -> dict[str, Any]:
    """Held-out results of a run by task."""
    files = sorted((folder / "eval").glob("*.json"))
    return {file.stem: json.loads(file.read_text()) for file in files}
