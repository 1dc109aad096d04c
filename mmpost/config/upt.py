"""The configuration of ``mmpost upt``: GRPO whose reward is the vote of the completions, without labels."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from mmpost.config.run import GRPOConfig
from mmpost.config.schema import GrpoSection, RewardSpec, Settings
from mmpost.core.errors import MmpostError


class UptRollouts(GrpoSection):
    """Rollouts: how many, how long, how random. Defaults as in arXiv 2505.22453."""

    num_generations: int = Field(10, ge=2, description="completions per prompt; they vote on its answer")
    temperature: float = Field(0.7, gt=0, description="sampling temperature; training uses the same")
    top_p: float = Field(0.99, gt=0, le=1, description="nucleus sampling")


class VoteSection(Settings):
    """The vote that takes the place of labels."""

    variant: Literal["paper", "released", "random"] = Field(
        "paper",
        description='paper: equal answers vote together; released: strings do, and "None" may win; random: a control',
    )
    kind: Literal["auto", "math", "number", "choice", "text", "boxes"] = Field(
        "auto", description="what answers are, which says when two are equal"
    )
    ties: Literal["likelier", "first", "skip"] = Field(
        "likelier", description="of classes of equal size: the likelier, the first seen, or no pseudo-label"
    )
    min_support: int = Field(2, ge=1, description="votes that a pseudo-label needs")
    iou: float = Field(0.5, gt=0, le=1, description="least intersection over union of boxes that vote together")
    tolerance: float = Field(1e-6, ge=0, description="largest relative difference of equal numbers")
    percent: bool = Field(False, description="50% means 0.5; else % is a unit")
    weight: float = Field(1.0, gt=0, description="factor of the vote in the weighted sum of rewards")
    timeout: float = Field(60.0, gt=0, description="seconds for the votes of a step")
    labels: list[str] = Field(
        ["solution", "aliases", "answer"],
        description="columns that hold labels: no reward gets them, the log compares pseudo-labels with them",
    )

    def reward(self, seed: int) -> RewardSpec:
        """The vote as a reward.

        Args:
            seed: Of the run; the control draws with it.
        """
        names = ("variant", "kind", "ties", "min_support", "iou", "tolerance", "percent")
        args = {name: getattr(self, name) for name in names}
        return RewardSpec(name="majority_vote", weight=self.weight, timeout=self.timeout, args={**args, "seed": seed})


class UPTConfig(GRPOConfig):
    """Unsupervised post-training: reinforcement learning on questions without labels.

    >>> UPTConfig(variant="released").grpo.num_generations
    10
    """

    model_config = ConfigDict(defer_build=True)

    command: ClassVar[Literal["sft", "grpo", "upt"]] = "upt"

    grpo: UptRollouts = Field(default_factory=UptRollouts)
    vote: VoteSection = Field(default_factory=VoteSection)
    rewards: list[RewardSpec] = Field([], description="further rewards, which must not need labels")

    @model_validator(mode="after")
    def _a_vote_can_be_won(self) -> Self:
        needed, votes = self.vote.min_support, self.grpo.num_generations
        # Adaptive sampling draws further completions, which vote too.
        if needed > votes and self.loss.preset != "reinforce_ada":
            raise MmpostError(
                "MMP-C004",
                f"vote.min_support: expected at most grpo.num_generations = {votes}, got {needed}; no vote is won.",
                f"Set vote.min_support={votes} or less, or grpo.num_generations={needed} or more.",
            )
        return self
