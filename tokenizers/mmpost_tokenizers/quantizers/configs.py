"""What a quantizer is made of, as frozen dataclasses that survive JSON. No torch here.

A configuration in JSON is a table with the key ``kind`` and the fields of the class of that kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mmpost.core.errors import MmpostError

VAR_SCALES = (1, 1, 2, 3, 3, 4, 5, 6, 8, 11)


def _require(claim: bool, kind: str, field: str, value: object, expected: str) -> None:
    if not claim:
        raise MmpostError("MMP-C071", f"quantizer '{kind}': {field}={value!r} is not {expected}.", f"Correct {field}.")


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Fields that every quantizer has: none but its name."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """Table that ``quantizer_config`` turns back into an equal configuration."""
        table: dict[str, Any] = {"kind": self.kind}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, QuantizerConfig):
                value = value.to_json()
            table[field.name] = list(value) if isinstance(value, tuple) else value
        return table


@dataclass(frozen=True, kw_only=True)
class VQConfig(QuantizerConfig):
    """Learned codebook, moved by the loss of the codes.

    Attributes:
        codebook_size: Number of codes K, at least 2.
        dim: Channels C of a code.
        l2_norm: Codes and latents are compared, and decoded, as unit vectors.
        vq_weight: Weight of mean|sg(z) - e|^2.
        commit_weight: Weight of mean|z - sg(e)|^2; the paper's beta.
    """

    kind: ClassVar[str] = "vq"
    codebook_size: int
    dim: int
    l2_norm: bool = True
    vq_weight: float = 1.0
    commit_weight: float = 0.25

    def __post_init__(self) -> None:
        _require(self.codebook_size >= 2, self.kind, "codebook_size", self.codebook_size, "2 or more")
        _require(self.dim >= 1, self.kind, "dim", self.dim, "1 or more")
        _require(min(self.vq_weight, self.commit_weight) >= 0, self.kind, "weight", self.commit_weight, "0 or more")


@dataclass(frozen=True, kw_only=True)
class EMAConfig(QuantizerConfig):
    """Learned codebook that follows the mean of the latents of each code.

    Attributes:
        codebook_size: Number of codes K, at least 2.
        dim: Channels C of a code.
        l2_norm: As in ``VQConfig``.
        commit_weight: Weight of mean|z - sg(e)|^2.
        decay: Share of the old value in each update, in [0, 1). 0.99 is the value of the VQ-VAE paper.
        epsilon: Laplace smoothing of the counts.
    """

    kind: ClassVar[str] = "vq_ema"
    codebook_size: int
    dim: int
    l2_norm: bool = False
    commit_weight: float = 0.25
    decay: float = 0.99
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        _require(self.codebook_size >= 2, self.kind, "codebook_size", self.codebook_size, "2 or more")
        _require(self.dim >= 1, self.kind, "dim", self.dim, "1 or more")
        _require(0 <= self.decay < 1, self.kind, "decay", self.decay, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class LFQConfig(QuantizerConfig):
    """One bit a channel: the code is the sign of the latent.

    Attributes:
        dim: Number of bits; there are 2^dim codes.
        entropy_weight: Weight of the entropy loss; 0.1 in XQ-GAN.
        commit_weight: Weight of mean|z - sg(code)|^2; XQ-GAN has none.
    """

    kind: ClassVar[str] = "lfq"
    dim: int
    entropy_weight: float = 0.1
    commit_weight: float = 0.0

    def __post_init__(self) -> None:
        # An index is an int64.
        _require(1 <= self.dim <= 62, self.kind, "dim", self.dim, "between 1 and 62")


@dataclass(frozen=True, kw_only=True)
class BSQConfig(LFQConfig):
    """As ``LFQConfig`` on the unit sphere: latents are normalised, codes are signs divided by sqrt(dim)."""

    kind: ClassVar[str] = "bsq"


@dataclass(frozen=True, kw_only=True)
class FSQConfig(QuantizerConfig):
    """Every channel is bounded and rounded to one of a few levels; no loss.

    Attributes:
        levels: Number of levels of each channel, each at least 3.
    """

    kind: ClassVar[str] = "fsq"
    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        _require(bool(self.levels), self.kind, "levels", self.levels, "a list of numbers")
        _require(min(self.levels) >= 3, self.kind, "levels", self.levels, "3 or more in each channel")


@dataclass(frozen=True, kw_only=True)
class ProductConfig(QuantizerConfig):
    """Channels split into groups, each with a quantizer of its own of the same configuration.

    Attributes:
        groups: Number of groups, at least 2.
        part: Configuration of each; its ``dim`` is per group.
    """

    kind: ClassVar[str] = "product"
    groups: int
    part: QuantizerConfig

    def __post_init__(self) -> None:
        _require(self.groups >= 2, self.kind, "groups", self.groups, "2 or more")
        _require(
            self.part.kind in ("vq", "vq_ema", "lfq", "bsq", "fsq"),
            self.kind,
            "part.kind",
            self.part.kind,
            "a plain one",
        )


@dataclass(frozen=True, kw_only=True)
class ResidualConfig(QuantizerConfig):
    """Quantize, subtract, quantize what is left, at one resolution.

    Attributes:
        depth: Number of levels, at least 2; each has its own codebook.
        part: Configuration of each level. Levels after the first see residuals, so ``l2_norm`` must be off.
    """

    kind: ClassVar[str] = "residual"
    depth: int
    part: QuantizerConfig

    def __post_init__(self) -> None:
        _require(self.depth >= 2, self.kind, "depth", self.depth, "2 or more")
        _require(self.part.kind in ("vq", "vq_ema"), self.kind, "part.kind", self.part.kind, "'vq' or 'vq_ema'")
        _require(not getattr(self.part, "l2_norm", False), self.kind, "part.l2_norm", True, "false")


@dataclass(frozen=True, kw_only=True)
class MultiScaleConfig(QuantizerConfig):
    """Residual quantization from coarse to fine with one codebook, as in VAR.

    Attributes:
        part: The codebook that all scales share.
        scales: Sides of the square maps, rising; the last must be the side of the token grid.
        num_phi: Number of convolutions phi; each scale takes the one whose tick is nearest, as published.
        phi_ratio: phi(h) = (1 - phi_ratio) h + phi_ratio conv3x3(h).
        dropout: Share of the images of a training batch whose later scales are dropped.
        dropout_min_depth: Fewest scales that such an image keeps.
    """

    kind: ClassVar[str] = "multi_scale"
    part: QuantizerConfig
    scales: tuple[int, ...] = VAR_SCALES
    num_phi: int = 4
    phi_ratio: float = 0.5
    dropout: float = 0.1
    dropout_min_depth: int = 3

    def __post_init__(self) -> None:
        rising = tuple(sorted(self.scales)) == tuple(self.scales)
        _require(bool(self.scales) and rising, self.kind, "scales", self.scales, "a rising list")
        _require(self.part.kind == "vq", self.kind, "part.kind", self.part.kind, "'vq'")
        _require(self.num_phi >= 1, self.kind, "num_phi", self.num_phi, "1 or more")
        _require(0 <= self.dropout <= 1, self.kind, "dropout", self.dropout, "in [0, 1]")
        _require(self.dropout_min_depth >= 1, self.kind, "dropout_min_depth", self.dropout_min_depth, "1 or more")


CONFIGS: dict[str, type[QuantizerConfig]] = {
    config.kind: config
    for config in (
        VQConfig,
        EMAConfig,
        LFQConfig,
        BSQConfig,
        FSQConfig,
        ProductConfig,
        ResidualConfig,
        MultiScaleConfig,
    )
}


def quantizer_config(table: Mapping[str, Any]) -> QuantizerConfig:
    """The configuration that a JSON or YAML table describes.

    Args:
        table: ``kind`` and the fields of that kind; ``part`` may be a table again.

    Raises:
        MmpostError: MMP-C006 for an unknown kind, MMP-C071 for a field that is unknown, missing or out of range.
    """
    kind = table.get("kind")
    if kind not in CONFIGS:
        raise MmpostError("MMP-C006", f"unknown name '{kind}' among quantizers.", f"Known: {', '.join(CONFIGS)}")
    values = {name: value for name, value in table.items() if name != "kind"}
    if isinstance(values.get("part"), Mapping):
        values["part"] = quantizer_config(values["part"])
    return from_fields(CONFIGS[kind], values, f"quantizer '{kind}'")


def from_fields(config: type[Any], values: Mapping[str, Any], place: str) -> Any:
    """Build the dataclass ``config``; lists become tuples.

    Raises:
        MmpostError: MMP-C071 when a field is unknown or a required one is missing; ``place`` begins the message.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    if unknown := sorted(set(values) - set(fields)):
        raise MmpostError("MMP-C071", f"{place} has no field {', '.join(unknown)}.", f"Known: {', '.join(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise MmpostError("MMP-C071", f"{place} lacks {', '.join(missing)}.", "Set it.")
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
