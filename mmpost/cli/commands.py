"""The tree of commands. Heavy modules are imported inside the functions, after the configuration is valid."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmpost import __version__
from mmpost.cli import contribution, demo_audio, demo_video, generator, recipe, tokenizer
from mmpost.cli.clap_temporal import clap_app
from mmpost.cli.mixture import mixture_app
from mmpost.cli.words import numbers
from mmpost.config.run import GRPOConfig, SFTConfig
from mmpost.config.upt import UPTConfig

if TYPE_CHECKING:
    from mmpost.api.training import Training

# Options of the training commands are KEY=VALUE words, which our own loader reads with file and line.
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    name="mmpost",
    help="Multimodal post-training: SFT and RL for vision-language models in one loop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)
runs_app = typer.Typer(help="Browse run folders.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(runs_app, name="runs")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(generator.app, name="generator")
app.add_typer(mixture_app, name="mixture")
app.add_typer(clap_app, name="clap-temporal")
contribution.register(app, data_app)
recipe.register(app)
demo_audio.register(app)

EXAMPLES = {
    "sft": (
        "Supervised fine-tuning.",
        "mmpost sft configs/demo/sft.yaml train.output_dir=runs/sft",
        "mmpost sft rows.jsonl model_name_or_path=Qwen/Qwen2.5-VL-3B-Instruct peft.kind=lora max_steps=200",
        "mmpost sft rows.jsonl model_name_or_path=Qwen/Qwen2.5-VL-7B-Instruct train.strategy=fsdp2 --gpus 8",
    ),
    "grpo": (
        "Reinforcement learning with verifiable rewards (GRPO).",
        "mmpost grpo configs/demo/grpo.yaml model.model_name_or_path=runs/sft/final",
        "mmpost grpo rows.jsonl model_name_or_path=runs/sft/final rewards=[answer,format] num_generations=8",
    ),
    "upt": (
        "Learning without labels: GRPO on the majority vote of the completions (MM-UPT).",
        "mmpost upt configs/demo/upt.yaml model.model_name_or_path=runs/demo-upt/seed-0/sft/final",
        "mmpost upt questions.jsonl model_name_or_path=Qwen/Qwen2.5-VL-7B-Instruct max_completion_length=2048",
        "mmpost upt pictures.jsonl --synthesize-questions=direct model_name_or_path=MODEL output_dir=runs/upt",
    ),
}


@app.command(context_settings=PASS_THROUGH)
def sft(context: typer.Context) -> None:
    """Supervised fine-tuning: mmpost sft CONFIG.yaml key=value ..."""
    _train(SFTConfig, context.args)


@app.command(context_settings=PASS_THROUGH)
def grpo(context: typer.Context) -> None:
    """RL with verifiable rewards: mmpost grpo CONFIG.yaml key=value ..."""
    _train(GRPOConfig, context.args)


@app.command(context_settings=PASS_THROUGH)
def upt(context: typer.Context) -> None:
    """Learning without labels, by majority vote (MM-UPT): mmpost upt CONFIG.yaml key=value ..."""
    args = list(context.args)
    if any(word.partition("=")[0] == "--synthesize-questions" for word in args):
        from mmpost.cli.questions import synthesize_first

        args = synthesize_first(args)
    _train(UPTConfig, args)


def _train(config_class: type[SFTConfig] | type[GRPOConfig], args: list[str]) -> None:
    from mmpost.cli import launch
    from mmpost.config.load import load, resolved_yaml, split_arguments

    name = config_class.command
    if "--help" in args or "-h" in args:
        _help(config_class, args)
        return
    if not args:
        _help(config_class, ["--help"])
        raise typer.Exit(2)
    wanted, args = launch.split(args)
    files, overrides = split_arguments(args)
    # Before processes are started, so that a mistake is told once.
    loaded = load(config_class, files, overrides)
    if wanted is not None and launch.needed(wanted):
        raise typer.Exit(launch.start(wanted, [name, *args]))

    from mmpost.api.training import Training

    _run(
        Training(
            loaded.config,
            command=["mmpost", name, *args],
            config_yaml=resolved_yaml(loaded),
            sources=loaded.sources,
        )
    )


def _run(training: Training) -> None:
    output = training.run()
    if training.processes.is_main:
        done = "this run was already finished" if training.was_finished else "done"
        sys.stderr.write(f"{done}: {output / 'final'}  report: {output / 'report.html'}\n")


def _help(config_class: type[SFTConfig] | type[GRPOConfig], args: list[str]) -> None:
    from mmpost.config.help import render

    at = next((i for i, word in enumerate(args) if word in ("--help", "-h")), 0)
    section = args[at + 1] if at + 1 < len(args) else None
    purpose, *examples = EXAMPLES[config_class.command]
    head = f"{purpose}\n\n" + "".join(f"  {line}\n" for line in examples) + "\n" if section is None else ""
    sys.stdout.write(head + render(config_class, section))


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="run folder")],
    gpus: Annotated[int | None, typer.Option(min=1, help="one process per GPU")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="processes on the CPU")] = None,
) -> None:
    """Continue an interrupted run from its last checkpoint."""
    from mmpost.cli import launch
    from mmpost.config.load import load
    from mmpost.core.errors import MmpostError

    config = run / "config.yaml"
    if not config.is_file():
        raise MmpostError("MMP-E023", f"'{run}' is no run folder: it has no config.yaml.", "See mmpost runs list.")
    if tokenizer.resume_run(run, gpus=gpus, processes=processes):
        return
    text = config.read_text()
    # The sections tell the command: only those of GRPO and its kin have one for rollouts, only UPT one for the vote.
    config_class: type[SFTConfig] | type[GRPOConfig] = GRPOConfig if "\ngrpo:" in f"\n{text}" else SFTConfig
    if config_class is GRPOConfig and "\nvote:" in f"\n{text}":
        config_class = UPTConfig
    loaded = load(config_class, [config], [f"train.output_dir={run}", "train.overwrite=false"])
    counts = [f"--{kind}={count}" for kind, count in (("gpus", gpus), ("processes", processes)) if count is not None]
    wanted, _ = launch.split(counts)
    if wanted is not None and launch.needed(wanted):
        raise typer.Exit(launch.start(wanted, ["resume", str(run)]))

    from mmpost.api.training import Training

    _run(Training(loaded.config, command=["mmpost", "resume", str(run)], config_yaml=text))


@app.command("eval")
def evaluate(
    tasks: Annotated[list[str], typer.Argument(help="task names, for example demo_vqa")],
    model: Annotated[str, typer.Option(help="hub id, folder, or tiny-* name")],
    limit: Annotated[int | None, typer.Option(min=1, help="rows per task")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts decoded together")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length limit of an answer")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
    out: Annotated[Path | None, typer.Option(help="folder for results and samples")] = None,
) -> None:
    """Accuracy on held-out rows, with a 95 % interval."""
    from mmpost.api.evaluate import evaluate as run

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{done}/{total} answers{'' if done < total else chr(10)}")

    results = run(model, tasks, limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=show)
    if out is not None:
        results.save_samples(out)
    if as_json:
        found = list(results.results.values())
        sys.stdout.write(json.dumps(found[0] if len(found) == 1 else found, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(results.table() + "\n")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="new folder")],
    kind: Annotated[str, typer.Option(help="sft, grpo, eval or all")] = "all",
) -> None:
    """A folder with example rows, pictures, configs and a README, ready to run."""
    from mmpost.cli.init import write_project

    for line in write_project(folder, kind):
        sys.stdout.write(line + "\n")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for both runs, summary.json and report.html")] = Path("runs/demo"),
    seeds: Annotated[str, typer.Option(help="comma-separated seeds")] = "0",
    control: Annotated[bool, typer.Option(help="also train with shuffled rewards")] = False,
) -> None:
    """First light: a small model from nothing through SFT to RL on real pictures."""
    from mmpost.cli.demo import first_light

    first_light(out, numbers(seeds, "--seeds"), control=control)


@app.command("demo-upt")
def demo_upt(
    out: Annotated[Path, typer.Option(help="folder for runs, summary.json and report.html")] = Path("runs/demo-upt"),
    seeds: Annotated[str, typer.Option(help="comma-separated seeds")] = "0,1,2",
) -> None:
    """Learning without labels: the majority vote beside labels and beside random labels."""
    from mmpost.cli.demo_upt import demo_upt as run_demo

    run_demo(out, numbers(seeds, "--seeds"))


app.command("demo-video")(demo_video.command)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False) -> None:
    """Does this machine decode pictures, sound and video? Each decoder is tried on a file made on the spot."""
    from dataclasses import asdict

    from mmpost.media.probe import findings

    found = findings()
    if as_json:
        sys.stdout.write(json.dumps({"decoders": [asdict(finding) for finding in found]}) + "\n")
        return
    for finding in found:
        sys.stdout.write(f"{'ok' if finding.works else '--':<4}{finding.name:<14}{finding.detail}\n")
        if finding.fix:
            sys.stdout.write(f"    {finding.fix}\n")


@app.command()
def version(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Versions of mmpost and of what it runs on."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    found: dict[str, Any] = {"mmpost": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "transformers", "accelerate", "peft"):
        try:
            found[name] = installed(name)
        except PackageNotFoundError:
            found[name] = None
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        sys.stdout.write("".join(f"{name} {value or 'not installed'}\n" for name, value in found.items()))


@data_app.command("check")
def data_check(
    data: Annotated[str, typer.Argument(help="file, folder or task:NAME")],
    model: Annotated[str | None, typer.Option(help="count tokens as this model sees them")] = None,
    media_root: Annotated[str | None, typer.Option(help="folder that relative media paths start from")] = None,
    command: Annotated[str | None, typer.Option("--for", help="sft or grpo: check what that command needs")] = None,
    deep: Annotated[bool, typer.Option(help="decode every file, not only its existence")] = False,
    split: Annotated[str | None, typer.Option(help="split of a task or data set")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Validate rows and media without training; exit code 3 if anything is wrong."""
    from mmpost.cli.dataset import check_data

    faults = check_data(
        data, model=model, media_root=media_root, command=command, deep=deep, split=split, as_json=as_json
    )
    if faults:
        raise typer.Exit(3)


@data_app.command("filter")
def data_filter(
    data: Annotated[list[str], typer.Argument(help="files, folders or task:NAME")],
    model: Annotated[str, typer.Option(help="policy that is to be trained")],
    out: Annotated[Path, typer.Option(help="JSONL file; the rollouts are kept beside it")],
    keep: Annotated[str, typer.Option(help="any_correct, mixed or band")] = "any_correct",
    low: Annotated[float, typer.Option(help="band: lowest share of correct rollouts")] = 0.0,
    high: Annotated[float, typer.Option(help="band: highest share of correct rollouts")] = 1.0,
    k: Annotated[int, typer.Option("-k", min=1, help="rollouts per row")] = 8,
    reward: Annotated[str, typer.Option(help="says what is correct; majority_vote needs no labels")] = "answer",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length limit of a rollout")] = 1024,
    temperature: Annotated[float, typer.Option(min=0.0, help="of the rollouts")] = 1.0,
    top_p: Annotated[float, typer.Option(help="nucleus of the rollouts")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the rollouts")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="rollouts decoded together")] = 256,
    media_root: Annotated[str | None, typer.Option(help="folder that relative media paths start from")] = None,
    split: Annotated[str | None, typer.Option(help="split of a task or data set")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="use only the first rows of each source")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Keep the rows that a policy can learn from (RIF-RFT), by rollouts; the same command goes on after a stop."""
    from mmpost.api.filtering import Rule
    from mmpost.cli.questions import filter_data, open_sources
    from mmpost.rollout.generate import Sampling

    rule = Rule(keep, low, high)  # type: ignore[arg-type]
    filter_data(
        open_sources(data, media_root, split, limit),
        model,
        out,
        rule,
        k=k,
        reward=reward,
        sampling=Sampling(max_new_tokens, temperature, top_p, seed),
        batch_size=batch_size,
        as_json=as_json,
    )


@data_app.command("synthesize")
def data_synthesize(
    data: Annotated[list[str], typer.Argument(help="files, folders or task:NAME with pictures")],
    model: Annotated[str, typer.Option(help="model that asks and answers")],
    out: Annotated[Path, typer.Option(help="JSONL file; the replies are kept beside it")],
    mode: Annotated[str, typer.Option(help="direct: from the picture; in_context: also from its question")] = "direct",
    low: Annotated[float, typer.Option(help="lowest share of 8 answers that agree")] = 0.3,
    high: Annotated[float, typer.Option(help="highest share of 8 answers that agree")] = 0.9,
    min_words: Annotated[int, typer.Option(min=0, help="shortest question")] = 3,
    suffix: Annotated[str, typer.Option(help="written behind each question")] = "Put the final answer in \\boxed{}.",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length limit of questions and answers")] = 1024,
    temperature: Annotated[float, typer.Option(min=0.0, help="of the questions")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="completions decoded together")] = 256,
    media_root: Annotated[str | None, typer.Option(help="folder that relative media paths start from")] = None,
    split: Annotated[str | None, typer.Option(help="split of a task or data set")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="use only the first rows of each source")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """New questions for pictures, asked and filtered by the model itself; the same command goes on after a stop."""
    from mmpost.api.questions import Wanted
    from mmpost.cli.questions import open_sources, synthesize_data
    from mmpost.rollout.generate import Sampling

    synthesize_data(
        open_sources(data, media_root, split, limit),
        model,
        out,
        mode=mode,
        wanted=Wanted(min_words, low, high),
        suffix=suffix,
        sampling=Sampling(max_new_tokens, temperature, seed=seed),
        batch_size=batch_size,
        as_json=as_json,
    )


@runs_app.command("list")
def runs_list(root: Annotated[Path, typer.Argument(help="folder to search")] = Path("runs")) -> None:
    """Runs under a folder, newest first."""
    from rich.console import Console

    from mmpost.runs.browse import list_runs, runs_table

    Console().print(runs_table(list_runs(root)))


@runs_app.command("show")
def runs_show(run: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """One run: command, status, last values, evaluations."""
    from mmpost.runs.browse import show

    sys.stdout.write(show(run).rstrip() + "\n")


@runs_app.command("compare")
def runs_compare(first: Path, second: Path) -> None:
    """Configuration differences and last values of two runs side by side."""
    from rich.console import Console

    from mmpost.runs.browse import compare, compare_tables

    for table in compare_tables(compare(first, second)):
        Console().print(table)


@runs_app.command("report")
def runs_report(
    run: Annotated[Path, typer.Argument(help="run folder")],
    out: Annotated[Path | None, typer.Option(help="file; default report.html in the run folder")] = None,
) -> None:
    """Write the report of a run again."""
    from mmpost.runs.records import require_run
    from mmpost.runs.report import write_report

    sys.stdout.write(f"{write_report(require_run(run), out)}\n")
