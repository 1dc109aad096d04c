"""On what a run ran: versions, machine, and the state of the code."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *(
        "mmpost-toolkit",
        "torch",
        "torchvision",
        "transformers",
        "accelerate",
        "peft",
        "numpy",
        "pillow",
        "pyarrow",
    ),
    *("safetensors", "scikit-learn", "pydantic", "PyYAML", "typer", "rich", "jinja2", "datasets"),
)
MAX_PATCH_BYTES = 5_000_000  # a larger diff means data in the checkout, which git.patch is not for


def environment() -> dict[str, Any]:
    """Start time (UTC), versions, platform and number of CPUs; neither host nor user name."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": versions,
    }


def git_state(folder: Path) -> tuple[str, bytes]:
    """Commit and uncommitted changes of the checkout around ``folder``; empty outside one or without git."""
    try:
        commit = _git(folder, "rev-parse", "--verify", "HEAD").decode().strip()
        return commit, _git(folder, "diff", "--no-ext-diff", "--no-color", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return "", b""


def _git(folder: Path, *words: str) -> bytes:
    return subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, timeout=20).stdout
