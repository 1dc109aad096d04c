"""What generators of index maps share whatever order they fill positions in: their parts, data checks, files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.bridge import checkpoint
from mmpost_tokenizers.bridge.head import DimensionHead, Head, HeadConfig, ParallelHead, guided
from mmpost_tokenizers.bridge.levels import PostTrainingQuantizer, config_from_json
from mmpost_tokenizers.bridge.model import IndexModel
from mmpost_tokenizers.published.files import load_strictly

NO_CLASS = -1  # label that stands for "any class"
HEADS: dict[str, type[Head]] = {"autoregressive": DimensionHead, "parallel": ParallelHead}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpatialConfig:
    """What the configurations of all spatial models have.

    Attributes:
        classes: Number of classes; there is one more vector for "any class".
        grid: Height and width of the token map.
        channels: C of the latents.
        width: Width of the features z.
    """

    classes: int = 1000
    grid: tuple[int, int] = (16, 16)
    channels: int = 16
    width: int = 1024

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.grid[0] * self.grid[1]


class SpatialModel(nn.Module):
    """Features of positions from a class and the values of other positions.

    Attributes:
        config: Sizes.
    """

    config: SpatialConfig


class SpatialGenerator(IndexModel):
    """Spatial model, head and levels: likelihood of index maps, and sampling of new ones.

    Attributes:
        backbone: Spatial model.
        head: Distribution of one position.
        quantizer: Turns indices into the values that the spatial model sees.
        tokenizer_sha256: Hash of the tokenizer whose indices it was trained on; empty when nobody said.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type[SpatialConfig]]
    backbone_class: ClassVar[type[SpatialModel]]

    def __init__(self, backbone: SpatialModel, head: Head, quantizer: PostTrainingQuantizer) -> None:
        """Join the parts.

        Raises:
            MmpostError: MMP-C095 when their channels, levels or widths differ.
        """
        super().__init__()
        self.backbone, self.head, self.quantizer = backbone, head, quantizer
        self.tokenizer_sha256 = ""
        pairs = {
            "channels": (backbone.config.channels, head.config.channels, quantizer.dim),
            "levels": (head.config.levels, quantizer.codebook_size),
            "width of z": (backbone.config.width, head.config.z_dim),
        }
        for name, sizes in pairs.items():
            if len(set(sizes)) > 1:
                what = f"bridge: {name} of the parts differ: {', '.join(map(str, sizes))}."
                raise MmpostError("MMP-C095", what, "Build the parts from one configuration.")

    def generate(
        self,
        labels: Tensor,
        *,
        steps: int | None = None,
        guidance: float = 1.0,
        schedule: str = "linear",
        temperature: float = 1.0,
        generator: torch.Generator,
    ) -> Tensor:
        """Sample index maps int64 ``[N, H, W, C]``; call it in eval mode.

        Args:
            labels: int64 ``[N]``.
            steps: Passes of the spatial model, 1 to L; None: L at most, and no more than the paper's 256. A raster
                model has L, always.
            guidance: Classifier-free guidance on z; 1 is none. The paper has 3.1 (L) and 3.45 (H).
            schedule: ``linear``: guidance rises from 1 with the share of known positions; ``constant``.
            temperature: See ``Head.sample``. The paper has 0.97 (L; the released code 0.96) and 0.91 (H).
            generator: On the device of ``labels``.

        Raises:
            MmpostError: MMP-C096 when ``steps`` is out of range.
        """
        raise NotImplementedError

    def check(self, indices: Tensor, labels: Tensor) -> None:
        """Look whether data are of this model.

        Raises:
            MmpostError: MMP-C095 when indices do not fit grid, channels or levels, or labels the classes.
        """
        config, levels = self.backbone.config, self.quantizer.codebook_size
        shape = (*config.grid, config.channels)
        fix = "Encode the images with the tokenizer that the model was made for."
        if tuple(indices.shape[1:]) != shape:
            what = f"bridge: index maps of shape {tuple(indices.shape[1:])}, but the model has {shape}."
            raise MmpostError("MMP-C095", what, fix)
        for name, values, low, high in (("indices", indices, 0, levels), ("labels", labels, NO_CLASS, config.classes)):
            first, last = int(values.min()), int(values.max())
            if not low <= first <= last < high:
                what = f"bridge: {name} from {first} to {last}, but the model has {low}..{high - 1}."
                raise MmpostError("MMP-C095", what, fix)

    def describe(self) -> dict[str, Any]:
        """Configuration of all parts as JSON; the order of the channels is a tensor of the head."""
        kind = next(name for name, head in HEADS.items() if type(self.head) is head)
        return {
            "kind": self.kind,
            "backbone": dataclasses.asdict(self.backbone.config),
            "head": {"kind": kind, **dataclasses.asdict(self.head.config)},
            "quantizer": self.quantizer.config.to_json(),
            "tokenizer_sha256": self.tokenizer_sha256,
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Open what ``save_pretrained`` wrote, in eval mode.

        Raises:
            MmpostError: MMP-E082 no usable configuration, or one of a model with another order of positions; MMP-E070
                no weights, MMP-E071 keys or shapes that differ, MMP-E073 a damaged file.
        """
        config, tensors = checkpoint.read(Path(folder))
        try:
            # Folders from before there was a second kind do not name theirs.
            if config.get("kind", "masked") != cls.kind:
                raise KeyError(f"it is of kind {config['kind']}, not {cls.kind}")
            backbone = {**config["backbone"], "grid": tuple(config["backbone"]["grid"])}
            head = dict(config["head"])
            kind = HEADS[head.pop("kind")]
            parts = cls.config_class(**backbone), HeadConfig(**head), config_from_json(config["quantizer"])
        except (KeyError, TypeError, AttributeError) as error:
            what = f"'{folder}' is not a TokenBridge generator: {error}."
            raise MmpostError("MMP-E082", what, "Name a folder that its trainer wrote.") from error
        model = cls(cls.backbone_class(parts[0]), kind(parts[1]), PostTrainingQuantizer(parts[2]))
        load_strictly(model, tensors, str(folder))
        model.tokenizer_sha256 = str(config.get("tokenizer_sha256", ""))
        return model.eval()

    def _hidden(self, labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
        """Labels, a share of them hidden while training."""
        if not self.training:
            return labels
        hidden = torch.rand(len(labels), generator=generator) < share
        return labels.masked_fill(hidden.to(labels.device), NO_CLASS)


def class_vectors(embedding: nn.Embedding, any_class: Tensor, labels: Tensor) -> Tensor:
    """Vector of each label, ``[N, width]``; ``NO_CLASS`` has its own."""
    one = embedding(labels.clamp(min=0))
    return torch.where((labels == NO_CLASS)[:, None], any_class.to(one.dtype), one)


def guidance_at(guidance: float, schedule: str, share: float) -> float:
    """Weight of guidance when ``share`` of the positions are known."""
    return 1 + (guidance - 1) * share if schedule == "linear" else guidance


def both_ways(labels: Tensor) -> Tensor:
    """The labels, then as many times no class."""
    return torch.cat([labels, torch.full_like(labels, NO_CLASS)])


def mixed(features: Tensor, scale: float) -> Tensor:
    """Guided features of a batch in which each row stands twice, with and without class."""
    with_class, without = features.chunk(2)
    return guided(with_class, without, scale)


def kind_of(folder: str | Path) -> str:
    """Kind of the generator in a folder.

    Raises:
        MmpostError: MMP-E082 no usable configuration.
    """
    config: Mapping[str, Any] = checkpoint.read_config(Path(folder))
    return str(config.get("kind", "masked"))
