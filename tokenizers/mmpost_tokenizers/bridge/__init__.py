"""TokenBridge: discrete tokens from a continuous VAE without training it, and models of those tokens.

Modules: ``levels`` (the quantizer), ``vae`` (a tokenizer around ``diffusers.AutoencoderKL``), ``order`` (order of the
channels), ``head`` (distribution of one position's channels), ``spatial`` (what generators share), ``masked`` and
``raster`` (spatial models in random order and row by row), ``training``, ``running`` and ``sampling`` (the commands),
``options`` and ``checkpoint``.

Source: arXiv 2503.16430.
"""
