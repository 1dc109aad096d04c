"""``mmpost mixture``: in which proportions to mix data sources, from short runs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmpost.cli.words import numbers, words

if TYPE_CHECKING:
    from mmpost.mixture.fit import Fit
    from mmpost.mixture.suggest import Suggestions

mixture_app = typer.Typer(
    help="Choose the proportions of data sources by short proxy runs (MoDoMoDo).", no_args_is_help=True
)
FOLDER = Path("runs/mixture")
Folder = Annotated[Path, typer.Argument(help="folder of mmpost mixture run")]


@mixture_app.command("design")
def mixture_design(
    sources: Annotated[str, typer.Option(help="names of the sources, a,b,c")],
    n: Annotated[int | None, typer.Option("--n", min=1, help="number of mixtures")] = None,
    scheme: Annotated[
        str,
        typer.Option(help="seeds (singles, leave-one-out, uniform), simplex, dirichlet, heuristics; joined by commas"),
    ] = "seeds,dirichlet",
    seed: Annotated[int, typer.Option(min=0, help="of random mixtures")] = 0,
    denominator: Annotated[int | None, typer.Option(min=1, help="simplex: weights are multiples of 1 over it")] = None,
    results: Annotated[Path | None, typer.Option(help="heuristics: folder of earlier runs")] = None,
    target: Annotated[str, typer.Option(help="heuristics: score of the earlier runs")] = "eval.mean",
    out: Annotated[Path, typer.Option(dir_okay=False, help="file to write")] = Path("design.yaml"),
) -> None:
    """List the mixtures to try: mmpost mixture design --sources a,b,c --n 12."""
    from mmpost.mixture.designs import design, write_design
    from mmpost.mixture.records import read_records
    from mmpost.mixture.scores import Target

    records = read_records(results) if results is not None else []
    wanted = Target(target)
    by_label = {record.label: wanted(record.scores)[0] for record in records}
    names = [name.strip() for name in sources.split(",")]
    if n is None and "dirichlet" in scheme and denominator is None:
        n = 4 * len(names)
    made = design(names, scheme, n, seed=seed, denominator=denominator, records=records, target=by_label)
    write_design(out, made)
    sys.stdout.write(f"{len(made.mixtures)} mixtures: {out}\n")


@mixture_app.command("run", context_settings={"allow_extra_args": True})
def mixture_run(
    context: typer.Context,
    design: Annotated[Path, typer.Argument(help="file of mmpost mixture design or of suggest --design")],
    config: Annotated[str, typer.Option(help="proxy run; every source of data.train has a name")],
    jobs: Annotated[int, typer.Option(min=1, help="runs at once")] = 1,
    engine: Annotated[str, typer.Option(help="processes or ray")] = "processes",
    seeds: Annotated[str, typer.Option(help="comma-separated; every mixture is run with each")] = "0",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of a run; 0 = as many as it likes")] = 1,
    devices: Annotated[str, typer.Option(help="CUDA devices that runs take in turn, 0,1,2")] = "",
    command: Annotated[str, typer.Option(help="sft, grpo, upt, or auto: by the options of the config")] = "auto",
    out: Annotated[Path, typer.Option(help="folder of the runs; may hold earlier ones")] = FOLDER,
) -> None:
    """Train every mixture briefly; run it again to go on after an interruption. KEY=VALUE words go to each run."""
    from mmpost.mixture.designs import read_design
    from mmpost.mixture.run import open_proxy, run

    made = read_design(design)
    proxy = open_proxy(config, context.args, made.sources, command)
    records = run(
        made,
        proxy,
        out,
        jobs=jobs,
        seeds=numbers(seeds, "--seeds"),
        engine=engine,
        threads=threads,
        devices=[device for device in devices.split(",") if device],
        say=say,
    )
    say(f"{len(records)} runs in {out / 'results.jsonl'}")


@mixture_app.command("fit")
def mixture_fit(
    folder: Folder = FOLDER,
    target: Annotated[
        str, typer.Option(help="eval.mean, eval.weighted, eval.in, eval.out, eval.in_out or eval.TASK")
    ] = "eval.mean",
    model: Annotated[str, typer.Option(help="mean, linear, quadratic, gp, or auto: smallest error")] = "auto",
    tasks: Annotated[str, typer.Option(help="tests that eval.mean and eval.weighted are over; default all")] = "",
    in_tasks: Annotated[str, typer.Option(help="tests of the in-score")] = "",
    out_tasks: Annotated[str, typer.Option(help="tests of the out-score")] = "",
    in_weight: Annotated[float, typer.Option(min=0, max=1, help="share of the in-score in eval.in_out")] = 0.5,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="file; default predictor.json in the folder")] = None,
) -> None:
    """Fit a predictor of the score and say how good it is on runs that it has not seen."""
    from mmpost.mixture.fit import PREDICTOR, fit, write_fit
    from mmpost.mixture.records import read_records
    from mmpost.mixture.run import read_settings
    from mmpost.mixture.scores import Target

    records = read_records(folder)
    wanted = Target(target, words(in_tasks), words(out_tasks), in_weight, words(tasks))
    with _told():
        fitted = fit(records, wanted, model, settings=read_settings(folder))
    file = out or (folder if folder.is_dir() else folder.parent) / PREDICTOR
    write_fit(file, fitted)
    sys.stdout.write(quality_table(fitted) + f"{file}\n")


@mixture_app.command("suggest")
def mixture_suggest(
    folder: Folder = FOLDER,
    n: Annotated[int, typer.Option("--n", min=1, help="number of mixtures")] = 5,
    floor: Annotated[float, typer.Option(min=0, max=1, help="smallest weight of every source")] = 0.0,
    strategy: Annotated[str, typer.Option(help="ei: what to try next; mean: what to train with")] = "ei",
    model: Annotated[str, typer.Option(help="gp, linear, quadratic, or auto: the fitted one")] = "gp",
    seed: Annotated[int, typer.Option(min=0, help="of the candidates")] = 0,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="file for the first; others beside it as FILE-2.yaml ...")
    ] = None,
    design: Annotated[
        Path | None, typer.Option(dir_okay=False, help="also write them as a design for mmpost mixture run")
    ] = None,
) -> None:
    """Weights of data.train to train with next, with predicted intervals and uniform weights beside them."""
    from mmpost.mixture.designs import Design, write_design
    from mmpost.mixture.fit import read_fit
    from mmpost.mixture.suggest import fragment, suggest, write_fragments

    with _told():
        fitted = read_fit(folder)
        found = suggest(fitted, n, floor=floor, strategy=strategy, model=model, seed=seed)
    if design is not None:
        mixtures = tuple(tuple(one.weights.values()) for one in found.chosen)
        write_design(design, Design(fitted.sources, mixtures, f"suggested by {found.model} ({strategy})", seed))
    if out is None:
        sys.stdout.write(fragment(fitted, found))
    else:
        for file in write_fragments(out, fitted, found):
            sys.stdout.write(f"{file}\n")


@mixture_app.command("report")
def mixture_report(
    folder: Folder = FOLDER,
    strategy: Annotated[str, typer.Option(help="of the suggestions: ei or mean")] = "ei",
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="file; default report.html in the folder")] = None,
) -> None:
    """Write report.html: runs, predictor, suggestions."""
    from mmpost.mixture.fit import read_fit
    from mmpost.mixture.records import read_records
    from mmpost.mixture.report import write_mixture_report

    with _told():
        fitted = read_fit(folder)
        found = _suggestions(fitted, strategy)
    file = out or folder / "report.html"
    sys.stdout.write(f"{write_mixture_report(file, fitted, read_records(folder), found)}\n")


def _suggestions(fitted: Fit, strategy: str) -> Suggestions:
    from mmpost.mixture.predict import is_determined
    from mmpost.mixture.suggest import suggest

    return suggest(fitted, strategy=strategy, model="gp" if is_determined("gp", fitted.weights) else "auto")


@contextmanager
def _told() -> Iterator[None]:
    """Warnings as one line each, without the place in the code."""
    with warnings.catch_warnings(record=True) as seen:
        yield
    for text in dict.fromkeys(str(warning.message) for warning in seen):
        say(f"warning: {text}")


def quality_table(fitted: Fit) -> str:
    """Leave-one-out figures of every model as text."""
    lines = [
        f"{fitted.target.name} of {len(fitted.values)} runs, each predicted from the others",
        f"{'model':<12}{'error':>8}{'R2':>9}{'ranks':>8}{'in 95 %':>9}",
    ]
    for name, q in fitted.quality.items():
        mark = "  <- chosen" if name == fitted.model else ""
        lines.append(f"{name:<12}{q.mae:>8.4f}{q.r2:>9.2f}{q.spearman:>8.2f}{q.coverage:>9.2f}{mark}")
    if not fitted.signal:
        lines.append("no signal: no model beats the mean by more than one standard error")
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    """One line for people."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
