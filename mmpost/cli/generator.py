"""``mmpost generator``: train, sample and measure class-conditional generators on the codes of a tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mmpost.cli.image_data import (
    AsJson,
    Bad,
    Batch,
    CheckOption,
    CropOption,
    DataOption,
    Limit,
    Split,
    image_size_of,
    open_data,
    progress_line,
    require_extra,
    say,
    show_help,
)

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(help="Generators on the codes of a tokenizer.", no_args_is_help=True)

TRAIN_HELP = """Train a class-conditional generator on codes of mmpost tokenizer pretokenize.

  mmpost generator train runs/codes --held-out runs/codes-val --out runs/generator model.size=B
  mmpost generator train runs/codes --out runs/generator configs/tokenizers/generator_llamagen_l.yaml

"""
Generator = Annotated[str, typer.Argument(help="run folder of a generator")]
Scale = Annotated[float, typer.Option(min=0, help="weight of classifier-free guidance; 1 = none")]
Schedule = Annotated[str, typer.Option(help="constant, linear or cosine")]
Power = Annotated[float, typer.Option(help="exponent of the cosine schedule")]
Temperature = Annotated[float, typer.Option(min=0, help="0 = most likely code")]
TopK = Annotated[int, typer.Option(min=0, help="codes kept; 0 = all")]
TopP = Annotated[float, typer.Option(help="nucleus sampling")]
Seed = Annotated[int, typer.Option(min=0, help="seed of the draws")]


@app.command(context_settings=PASS_THROUGH)
def train(
    context: typer.Context,
    codes: Annotated[str, typer.Argument(help="folder or file of mmpost tokenizer pretokenize")],
    out: Annotated[Path, typer.Option(help="run folder")],
    held_out: Annotated[str | None, typer.Option(help="codes of other images")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="the tokenizer of the codes, for samples in the report")] = None,
) -> None:
    """Train: mmpost generator train CODES --out RUN [--held-out CODES] [CONFIG.yaml] key=value ..."""
    from mmpost.config.load import load, resolved_yaml, split_arguments
    from mmpost_tokenizers.options import GeneratorRunConfig

    if context.args and show_help(GeneratorRunConfig, context.args, TRAIN_HELP):
        return
    files, overrides = split_arguments(context.args)
    loaded = load(GeneratorRunConfig, files, overrides)
    run_training(loaded.config, codes, held_out, out, resolved_yaml(loaded), tokenizer=tokenizer)


def run_training(
    config: Any, codes: str, held_out: str | None, out: Path, config_yaml: str, *, tokenizer: str | None = None
) -> dict[str, Any]:
    """Train with a checked configuration; returns the summary."""
    require_extra()
    from mmpost_tokenizers.generating import train_generator

    summary = train_generator(config, codes, held_out, out, config_yaml=config_yaml, tokenizer=tokenizer)
    say(summary, as_json=False)
    sys.stderr.write(f"done: {out / 'final'}  report: {out / 'report.html'}\n")
    return summary


def resume(run: Path, paths: Mapping[str, str]) -> None:
    """Go on with a run of ``generator train``; behind ``mmpost resume``."""
    from mmpost.config.load import load
    from mmpost_tokenizers.options import GeneratorRunConfig

    config = run / "config.yaml"
    settings, text = load(GeneratorRunConfig, [config], []).config, config.read_text()
    run_training(settings, paths["codes"], paths.get("held_out"), run, text, tokenizer=paths.get("tokenizer"))


@app.command()
def sample(
    generator: Generator,
    tokenizer: Annotated[str, typer.Option(help="the tokenizer of its codes")],
    out: Annotated[Path, typer.Option(help="folder for PNG files and codes.safetensors")],
    classes: Annotated[
        str, typer.Option("--classes", "--class", help="all, or comma-separated names or numbers of classes")
    ] = "all",
    per_class: Annotated[int, typer.Option(min=1, help="images of each class")] = 8,
    guidance: Scale = 2.0,
    schedule: Schedule = "constant",
    power: Power = 1.0,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: Batch = 64,
) -> None:
    """Draw images: PNG files, their codes, and one sheet with a row per class."""
    require_extra()
    from mmpost_tokenizers.generating import sample_images

    sampling = _sampling(guidance, schedule, power, temperature, top_k, top_p, seed, batch_size)
    count = sample_images(
        generator, tokenizer, out, classes=classes, per_class=per_class, sampling=sampling, progress=progress_line
    )
    sys.stderr.write(f"{count} images: {out}\n")


@app.command("eval")
def evaluate(
    generator: Generator,
    tokenizer: Annotated[str, typer.Option(help="the tokenizer of its codes")],
    data: DataOption,
    samples: Annotated[int, typer.Option(min=2, help="images to draw; 50000 for published figures")] = 5000,
    split: Split = None,
    limit: Limit = None,
    crop: CropOption = "center",
    quarantine: Bad = False,
    check: CheckOption = "auto",
    features: Annotated[str, typer.Option(help="weights file, random-conv or auto")] = "auto",
    guidance: Scale = 2.0,
    schedule: Schedule = "constant",
    power: Power = 1.0,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: Batch = 64,
    as_json: AsJson = False,
) -> None:
    """Distance to real images, precision and recall, and with Inception weights IS; called FID only with those."""
    require_extra()
    from mmpost_tokenizers.generating import evaluate_samples

    size = image_size_of(tokenizer)
    images = open_data(data, image_size=size, split=split, limit=limit, crop=crop, bad=quarantine, check=check)
    results = evaluate_samples(
        generator,
        tokenizer,
        images,
        samples=samples,
        features=features,
        sampling=_sampling(guidance, schedule, power, temperature, top_k, top_p, seed, batch_size),
        progress=progress_line,
    )
    say(results, as_json=as_json)


def _sampling(
    guidance: float,
    schedule: str,
    power: float,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    batch_size: int,
) -> Any:
    from mmpost.core.errors import MmpostError
    from mmpost_tokenizers.generator.options import SamplingSection
    from mmpost_tokenizers.generator.sample import Sampling

    if schedule not in ("constant", "linear", "cosine"):
        raise MmpostError("MMP-C117", f"--schedule {schedule} is not known.", "Known: constant, linear, cosine.")
    if not 0 < top_p <= 1:
        raise MmpostError("MMP-C117", f"--top-p {top_p} is not in (0, 1].", "Choose 1 for all codes.")
    if power <= 0:
        raise MmpostError("MMP-C117", f"--power {power} is not positive.", "Choose 1 for the plain cosine.")
    options = {"guidance": guidance, "guidance_schedule": schedule, "guidance_power": power, "top_k": top_k}
    more = {"temperature": temperature, "top_p": top_p, "seed": seed, "batch_size": batch_size}
    return Sampling.of(SamplingSection.model_validate({**options, **more}))
