"""``mmpost tokenizer``: train, measure, post-train, use and look at image tokenizers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmpost.cli import bridge
from mmpost.cli.image_data import (
    AsJson,
    Bad,
    Batch,
    CheckOption,
    CropOption,
    DataOption,
    Limit,
    Split,
    check_word,
    image_size_of,
    open_data,
    progress_line,
    require_extra,
    resolve,
    say,
    show_help,
)
from mmpost.cli.words import numbers

if TYPE_CHECKING:
    from mmpost_tokenizers.images import ImageSet

# Options of the training commands are KEY=VALUE words, which our own loader reads with file and line.
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(help="Train, measure and use image tokenizers.", no_args_is_help=True)

TRAIN_HELP = """Train a discrete image tokenizer.

  mmpost tokenizer train configs/tokenizers/demo.yaml train.output_dir=runs/tokenizer
  mmpost tokenizer train configs/tokenizers/robustok_imagenet256.yaml data.train=imagenet/train data.eval=imagenet/val

"""
POSTTRAIN_HELP = """Post-train the decoder of a tokenizer on codes that look generated.

  mmpost tokenizer posttrain runs/tokenizer --generator runs/generator data.train=images/ posttrain.sigma=0.8

"""
Checkpoint = Annotated[str, typer.Argument(help="run folder, checkpoint or hub id of a tokenizer")]


@app.command(context_settings={**PASS_THROUGH, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train a discrete tokenizer: mmpost tokenizer train CONFIG.yaml key=value ..."""
    from mmpost.cli import launch
    from mmpost.config.load import load, resolved_yaml, split_arguments
    from mmpost_tokenizers.options import TokenizerConfig

    if show_help(TokenizerConfig, context.args, TRAIN_HELP):
        return
    wanted, args = launch.split(context.args)
    files, overrides = split_arguments(args)
    loaded = load(TokenizerConfig, files, overrides)
    if wanted is not None and launch.needed(wanted):
        raise typer.Exit(launch.start(wanted, ["tokenizer", "train", *args]))
    run_training(loaded.config, ["mmpost", "tokenizer", "train", *args], resolved_yaml(loaded))


def run_training(config: Any, command: list[str], config_yaml: str) -> Path:
    """Train with a checked configuration; returns the run folder."""
    require_extra()
    from mmpost_tokenizers.session import TokenizerSession

    session = TokenizerSession(config, command=command, config_yaml=config_yaml, resolve=resolve)
    output = session.run()
    if session.processes.is_main:
        done = "this run was already finished" if session.was_finished else "done"
        sys.stderr.write(f"{done}: {output / 'final'}  report: {output / 'report.html'}\n")
    return output


def resume_run(run: Path, *, gpus: int | None, processes: int | None) -> bool:
    """Go on with a run of this package; behind ``mmpost resume``.

    Returns:
        False when the folder holds another run.

    Raises:
        MmpostError: MMP-C117 when processes are asked for by a command that runs in one.
    """
    if not (run / "inputs.json").is_file():
        return "\ntokenizer:" in f"\n{(run / 'config.yaml').read_text()}" and resume_training(run, gpus, processes)
    from mmpost.cli import generator
    from mmpost.core.errors import MmpostError

    require_extra()
    from mmpost_tokenizers.inputs import read_inputs

    given = read_inputs(run)
    known = {
        "generator train": generator.resume,
        "tokenizer bridge-train": bridge.resume,
        "tokenizer posttrain": resume_posttraining,
    }
    if given is None or given.command not in known:
        return False
    if (gpus or 1) > 1 or (processes or 1) > 1:
        what = f"mmpost {given.command} runs in one process."
        raise MmpostError("MMP-C117", what, "Leave --gpus and --processes out.")
    known[given.command](run, given.paths)
    return True


def resume_training(run: Path, gpus: int | None, processes: int | None) -> bool:
    """Go on with a run of ``tokenizer train``; True."""
    from mmpost.cli import launch
    from mmpost.config.load import load
    from mmpost_tokenizers.options import TokenizerConfig

    loaded = load(TokenizerConfig, [run / "config.yaml"], [f"train.output_dir={run}", "train.overwrite=false"])
    counts = [f"--{kind}={count}" for kind, count in (("gpus", gpus), ("processes", processes)) if count is not None]
    wanted, _ = launch.split(counts)
    if wanted is not None and launch.needed(wanted):
        raise typer.Exit(launch.start(wanted, ["resume", str(run)]))
    run_training(loaded.config, ["mmpost", "resume", str(run)], (run / "config.yaml").read_text())
    return True


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    data: DataOption,
    split: Split = None,
    limit: Limit = None,
    crop: CropOption = "center",
    quarantine: Bad = False,
    check: CheckOption = "auto",
    features: Annotated[str, typer.Option(help="weights file, random-conv or auto")] = "auto",
    perceptual: Annotated[
        str, typer.Option(help="auto or features: layers of the scoring network; none; file of VGG16 for LPIPS")
    ] = "auto",
    curves: Annotated[str | None, typer.Option(help="perturb: also a page with the score by share of tokens")] = None,
    batch_size: Batch = 64,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option(help="folder for results.json and report.html")] = None,
) -> None:
    """Reconstruction scores, clean and perturbed (15 settings); called FID only with the Inception weights."""
    from mmpost.core.errors import MmpostError

    if curves not in (None, "perturb"):
        raise MmpostError("MMP-C117", f"--curves {curves} is not known.", "Known: perturb.")
    require_extra()
    from mmpost_tokenizers.using import evaluate_checkpoint

    size = image_size_of(checkpoint)
    images = open_data(data, image_size=size, split=split, limit=limit, crop=crop, bad=quarantine, check=check)
    results = evaluate_checkpoint(
        checkpoint,
        images,
        features=features,
        batch_size=batch_size,
        out=out,
        curves=curves is not None,
        perceptual=perceptual,
    )
    say(results, as_json=as_json, skip=("curve", "grid"))
    if out is not None:
        sys.stderr.write(f"results: {out / 'results.json'}  report: {out / 'report.html'}\n")


@app.command()
def inspect(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None,
        typer.Option("--data", help="images; default: those of the checkpoint's run, else the digits that ship"),
    ] = None,
    split: Split = None,
    limit: Limit = 512,
    crop: CropOption = "center",
    quarantine: Bad = False,
    check: CheckOption = "auto",
    out: Annotated[Path, typer.Option(help="the page")] = Path("inspect.html"),
    as_json: AsJson = False,
) -> None:
    """Pictures of a tokenizer: reconstructions, the same perturbed, use of codes, neighbours of codes, pFD by alpha."""
    require_extra()
    from mmpost_tokenizers.using import inspect_checkpoint

    size = image_size_of(checkpoint)
    if data is None:
        images = images_of_run(checkpoint, size, split=split, limit=limit, bad=quarantine, check=check)
    else:
        images = open_data(data, image_size=size, split=split, limit=limit, crop=crop, bad=quarantine, check=check)
    say(inspect_checkpoint(checkpoint, images, out), as_json=as_json)
    sys.stderr.write(f"page: {out}\n")


def images_of_run(
    checkpoint: str, size: int, *, split: str | None, limit: int | None, bad: bool, check: str
) -> ImageSet:
    """Held-out images of a checkpoint's run, cut as there; else training images, else the digits that ship.

    What was taken is said on stderr.
    """
    from mmpost_tokenizers.opening import open_images, pick
    from mmpost_tokenizers.using import data_of_run

    found = data_of_run(checkpoint)
    if found is None:
        sys.stderr.write("images: task:digits, which ships with mmpost; no run folder is around the checkpoint\n")
        split = split or "heldout"
        return open_data("task:digits", image_size=size, split=split, limit=limit, crop="center", bad=bad, check=check)
    section, name = found
    changed = {"on_bad_image": "quarantine"} if bad else {}
    section = section.model_copy(update={**changed, "check": check_word(check)})
    named = ", ".join(source.path for source in section.eval)
    sys.stderr.write(f"images: {named}, {name} of the checkpoint's run\n")
    images = open_images(
        section.eval,
        section,
        size=size,
        seed=0,
        training=False,
        resolve=resolve,
        name=f"{name} of the checkpoint's run",
        quarantine="--quarantine",
    )
    return pick(images, limit)


@app.command()
def encode(
    checkpoint: Checkpoint,
    data: DataOption,
    out: Annotated[Path, typer.Option(help=".npz or .safetensors file")],
    split: Split = None,
    limit: Limit = None,
    crop: CropOption = "center",
    quarantine: Bad = False,
    check: CheckOption = "auto",
    batch_size: Batch = 64,
) -> None:
    """Images to codes in one file."""
    require_extra()
    from mmpost_tokenizers.using import encode_images

    size = image_size_of(checkpoint)
    images = open_data(data, image_size=size, split=split, limit=limit, crop=crop, bad=quarantine, check=check)
    count, shape = encode_images(checkpoint, images, out, batch_size=batch_size)
    sys.stderr.write(f"{count} images, codes {list(shape)} each: {out}\n")


@app.command()
def decode(
    checkpoint: Checkpoint,
    codes: Annotated[Path, typer.Argument(help=".npz or .safetensors file of encode, pretokenize or generator sample")],
    out: Annotated[Path, typer.Option(help="folder for PNG files")],
    batch_size: Batch = 64,
) -> None:
    """Codes to PNG files."""
    require_extra()
    from mmpost_tokenizers.using import decode_codes

    sys.stderr.write(f"{decode_codes(checkpoint, codes, out, batch_size=batch_size)} images: {out}\n")


@app.command()
def pretokenize(
    checkpoint: Checkpoint,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="folder for codes.safetensors")],
    crops: Annotated[int, typer.Option(help="views per image: 1, 2, 5 or 10")] = 1,
    split: Split = None,
    limit: Limit = None,
    crop: CropOption = "center",
    quarantine: Bad = False,
    check: CheckOption = "auto",
    batch_size: Batch = 64,
    workers: Annotated[int, typer.Option(min=0, help="processes that decode images")] = 0,
) -> None:
    """Codes of a whole image set, for training a generator; an interrupted call goes on where it was."""
    require_extra()
    from mmpost_tokenizers.generator.pretokenize import pretokenize as run
    from mmpost_tokenizers.generator.pretokenize import source_size
    from mmpost_tokenizers.session import open_tokenizer

    tokenizer = open_tokenizer(checkpoint)
    size = source_size(tokenizer.config.image_size, crops)
    images = open_data(data, image_size=size, split=split, limit=limit, crop=crop, bad=quarantine, check=check)
    codes = run(images, tokenizer, out, crops=crops, batch_size=batch_size, workers=workers, progress=progress_line)
    sys.stderr.write(f"{len(codes)} images, {codes.crops} crops, codes {list(codes.layout.shape)} each: {out}\n")


app.command()(bridge.bridge)
app.command("bridge-train", context_settings=PASS_THROUGH)(bridge.train)
app.command("bridge-sample")(bridge.sample)


@app.command(context_settings=PASS_THROUGH)
def posttrain(
    context: typer.Context,
    checkpoint: Checkpoint,
    generator: Annotated[str, typer.Option(help="run folder of a generator of this tokenizer's codes")],
    out: Annotated[Path, typer.Option(help="run folder")] = Path("runs/posttrain"),
) -> None:
    """Post-train the decoder on generated-looking codes: CKPT --generator G [CONFIG.yaml] key=value ..."""
    from mmpost.config.load import load, resolved_yaml, split_arguments
    from mmpost_tokenizers.options import PosttrainConfig

    files, overrides = split_arguments(context.args)
    loaded = load(PosttrainConfig, files, overrides)
    run_posttraining(loaded.config, checkpoint, generator, out, resolved_yaml(loaded))


def resume_posttraining(run: Path, paths: Mapping[str, str]) -> None:
    """Go on with a run of ``tokenizer posttrain``; behind ``mmpost resume``."""
    from mmpost.config.load import load
    from mmpost_tokenizers.options import PosttrainConfig

    config = run / "config.yaml"
    settings, text = load(PosttrainConfig, [config], []).config, config.read_text()
    run_posttraining(settings, paths["checkpoint"], paths["generator"], run, text)


def run_posttraining(config: Any, checkpoint: str, generator: str, out: Path, config_yaml: str) -> dict[str, Any]:
    """Post-train with a checked configuration; returns the summary."""
    require_extra()
    from mmpost_tokenizers.posttraining import run_posttrain

    summary = run_posttrain(config, checkpoint, generator, out, config_yaml=config_yaml, resolve=resolve)
    say(summary, as_json=False)
    sys.stderr.write(f"done: {out / 'final'}  report: {out / 'report.html'}\n")
    return summary


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for all stages, summary.json and report.html")] = Path(
        "runs/demo-tokenizer"
    ),
    seeds: Annotated[str, typer.Option(help="comma-separated seeds")] = "0",
    steps: Annotated[int | None, typer.Option(min=10, help="steps of each tokenizer, for a trial")] = None,
) -> None:
    """Tokenizers with and without perturbation, a generator, decoder post-training and TokenBridge on two cores."""
    require_extra()
    from mmpost.cli.demo_tokenizer import run_demo

    run_demo(out, numbers(seeds, "--seeds"), steps=steps)
