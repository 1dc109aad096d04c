"""Command line that both comparisons share."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.model import SIZES


def parser(description: str, out: str) -> argparse.ArgumentParser:
    """Options of both scripts.

    Args:
        description: First line of the help.
        out: Name of the result file.
    """
    add = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add.add_argument("--cases", default="*", help="names or patterns, separated by commas")
    add.add_argument("--quick", action="store_true", help="only the small cases, few steps")
    add.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    add.add_argument("--size", choices=list(SIZES), default="tiny", help="shape of the model")
    add.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="CPU seconds or synchronised wall time")
    add.add_argument("--bf16", action="store_true", help="weights and autocast in bfloat16")
    add.add_argument("--steps", type=int, default=None, help="measured steps of each trainer; default 8, quick 4")
    add.add_argument("--warmup", type=int, default=2, help="steps before them")
    add.add_argument("--micro", type=int, default=8, help="rows per forward pass, both trainers")
    add.add_argument("--freeze-vision", action="store_true", help="the vision tower does not train")
    add.add_argument("--trl-no-checkpointing", action="store_true", help="TRL also without its default checkpointing")
    add.add_argument("--one-at-a-time", action="store_true", help="no turns; for models that do not fit twice")
    add.add_argument("--out", type=Path, default=report.OUT / out, help="JSON lines are appended here")
    return add


def prepare(args: argparse.Namespace) -> None:
    """Settings that the processes of the trainers inherit; one thread on a CPU.

    Raises:
        SystemExit: When TRL is not installed.
    """
    if not args.list and importlib.util.find_spec("trl") is None:
        raise SystemExit("TRL is not installed. Run: pip install trl==1.16.0")
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    # The trainers' processes end in the middle of a run; Python would report their locks as leaked.
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    if args.device == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    if args.steps is None:
        args.steps = 4 if args.quick else 8


def chosen(names: Sequence[str], quick: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Names that ``--cases`` or ``--quick`` ask for.

    Raises:
        SystemExit: When a pattern fits nothing.
    """
    patterns = list(quick) if args.quick and args.cases == "*" else args.cases.split(",")
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise SystemExit(f"no case '{pattern}'; --list prints them")
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """What holds for every case of a call."""
    return {
        "device": args.device,
        "device_name": report.device_name(args.device),
        "size": args.size,
        "bf16": args.bf16,
        "freeze_vision": args.freeze_vision,
        "micro_batch": args.micro,
        "warmup": args.warmup,
        "together": not args.one_at_a_time,
        "clock": "process CPU seconds, 1 thread" if args.device == "cpu" else "synchronised wall seconds",
    }
