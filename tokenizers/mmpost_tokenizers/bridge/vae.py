"""A tokenizer made of a continuous VAE of diffusers and the post-training quantizer; nothing is trained."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor, nn

from mmpost.core import seeding
from mmpost.core.errors import MmpostError
from mmpost_tokenizers.base import DiscreteTokenizer, TokenizerConfig
from mmpost_tokenizers.bridge.levels import PostTrainingConfig, PostTrainingQuantizer, config_from_json
from mmpost_tokenizers.published.files import missing_place

Posterior = Literal["sample", "mode"]


@dataclass(frozen=True, kw_only=True)
class QuantizedVAEConfig(TokenizerConfig):
    """What ``QuantizedVAETokenizer`` is made of.

    Attributes:
        quantizer: Configuration of the quantizer.
        vae: Configuration of the ``diffusers.AutoencoderKL``.
        posterior: Latents are drawn from the VAE's posterior, as in the paper, or are its mode. A model of the tokens
            should be trained and measured with the same choice.
        seed: Of the draws. They depend on it and on the picture alone, so a picture always has the same tokens.
    """

    kind: ClassVar[str] = "bridge"
    quantizer: PostTrainingConfig
    vae: Mapping[str, Any]
    posterior: Posterior = "sample"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.posterior not in ("sample", "mode"):
            what = f"bridge: posterior={self.posterior!r} is not one of sample, mode."
            raise MmpostError("MMP-C090", what, "Correct posterior.")

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Self:
        """The configuration that ``to_json`` wrote."""
        quantizer = table.get("quantizer")
        if isinstance(quantizer, Mapping):
            table = {**table, "quantizer": config_from_json(quantizer)}
        return super().from_json(table)


class QuantizedVAETokenizer(DiscreteTokenizer):
    """C indices per token, one for each channel of the VAE's latent.

    Latents are normalised as the VAE's configuration says: ``(z - shift_factor) * scaling_factor``, or with its mean
    and deviation per channel where it has them.

    Attributes:
        vae: The autoencoder.
    """

    config_class = QuantizedVAEConfig
    config: QuantizedVAEConfig
    quantizer: PostTrainingQuantizer
    center: Tensor
    factor: Tensor

    def __init__(self, config: QuantizedVAEConfig, vae: AutoencoderKL | None = None) -> None:
        """Wrap ``vae``, or a new one with weights from torch's global generator.

        Raises:
            MmpostError: MMP-C097 when the VAE does not fit the image size or the quantizer, or makes no RGB images.
        """
        super().__init__()
        self.config = config
        self.vae = AutoencoderKL.from_config(dict(config.vae)) if vae is None else vae
        self.quantizer = PostTrainingQuantizer(config.quantizer)
        table = self.vae.config
        channels, down = table.latent_channels, 2 ** (len(table.block_out_channels) - 1)
        faults = {
            f"it has {channels} latent channels, the quantizer {config.quantizer.dim}": channels
            != config.quantizer.dim,
            f"images of {config.image_size} pixels are no multiple of its step of {down}": config.image_size % down
            != 0,
            f"it takes {table.in_channels} colour channels": table.in_channels != 3,
            f"it makes {table.out_channels} colour channels": table.out_channels != 3,
        }
        if any(faults.values()):
            what = f"bridge: this VAE does not fit: {', '.join(text for text, is_so in faults.items() if is_so)}."
            raise MmpostError("MMP-C097", what, "Choose another image_size or VAE.")
        self.grid = (config.image_size // down, config.image_size // down)
        mean, deviation = table.get("latents_mean"), table.get("latents_std")
        center = torch.zeros(channels) + (table.get("shift_factor") or 0.0)
        self.register_buffer("center", center if mean is None else torch.tensor(mean).flatten(), persistent=False)
        spread = torch.ones(channels) if deviation is None else torch.tensor(deviation).flatten()
        self.register_buffer("factor", table.scaling_factor / spread, persistent=False)

    @classmethod
    def from_vae(
        cls,
        name_or_path: str | Path,
        *,
        image_size: int | None = None,
        posterior: Posterior = "sample",
        seed: int = 0,
        subfolder: str | None = None,
        **quantizer: Any,
    ) -> Self:
        """Open a ``diffusers.AutoencoderKL`` and put a quantizer behind it.

        Args:
            name_or_path: Local folder or hub id, of a VAE or of a pipeline that has one.
            image_size: Side of the images; default: the one in the VAE's configuration.
            posterior: See ``QuantizedVAEConfig``.
            seed: See ``QuantizedVAEConfig``.
            subfolder: Where the VAE is; default: ``vae`` if that exists in a local folder.
            quantizer: Fields of ``PostTrainingConfig`` but ``dim`` and ``mode``; see ``fit`` for the latter.

        Raises:
            MmpostError: MMP-E080 no such VAE, MMP-E083 weights that do not fit it, MMP-C097 as in ``__init__``.
        """
        vae = open_vae(name_or_path, subfolder)
        config = QuantizedVAEConfig(
            image_size=image_size or vae.config.sample_size,
            quantizer=PostTrainingConfig(dim=vae.config.latent_channels, **quantizer),
            vae=_plain(vae.config),
            posterior=posterior,
            seed=seed,
        )
        tokenizer = cls(config, vae)
        return tokenizer.eval()

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], **options: Any) -> Self:
        """Measure the quantizer's shift and scale on images, and keep it.

        Args:
            batches: Images ``[B, 3, S, S]`` in [-1, 1].
            options: Of ``PostTrainingQuantizer.fit``; those left out stay as they are.

        Raises:
            MmpostError: As ``PostTrainingQuantizer.fit``; then the quantizer is the old one.
        """
        was_training = self.training
        self.eval()
        latents = torch.cat([self.encode(batch).flatten(0, -2).cpu() for batch in batches])
        self.train(was_training)
        kept = {name: getattr(self.config.quantizer, name) for name in ("levels", "value_range", "scheme", "mode")}
        kept["max_saturation"] = self.config.quantizer.max_saturation
        device = self.quantizer.table.device
        self.quantizer = PostTrainingQuantizer.fit(latents, **{**kept, **options}).to(device).train(was_training)
        self.config = dataclasses.replace(self.config, quantizer=self.quantizer.config)
        return self

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that makes the pixels."""
        weight: nn.Parameter = self.vae.decoder.conv_out.weight
        return weight

    def decoder_modules(self) -> list[nn.Module]:
        """Decoder, and the convolution before it where there is one."""
        return [part for part in (self.vae.post_quant_conv, self.vae.decoder) if part is not None]

    def features(self, images: Tensor) -> Tensor:
        """Normalised latents ``[B, H, W, C]``, of the posterior's sample or mode."""
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mode()
        if self.config.posterior == "sample":
            latents = latents + posterior.std * self._noise(images, latents)
        return (latents.permute(0, 2, 3, 1) - self.center) * self.factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, S, S]`` from latents ``[B, H, W, C]``; not quantized, not clamped."""
        normal = latents / self.factor + self.center
        images: Tensor = self.vae.decode(normal.permute(0, 3, 1, 2).contiguous()).sample
        return images

    def _noise(self, images: Tensor, latents: Tensor) -> Tensor:
        """Normal noise of the shape of ``latents`` that depends on each picture, not on its neighbours in the batch."""
        keys = [zlib.crc32(picture.detach().cpu().float().contiguous().numpy().tobytes()) for picture in images]
        streams = [seeding.generator(self.config.seed, "posterior", key) for key in keys]
        noise = np.stack([stream.standard_normal(latents.shape[1:], dtype=np.float32) for stream in streams])
        return torch.from_numpy(noise).to(latents)


def open_vae(name_or_path: str | Path, subfolder: str | None = None) -> AutoencoderKL:
    """Open a VAE with all its weights.

    Raises:
        MmpostError: MMP-E080 no such VAE, or a model of another class; MMP-E083 weights that are missing or unknown.
    """
    fix = "Give the folder or hub id of a diffusers.AutoencoderKL."
    if missing := missing_place(str(name_or_path)):
        raise MmpostError("MMP-E080", f"cannot open the VAE '{name_or_path}': {missing}.", fix)
    if subfolder is None and (Path(name_or_path) / "vae" / "config.json").is_file():
        subfolder = "vae"
    place = {} if subfolder is None else {"subfolder": subfolder}
    try:
        config = AutoencoderKL.load_config(name_or_path, **place)
        found = config.get("_class_name", "a model without a class name")
        if found != "AutoencoderKL":
            what = f"'{name_or_path}' is {found}, not an AutoencoderKL."
            raise MmpostError("MMP-E080", what, "TokenBridge takes continuous VAEs of that class.")
        vae, report = AutoencoderKL.from_pretrained(name_or_path, output_loading_info=True, **place)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        what = f"cannot open the VAE '{name_or_path}': {reason}"
        raise MmpostError("MMP-E080", what, fix) from error
    bad = {kind: report[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched") if report[f"{kind}_keys"]}
    if bad:
        keys = "; ".join(f"{kind}: {', '.join(map(str, list(names)[:5]))}" for kind, names in bad.items())
        what = f"the weights of the VAE '{name_or_path}' do not fit its configuration. {keys}."
        raise MmpostError("MMP-E083", what, "Download or save it again.")
    return vae.eval()


def mar_kl16() -> AutoencoderKL:
    """The architecture of MAR's KL-16 VAE (16 channels, 1/16 of the side), with random weights.

    28,265,760 parameters in the encoder, 38,188,931 in the decoder, 66,456,019 in all, as in the reference.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(128, 128, 256, 256, 512),
        layers_per_block=2,
        latent_channels=16,
        sample_size=256,
        scaling_factor=0.2325,
    )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration without diffusers' private notes, in the types that JSON gives back."""
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in public.items()}
