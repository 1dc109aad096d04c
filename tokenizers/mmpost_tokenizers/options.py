"""Options of ``mmpost tokenizer train``: what YAML files and the command line may say, and their defaults.

Light: no torch. Names follow ``mmpost.config.schema`` where a concept exists there; quantizers and tokenizers have the
field names of their own configurations.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from mmpost.config.run import Options
from mmpost.config.schema import LogSection, Settings
from mmpost.core.errors import MmpostError
from mmpost_tokenizers.generator.options import (
    GeneratorModelSection,
    GeneratorTrainSection,
    PosttrainSection,
    SamplingSection,
)

# -- quantizers ------------------------------------------------------------------------------------------------------


class VQSettings(Settings):
    """Learned codebook, moved by the loss of its codes."""

    kind: Literal["vq"] = "vq"
    codebook_size: int = Field(4096, ge=2, description="codes")
    dim: int = Field(64, ge=1, description="channels of a code")
    l2_norm: bool = Field(True, description="compare and decode unit vectors")
    vq_weight: float = Field(1.0, ge=0, description="weight of the codebook loss")
    commit_weight: float = Field(0.25, ge=0, description="weight of the commitment loss")


class EMASettings(Settings):
    """Learned codebook that follows the means of its latents."""

    kind: Literal["vq_ema"] = "vq_ema"
    codebook_size: int = Field(4096, ge=2, description="codes")
    dim: int = Field(64, ge=1, description="channels of a code")
    l2_norm: bool = Field(False, description="compare and decode unit vectors")
    commit_weight: float = Field(0.25, ge=0, description="weight of the commitment loss")
    decay: float = Field(0.99, ge=0, lt=1, description="share of the old code in each update")
    epsilon: float = Field(1e-5, gt=0, description="smoothing of the counts")


class LFQSettings(Settings):
    """One bit a channel, the sign of the latent."""

    kind: Literal["lfq"] = "lfq"
    dim: int = Field(12, ge=1, le=62, description="bits")
    entropy_weight: float = Field(0.1, ge=0, description="weight of the entropy loss")
    commit_weight: float = Field(0.0, ge=0, description="weight of the commitment loss")


class BSQSettings(LFQSettings):
    """Signs on the unit sphere."""

    kind: Literal["bsq"] = "bsq"  # type: ignore[assignment]


class FSQSettings(Settings):
    """Bounded rounding per channel, no loss."""

    kind: Literal["fsq"] = "fsq"
    levels: list[int] = Field([8, 5, 5, 5], description="levels of each channel")


Plain = Annotated[VQSettings | EMASettings | LFQSettings | BSQSettings | FSQSettings, Field(discriminator="kind")]


class ProductSettings(Settings):
    """Channels split into groups with a codebook each."""

    kind: Literal["product"] = "product"
    groups: int = Field(2, ge=2, description="groups")
    part: Plain = Field(default_factory=VQSettings, description="quantizer of one group; its dim is per group")


class ResidualSettings(Settings):
    """Quantize, subtract, quantize what is left."""

    kind: Literal["residual"] = "residual"
    depth: int = Field(4, ge=2, description="levels")
    part: Plain = Field(
        default_factory=lambda: VQSettings(l2_norm=False), description="quantizer of one level, without l2_norm"
    )


class MultiScaleSettings(Settings):
    """Residual quantization from coarse to fine maps with one codebook, as in VAR."""

    kind: Literal["multi_scale"] = "multi_scale"
    scales: list[int] = Field([1, 1, 2, 3, 3, 4, 5, 6, 8, 11], description="sides of the maps, the last one the grid's")
    num_phi: int = Field(4, ge=1, description="convolutions that scales share")
    phi_ratio: float = Field(0.5, ge=0, le=1, description="share of the convolution in phi")
    dropout: float = Field(0.1, ge=0, le=1, description="share of images whose later scales are dropped")
    dropout_min_depth: int = Field(3, ge=1, description="scales that such an image keeps")
    part: Plain = Field(default_factory=VQSettings, description="codebook that all scales share")


AnyQuantizer = Annotated[
    VQSettings
    | EMASettings
    | LFQSettings
    | BSQSettings
    | FSQSettings
    | ProductSettings
    | ResidualSettings
    | MultiScaleSettings,
    Field(discriminator="kind"),
]

# -- tokenizers ------------------------------------------------------------------------------------------------------


class PerturbSection(Settings):
    """Latent perturbation while training (RobusTok)."""

    alpha: float = Field(1.0, ge=0, le=1, description="share of the tokens of a chosen image")
    beta: float = Field(0.1, ge=0, le=1, description="share of the images of a batch; 0 = no perturbation")
    delta: int | None = Field(None, ge=1, description="codes to draw from; null: 100 at 4096 codes, scaled")
    variant: Literal["paper", "released"] = Field("paper", description="released: the rules of the published code")
    neighbour_of: Literal["code", "latent"] | None = Field(None, description="centre; null: that of the variant")
    exclude_self: bool = Field(False, description="never draw the code itself")
    exact: bool = Field(False, description="exactly the share of tokens and images instead of independent draws")
    refresh_every: int = Field(1, ge=1, le=10, description="steps between searches for the neighbours of moving codes")
    anneal_start: float = Field(0.2, ge=0, le=1, description="share of training at which alpha and delta start to fall")
    anneal_end: float = Field(0.6, ge=0, le=1, description="share of training at which they stop")
    end_ratio: float = Field(0.5, ge=0, le=1, description="what is left of alpha and delta then; 1 = no annealing")


class CNNSettings(Settings):
    """Convolutional encoder and decoder (VQGAN)."""

    kind: Literal["cnn"] = "cnn"
    image_size: int = Field(256, ge=4, description="side of the square images in pixels")
    quantizer: AnyQuantizer = Field(default_factory=VQSettings)
    perturb: PerturbSection = Field(default_factory=PerturbSection)
    block_out_channels: list[int] = Field(
        [128, 128, 256, 256, 512], description="channels of each level, finest first; all but the last halve the side"
    )
    layers_per_block: int = Field(
        2, ge=1, description="residual blocks per level of the encoder; the decoder has one more"
    )
    z_channels: int = Field(256, ge=1, description="channels between the backbone and the 1x1 convolutions")
    stem_patch: int = Field(1, ge=1, description="side of the pixel blocks that become channels first; 1 as published")
    norm_groups: int = Field(32, ge=1, description="groups of every GroupNorm")
    lowest_attention: bool = Field(True, description="self-attention in the lowest level")
    mid_attention: bool = Field(True, description="self-attention in the middle block")


class ViTSettings(Settings):
    """A timm ViT with learned latent tokens on both sides."""

    kind: Literal["vit"] = "vit"
    image_size: int = Field(256, ge=4, description="side of the square images in pixels")
    quantizer: AnyQuantizer = Field(default_factory=VQSettings)
    perturb: PerturbSection = Field(default_factory=PerturbSection)
    backbone: str = Field("vit_small_patch16_224", description="timm name of the encoder")
    decoder_backbone: str | None = Field(None, description="timm name of the decoder; null: the encoder's")
    pretrained: bool = Field(False, description="start both ViTs from timm's weights of that name")
    shape: list[int] | None = Field(None, description="width, depth and heads instead of those of the name")
    decoder_shape: list[int] | None = Field(None, description="the same of the decoder")
    patch_size: int = Field(16, ge=1, description="side of a patch in pixels")
    num_latent_tokens: int = Field(256, ge=1, description="tokens of an image")
    positions: Literal["learned", "shared"] = Field("learned", description="learned: a row of tokens; shared: a grid")
    pixels: Literal["linear", "linear_conv", "maskgit"] = Field("linear", description="what makes the pixels")
    interleaved_latents: bool = Field(False, description="the scrambled order of TiTok of two stages")
    unit_range: bool = Field(False, description="the network works on [0, 1]")
    drop_path: float = Field(0.0, ge=0, lt=1, description="largest rate of stochastic depth")


AnyTokenizer = Annotated[CNNSettings | ViTSettings, Field(discriminator="kind")]

# -- losses ----------------------------------------------------------------------------------------------------------


class PatchGANSettings(Settings):
    """Judges patches; needs no weights."""

    kind: Literal["patchgan"] = "patchgan"
    ndf: int = Field(64, ge=4, description="width of the first layer")
    layers: int = Field(3, ge=1, description="layers of stride 2")
    norm: Literal["batch", "group"] = Field("batch", description="group suits batches below 16")


class DinoSettings(Settings):
    """Heads on a frozen DINO ViT-S/16."""

    kind: Literal["dino"] = "dino"
    weights: str | None = Field(None, description="file with the trunk; null lets timm look for it")


class LossesSection(Settings):
    """Weights of the losses; those of a quantizer are its own options."""

    reconstruction: Literal["l1", "l2"] = Field("l2", description="pixel error")
    reconstruction_weight: float = Field(1.0, ge=0, description="its weight")
    perceptual: Literal["none", "lpips", "features"] = Field(
        "features", description="lpips needs its weights; features: a fixed random net, which is not LPIPS"
    )
    perceptual_weight: float = Field(1.0, ge=0, description="its weight")
    perceptual_weights: str | None = Field(None, description="file with the VGG16 trunk, for lpips")
    adversarial: float = Field(0.0, ge=0, description="weight of the adversarial loss; 0 = no discriminator")
    adversarial_start: float = Field(0.28, ge=0, le=1, description="share of training at which it begins")
    adaptive: bool = Field(True, description="balance it by the gradients at the last layer")
    discriminator: Annotated[PatchGANSettings | DinoSettings, Field(discriminator="kind")] = Field(
        default_factory=PatchGANSettings
    )
    lecam: float = Field(0.0, ge=0, description="weight of the LeCam regulariser")
    semantic: float = Field(0.0, ge=0, description="weight of the contrastive loss to a frozen encoder")
    semantic_model: str = Field("vit_base_patch14_dinov2.lvd142m", description="timm name of that encoder")
    semantic_weights: str | None = Field(None, description="file with its weights; null lets timm look for them")
    semantic_normalise: bool = Field(False, description="unit length before comparing")


# -- data, training, evaluation --------------------------------------------------------------------------------------


class ImageSource(Settings):
    """One source of images."""

    path: str = Field(description="folder, file or task:NAME")
    split: str | None = Field(None, description="split of a task")
    limit: int | None = Field(None, ge=1, description="use this many images, evenly spread over the source")


class ImagesSection(Settings):
    """Which images, and how they become squares."""

    train: list[ImageSource] = Field([], description="training images; a plain path is accepted")
    eval: list[ImageSource] = Field([], description="held-out images; never trained on")
    crop: Literal["center", "random", "pad"] = Field("center", description="how a square is made; pad: black margins")
    flip: bool = Field(False, description="mirror half of the images")
    on_bad_image: Literal["error", "quarantine"] = Field(
        "error", description="faulty files: stop, or leave out and write to bad_rows.jsonl"
    )
    check: Literal["auto", "decode", "header"] = Field(
        "auto",
        description="before the start; decode: every file, once while its size and time stay; header: a damaged file "
        "ends the run when its turn comes; auto: decode 20,000 files or fewer, or with quarantine, else header",
    )
    workers: int = Field(0, ge=0, description="processes that decode ahead; 0 = in the training process")


class TokenizerTrainSection(Settings):
    """Steps, optimiser, schedule, and what is written when."""

    output_dir: str | None = Field(None, description="run folder; default runs/tokenizer-DATE-TIME")
    overwrite: bool = Field(False, description="delete an earlier run in output_dir instead of continuing or refusing")
    max_steps: int | None = Field(None, ge=1, description="optimiser steps; overrides num_train_epochs")
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the data")
    batch_size: int = Field(64, ge=1, description="images per step over all processes")
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    min_learning_rate: float = Field(0.0, ge=0, description="rate at the end of the cosine")
    discriminator_learning_rate: float | None = Field(None, gt=0, description="null: learning_rate")
    warmup_steps: float = Field(0.03, ge=0, description="steps of linear warm-up; below 1 a share of all steps")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    discriminator_weight_decay: float = Field(0.0, ge=0, description="the same for the discriminator")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW first moment")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW second moment")
    max_grad_norm: float = Field(0.0, ge=0, description="clip the gradient norm; 0 = never")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="running mean of weights, used for evaluation; 0 = none")
    revive_steps: int = Field(0, ge=0, description="steps between revivals of dead codes; 0 = never")
    health_window: int = Field(100, ge=1, description="steps over which the use of codes is counted")
    bf16: bool | Literal["auto"] = Field("auto", description="bfloat16 autocast; auto: on CUDA")
    seed: int = Field(42, ge=0, description="seed of everything random")
    logging_steps: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    save_steps: int = Field(500, ge=1, description="steps between checkpoints")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept")


class TokenizerEvalSection(Settings):
    """Held-out evaluation."""

    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations; null: only at the end")
    limit: int | None = Field(None, ge=1, description="images")
    batch_size: int = Field(64, ge=1, description="images decoded together")
    features: str = Field(
        "auto",
        description="what compares images: a weights file, classifier, random-conv; auto: MMPOST_FEATURE_WEIGHTS, else "
        "a classifier of the training labels, else random-conv; the score's name says which",
    )
    perceptual: str = Field(
        "auto",
        description="auto or features: layers of the network that scores; none; a file of the VGG16 trunk, for LPIPS",
    )
    curves: bool = Field(False, description="also scores at further shares of perturbed tokens, for the curve")


class TokenizerConfig(Options):
    """Training a discrete tokenizer.

    >>> TokenizerConfig(max_steps=20, tokenizer={"kind": "cnn"}).train.max_steps
    20
    """

    model_config = ConfigDict(defer_build=True)

    command: ClassVar[str] = "tokenizer train"

    tokenizer: AnyTokenizer = Field(default_factory=CNNSettings)
    data: ImagesSection = Field(default_factory=ImagesSection)
    losses: LossesSection = Field(default_factory=LossesSection)
    train: TokenizerTrainSection = Field(default_factory=TokenizerTrainSection)
    eval: TokenizerEvalSection = Field(default_factory=TokenizerEvalSection)
    log: LogSection = Field(default_factory=LogSection)

    @model_validator(mode="after")
    def _schedule_runs_forward(self) -> TokenizerConfig:
        perturb = self.tokenizer.perturb
        if perturb.anneal_end < perturb.anneal_start:
            raise MmpostError(
                "MMP-C110",
                f"tokenizer.perturb.anneal_end={perturb.anneal_end} lies before anneal_start={perturb.anneal_start}.",
                "Swap them, or set tokenizer.perturb.end_ratio=1 for no annealing.",
            )
        return self


class GeneratorRunConfig(Options):
    """Training a class-conditional generator on codes."""

    model_config = ConfigDict(defer_build=True)

    command: ClassVar[str] = "generator train"

    model: GeneratorModelSection = Field(default_factory=GeneratorModelSection)
    train: GeneratorTrainSection = Field(default_factory=GeneratorTrainSection)
    log: LogSection = Field(default_factory=LogSection)


class PosttrainConfig(Options):
    """Post-training the decoder of a tokenizer."""

    model_config = ConfigDict(defer_build=True)

    command: ClassVar[str] = "tokenizer posttrain"

    data: ImagesSection = Field(default_factory=ImagesSection)
    posttrain: PosttrainSection = Field(default_factory=PosttrainSection)
    sampling: SamplingSection = Field(default_factory=SamplingSection)
    losses: LossesSection = Field(default_factory=LossesSection)
    log: LogSection = Field(default_factory=LogSection)
