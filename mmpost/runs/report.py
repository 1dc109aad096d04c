"""report.html: one file that shows a run, or a chain of runs, without a server, a script or a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpost.config.schema import GrpoSection, RunConfig
from mmpost.runs import charts, gallery
from mmpost.runs.charts import Chart
from mmpost.runs.records import (
    Option,
    RunRecords,
    config_options,
    flatten,
    is_number,
    parse_config,
    read_json,
    read_run,
)
from mmpost.runs.svg import number

MAX_BYTES = 5_000_000
CARDS = 8  # samples per wall before the size limit speaks
MAX_EVENTS = 200


@dataclass(frozen=True, slots=True)
class Stage:
    """One link of a chain of runs.

    Attributes:
        name: For example ``init``, ``sft``, ``grpo``.
        run: Run folder, or None for a stage without training.
        eval: Path of its eval/NAME.json, or None.
    """

    name: str
    run: Path | None = None
    eval: Path | None = None


@dataclass(slots=True)
class StageView:
    """What the page shows of a stage; the template reads it."""

    name: str
    status: str = ""
    tiles: list[tuple[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    histogram: Chart | None = None
    evals: list[dict[str, Any]] = field(default_factory=list)
    groups: list[Chart] = field(default_factory=list)
    walls: list[gallery.Wall] = field(default_factory=list)
    events: list[dict[str, str]] = field(default_factory=list)
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    environment: list[tuple[str, str]] = field(default_factory=list)
    citations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """True when there is nothing to show."""
        return not (self.status or self.evals or self.notes)


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of one run.

    Args:
        run: Run folder; any of its files may be missing or torn.
        out: The file; by default report.html in the run folder.

    Returns:
        The file, at most 5 MB.
    """
    records = read_run(run)
    title = str(parse_config(records.config_text).get("log.run_name") or run.resolve().name)
    evals = [run / "eval" / f"{name}.json" for name in records.evals]

    def render(cards: int, notes: list[str]) -> str:
        return _render(title, None, [_view("", records, evals, cards)], notes)

    return _write_within_limit(render, out or run / "report.html", [])


def write_staged_report(
    stages: Sequence[Stage], out: Path, *, title: str, summary: dict[str, Any], notes: Sequence[str]
) -> Path:
    """Write the report of a chain of runs.

    Args:
        stages: In order.
        out: The file.
        title: Heading.
        summary: Content of summary.json: ``stages`` with accuracy and interval, ``grpo_minus_sft``, counts.
        notes: Sentences shown under the summary.

    Returns:
        ``out``, at most 5 MB.
    """
    loaded = [(stage, read_run(stage.run) if stage.run else None) for stage in stages]

    def render(cards: int, size_notes: list[str]) -> str:
        views = [_view(s.name, records, [s.eval] if s.eval else [], cards) for s, records in loaded]
        return _render(title, summary, views, size_notes)

    return _write_within_limit(render, out, list(notes))


def _write_within_limit(render: Any, out: Path, notes: list[str]) -> Path:
    """Render with fewer and fewer samples until the file is small enough; the page says so."""
    html = render(CARDS, notes)
    cards = CARDS
    while len(html.encode()) > MAX_BYTES and cards > 0:
        cards //= 2
        less = f"Only {cards} samples of each kind are shown, to keep this file under 5 MB."
        html = render(cards, [*notes, less])
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(html.encode("utf-8", errors="replace"))
    partial.replace(out)
    return out


def _render(title: str, summary: dict[str, Any] | None, views: list[StageView], notes: list[str]) -> str:
    # jinja2 costs 60 ms; reports are written at the end of runs only.
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415
    from markupsafe import Markup  # noqa: PLC0415

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # Drawings and style sheet are ours, and escaped where they were made; everything else is escaped here.
    environment.filters |= {"drawing": Markup, "number": number, "percent": percent}
    folder = Path(__file__).parent
    style = Markup((folder / "report.css").read_text("utf-8"))
    page = environment.from_string((folder / "report.html.j2").read_text("utf-8"))
    return page.render(title=title, summary=summary_view(summary), stages=views, notes=notes, style=style)


def summary_view(summary: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the head of a staged report shows: tiles, a bar chart with whiskers, and table rows."""
    if not summary:
        return None
    rows = [row for row in summary.get("stages") or [] if isinstance(row, dict) and is_number(row.get("accuracy"))]
    bars = [(str(row.get("name", "")), {"n": summary.get("n_eval", "?"), **row}) for row in rows]
    chart = charts.accuracy_bars(
        bars, key="accuracy", title="Accuracy after each stage", note="bars with 95 % intervals"
    )
    tiles = []
    gains = {name.removesuffix("_minus_sft"): gain for name, gain in summary.items() if name.endswith("_minus_sft")}
    # Several gains over one start are no chain, and are told apart by the bars.
    if rows and len(gains) <= 1:
        tiles.append(
            (
                "accuracy, " + " → ".join(label for label, _ in bars),
                " → ".join(percent(r["accuracy"]) for r in rows),
            )
        )
    for name, gain in gains.items():
        if isinstance(gain, dict) and is_number(gain.get("mean")):
            label = f"{name.upper().replace('_', ' ')} minus SFT"
            tiles.append((label, f"{100 * gain['mean']:+.1f} points {_interval(gain.get('ci'), signed=True)}"))
    recovered = summary.get("recovered") or {}
    if is_number(recovered.get("share")):
        tiles.append(("share of the labels' gain", percent(recovered["share"])))
    seeds = summary.get("seeds") or []
    for label, value in (
        ("task", summary.get("task")),
        ("parameters", _count(summary.get("model_params"))),
        ("held-out rows", summary.get("n_eval")),
        ("seeds" if len(seeds) != 1 else "seed", ", ".join(str(seed) for seed in seeds)),
        ("time", duration(summary["seconds"]) if is_number(summary.get("seconds")) else None),
    ):
        if value not in (None, ""):
            tiles.append((label, str(value)))
    table = [
        {
            "name": row.get("name", ""),
            "accuracy": percent(row["accuracy"]),
            "ci": _interval(row.get("ci")),
            "time": duration(row["seconds"]) if is_number(row.get("seconds")) else "",
        }
        for row in rows
    ]
    return {"tiles": tiles, "chart": chart, "rows": table, "timed": any(row["time"] for row in table)}


def _view(name: str, records: RunRecords | None, evals: Sequence[Path], cards: int) -> StageView:
    view = StageView(name)
    if records is not None:
        _fill_from_run(view, records, cards)
    for file in evals:
        result = read_json(file)
        if not result:
            view.notes.append(f"{file.name} is missing or unreadable.")
            continue
        view.evals += _eval_rows(file.stem, result)
        groups = list((result.get("by_group") or {}).items())
        chart = charts.accuracy_bars(groups[:40], key="value", title=f"{file.stem}: accuracy by group", one_colour=True)
        if chart:
            view.groups.append(chart)
        if cards:
            view.walls += gallery.evaluation_walls(result, file, cards)
    if view.evals:
        best = view.evals[0]
        view.tiles.append((f"{best['metric']} on {best['task']}", f"{best['value']} {best['ci']}"))
    return view


def _fill_from_run(view: StageView, records: RunRecords, cards: int) -> None:
    view.status = records.status
    view.commands = records.command.splitlines()
    view.options = changed_options(records.config_text)
    view.charts = charts.metric_charts(records.metrics, records.eval_metrics)
    rewards = [reward for row in records.samples if (reward := gallery.reward_of(row)) is not None]
    view.histogram = charts.reward_histogram(rewards)
    if cards:
        view.walls = gallery.training_walls(records.samples, records.path, cards)
    view.tiles = _tiles(records)
    view.phases = charts.phase_shares(records.metrics)
    view.environment = [(key, str(value)) for key, value in flatten(records.env).items()]
    view.citations = [str(event.get("text", "")) for event in records.events if event.get("kind") == "citation"]
    events = [event for event in records.events if event.get("kind") != "citation"]
    if len(events) > MAX_EVENTS:
        view.notes.append(f"The last {MAX_EVENTS} of {len(events)} events are shown; all are in events.jsonl.")
    view.events = [_event(event) for event in events[-MAX_EVENTS:]]
    nonfinite = sorted({key for record in records.metrics for key in record.get("nonfinite") or []})
    if nonfinite:
        view.notes.append(f"Values that were not finite are gaps in the curves: {', '.join(nonfinite)}.")
    if records.unreadable:
        view.notes.append(f"{records.unreadable} unreadable lines in the logs were left out, as a crash leaves them.")


def changed_options(text: str) -> list[Option]:
    """Options that differ from the defaults, by their source comments or else by the schema."""
    options = config_options(text)
    if any(option.source for option in options):
        return [option for option in options if option.source and option.source != "default"]
    defaults = flatten({**RunConfig().model_dump(), "grpo": GrpoSection.model_validate({}).model_dump()})
    given = parse_config(text)
    changed = {key for key in given if given[key] != defaults.get(key)}
    return [o for o in options if o.key in changed or any(key.startswith(o.key + ".") for key in changed)]


def percent(value: float) -> str:
    """A share as ``41.3 %``."""
    return f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """Seconds as ``0:07``, ``12:30`` or ``1:02:03``."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _tiles(records: RunRecords) -> list[tuple[str, str]]:
    tiles = [("steps", str(records.step))]
    last: dict[str, Any] = {}
    for record in records.metrics:
        last |= flatten(record)
    times = [record["time"] for record in records.metrics if is_number(record.get("time"))]
    if times:
        # "time" may count from 1970 or from the start of the run.
        tiles.append(("time", duration(times[-1] - times[0] if times[0] > 1e8 else times[-1])))
    if is_number(last.get("tokens_total")):
        tiles.append(("tokens", _count(last["tokens_total"]) or ""))
    labels = {"loss": "last loss", "reward.total": "last reward", "entropy": "last entropy"}
    tiles += [(label, number(last[key])) for key, label in labels.items() if is_number(last.get(key))]
    return tiles


def _eval_rows(name: str, result: dict[str, Any]) -> list[dict[str, str]]:
    rows = []
    for metric, values in (result.get("metrics") or {}).items():
        if not isinstance(values, dict) or not is_number(values.get("value")):
            continue
        task = result.get("task") or {}
        share = 0 <= values["value"] <= 1
        rows.append(
            {
                "name": name,
                "task": str(task.get("name", name)),
                "model": str((result.get("model") or {}).get("name", "")),
                "metric": metric,
                "value": percent(values["value"]) if share else number(values["value"]),
                "ci": _interval(values.get("ci"), percentages=share),
                "n": str(values.get("n", result.get("n", ""))),
                "unparsed": str(values.get("unparsed", "")),
                "time": duration(result["seconds"]) if is_number(result.get("seconds")) else "",
            }
        )
    return rows


def _interval(value: Any, *, signed: bool = False, percentages: bool = True) -> str:
    low, high = charts.interval(value)
    if low is None or high is None:
        return ""
    if not percentages:
        return f"[{number(low)}, {number(high)}]"
    return f"[{100 * low:+.1f}, {100 * high:+.1f}]" if signed else f"[{100 * low:.1f}, {100 * high:.1f}]"


def _event(event: dict[str, Any]) -> dict[str, str]:
    extra = {key: value for key, value in event.items() if key not in {"time", "kind", "text", "step"}}
    text = str(event.get("text", "")) + "".join(f" {key}={value}" for key, value in extra.items())
    return {"step": str(event.get("step", "")), "kind": str(event.get("kind", "")), "text": text[:600]}


def _count(value: Any) -> str | None:
    if not is_number(value):
        return None
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)
