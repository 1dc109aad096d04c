import io
import re

import pytest
from rich.console import Console

from mmpost.runs.live import Progress, clock


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def record(step: int) -> dict:
    return {
        "step": step,
        "loss": 1.234,
        "accuracy": 0.41,
        "lr": 3e-4,
        "grad_norm": 0.5,
        "reward": {
            "total": step / 100,
            "by_name": {"accuracy": 0.1 * step, "format": 1.0},
            "std_within": 0.3,
        },
        "entropy": 0.9,
        "truncated": 0.02,
        "zero_spread": None,
        "nonfinite": ["kl"],
    }


def test_auto_is_lines_in_a_pipe_and_live_on_a_terminal(monkeypatch):
    monkeypatch.delenv("TERM", raising=False)
    assert Progress(stream=io.StringIO()).mode == "lines"
    assert Progress(stream=Terminal()).mode == "live"
    monkeypatch.setenv("TERM", "dumb")
    assert Progress(stream=Terminal()).mode == "lines"


def test_a_line_has_the_documented_form():
    stream = io.StringIO()
    progress = Progress("lines", stream=stream)
    progress.start(200, "digits")
    progress.update(40, {"loss": 1.234, "accuracy": 0.41, "lr": 3e-4}, None)
    first, line = stream.getvalue().splitlines()
    assert first == "digits"
    pattern = r"step   40/200  loss 1\.234  acc 0\.410  lr 3\.0e-4  \d+\.\d\d s/step  eta \d+:\d\d"
    assert re.fullmatch(pattern, line)


def test_lines_fit_80_columns_and_hold_no_colour():
    stream = io.StringIO()
    progress = Progress("lines", stream=stream, report="runs/a/report.html")
    progress.start(1_000_000, "title")
    for step in (1, 500_000):
        progress.update(step, record(step), {"train": 1.0})
    progress.event("first\x1b[31m line\nsecond line")
    progress.checkpoint("runs/a/checkpoints/step-000050")
    progress.stop()
    progress.stop()
    text = stream.getvalue()
    assert "\x1b" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.splitlines()[-3:] == [
        "first[31m line second line",
        "checkpoint: runs/a/checkpoints/step-000050",
        "report: runs/a/report.html",
    ]


def test_none_is_silent():
    stream = io.StringIO()
    progress = Progress("none", stream=stream)
    progress.start(10, "t")
    progress.update(1, record(1))
    progress.event("e")
    progress.stop()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("width", [80, 120])
def test_the_panel_has_at_most_14_lines_of_the_terminal_width(width):
    progress = Progress("none", report="runs/" + "long-" * 40 + "/report.html")
    progress.start(200, "a title that is longer than any terminal " * 5)
    for step in range(1, 60):
        metrics = {**record(step), **{f"extra_{i}": float(i) for i in range(30)}}
        progress.update(step, metrics, {"data": 0.1, "rollout": 0.5, "reward": 0.1, "train": 0.3, "sync": 0.0})
    progress.event("something happened " * 20)
    progress.checkpoint("checkpoints/step-000050")
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    console.print(progress.panel())
    shown = console.file.getvalue().splitlines()
    assert len(shown) <= 14
    assert all(len(line) <= width for line in shown)
    text = "\n".join(shown)
    assert "59/200" in text
    assert "rollout 50%" in text
    assert re.search(r"reward +0\.590↑", text)
    sparks = next(line for line in shown if line.startswith("reward ▁"))
    assert len(re.findall("[▁▂▃▄▅▆▇█]", sparks)) == 40


def test_live_honours_no_color_and_gives_the_terminal_back(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    progress = Progress("live", stream=stream)
    progress.start(10, "t")
    progress.update(3, record(3), {"train": 1.0})
    progress.stop()
    text = stream.getvalue()
    assert "3/10" in text
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", text)  # no foreground colour
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_resumed_run_is_not_called_fast():
    stream = io.StringIO()
    progress = Progress("lines", stream=stream)
    progress.start(200, "t", first_step=100)
    progress.update(100, {"loss": 1.0})
    assert "eta" not in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (750, "12:30"), (3723, "1:02:03"), (-1, "0:00")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
