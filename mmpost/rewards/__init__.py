"""Verifiers: functions of completions and columns, in TRL's signature."""

REWARDS = {
    "answer": "mmpost.rewards.answers:answer",
    "number": "mmpost.rewards.answers:number",
    "choice": "mmpost.rewards.answers:choice",
    "exact": "mmpost.rewards.answers:exact",
    "format": "mmpost.rewards.form:answer_tags",
    "boxed_format": "mmpost.rewards.form:boxed",
}
