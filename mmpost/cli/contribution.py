"""``mmpost data contribution`` and ``mmpost audio-filter``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Sources = Annotated[list[str], typer.Argument(help="files, folders or task:NAME")]
Models = Annotated[list[str], typer.Option("--model", help="a voter; give it again for more, best of other families")]
Out = Annotated[Path, typer.Option(help="folder for scores, split files and the report")]
Votes = Annotated[int, typer.Option("--k", min=1, help="votes of each model with the medium and for each null")]
NullOption = Annotated[
    str, typer.Option("--null", help="silence, noise, none, shuffle, joined by commas, or all; audio: silence:30")
]
RuleOption = Annotated[str, typer.Option(help="robust, or paper: most models are right without")]
RewardOption = Annotated[str, typer.Option(help="verifier: answer, choice, exact, number, ...")]
Tokens = Annotated[int, typer.Option(min=1, help="length limit of an answer")]
Temperature = Annotated[float, typer.Option(min=0.0, help="of the votes; 0 = greedy, one vote")]
TopP = Annotated[float, typer.Option(help="nucleus of the votes")]
Seed = Annotated[int, typer.Option(min=0, help="of votes, noise and swapped media")]
Batch = Annotated[int, typer.Option(min=1, help="answers decoded together")]
Processes = Annotated[int, typer.Option(min=1, help="processes, or Ray actors, that share the rows")]
EngineOption = Annotated[str, typer.Option(help="processes, or ray: nodes that share the folder's disk")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of each process")]
Devices = Annotated[str, typer.Option(help="devices that processes take in turn, cuda:0,cuda:1")]
MediaRoot = Annotated[str | None, typer.Option(help="folder that relative media paths start from")]
Split = Annotated[str | None, typer.Option(help="split of a task or data set")]
Limit = Annotated[int | None, typer.Option(min=1, help="use only the first rows of each source")]
AsJson = Annotated[bool, typer.Option("--json", help="the summary as one JSON object on stdout")]


def register(app: typer.Typer, data_app: typer.Typer) -> None:
    """Put the commands into the tree."""
    app.command("audio-filter")(audio_filter)
    data_app.command("contribution")(data_contribution)


def data_contribution(
    data: Sources,
    model: Models,
    out: Out,
    modality: Annotated[str, typer.Option(help="what is taken away: audio, image or video")] = "audio",
    k: Votes = 4,
    null: NullOption = "silence",
    rule: RuleOption = "robust",
    reward: RewardOption = "answer",
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: Batch = 256,
    processes: Processes = 1,
    engine: EngineOption = "processes",
    threads: Threads = 1,
    devices: Devices = "",
    media_root: MediaRoot = None,
    split: Split = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Which rows need their sound, picture or video? The same command goes on after a stop."""
    from mmpost.api.contribution import Engine, contribution
    from mmpost.cli.questions import open_sources, show
    from mmpost.rollout.generate import Sampling

    found = contribution(
        open_sources(data, media_root, split, limit),
        model,
        out,
        modality=modality,  # type: ignore[arg-type]
        null=null,
        k=k,
        rule=rule,
        reward=reward,
        sampling=Sampling(max_new_tokens, temperature, top_p, seed),
        batch_size=batch_size,
        engine=Engine(processes, engine, threads, tuple(word for word in devices.split(",") if word)),
        progress=show("the votes"),
    )
    if as_json:
        sys.stdout.write(json.dumps(found, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(table(found, out))


def audio_filter(
    data: Sources,
    model: Models,
    out: Out,
    k: Votes = 4,
    null: NullOption = "silence",
    rule: RuleOption = "robust",
    reward: RewardOption = "answer",
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: Batch = 256,
    processes: Processes = 1,
    engine: EngineOption = "processes",
    threads: Threads = 1,
    devices: Devices = "",
    media_root: MediaRoot = None,
    split: Split = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Which rows are answered without listening (AudioMCQ): mmpost data contribution --modality audio."""
    data_contribution(
        data, model, out, "audio", k, null, rule, reward, max_new_tokens, temperature, top_p, seed, batch_size,
        processes, engine, threads, devices, media_root, split, limit, as_json,
    )  # fmt: skip


def table(found: dict[str, Any], out: Path) -> str:
    """The summary as text."""
    lines = [f"{found['rows']} rows, {found['modality']}"]
    for name, share in found["accuracy"].items():
        low, high = share["ci"]
        lines.append(f"accuracy {name:<10}{share['value']:>7.3f}  [{low:.3f}, {high:.3f}]")
    lines.append(f"chance{'':<13}{found['chance']:>7.3f}")
    for rule, counts in found["labels"].items():
        chosen = "  <- files" if rule == found["rule"] else ""
        lines.append(f"{rule:<8}{', '.join(f'{count} {label}' for label, count in counts.items() if count)}{chosen}")
    lines.append(f"{out / 'report.html'}")
    return "\n".join(lines) + "\n"
