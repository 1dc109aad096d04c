"""``mmpost tokenizer bridge``, ``bridge-train`` and ``bridge-sample``: TokenBridge from a VAE to generated images."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmpost.cli.image_data import (
    AsJson,
    Bad,
    Batch,
    CheckOption,
    CropOption,
    Limit,
    Split,
    open_data,
    progress_line,
    require_extra,
    say,
    show_help,
)

if TYPE_CHECKING:
    from mmpost_tokenizers.images import ImageSet

TRAIN_HELP = """Train a model of the tokens of a bridge: a spatial model and a head for the channels of one position.

  mmpost tokenizer bridge-train runs/bridge --data images/train --held-out images/val --out runs/bridge-ar
  mmpost tokenizer bridge-train runs/bridge --data images/train --head independent --order none --out runs/bridge-par

"""


def bridge(
    vae: Annotated[str, typer.Argument(help="folder or hub id of a diffusers.AutoencoderKL")],
    levels: Annotated[int, typer.Option(min=2, help="levels per channel")] = 64,
    value_range: Annotated[
        float, typer.Option("--range", help="scaled latents of +-this lie at the ends of the level axis")
    ] = 5.0,
    scheme: Annotated[str, typer.Option(help="gaussian (paper), uniform or lloyd")] = "gaussian",
    mode: Annotated[str, typer.Option(help="paper: one scale; channel: shift and scale of each channel")] = "paper",
    data: Annotated[str | None, typer.Option("--data", help="images that the scale is measured on")] = None,
    split: Split = None,
    limit: Limit = 1024,
    crop: CropOption = "center",
    quarantine: Bad = False,
    check: CheckOption = "auto",
    image_size: Annotated[int | None, typer.Option(help="default: that of the VAE")] = None,
    dims: Annotated[
        str, typer.Option(help="auto: order channels by their low frequencies, from --data; none")
    ] = "auto",
    max_saturation: Annotated[
        float,
        typer.Option(min=0, max=1, help="largest share of latents that the range may cut off; 1 accepts any"),
    ] = 0.01,
    out: Annotated[Path, typer.Option(help="folder for the tokenizer")] = Path("runs/bridge"),
    as_json: AsJson = False,
) -> None:
    """Discrete tokens from a continuous VAE, without training (TokenBridge)."""
    require_extra()
    from mmpost_tokenizers.bridging import bridge_vae

    def images(size: int) -> ImageSet | None:
        if data is None:
            return None
        return open_data(data, image_size=size, split=split, limit=limit, crop=crop, bad=quarantine, check=check)

    results = bridge_vae(
        vae,
        out,
        images=images,
        image_size=image_size,
        order=dims == "auto",
        levels=levels,
        value_range=value_range,
        scheme=scheme,
        mode=mode,
        max_saturation=max_saturation,
    )
    say(results, as_json=as_json)
    sys.stderr.write(f"tokenizer: {out}\n")


def train(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="BRIDGE", help="folder of mmpost tokenizer bridge")],
    data: Annotated[str, typer.Option("--data", help="images, or codes of mmpost tokenizer pretokenize")],
    out: Annotated[Path, typer.Option(help="run folder")],
    held_out: Annotated[
        str | None, typer.Option(help="other images or codes; default: every tenth of --data is held out")
    ] = None,
    split: Split = None,
    held_out_split: Annotated[str | None, typer.Option(help="split of the held-out data")] = None,
    limit: Limit = None,
    crop: CropOption = "center",
    crops: Annotated[int, typer.Option(help="views per training image: 1, 2 (mirrored), 5 or 10")] = 1,
    quarantine: Bad = False,
    check: CheckOption = "auto",
    head: Annotated[str | None, typer.Option(help="ar or independent; model.head")] = None,
    backbone: Annotated[str | None, typer.Option(help="masked or raster; model.backbone")] = None,
    order: Annotated[str, typer.Option(help="dimension_order.json, auto (the one beside the bridge) or none")] = "auto",
    batch_size: Batch = 64,
    workers: Annotated[int, typer.Option(min=0, help="processes that decode images")] = 0,
) -> None:
    """Train: bridge-train BRIDGE --data D --out RUN [--head ar|independent] [CONFIG.yaml] key=value ..."""
    from mmpost.config.load import load, resolved_yaml, split_arguments
    from mmpost_tokenizers.bridge.options import BridgeRunConfig

    if context.args and show_help(BridgeRunConfig, context.args, TRAIN_HELP):
        return
    files, overrides = split_arguments(context.args)
    overrides += [f"model.{name}={value}" for name, value in (("head", head), ("backbone", backbone)) if value]
    loaded = load(BridgeRunConfig, files, overrides)
    require_extra()

    common: dict[str, Any] = {
        "crop": crop,
        "bad": quarantine,
        "check": check,
        "batch_size": batch_size,
        "workers": workers,
    }
    codes = codes_of(data, folder, out / "codes", split=split, limit=limit, crops=crops, **common)
    others = None
    if held_out is not None:
        place = out / "codes-heldout"
        others = codes_of(held_out, folder, place, split=held_out_split, limit=limit, crops=1, **common)
    words = ["mmpost", "tokenizer", "bridge-train", folder, "--data", data, "--out", str(out), *context.args]
    run_training(loaded.config, folder, codes, others, out, order, resolved_yaml(loaded), words)


def run_training(
    config: Any,
    folder: str,
    codes: str,
    held_out: str | None,
    out: Path,
    order: str,
    config_yaml: str,
    command: list[str],
) -> dict[str, Any]:
    """Train with a checked configuration; returns the summary."""
    from mmpost_tokenizers.bridge.running import train_bridge

    summary = train_bridge(config, folder, codes, held_out, out, order=order, config_yaml=config_yaml, command=command)
    say(summary, as_json=False)
    sys.stderr.write(f"done: {out / 'final'}  report: {out / 'report.html'}\n")
    return summary


def resume(run: Path, paths: Mapping[str, str]) -> None:
    """Go on with a run of ``tokenizer bridge-train``; behind ``mmpost resume``."""
    from mmpost.config.load import load
    from mmpost_tokenizers.bridge.options import BridgeRunConfig

    config = run / "config.yaml"
    settings, text = load(BridgeRunConfig, [config], []).config, config.read_text()
    words, order = ["mmpost", "resume", str(run)], paths.get("order", "auto")
    run_training(settings, paths["bridge"], paths["codes"], paths.get("held_out"), run, order, text, words)


def codes_of(
    data: str,
    folder: str,
    place: Path,
    *,
    split: str | None,
    limit: int | None,
    crop: str,
    crops: int,
    bad: bool,
    check: str,
    batch_size: int,
    workers: int,
) -> str:
    """Where the codes of ``data`` are: there, if these are codes; else in ``place``, where images are tokenized to."""
    from mmpost_tokenizers.bridge.running import open_bridge
    from mmpost_tokenizers.generator.pretokenize import CODES_FILE, pretokenize, source_size

    if (Path(data) / CODES_FILE).is_file() or Path(data).suffix == ".safetensors":
        return data
    tokenizer = open_bridge(folder)
    size = source_size(tokenizer.config.image_size, crops)
    images = open_data(data, image_size=size, split=split, limit=limit, crop=crop, bad=bad, check=check)
    pretokenize(images, tokenizer, place, crops=crops, batch_size=batch_size, workers=workers, progress=progress_line)
    return str(place)


def sample(
    run: Annotated[str, typer.Argument(help="run folder of bridge-train")],
    folder: Annotated[str, typer.Option("--bridge", help="the bridge of its codes")],
    out: Annotated[Path, typer.Option(help="folder for PNG files and codes.safetensors, or for results.json")],
    data: Annotated[
        str | None, typer.Option("--data", help="real images: score --samples images instead of writing them")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="images to score; 50000 for published figures")] = 5000,
    split: Split = None,
    limit: Limit = None,
    crop: CropOption = "center",
    quarantine: Bad = False,
    check: CheckOption = "auto",
    features: Annotated[str, typer.Option(help="weights file, random-conv or auto")] = "auto",
    classes: Annotated[str, typer.Option(help="all, or comma-separated class numbers")] = "all",
    per_class: Annotated[int, typer.Option(min=1, help="images of each class")] = 8,
    steps: Annotated[int | None, typer.Option(min=1, help="passes of a masked model; default 256 at most")] = None,
    guidance: Annotated[float, typer.Option(min=0, help="weight of classifier-free guidance; 1 = none")] = 1.0,
    schedule: Annotated[str, typer.Option(help="linear: rises from 1 with the known positions; constant")] = "linear",
    temperature: Annotated[float, typer.Option(min=0, help="of each channel; 0 = most likely level")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="seed of the draws")] = 0,
    batch_size: Batch = 64,
    as_json: AsJson = False,
) -> None:
    """Draw images from a model of bridge-train; with --data their scores, called FID only with Inception weights."""
    import json

    from mmpost.core.errors import MmpostError

    if schedule not in ("linear", "constant"):
        raise MmpostError("MMP-C117", f"--schedule {schedule} is not known.", "Known: linear, constant.")
    require_extra()
    from mmpost_tokenizers.bridge.sampling import BridgeSampling, sample_images, score_samples
    from mmpost_tokenizers.using import decode_codes, reference_for, scoring_features

    sampling = BridgeSampling(
        steps=steps, guidance=guidance, schedule=schedule, temperature=temperature, seed=seed, batch_size=batch_size
    )
    if data is None:
        chosen = None if classes == "all" else class_numbers(classes)
        file = sample_images(
            run, folder, out, classes=chosen, per_class=per_class, sampling=sampling, progress=progress_line
        )
        sys.stderr.write(f"{decode_codes(folder, file, out, batch_size=batch_size)} images: {out}\n")
        return
    from mmpost_tokenizers.bridge.running import open_bridge

    side = open_bridge(folder).config.image_size
    images = open_data(data, image_size=side, split=split, limit=limit, crop=crop, bad=quarantine, check=check)
    extractor = scoring_features(folder, features)
    reference = reference_for(images, extractor, batch_size=batch_size)
    results = score_samples(
        run, folder, reference, extractor, samples=samples, sampling=sampling, progress=progress_line
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    say(results, as_json=as_json)


def class_numbers(text: str) -> list[int]:
    """Numbers of ``0,3,7``.

    Raises:
        MmpostError: MMP-C117 for something else.
    """
    from mmpost.core.errors import MmpostError

    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise MmpostError(
            "MMP-C117", f"--classes {text} is not a list of class numbers.", "Give all, or numbers such as 0,3,7."
        ) from error
