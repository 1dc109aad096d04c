"""Files of tokenizers: our own folders, and checkpoints that others published.

``PUBLISHED`` names the published layouts; each function takes the path of the file and returns a tokenizer.
"""

PUBLISHED = {
    "llamagen": "mmpost_tokenizers.published.llamagen:load_llamagen",
    "titok": "mmpost_tokenizers.published.titok:load_titok",
    "robustok": "mmpost_tokenizers.published.robustok:load_robustok",
}
