"""What is going wrong with a vote that takes the place of labels: it agrees on nothing, on everything, or on one word.

A policy that is rewarded for agreeing with itself can agree by giving every question the same answer, or none. Reward
and agreement then rise as they do in a run that learns; only entropy, length and the answers themselves tell.
"""

from __future__ import annotations

from collections.abc import Set
from statistics import fmean
from typing import TYPE_CHECKING

from mmpost.train.finding import Finding, percent

if TYPE_CHECKING:
    from mmpost.train.diagnose import Diagnosis

WINDOW = 10  # steps at the start and now over which agreement, entropy and accuracy are averaged (own choice)
STEADY = 5  # steps that must agree before a share is believed; as in ``diagnose``
RELAX = 1.25  # likewise
CLEAR, UNCLEAR = 0.95, 0.2  # agreement beyond which a vote carries no information
ONE_ANSWER = 0.5  # share of the prompts with the same pseudo-label
UNPARSED = 0.3  # share of completions without an answer
ENTROPY_LOST = 0.8  # of the entropy of the votes at the start
RISE, FALL = 0.05, 0.05  # agreement up, pseudo-labels' accuracy down (own choice)
SHRUNK = 0.5  # mean length now over mean length at the start

# Metrics that are remembered, and how many of their last values; of those in STARTS also the first.
KEPT = {
    "vote/agreement": WINDOW,
    "vote/entropy": WINDOW,
    "vote/unparsed": STEADY,
    "vote/same_answer": STEADY,
    "vote/accuracy/pseudo_labels": WINDOW,
}
STARTS = {"vote/agreement": WINDOW, "vote/entropy": WINDOW, "vote/accuracy/pseudo_labels": WINDOW}


def uninformative(seen: Diagnosis, active: Set[str]) -> dict[str, Finding]:
    """MMP-R221: everybody agrees, or nobody."""
    code = "MMP-R221"
    values = seen.last("vote/agreement")[-STEADY:]
    if len(values) < STEADY:
        return {}
    share, relax = fmean(values), RELAX if code in active else 1.0
    if share > 1 - (1 - CLEAR) * relax:
        words = f"{percent(share)} of the completions agree with the majority, so the vote teaches nothing more."
        return {code: Finding(code, words, "Stop here, or add harder questions.")}
    if share < UNCLEAR * relax:
        words = f"the largest class has {percent(share)} of the completions, so the vote is little more than chance."
        advice = "Train with labels first, lower grpo.temperature, or raise vote.min_support."
        return {code: Finding(code, words, advice)}
    return {}


def collapsed(seen: Diagnosis, active: Set[str]) -> dict[str, Finding]:
    """MMP-R222: one answer to most questions."""
    code = "MMP-R222"
    values = seen.last("vote/same_answer")
    limit = ONE_ANSWER / RELAX if code in active else ONE_ANSWER
    if len(values) < STEADY or fmean(values) <= limit:
        return {}
    first, now = seen.first("vote/agreement"), seen.last("vote/agreement")
    rise = ""
    if len(first) == WINDOW and fmean(now) - fmean(first) > RISE:
        rise = f" while agreement rose from {fmean(first):.2f} to {fmean(now):.2f}"
    words = f"{percent(fmean(values))} of the questions have the same pseudo-label{rise}: the policy may agree blindly."
    advice = "Read the samples; if the answers do not fit, start again with a larger loss.kl.beta."
    return {code: Finding(code, words, advice)}


def unparsed(seen: Diagnosis, active: Set[str]) -> dict[str, Finding]:
    """MMP-R223: completions without an answer."""
    code = "MMP-R223"
    values = seen.last("vote/unparsed")
    limit = UNPARSED / RELAX if code in active else UNPARSED
    if len(values) < STEADY or fmean(values) <= limit:
        return {}
    words = f"{percent(fmean(values))} of the completions of {STEADY} steps hold no answer that can be found."
    advice = "Ask for \\boxed{} or <answer> in the questions, raise grpo.max_completion_length, or set vote.kind."
    return {code: Finding(code, words, advice)}


def vanishing(seen: Diagnosis, active: Set[str]) -> dict[str, Finding]:
    """MMP-R224: the votes become unanimous while completions shrink."""
    code = "MMP-R224"
    start, now = seen.first("vote/entropy"), seen.last("vote/entropy")
    lengths = seen.first("completion_length"), seen.last("completion_length")
    if len(start) < WINDOW or not lengths[0] or not lengths[1]:
        return {}
    relax = RELAX if code in active else 1.0
    lost = fmean(now) < (1 - ENTROPY_LOST) * fmean(start) * relax
    shrunk = fmean(lengths[1]) < SHRUNK * fmean(lengths[0]) * relax
    if not (lost and shrunk):
        return {}
    words = (
        f"the entropy of the votes fell from {fmean(start):.2g} to {fmean(now):.2g} nats while completions shrank from "
        f"{fmean(lengths[0]):.0f} to {fmean(lengths[1]):.0f} tokens: the policy has stopped to reason."
    )
    return {code: Finding(code, words, "Take an earlier checkpoint, and train with a larger loss.kl.beta.")}


def drifting(seen: Diagnosis, active: Set[str]) -> dict[str, Finding]:
    """MMP-R225: more agreement, fewer right pseudo-labels (where the data have labels to compare with)."""
    code = "MMP-R225"
    first, now = seen.first("vote/agreement"), seen.last("vote/agreement")
    before, after = seen.first("vote/accuracy/pseudo_labels"), seen.last("vote/accuracy/pseudo_labels")
    if min(len(first), len(before)) < WINDOW:
        return {}
    relax = RELAX if code in active else 1.0
    if fmean(now) - fmean(first) <= RISE / relax or fmean(before) - fmean(after) <= FALL / relax:
        return {}
    words = (
        f"agreement rose from {fmean(first):.2f} to {fmean(now):.2f} while the pseudo-labels became worse "
        f"({fmean(before):.2f} to {fmean(after):.2f} right): the vote amplifies errors."
    )
    advice = "Take an earlier checkpoint; leave out questions below one half of agreement with mmpost data filter."
    return {code: Finding(code, words, advice)}


RULES = (uninformative, collapsed, unparsed, vanishing, drifting)
