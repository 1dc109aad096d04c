"""``mmpost recipe``: two-stage training on the split of a contribution filter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Put the command into the tree."""
    app.command("recipe")(recipe)


def recipe(
    name: Annotated[str, typer.Argument(help="weak-to-strong, mixed-to-strong or mixed-to-mixed")],
    filtered: Annotated[Path, typer.Argument(help="folder that mmpost data contribution wrote")],
    out: Annotated[Path, typer.Option(help="folder for the runs sft and grpo")],
    configs: Annotated[str, typer.Option(help="folder with sft.yaml and grpo.yaml, or a shipped one")] = "audiomcq",
    model: Annotated[str | None, typer.Option(help="where the first stage starts; default: as its config says")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of both runs and of the mix")] = 0,
    sft: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the first stage; give it again for more")] = None,
    grpo: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the second stage")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """SFT on one part of a filtered data set, then GRPO on the other (AudioMCQ); goes on after a stop."""
    from mmpost.api.recipe import TwoStages, run_recipe

    stages = TwoStages(configs.rstrip("/"), model, seed, tuple(sft or ()), tuple(grpo or ()))
    found = run_recipe(name, filtered, out, stages)
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    for stage in ("sft", "grpo"):
        one = found[stage]
        sys.stdout.write(f"{stage}: {one['rows']} rows ({one['part']}), {out / stage / 'final'}\n")
        for task, result in one["eval"].items():
            share = result["metrics"]["accuracy"]
            low, high = share["ci"]
            sys.stdout.write(f"  {task}: {share['value']:.3f} [{low:.3f}, {high:.3f}]\n")
