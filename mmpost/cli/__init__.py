"""The ``mmpost`` command: its outer edge turns every failure into one clear message and an exit code."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence

from mmpost.core.errors import MmpostError

# How long the other processes of a run leave the word to the first one.
OTHERS_S = 10.0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes: 0 done, 1 unexpected (a crash file is written), 2 configuration, 3 data, 4 environment, 5 out of
    memory, 6 a guard stopped training, 7 evaluation incomplete, 130 interrupted (a checkpoint is written).
    """
    code = run(list(sys.argv[1:] if argv is None else argv))
    # The interpreter's last collection would visit every object of the libraries, for more than a second.
    gc.freeze()
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run the command line and return the exit code."""
    _quiet_libraries()
    from mmpost.cli.commands import app

    try:
        # Outside standalone mode an exit code comes back as the value of the call.
        code = app(args=argv, prog_name="mmpost", standalone_mode=False)
    except MmpostError as error:
        if os.environ.get("RANK", "0") != "0":
            # Most errors happen in every process, and the first one speaks for all: it exits, and the launcher
            # ends the others while they wait here. An error of this process alone is told after the wait.
            time.sleep(OTHERS_S)
        # One write, so that the processes of a run do not mix their lines.
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except Exception as error:
        return _unexpected(error)
    return code if isinstance(code, int) else 0


def _quiet_libraries() -> None:
    """Settings that must stand before transformers is imported."""
    # Worker processes must not fight over the tokenizer's threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Deprecations inside the libraries are not the user's to mend, and would hide what is.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _unexpected(error: Exception) -> int:
    # Newer versions of typer carry a click of their own, so its errors are known by what they can do.
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return 2
    if hasattr(error, "format_message"):
        sys.stderr.write(f"{error.format_message()} See mmpost --help. [MMP-C000]\n")
        return 2
    if type(error).__name__ == "Abort":
        return 130
    if type(error).__name__ == "Interrupted":
        sys.stderr.write("interrupted; a checkpoint is written. Run the same command again to go on.\n")
        return 130
    if type(error).__name__ == "OutOfMemoryError":
        sys.stderr.write(
            f"out of memory: {str(error).splitlines()[0]} Try, in this order: a smaller "
            "train.per_device_train_batch_size, model.gradient_checkpointing=true, peft.kind=lora, a smaller "
            "data.media.max_pixels. [MMP-T001]\n"
        )
        return 5
    if "closed by peer" in str(error) and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stderr.write("another process of this run has ended; its own message says why. [MMP-T003]\n")
        return 1
    crash = os.path.abspath("crash.txt")
    text = traceback.format_exc()
    try:
        with open(crash, "w", encoding="utf-8") as file:
            file.write(text)
        where = f" Details: {crash}"
    except OSError:
        where = f"\n{text}"
    sys.stderr.write(f"unexpected {type(error).__name__}: {error}.{where} [MMP-T000]\n")
    return 1
