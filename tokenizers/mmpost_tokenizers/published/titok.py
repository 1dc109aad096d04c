"""TiTok's tokenizers (folders ``tokenizer_titok_*_imagenet`` of the hub) as ``ViTTokenizer``.

Checked against the released ``modeling/titok.py``, ``modules/blocks.py``, ``modules/maskgit_vqgan.py`` and
``quantizer/quantizer.py`` of bytedance/1d-tokenizer: names and shapes of all tensors, order of tokens, range of pixels,
the untransposed reshape of the two-stage models, the shortcut of the pixel decoder. Tests build files of the same names
and shapes from random weights; the published files themselves were not at hand. TA-TiTok, which takes text, and TiTok
with a VAE are not covered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.published.files import CONFIG, WEIGHTS, locate, read_tensors
from mmpost_tokenizers.published.renaming import Rename, load_renamed, renames
from mmpost_tokenizers.quantizers.configs import VQConfig
from mmpost_tokenizers.vit import TITOK_SHAPES, ViTConfig, ViTTokenizer

_BLOCK = {
    "ln_1.weight": "norm1.weight",
    "ln_1.bias": "norm1.bias",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.proj.weight",
    "attn.out_proj.bias": "attn.proj.bias",
    "ln_2.weight": "norm2.weight",
    "ln_2.bias": "norm2.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
_SIZE = Literal["small", "base", "large"]


def load_titok(
    name_or_path: str | Path, config: ViTConfig | None = None, *, revision: str | None = None
) -> ViTTokenizer:
    """A published TiTok tokenizer.

    Args:
        name_or_path: Hub id or folder with ``config.json`` and ``model.safetensors``; or, with ``config``, one file.
        config: Shape of the model instead of the one in ``config.json``.
        revision: Branch, tag or commit on the hub.

    Raises:
        MmpostError: MMP-E070 nothing there, MMP-E071 tensors differ, MMP-E072 a configuration of another model.
    """
    if config is None:
        config = published_config(locate(str(name_or_path), CONFIG, revision))
    single = Path(name_or_path).is_file()
    weights = Path(name_or_path) if single else locate(str(name_or_path), WEIGHTS, revision)
    tokenizer = ViTTokenizer(config)
    return load_renamed(tokenizer, read_tensors(weights), table(tokenizer), left_out=(), place=str(weights))


def published_config(path: Path) -> ViTConfig:
    """Our configuration of the model that a published ``config.json`` describes.

    Raises:
        MmpostError: MMP-E072 when it is no TiTok with a codebook.
    """
    try:
        model: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model"]["vq_model"]
        two_stage = bool(model.get("is_legacy", True))
        usable = model.get("quantize_mode", "vq") == "vq" and bool(model.get("finetune_decoder", True)) == two_stage
        sizes = cast(tuple[_SIZE, _SIZE], (model["vit_enc_model_size"], model["vit_dec_model_size"]))
        if not usable or not set(sizes) <= set(TITOK_SHAPES):
            raise KeyError("model.vq_model")
        quantizer = VQConfig(
            codebook_size=model["codebook_size"],
            dim=model["token_size"],
            l2_norm=model["use_l2_norm"],
            commit_weight=model["commitment_cost"],
        )
        return ViTConfig.titok(
            encoder=sizes[0],
            decoder=sizes[1],
            num_latent_tokens=model["num_latent_tokens"],
            two_stage=two_stage,
            quantizer=quantizer,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{path} is not the configuration of a TiTok with a codebook and a pixel decoder."
        raise MmpostError("MMP-E072", what, "Name a published TiTok, or pass config.") from error


def table(tokenizer: ViTTokenizer) -> dict[str, Rename]:
    """Published names of all tensors of ``tokenizer``, with their published shapes."""
    names = dict(_names(tokenizer))
    own = {name: tuple(tensor.shape) for name, tensor in tokenizer.state_dict().items()}
    shapes = {theirs: _shape(theirs, own[ours]) for theirs, ours in names.items()}
    return renames(tokenizer, names, shapes)


def _shape(theirs: str, own: tuple[int, ...]) -> tuple[int, ...]:
    if ("embedding" in theirs and len(own) == 3) or theirs == "latent_tokens":
        return own[1:]  # no axis for the batch
    if theirs in ("encoder.conv_out.weight", "decoder.ffn.0.weight", "decoder.ffn.2.weight"):
        return (*own, 1, 1)
    return own


def _names(tokenizer: ViTTokenizer) -> Iterator[tuple[str, str]]:
    yield "latent_tokens", "encoder.latent_tokens"
    yield "quantize.embedding.weight", "quantizer.weight"
    yield "decoder.mask_token", "decoder.mask_token"
    for side, trunk in (("encoder", tokenizer.encoder), ("decoder", tokenizer.decoder)):
        yield f"{side}.class_embedding", f"{side}.model.cls_token"
        yield f"{side}.positional_embedding", f"{side}.model.pos_embed"
        yield f"{side}.latent_token_positional_embedding", f"{side}.latent_positions"
        for index in range(len(trunk.model.blocks)):
            for theirs, ours in _BLOCK.items():
                yield f"{side}.transformer.{index}.{theirs}", f"{side}.model.blocks.{index}.{ours}"
    pairs = {
        "encoder.patch_embed": "encoder.model.patch_embed.proj",
        "encoder.conv_out": "quant_conv",
        "decoder.decoder_embed": "post_quant_conv",
        **{f"{side}.ln_pre": f"{side}.model.norm_pre" for side in ("encoder", "decoder")},
        **{f"{side}.ln_post": f"{side}.model.norm" for side in ("encoder", "decoder")},
    }
    if tokenizer.config.pixels == "maskgit":
        pairs |= {"decoder.ffn.0": "to_pixels.inner", "decoder.ffn.2": "to_pixels.outer"}
        yield "pixel_quantize.embedding.weight", "to_pixels.codes.weight"
        for name in tokenizer.state_dict():
            if name.startswith("to_pixels.decoder."):
                yield name.replace("to_pixels.decoder", "pixel_decoder"), name
    else:
        pairs |= {"decoder.ffn.0": "to_pixels.patches", "decoder.conv_out": "to_pixels.last"}
    for theirs, ours in pairs.items():
        yield f"{theirs}.weight", f"{ours}.weight"
        yield f"{theirs}.bias", f"{ours}.bias"
