"""RobusTok's checkpoints (XQ-GAN layout, DINOv2 on both sides, one codebook) as ``ViTTokenizer``.

Checked against the released ``xqgan_model.py``, ``dino_enc/dinov2.py``, ``dino_enc/to_pixel.py`` and
``configs/main-train.yaml`` of qiuk2/RobusTok: names and shapes of all tensors that a tokenizer needs, order of tokens,
the second class token before the latents of the decoder, level embeddings, order of the numbers of a patch. Tests build
files of the same names and shapes from random weights; the published files themselves were not at hand. Product and
multi-scale XQ-GANs are not covered.
"""

from __future__ import annotations

from pathlib import Path

from mmpost_tokenizers.published.files import read_tensors
from mmpost_tokenizers.published.renaming import Rename, load_renamed, renames
from mmpost_tokenizers.vit import ViTConfig, ViTTokenizer

# Networks for the semantic losses, bookkeeping of usage, and constants.
LEFT_OUT = (
    "semantic_model.",
    "semantic_loss.",
    "detail_model.",
    "detail_loss.",
    "sem_linear.",
    "quantize.ema_vocab_hit_SV",
    "encoder.lvl1LC",
    "decoder.lvl1LC",
)
_OTHERS = {
    "quantizer.weight": "quantize.embedding.weight",
    "encoder.level": "encoder.lvl_embed.weight",
    "decoder.level": "decoder.lvl_embed.weight",
    "to_pixels.weight": "decoder.to_pixel.model.weight",
    "to_pixels.bias": "decoder.to_pixel.model.bias",
}


def load_robustok(path: str | Path, config: ViTConfig | None = None) -> ViTTokenizer:
    """A published RobusTok tokenizer.

    Args:
        path: ``.pt`` file with ``ema`` or ``model``, or ``.safetensors``.
        config: Shape of the model; the published one by default.

    Raises:
        MmpostError: MMP-E070 no file, MMP-E071 tensors differ, MMP-E073 not readable without running code.
    """
    tokenizer = ViTTokenizer(config or ViTConfig.robustok())
    return load_renamed(tokenizer, read_tensors(path), table(tokenizer), left_out=LEFT_OUT, place=str(path))


def table(tokenizer: ViTTokenizer) -> dict[str, Rename]:
    """Published names of all tensors of ``tokenizer``, with their published shapes."""
    own = tokenizer.state_dict()
    theirs = {_OTHERS.get(name, name): name for name in own}
    convolutions = ("quant_conv.weight", "post_quant_conv.weight")
    return renames(tokenizer, theirs, {name: (*own[name].shape, 1, 1) for name in convolutions})
