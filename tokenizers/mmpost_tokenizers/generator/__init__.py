"""Class-conditional autoregressive generators on the codes of a tokenizer: train, sample, evaluate.

Nothing is imported here; ``GENERATORS`` maps a kind to ``module:Class``.
"""

# A published RAR model (adaLN blocks, permuted order) would be the second line: see ``model.TokenGenerator``.
GENERATORS = {"llama": "mmpost_tokenizers.generator.model:ClassConditionalGenerator"}
