"""What the tokenizer and generator commands share: options about images, opening them, showing results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mmpost_tokenizers.images import ImageSet

DataOption = Annotated[str, typer.Option("--data", help="folder, list of files, sheets or task:NAME")]
Split = Annotated[str | None, typer.Option(help="split of the data")]
Limit = Annotated[int | None, typer.Option(min=1, help="use this many images, evenly spread")]
CropOption = Annotated[str, typer.Option(help="center or pad")]
Bad = Annotated[bool, typer.Option("--quarantine", help="leave faulty images out instead of stopping")]
CheckOption = Annotated[str, typer.Option("--check", help="auto, decode or header: how files are looked at first")]
Batch = Annotated[int, typer.Option(min=1, help="images per pass")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]


def show_help(config_class: Any, args: list[str], text: str) -> bool:
    """Print the options where they are asked for; True when there is nothing else to do."""
    from mmpost.config.help import render

    if args and "--help" not in args and "-h" not in args:
        return False
    at = next((i for i, word in enumerate(args) if word in ("--help", "-h")), 0)
    section = args[at + 1] if at + 1 < len(args) else None
    sys.stdout.write(("" if section else text) + render(config_class, section))
    if not args:
        raise typer.Exit(2)
    return True


def require_extra() -> None:
    """Refuse to start without the libraries of the ``tokenizers`` extra.

    Raises:
        MmpostError: MMP-E010.
    """
    from importlib.util import find_spec

    # diffusers imports bitsandbytes where it is installed; this package keeps that quiet.
    import mmpost.models  # noqa: F401
    from mmpost.core.errors import MmpostError

    for name in ("diffusers", "timm", "torchmetrics", "vector_quantize_pytorch"):
        if find_spec(name) is None:
            raise MmpostError(
                "MMP-E010",
                f"the tokenizer commands need {name}, which is not installed.",
                'Run: pip install "mmpost-toolkit[tokenizers]"',
            )


def resolve(path: str) -> str | Path:
    """The file behind ``task:fashion`` or ``task:digits``; any other path as it is.

    Raises:
        MmpostError: MMP-C006 for another task.
    """
    if not path.startswith("task:"):
        return path
    from mmpost.core.errors import MmpostError

    if path == "task:fashion":
        from importlib.resources import files

        return Path(str(files("mmpost_tasks"))) / "data" / "fashion.json"
    if path == "task:digits":
        from mmpost.cli.demo_digits import digit_sheets

        return digit_sheets()
    raise MmpostError("MMP-C006", f"unknown name '{path[5:]}' among image tasks.", "Known: digits, fashion")


def open_data(
    data: str,
    *,
    image_size: int,
    split: str | None,
    limit: int | None,
    crop: str,
    bad: bool,
    check: str = "auto",
) -> ImageSet:
    """Images of a command line, without random crops.

    Raises:
        MmpostError: MMP-C117 for an unknown ``crop`` or ``check``; what ``open_images`` raises.
    """
    from mmpost_tokenizers.opening import open_images
    from mmpost_tokenizers.options import ImageSource, ImagesSection

    options = {"crop": crop_word(crop), "check": check_word(check), "on_bad_image": "quarantine" if bad else "error"}
    section = ImagesSection.model_validate(options)
    images = open_images(
        [ImageSource(path=data, split=split, limit=limit)],
        section,
        size=image_size,
        seed=0,
        training=False,
        resolve=resolve,
        quarantine="--quarantine",
    )
    for note in images.notes:
        sys.stderr.write(f"{note}\n")
    for _, error in images.bad[:5]:
        sys.stderr.write(f"left out: {error}\n")
    return images


def crop_word(crop: str) -> str:
    """``center`` or ``pad``.

    Raises:
        MmpostError: MMP-C117.
    """
    from mmpost.core.errors import MmpostError

    if crop not in ("center", "pad"):
        raise MmpostError("MMP-C117", f"--crop {crop} is not known.", "Known: center, pad.")
    return crop


def check_word(check: str) -> str:
    """``auto``, ``decode`` or ``header``.

    Raises:
        MmpostError: MMP-C117.
    """
    from mmpost.core.errors import MmpostError

    if check not in ("auto", "decode", "header"):
        raise MmpostError("MMP-C117", f"--check {check} is not known.", "Known: auto, decode, header.")
    return check


def image_size_of(checkpoint: str) -> int:
    """Side of a tokenizer's images, from its configuration."""
    from mmpost_tokenizers.session import open_tokenizer

    return int(open_tokenizer(checkpoint).config.image_size)


def progress_line(done: int, total: int) -> None:
    """One line that is overwritten, on terminals only."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done}/{total}{'' if done < total else chr(10)}")


def say(results: dict[str, Any], *, as_json: bool, skip: tuple[str, ...] = ()) -> None:
    """Results as JSON, or as lines of name and value."""
    if as_json:
        sys.stdout.write(json.dumps(results, ensure_ascii=False) + "\n")
        return
    for name, value in results.items():
        if name not in skip:
            sys.stdout.write(f"{name:<24}{_shown(value)}\n")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
