"""LlamaGen's VQ tokenizers (``vq_ds16_c2i.pt``, ``vq_ds8_c2i.pt``) as ``CNNTokenizer``.

Checked against the released ``tokenizer/tokenizer_image/vq_model.py``: names and shapes of all tensors, order of
attention and residual blocks, padding, normalisation (GroupNorm of 32, epsilon 1e-6), attention scale. The published
files themselves were not at hand; tests build files of the same names and shapes from random weights.
"""

from __future__ import annotations

from pathlib import Path

from mmpost_tokenizers.cnn import CNNConfig, CNNTokenizer
from mmpost_tokenizers.published.files import read_tensors
from mmpost_tokenizers.published.renaming import Rename, load_renamed, renames

# The record of the last 65536 indices, for a usage number while training.
LEFT_OUT = ("quantize.codebook_used",)
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}


def load_llamagen(path: str | Path, config: CNNConfig | None = None) -> CNNTokenizer:
    """A published LlamaGen tokenizer.

    Args:
        path: ``.pt`` file with ``ema``, ``model`` or ``state_dict``, or ``.safetensors``.
        config: Shape of the model; VQ-16 for 256 pixels by default.

    Raises:
        MmpostError: MMP-E070 no file, MMP-E071 tensors differ, MMP-E073 not readable without running code.
    """
    tokenizer = CNNTokenizer(config or CNNConfig.llamagen())
    return load_renamed(tokenizer, read_tensors(path), table(tokenizer), left_out=LEFT_OUT, place=str(path))


def table(tokenizer: CNNTokenizer) -> dict[str, Rename]:
    """Published names of all tensors of ``tokenizer``, with their published shapes."""
    theirs = {_theirs(name): name for name in tokenizer.state_dict()}
    own = tokenizer.state_dict()
    # 1x1 convolutions there are linear layers here.
    shapes = {
        published: (*own[name].shape, 1, 1)
        for published, name in theirs.items()
        if ".attentions." in name and own[name].ndim == 2
    }
    return renames(tokenizer, theirs, shapes)


def _theirs(name: str) -> str:
    """Published name of one of our tensors."""
    if name == "quantizer.weight":
        return "quantize.embedding.weight"
    parts = name.split(".")
    if parts[1] == "mid_block":
        # Published: one list of residual, attention, residual.
        place = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}[parts[2], parts[3]]
        return ".".join([parts[0], "mid", str(place), *_inner(parts[2], parts[4:])])
    if parts[1] in ("down_blocks", "up_blocks"):
        block = [parts[0], "conv_blocks", parts[2]]
        if parts[3] in ("downsamplers", "upsamplers"):
            return ".".join([*block, parts[3].removesuffix("rs"), *parts[5:]])
        kind = "res" if parts[3] == "resnets" else "attn"
        return ".".join([*block, kind, parts[4], *_inner(parts[3], parts[5:])])
    return name.replace("conv_norm_out", "norm_out")


def _inner(kind: str, parts: list[str]) -> list[str]:
    own = _ATTENTION if kind == "attentions" else _RESIDUAL
    theirs = {ours: published for published, ours in own.items()}
    *layer, last = parts
    return [theirs[".".join(layer)], last]
