"""Image tokenizers: images to discrete tokens and back, their training and their evaluation.

``TOKENIZERS`` and ``mmpost_tokenizers.quantizers.QUANTIZERS`` say which classes exist, without importing any of them.
"""

TOKENIZERS = {
    "cnn": "mmpost_tokenizers.cnn:CNNTokenizer",
    "vit": "mmpost_tokenizers.vit:ViTTokenizer",
    "bridge": "mmpost_tokenizers.bridge.vae:QuantizedVAETokenizer",
}
