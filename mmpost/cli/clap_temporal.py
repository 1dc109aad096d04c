"""``mmpost clap-temporal train|eval``: a sense of order for CLAP models (TeminAL), and its test (ZSTE)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

clap_app = typer.Typer(help="A sense of order for CLAP models (TeminAL), and its test (ZSTE).", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="folder of a ClapModel with its processor")]
Sounds = Annotated[Path, typer.Argument(help="one folder of sound files per class")]
Scenes = Annotated[int, typer.Option(min=1, help="scenes of a test")]
Seed = Annotated[int, typer.Option(min=0, help="seed of scenes")]


@clap_app.command("train")
def train(
    model: Model,
    sounds: Sounds,
    out: Annotated[Path, typer.Option(help="folder for final/ and zste.json")] = Path("runs/clap-temporal"),
    steps_a: Annotated[int, typer.Option(min=0, help="steps of stage A: single sounds and pairs")] = 500,
    steps_b: Annotated[int, typer.Option(min=0, help="steps of stage B: pairs and their reverses")] = 500,
    batch_size: Annotated[int, typer.Option(min=2, help="scenes of a step")] = 64,
    learning_rate: Annotated[float, typer.Option(min=0, help="of the towers")] = 1e-5,
    head_learning_rate: Annotated[float, typer.Option(min=0, help="of projections and temperatures")] = 1e-4,
    alpha_same: Annotated[float, typer.Option(min=0, help="weight of a scene's own reverse as a negative")] = 1.0,
    alpha_cross: Annotated[float, typer.Option(min=0, help="weight of the other scenes' reverses")] = 1.0,
    beta: Annotated[float, typer.Option(min=0, help="weight of reversed scenes as positives")] = 1.0,
    scenes: Scenes = 500,
    seed: Seed = 0,
) -> None:
    """Post-train a model in two stages; test recordings are never trained on."""
    from mmpost.contrastive.loss import Weights
    from mmpost.contrastive.run import post_train
    from mmpost.contrastive.teminal import Stage

    weights = Weights(alpha_same, alpha_cross, beta)
    stages = [
        Stage("A", steps_a, batch_size, learning_rate, head_learning_rate, weights),
        Stage("B", steps_b, batch_size, learning_rate, head_learning_rate, weights),
    ]
    result = post_train(model, sounds, out, [stage for stage in stages if stage.steps], scenes=scenes, seed=seed)
    _print(result["after"], result["before"])
    sys.stdout.write(f"done: {out / 'final'}\n")


@clap_app.command("eval")
def evaluate(
    model: Model,
    sounds: Sounds,
    scenes: Scenes = 500,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Test a model on scenes of the test recordings."""
    from mmpost.contrastive.run import evaluate as run

    found = run(model, sounds, scenes=scenes, seed=seed)
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        _print(found)


def _print(found: dict[str, Any], before: dict[str, Any] | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="ZSTE")
    for column in ("task", "accuracy", "95 % interval", "chance", "n", *(["before"] if before else [])):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, one in found.items():
        low, high = one["ci"]
        cells = [name, f"{one['accuracy']:.3f}", f"{low:.3f} to {high:.3f}", f"{one['chance']:.3f}", str(one["n"])]
        table.add_row(*cells, *([f"{before[name]['accuracy']:.3f}"] if before else []))
    Console().print(table)
