"""Quantizers: latents to indices of codes, and back. Configurations are in ``configs``, which imports no torch."""

QUANTIZERS = {
    "vq": "mmpost_tokenizers.quantizers.vq:VectorQuantizer",
    "vq_ema": "mmpost_tokenizers.quantizers.vq:EMAQuantizer",
    "lfq": "mmpost_tokenizers.quantizers.binary:LFQuantizer",
    "bsq": "mmpost_tokenizers.quantizers.binary:BSQuantizer",
    "fsq": "mmpost_tokenizers.quantizers.fsq:FSQuantizer",
    "product": "mmpost_tokenizers.quantizers.product:ProductQuantizer",
    "residual": "mmpost_tokenizers.quantizers.residual:ResidualQuantizer",
    "multi_scale": "mmpost_tokenizers.quantizers.multi_scale:MultiScaleQuantizer",
}
