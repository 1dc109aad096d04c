"""What is going wrong in a run under way, in plain words: a finding per cause, once, until the cause is gone.

Pure arithmetic over the metrics of past steps, no torch. The memory is plain JSON and belongs to the checkpoint, so
that a continued run says exactly what an uninterrupted one says. Nothing here stops a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from statistics import fmean, median, pvariance
from typing import Any

from mmpost.train import diagnose_votes
from mmpost.train.finding import Finding, percent

# Thresholds. "Own choice" marks what no source gives.
STEADY = 5  # steps that must agree before a share or a mean is believed
SPREADLESS_STEPS = 20  # the longer view of groups without spread: a few lucky groups must not hide a dead reward
SPREADLESS_SHARE = 0.8  # of the groups over those steps; working runs of the demo reach 0.7 late in training
TRUNCATED_SHARE = 0.3  # of the completions; the limit then decides rewards and lengths more than the policy does
ENTROPY_SHARE = 0.1  # of the entropy at the start; below it samples of one prompt are nearly copies
# |log-probability of the engine - of the trainer|, in nats; the distance that 99 % of the tokens keep, or where it is
# not known the mean. Equal code and weights agree to 1e-7 in float32; bfloat16 carries 8 bits, which a deep model turns
# into about 1e-2. An engine with kernels of its own is further away.
GAP_FLOAT32, GAP_BFLOAT16, GAP_OTHER_ENGINE = 1e-3, 5e-2, 0.2
LENGTH_WINDOW = 10  # steps at the start and now over which lengths and rewards are averaged (own choice)
LENGTH_GROWTH, LENGTH_SHRINKAGE = 1.5, 0.5  # mean length now over mean length at the start
LENGTH_TOKENS = 8.0  # smaller changes are a matter of one phrase, whatever the ratio (own choice)
RISE_ERRORS = 3.0  # standard errors by which the reward must have gone up; 2 would be met by chance in a long run
SPIKE_FACTOR = 10.0  # gradient norm over its running median
SPIKE_HISTORY = 50  # steps of the median; the first 10 only teach it what is normal (own choice)
SPIKE_WARMUP = 10
CONSTANT_STEPS = 50  # steps with the same mean of a reward function
CLIPPED_SHARE = 0.3  # of the tokens over 20 steps; usual updates clip below 0.2 (own choice)
CLIPPED_STEPS = 20
CUT_SHARE, CUT_STEPS = 0.95, 50  # steps whose gradient was scaled down to max_grad_norm (own choice)
# A cause is gone only once it is this factor on the other side, so that noise at a threshold does not repeat itself.
RELAX = 1.25
# A reward is at the end of its range within this share of it.
NEAR_END = 0.01

BY_NAME = "reward/by_name/"
# Metrics that are remembered, and how many of their last values.
KEPT = {
    "reward/total": LENGTH_WINDOW,
    "zero_spread": SPREADLESS_STEPS,
    "truncated": STEADY,
    "completion_length": LENGTH_WINDOW,
    "entropy": STEADY,
    "grad_norm": SPIKE_HISTORY + 1,
    "logp_gap": STEADY,
    "logp_gap_p99": STEADY,
    "clip_share": CLIPPED_STEPS,
    **diagnose_votes.KEPT,
}
# Metrics whose first values are remembered as well.
STARTS = {"reward/total": LENGTH_WINDOW, "completion_length": LENGTH_WINDOW, "entropy": STEADY}
STARTS |= diagnose_votes.STARTS


class Diagnosis:
    """Watches the metrics of each step.

    Args:
        memory: What an earlier ``Diagnosis`` knew; empty at the start of a run. It is filled in place.
        half: True when the forward pass runs in bfloat16, which widens the tolerated engine gap.
        max_grad_norm: Limit to which gradients are scaled down; 0 = never.
        exact: False for an engine with numerics of its own, whose tails are not the trainer's.

    Attributes:
        memory: Plain JSON: last values, first values, range of each reward, causes that are on.
    """

    def __init__(self, memory: dict[str, Any], *, half: bool, max_grad_norm: float, exact: bool = True) -> None:
        self.memory = memory
        self.exact = exact
        self.gap_limit = GAP_BFLOAT16 if half else GAP_FLOAT32
        self.max_grad_norm = max_grad_norm

    def feed(self, metrics: Mapping[str, float | None]) -> list[Finding]:
        """Take in one step and say what is new.

        Args:
            metrics: Flat, with ``/`` between levels: ``reward/total``, ``reward/by_name/NAME``, ``zero_spread``,
                ``truncated``, ``completion_length`` (tokens), ``entropy``, ``logp_gap`` and ``logp_gap_p99`` (nats),
                ``grad_norm``, ``clip_share``, and those of ``vote/``. Any may be absent, None or not finite,
                which is no observation; others are ignored.

        Returns:
            Findings whose cause was not on before this step, in the order of the rules.
        """
        self._remember({name: value for name, value in metrics.items() if value is not None and math.isfinite(value)})
        active = set(self.memory.get("active", []))
        found: dict[str, Finding] = {}
        for rule in (*RULES, *diagnose_votes.RULES):
            found |= rule(self, active)
        self.memory["active"] = list(found)
        return [finding for cause, finding in found.items() if cause not in active]

    def last(self, name: str, count: int = CONSTANT_STEPS + 1) -> list[float]:
        """At most ``count`` last values of a metric, oldest first."""
        values: list[float] = self._part("last").get(name, [])[-count:]
        return values

    def first(self, name: str) -> list[float]:
        """First values of a metric."""
        values: list[float] = self._part("first").get(name, [])
        return values

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest step mean of each reward function since the start, in their order."""
        return {name: (low, high) for name, (low, high) in self._part("range").items()}

    def _part(self, name: str) -> dict[str, Any]:
        part: dict[str, Any] = self.memory.setdefault(name, {})
        return part

    def _remember(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if name.startswith(BY_NAME):
                short = name.removeprefix(BY_NAME)
                low, high = self._part("range").get(short, (value, value))
                self._part("range")[short] = [min(low, value), max(high, value)]
            elif name not in KEPT or (name == "grad_norm" and self._is_idle(metrics)):
                continue
            kept = KEPT.get(name, CONSTANT_STEPS)
            self._part("last")[name] = [*self.last(name), value][-kept:]
            if name in STARTS and len(self.first(name)) < STARTS[name]:
                self._part("first")[name] = [*self.first(name), value]

    def _is_idle(self, metrics: dict[str, float]) -> bool:
        """Whether the gradient norm only says how many groups had any spread, which is no scale for spikes."""
        spread = metrics.get("zero_spread", (self.last("zero_spread") or [0.0])[-1])
        return metrics["grad_norm"] == 0 or spread > SPREADLESS_SHARE


# -- the rules: findings that hold, by cause; ``active`` has the causes of the step before, whose limits are relaxed ---


def _no_spread(seen: Diagnosis, active: Set[str]) -> dict[str, Finding]:
    code = "MMP-R201"
    values = seen.last("zero_spread")
    recent = values[-STEADY:]
    if code in active:
        on = max(fmean(values), fmean(recent)) > SPREADLESS_SHARE / RELAX
    else:
        on = len(recent) == STEADY and min(recent) >= 1
        on = on or (len(values) == SPREADLESS_STEPS and fmean(values) > SPREADLESS_SHARE)
    if not on:
        return {}
    share = "every prompt" if min(recent) >= 1 else f"{percent(fmean(values))} of the prompts"
    steps = STEADY if min(recent) >= 1 else len(values)
    why, advice = _hard_or_easy(seen)
    words = f"for {share} of {steps} steps all completions got the same reward, so nothing is learned from them: {why}."
    return {code: Finding(code, words, advice)}


def _hard_or_easy(seen: Diagnosis) -> tuple[str, str]:
    """Why groups lack spread, and the way out.

    By convention a function scores from 0 to 1 unless it was seen outside, one that was never above 0 from -1 to 0,
    and the first function says whether an answer is right.
    """
    means = {name: seen.last(BY_NAME + name)[-1] for name in seen.ranges()}
    if not means:
        return "the reward does not tell completions apart", "Look at the rewards of the samples in the report."
    first, *others = means
    ends = {name: _end(means[name], *seen.ranges()[name], is_first=name == first) for name in means}
    at = f"'{first}' is {means[first]:.3g}"
    stuck = [name for name in others if ends[name] == "lowest" or seen.ranges()[name] == (0.0, 0.0)]
    if ends[first] == "lowest":
        return f"too hard ({at}, its lowest)", "Add easier rows, or train with mmpost sft first."
    if ends[first] == "highest" and stuck:
        listed = ", ".join(f"'{name}' {means[name]:.3g}" for name in stuck)
        advice = f"See in the samples whether '{stuck[0]}' can be reached at all; if it need not be, add harder rows."
        return f"too easy for one reward ({at}, its highest), out of reach for another ({listed})", advice
    if ends[first] == "highest":
        return f"too easy ({at}, its highest)", "Add harder rows, or stop here."
    return (
        f"each prompt is too easy or too hard ({at} on average)",
        "Add rows of medium difficulty, or raise grpo.num_generations.",
    )


def _end(value: float, low: float, high: float, *, is_first: bool) -> str:
    """``lowest``, ``highest`` or nothing, for a value in the range that the function is taken to have."""
    is_penalty = high <= 0 and (low < 0 or not is_first)
    bottom, top = (min(-1.0, low), 0.0) if is_penalty else (min(0.0, low), max(1.0, high))
    share = (value - bottom) / (top - bottom)
    return "lowest" if share <= NEAR_END else "highest" if share >= 1 - NEAR_END else ""


def _truncated(seen: Diagnosis, active: Set[str]) -> dict[str, Finding]:
    code = "MMP-R202"
    values = seen.last("truncated")
    limit = TRUNCATED_SHARE / RELAX if code in active else TRUNCATED_SHARE
    if len(values) < STEADY or fmean(values) <= limit:
        return {}
    words = f"{percent(fmean(values))} of the completions of {STEADY} steps were cut by the length limit."
    advice = "Raise grpo.max_completion_length, or add the reward soft_overlong, which falls near the limit."
    return {code: Finding(code, words, advice)}


def _engine_gap(seen: Diagnosis, active: Set[str]) -> dict[str, Finding]:
    code = "MMP-R203"
    relax = RELAX if code in active else 1.0
    advice = "Give both sides the same weights, dtype and image size, and train without dropout."
    ends = "stale weights, dropout or other numerics."
    mean, tail = seen.last("logp_gap"), seen.last("logp_gap_p99")
    if len(mean) == STEADY and fmean(mean) > seen.gap_limit / relax:
        words = (
            f"log-probabilities of the engine and of the trainer differ by {fmean(mean):.3g} nats per token "
            f"(normal is below {seen.gap_limit:g}): {ends}"
        )
        return {code: Finding(code, words, advice)}
    limit = seen.gap_limit if seen.exact else GAP_OTHER_ENGINE
    if len(tail) == STEADY and fmean(tail) > limit / relax:
        words = (
            "log-probabilities of the engine and of the trainer differ by more than "
            f"{fmean(tail):.3g} nats on 1 % of the tokens (normal is below {limit:g}): {ends}"
        )
        return {code: Finding(code, words, advice)}
    return {}


def _constant(seen: Diagnosis, active: Set[str]) -> dict[str, Finding]:
    code = "MMP-R205"
    found = {}
    for name in seen.ranges():
        values = seen.last(BY_NAME + name)
        # Means over processes may differ in the last bit.
        if len(values) == CONSTANT_STEPS and max(values) - min(values) <= 1e-9 * max(1.0, abs(values[0])):
            words = f"reward '{name}' was {values[0]:.3g} in each of {CONSTANT_STEPS} steps and contributes nothing."
            advice = "Leave it out, or see in the samples why it does not change."
            found[f"{code} {name}"] = Finding(code, words, advice)
    return found


def _entropy(seen: Diagnosis, active: Set[str]) -> dict[str, Finding]:
    code = "MMP-R206"
    start, values = seen.first("entropy"), seen.last("entropy")
    if len(start) < STEADY:
        return {}
    limit = ENTROPY_SHARE * fmean(start) * (RELAX if code in active else 1)
    if fmean(values) >= limit:
        return {}
    reward = "".join(f" (reward {value:.3g})" for value in seen.last("reward/total", 1))
    words = (
        f"entropy fell from {fmean(start):.3g} to {fmean(values):.2g} nats per token{reward}: "
        "nearly all completions of a prompt are the same."
    )
    advice = "Train again with loss.kl.beta=0.01, which holds the policy near its start."
    return {code: Finding(code, words, advice)}


def _length(seen: Diagnosis, active: Set[str]) -> dict[str, Finding]:
    """Two causes; a change of length that was named stays named until the length is back."""
    drift, paid = "MMP-R212", "MMP-R213"
    start, values = seen.first("completion_length"), seen.last("completion_length")
    before, after = seen.first("reward/total"), seen.last("reward/total")
    if min(len(start), len(before)) < LENGTH_WINDOW or fmean(start) <= 0:
        return {}
    old, new = fmean(start), fmean(values)
    relax = RELAX if {drift, paid} & active else 1.0
    grows = new / old > LENGTH_GROWTH / relax and new - old > LENGTH_TOKENS / relax
    shrinks = new / old < LENGTH_SHRINKAGE * relax and old - new > LENGTH_TOKENS / relax
    rises = _has_risen(before, after)
    found = {}
    lengths = f"from {old:.0f} to {new:.0f} tokens"
    rewards = f"from {fmean(before):.3g} to {fmean(after):.3g}"
    if drift in active or not rises:
        verb = "grew" if grows else "shrank"
        words = f"completions {verb} {lengths} while the reward did not rise ({rewards})."
        advice = "Read samples of both ends in the report; if the policy drifts, lower train.learning_rate."
        found[drift] = Finding(drift, words, advice)
    if grows and (paid in active or rises):
        words = f"the reward rose {rewards} while completions grew {lengths}: it may pay for length."
        advice = "Read the longest samples in the report; if they ramble, add the reward length with a maximum."
        found[paid] = Finding(paid, words, advice)
    return found if grows or shrinks else {}


def _has_risen(before: list[float], after: list[float]) -> bool:
    """Whether the mean went up by more than chance: Welch's statistic over the step means."""
    error = math.sqrt(sum(pvariance(values) / (len(values) - 1) for values in (before, after)))
    return fmean(after) - fmean(before) > max(RISE_ERRORS * error, 1e-9)


def _spike(seen: Diagnosis, active: Set[str]) -> dict[str, Finding]:
    code = "MMP-R214"
    norms = seen.last("grad_norm")
    if len(norms) <= SPIKE_WARMUP:
        return {}
    usual = median(norms[:-1])
    # One quiet step after a spike is no all-clear: spikes come in bursts.
    judged = norms[-SPIKE_WARMUP:] if code in active else norms[-1:]
    if max(judged) <= SPIKE_FACTOR * usual:
        return {}
    words = f"the gradient norm jumped to {max(judged):.3g}, {max(judged) / usual:.0f} times its usual {usual:.2g}."
    return {code: Finding(code, words, "If it happens again, lower train.learning_rate.")}


def _clipped(seen: Diagnosis, active: Set[str]) -> dict[str, Finding]:
    code = "MMP-R215"
    values = seen.last("clip_share")
    limit = CLIPPED_SHARE / RELAX if code in active else CLIPPED_SHARE
    if len(values) < CLIPPED_STEPS or fmean(values) <= limit:
        return {}
    words = f"{percent(fmean(values))} of the tokens of {CLIPPED_STEPS} steps were clipped and did not train."
    return {code: Finding(code, words, "Lower train.learning_rate, so that the policy moves less per rollout batch.")}


def _cut(seen: Diagnosis, active: Set[str]) -> dict[str, Finding]:
    code = "MMP-R216"
    norms = seen.last("grad_norm", CUT_STEPS)
    if not seen.max_grad_norm or len(norms) < CUT_STEPS:
        return {}
    count = sum(norm > seen.max_grad_norm for norm in norms)
    if count < CUT_STEPS * (CUT_SHARE / RELAX if code in active else CUT_SHARE):
        return {}
    words = (
        f"the gradient was cut to train.max_grad_norm={seen.max_grad_norm:g} in {count} of {CUT_STEPS} steps "
        f"(usual norm {median(norms):.3g}), which gives every step the same weight."
    )
    advice = f"Set train.max_grad_norm={2 * median(norms):.2g}, so that only outliers are cut."
    return {code: Finding(code, words, advice)}


Rule = Callable[[Diagnosis, Set[str]], dict[str, Finding]]
RULES: tuple[Rule, ...] = (
    _no_spread,
    _truncated,
    _engine_gap,
    _constant,
    _entropy,
    _length,
    _spike,
    _clipped,
    _cut,
)
