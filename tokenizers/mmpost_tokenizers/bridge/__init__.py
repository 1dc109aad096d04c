"""TokenBridge: discrete tokens from a continuous VAE without training it, and models of those tokens.

Modules: ``levels`` (the quantizer), ``vae`` (a tokenizer around ``diffusers.AutoencoderKL``), ``order`` (order of the
channels), ``head`` (distribution of one position's channels), ``masked`` (spatial model in random order), ``training``
and ``checkpoint``.

Source: arXiv 2503.16430.
"""
