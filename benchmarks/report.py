"""One JSON line per case."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.lockstep import Run, ratio

OUT = Path(__file__).resolve().parent / "out"
PACKAGES = ("mmpost-toolkit", "trl", "transformers", "torch", "accelerate", "datasets")


def versions() -> dict[str, str | None]:
    """What was compared with what; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: str) -> str:
    """The processor or the GPU in words."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def record(case: str, runs: Mapping[str, Run], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What one case says.

    Args:
        case: Its name.
        runs: ``mmpost``, ``trl`` (with its defaults) and, when it was asked for, ``trl_no_ckpt``.
        facts: Anything else about the case.

    Returns:
        Medians in seconds, ratios above 1 where mmpost is faster, memory ratios below 1 where it takes less.
    """
    ours = runs["mmpost"]
    out: dict[str, Any] = {"case": case, "mmpost_s": round(ours.median, 5)}
    for name, suffix in (("trl", ""), ("trl_no_ckpt", "_no_ckpt")):
        if name not in runs:
            continue
        theirs = runs[name]
        value, low, high = ratio(ours.seconds, theirs.seconds)
        out |= {
            f"{name}_s": round(theirs.median, 5),
            f"ratio{suffix}": round(value, 3),
            f"ratio{suffix}_low": round(low, 3),
            f"ratio{suffix}_high": round(high, 3),
            f"peak_mem_ratio{suffix}": round(ours.peak / theirs.peak, 3),
        }
    out["peak_mb"] = {name: round(run.peak / 1e6, 1) for name, run in runs.items()}
    out["step_s"] = {name: [round(value, 5) for value in run.seconds] for name, run in runs.items()}
    return out | {"steps": len(ours.seconds), **facts, "versions": versions()}


def write(file: Path, line: Mapping[str, Any]) -> None:
    """Append a record and show the figures that matter."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")
    shown = f"{line['case']:<28} mmpost {line['mmpost_s']:.3f} s  TRL {line['trl_s']:.3f} s"
    shown += f"  ratio {line['ratio']:.2f} [{line['ratio_low']:.2f}, {line['ratio_high']:.2f}]"
    if "ratio_no_ckpt" in line:
        shown += f"  without checkpointing {line['ratio_no_ckpt']:.2f}"
    print(f"{shown}  memory {line['peak_mem_ratio']:.2f}", flush=True)
