"""What a running command says on stderr: a live panel, one line per log, or nothing."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mmpost.runs.records import flatten, is_number
from mmpost.runs.svg import number

Mode = Literal["auto", "live", "lines", "none"]
COLUMNS = 80  # a line never gets longer
SPARK_POINTS = 40
MAX_METRICS = 9  # three rows of three in the live panel
# Key in the metrics, short name in a line. Order is priority: what does not fit into 80 columns is left out.
SHORT = (
    ("reward.total", "reward"),
    ("loss", "loss"),
    ("nll", "nll"),
    ("accuracy", "acc"),
    ("truncated", "trunc"),
    ("entropy", "entropy"),
    ("grad_norm", "grad"),
)
# Clocks and settings have their own place in a line.
HIDDEN = {"step", "epoch", "time", "lr", "nonfinite"}


class Progress:
    """The progress display of one run; only the first process makes one.

    Args:
        mode: ``live`` needs a terminal, ``lines`` prints one line per update, ``none`` is silent; ``auto``
            takes live on a terminal and lines elsewhere.
        report: Path that the panel names as the report.
        stream: Where to write, by default stderr.

    Attributes:
        mode: The mode in use, never ``auto``.
    """

    def __init__(self, mode: Mode = "auto", *, report: Path | str | None = None, stream: IO[str] | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        if mode == "auto":
            is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
            mode = "live" if is_terminal else "lines"
        self.mode = mode
        self._report = str(report) if report else ""
        self._live: Live | None = None
        self._title, self._total, self._step, self._first = "", 0, 0, 0
        self._began = time.monotonic()
        self._clock: deque[tuple[float, int]] = deque(maxlen=20)
        self._spark: dict[str, deque[float]] = {}
        self._last: dict[str, float] = {}
        self._before: dict[str, float] = {}
        self._phases: dict[str, float] = {}
        self._event = self._checkpoint = ""

    def start(self, total_steps: int, title: str, *, first_step: int = 0) -> None:
        """Begin.

        Args:
            total_steps: Steps of the whole run.
            title: Run, model and device in one line.
            first_step: Steps done before this start, when a run goes on.
        """
        self._total, self._title, self._step, self._first = (
            total_steps,
            _one_line(title),
            first_step,
            first_step,
        )
        self._began = time.monotonic()
        self._clock.clear()
        self._clock.append((self._began, first_step))
        if self.mode == "lines":
            self._print(self._title)
        elif self.mode == "live":
            console = Console(file=self._stream)
            # With stdout in a pipe (--json), redirecting it would send its lines to the terminal instead.
            self._live = Live(self.panel(), console=console, refresh_per_second=4, redirect_stdout=sys.stdout.isatty())
            self._live.start()

    def update(self, step: int, metrics: Mapping[str, Any], phase_s: Mapping[str, float] | None = None) -> None:
        """Show a step.

        Args:
            step: Steps done.
            metrics: A record of metrics.jsonl, nested or not; only numbers are shown.
            phase_s: Seconds by phase; only their proportions are used.
        """
        self._step = step
        self._clock.append((time.monotonic(), step))
        values = {key: float(value) for key, value in flatten(metrics).items() if is_number(value)}
        phases = phase_s if phase_s is not None else metrics.get("phase_s") or {}
        self._phases = {name: float(value) for name, value in phases.items() if is_number(value)}
        values = {key: value for key, value in values.items() if not key.startswith("phase_s.")}
        self._before.update(self._last)
        self._last.update(values)
        for key in ("loss", "reward.total"):
            if key in values:
                self._spark.setdefault(key, deque(maxlen=SPARK_POINTS)).append(values[key])
        if self.mode == "lines":
            self._print(self.line(values))
        self._refresh()

    def event(self, text: str) -> None:
        """Show something that happened: a diagnosis, an evaluation, a warning."""
        self._event = _one_line(text)
        if self.mode == "lines":
            self._print(self._event)
        self._refresh()

    def checkpoint(self, path: Path | str) -> None:
        """Name the last checkpoint."""
        self._checkpoint = str(path)
        if self.mode == "lines":
            self._print(f"checkpoint: {path}")
        self._refresh()

    def stop(self) -> None:
        """Leave the last state on the screen and give the terminal back; may be called twice."""
        if self._live is not None:
            self._live.update(self.panel(), refresh=True)
            self._live.stop()
            self._live = None
        elif self.mode == "lines" and self._report:
            self._print(f"report: {self._report}")
            self._report = ""

    def line(self, values: Mapping[str, float]) -> str:
        """One line of at most 80 characters: step, main values, speed, time left."""
        width = max(4, len(str(self._total)))
        head = f"step {self._step:>{width}}/{self._total}"
        tail = [f"lr {_rate(values['lr'])}"] if "lr" in values else []
        tail += self._speed()
        parts = [head]
        for key, name in SHORT:
            if key in values and len("  ".join([*parts, f"{name} {_value(values[key])}", *tail])) <= COLUMNS:
                parts.append(f"{name} {_value(values[key])}")
        return "  ".join([*parts, *tail])

    def panel(self) -> RenderableType:
        """The live panel, at most 14 lines."""
        rows: list[RenderableType] = [_cut(Text(self._title, "bold")), self._bar()]
        if self._phases and sum(self._phases.values()) > 0:
            whole = sum(self._phases.values())
            split = " | ".join(f"{name} {value / whole:.0%}" for name, value in self._phases.items())
            rows.append(_cut(Text(split, "dim")))
        for key, name in (("reward.total", "reward"), ("loss", "loss")):
            if len(self._spark.get(key, ())) > 1:
                rows.append(_cut(Text.assemble((f"{name:<7}", "dim"), (self._sparkline(self._spark[key]), "cyan"))))
        if self._last:
            rows.append(self._table())
        for name, text in (("event", self._event), ("saved", self._checkpoint), ("report", self._report)):
            if text:
                rows.append(_cut(Text.assemble((f"{name:<7}", "dim"), text)))
        return Group(*rows)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self.panel())

    def _print(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _speed(self) -> list[str]:
        (since, first), (now, last) = self._clock[0], self._clock[-1]
        if last <= first:
            return []
        per_step = (now - since) / (last - first)
        left = max(0, self._total - self._step) * per_step
        return [
            f"{per_step:.2f} s/step" if per_step < 100 else f"{per_step:.0f} s/step",
            f"eta {clock(left)}",
        ]

    def _bar(self) -> Text:
        share = min(1.0, self._step / self._total) if self._total else 0.0
        filled = round(30 * share)
        full, empty = ("━", "─") if self._can_draw() else ("#", "-")
        speed = "  ".join([f"{self._step}/{self._total}", *self._speed()])
        return _cut(Text.assemble((full * filled, "green"), (empty * (30 - filled), "dim"), f" {share:4.0%}  {speed}"))

    def _table(self) -> Table:
        names = dict(SHORT)
        shown = [key for key, _ in SHORT if key in self._last]
        # Rewards by name and evaluation results follow in the order in which they came.
        shown += [key for key in self._last if key not in names and key.split(".")[0] not in HIDDEN]
        shown = (["lr"] if "lr" in self._last else []) + shown
        table = Table.grid(padding=(0, 2))
        cells = [self._cell(key, names.get(key) or _short(key)) for key in shown[:MAX_METRICS]]
        for start in range(0, len(cells), 3):
            table.add_row(*cells[start : start + 3])
        return table

    def _cell(self, key: str, name: str) -> Text:
        value, before = self._last[key], self._before.get(key)
        up, down = ("↑", "↓") if self._can_draw() else ("+", "-")
        arrow = " " if before is None or before == value else up if value > before else down
        short = name if len(name) <= 14 else name[:13] + "~"
        shown = _rate(value) if key == "lr" else _value(value)
        return Text.assemble((f"{short:<14}", "dim"), f"{shown:>7}", (arrow, "cyan"), no_wrap=True, overflow="crop")

    def _sparkline(self, values: deque[float]) -> str:
        levels = "▁▂▃▄▅▆▇█" if self._can_draw() else "_.-=+*#"
        low, high = min(values), max(values)
        span = (high - low) or 1.0
        drawn = "".join(levels[int((value - low) / span * (len(levels) - 1) + 0.5)] for value in values)
        return f"{drawn} {_value(low)}..{_value(high)}"

    def _can_draw(self) -> bool:
        return (getattr(self._stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


def clock(seconds: float) -> str:
    """Seconds as ``0:07``, ``12:30`` or ``1:02:03``."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _short(key: str) -> str:
    """``format`` of ``reward.by_name.format``, ``digits accuracy`` of ``eval.digits.accuracy``."""
    return key.removeprefix("reward.by_name.").removeprefix("eval.").replace(".", " ")


def _value(value: float) -> str:
    if value == int(value) and abs(value) < 1e5:
        return str(int(value))
    return f"{value:.3f}" if 0.01 <= abs(value) < 100 else number(float(f"{value:.3g}"))


def _rate(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _one_line(text: str) -> str:
    # Event texts quote data; control characters would move the cursor.
    return "".join(char for char in " ".join(text.split()) if char.isprintable())


def _cut(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
