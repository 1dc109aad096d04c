"""Verifiers: functions of completions and columns, in TRL's signature."""

REWARDS = {
    "answer": "mmpost.rewards.answers:answer",
    "number": "mmpost.rewards.answers:number",
    "counting": "mmpost.rewards.answers:counting",
    "choice": "mmpost.rewards.answers:choice",
    "exact": "mmpost.rewards.answers:exact",
    "math": "mmpost.rewards.mathematics:math",
    "contains": "mmpost.rewards.text:contains",
    "regex": "mmpost.rewards.text:regex",
    "boxes": "mmpost.rewards.geometry:boxes",
    "points": "mmpost.rewards.geometry:points",
    "json": "mmpost.rewards.json_answer:json",
    "format": "mmpost.rewards.form:answer_tags",
    "boxed_format": "mmpost.rewards.form:boxed",
    "think_format": "mmpost.rewards.form:think_tags",
    "soft_overlong": "mmpost.rewards.length:soft_overlong",
    "length": "mmpost.rewards.length:length",
    "repetition": "mmpost.rewards.length:repetition",
    "majority_vote": "mmpost.rewards.majority_vote:majority_vote",
    "reasoning_pattern": "mmpost.rewards.reasoning:reasoning_pattern",
}
