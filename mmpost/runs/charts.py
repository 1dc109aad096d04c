"""Which charts a run's metrics give: known keys first, in words, then whatever else was logged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmpost.runs.records import flatten, is_number
from mmpost.runs.svg import COLOURS, Bar, Series, bar_chart, histogram, line_chart

# Key in metrics.jsonl, title, one line of meaning. Nested keys are dotted.
KNOWN = (
    ("loss", "Loss", "what the optimiser minimises"),
    ("surrogate", "Surrogate", "policy objective; near 0 by construction, watch reward and gradient instead"),
    ("nll", "Negative log-likelihood", "nats per trained token"),
    ("reward.total", "Reward", "weighted sum, mean over completions"),
    ("reward.std_within", "Reward spread within groups", "standard deviation; 0 means nothing to learn"),
    ("vote.agreement", "Vote agreement", "share of the completions of a question in the largest class of answers"),
    ("vote.entropy", "Vote entropy", "nats over the classes of answers of a question; 0 means that all agree"),
    ("vote.unparsed", "Completions without an answer", "share; they do not vote"),
    ("vote.labelled", "Questions with a pseudo-label", "share; the others train nothing"),
    ("vote.same_answer", "Most frequent pseudo-label", "share of the questions that got it; near 1 is a collapse"),
    ("zero_spread", "Groups without spread", "share of groups in which all rewards are equal"),
    ("truncated", "Truncated completions", "share cut by the length limit"),
    ("completion_length", "Completion length", "tokens, mean"),
    ("entropy", "Entropy", "nats per token under the sampling policy"),
    ("kl", "KL to the start", "nats per token"),
    ("logp_gap", "Rollout against trainer", "mean absolute difference of token log-probabilities"),
    ("logp_gap_p99", "Rollout against trainer, tail", "absolute difference that 99 % of the tokens keep"),
    ("logp_gap_max", "Rollout against trainer, largest", "largest absolute difference of a token"),
    ("clip_share", "Clipped share", "share of tokens outside the clip range"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("lr", "Learning rate", ""),
)
# Counters and clocks: not curves.
HIDDEN = {"step", "epoch", "time", "tokens_total", "nonfinite"}
GROUPED = {
    "reward.by_name": "Reward by name",
    "vote.accuracy": "Pseudo-labels against labels",
    "by_source": "Loss by source",
    "by_modality": "Loss by modality",
}
# Groups that stand right behind one of the known charts.
BEHIND = {"reward.total": "reward.by_name", "vote.agreement": "vote.accuracy"}
MAX_CHARTS = 24


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing and its heading."""

    title: str
    note: str
    svg: str


def metric_charts(metrics: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]]) -> list[Chart]:
    """Curves of everything in metrics.jsonl that is a number over steps.

    Args:
        metrics: Training records; keys may come and go.
        evals: Records with ``eval``: task to ``{"accuracy", "ci", "n"}``.

    Returns:
        Charts in reading order, at most 24.
    """
    rows = [(float(record["step"]), flatten(record)) for record in metrics if is_number(record.get("step"))]
    rows.sort(key=lambda row: row[0])  # a run killed without truncation logs some steps twice
    charts = [eval_chart(evals)]
    known = {key: (title, note) for key, title, note in KNOWN}
    seen = dict.fromkeys(key for _, row in rows for key in row)
    if all(row.get("nll") == row.get("loss") for _, row in rows):
        seen.pop("nll", None)  # in SFT the loss is the likelihood; one curve says it
    for key in [*known, *(key for key in seen if key not in known)]:
        head = key.split(".")[0]
        if key not in seen or head in HIDDEN | {"phase_s"} or any(key.startswith(group + ".") for group in GROUPED):
            continue
        title, note = known.get(key, (key, ""))
        charts.append(_curve(rows, [(title, key)], title, note))
        if key in BEHIND:
            charts.append(_grouped(rows, seen, BEHIND[key]))
    drawn = {group for key, group in BEHIND.items() if key in seen}
    charts += [_grouped(rows, seen, group) for group in GROUPED if group not in drawn]
    return [chart for chart in charts if chart is not None][:MAX_CHARTS]


def eval_chart(evals: Sequence[dict[str, Any]]) -> Chart | None:
    """Accuracy of each task over the steps, with intervals."""
    points: dict[str, list[tuple[float, float, float | None, float | None]]] = {}
    for record in evals:
        for task, result in record["eval"].items():
            if isinstance(result, dict) and is_number(result.get("accuracy")) and is_number(record.get("step")):
                low, high = interval(result.get("ci"))
                points.setdefault(task, []).append((float(record["step"]), result["accuracy"], low, high))
    lines = []
    for task, rows in points.items():
        rows.sort(key=lambda row: row[0])
        x, y = [row[0] for row in rows], [row[1] for row in rows]
        lines.append(Series(task, x, y, [row[2] for row in rows], [row[3] for row in rows]))
    drawing = line_chart(lines, title="Held-out accuracy", smooth=False)
    return Chart("Held-out accuracy", "with 95 % intervals", drawing) if drawing else None


def interval(value: Any) -> tuple[float | None, float | None]:
    """(low, high) of a two-number list, or (None, None)."""
    if isinstance(value, list | tuple) and len(value) == 2 and all(is_number(end) for end in value):
        return float(value[0]), float(value[1])
    return None, None


def accuracy_bars(
    rows: Sequence[tuple[str, dict[str, Any]]],
    *,
    key: str,
    title: str,
    note: str = "",
    one_colour: bool = False,
) -> Chart | None:
    """Bars with whiskers of results ``{key, "ci", "n"}``; None when no row has a number."""
    bars = []
    for label, result in rows:
        if isinstance(result, dict) and is_number(result.get(key)):
            low, high = interval(result.get("ci"))
            count = f"n={result['n']}" if "n" in result else ""
            bars.append(Bar(label, float(result[key]), low, high, count))
    # Accuracies share the axis 0..1 so that two reports can be held side by side.
    unit = all(0 <= bar.value <= 1 for bar in bars)
    drawing = bar_chart(bars, title=title, high=1.0 if unit else None, one_colour=one_colour)
    return Chart(title, note, drawing) if drawing else None


def reward_histogram(values: Sequence[float]) -> Chart | None:
    """How the rewards of the written samples spread."""
    drawing = histogram(values, title="Rewards of samples")
    return Chart("Rewards of samples", f"{len(values)} completions written to samples/", drawing) if drawing else None


def phase_shares(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(phase, seconds over all logged records, share of the total), longest first."""
    total: dict[str, float] = {}
    for record in metrics:
        for phase, seconds in (record.get("phase_s") or {}).items():
            if is_number(seconds):
                total[phase] = total.get(phase, 0.0) + seconds
    whole = sum(total.values())
    ranked = sorted(total.items(), key=lambda item: -item[1])
    return [(phase, seconds, seconds / whole if whole else 0.0) for phase, seconds in ranked]


def _grouped(rows: list[tuple[float, dict[str, Any]]], seen: dict[str, None], group: str) -> Chart | None:
    keys = [key for key in seen if key.startswith(group + ".")]
    more = f"{len(keys) - COLOURS} more in metrics.jsonl" if len(keys) > COLOURS else ""
    return _curve(rows, [(key[len(group) + 1 :], key) for key in keys[:COLOURS]], GROUPED[group], more)


def _curve(
    rows: list[tuple[float, dict[str, Any]]], lines: Sequence[tuple[str, str]], title: str, note: str
) -> Chart | None:
    series = []
    for name, key in lines:
        # A record without the key is no gap: evaluations and rollouts log at other steps than the optimiser.
        points = [(x, row[key] if is_number(row[key]) else None) for x, row in rows if key in row]
        series.append(Series(name, [x for x, _ in points], [y for _, y in points]))
    drawing = line_chart(series, title=title)
    return Chart(title, note, drawing) if drawing else None
