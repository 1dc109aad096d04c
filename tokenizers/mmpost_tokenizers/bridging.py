"""What ``mmpost tokenizer bridge`` does: a tokenizer from a VAE, its channel order, and how much quantizing costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpost.core.errors import MmpostError
from mmpost_tokenizers import opening
from mmpost_tokenizers.bridge.levels import MAX_CUT_OFF, MODES, SCHEMES
from mmpost_tokenizers.bridge.order import dimension_order, low_frequency_share
from mmpost_tokenizers.bridge.vae import QuantizedVAETokenizer
from mmpost_tokenizers.images import ImageSet, from_uint8

ORDER_FILE = "dimension_order.json"
BATCH = 64


def bridge_vae(
    vae: str,
    out: Path,
    *,
    images: Callable[[int], ImageSet | None] = lambda _: None,
    image_size: int | None = None,
    order: bool = True,
    levels: int = 64,
    value_range: float = 5.0,
    scheme: str = "gaussian",
    mode: str = "paper",
    max_saturation: float = MAX_CUT_OFF,
) -> dict[str, Any]:
    """Make and save the tokenizer of a VAE.

    Args:
        vae: Folder or hub id.
        out: Folder that ``from_pretrained`` opens afterwards.
        images: Gives images of a side, that the scale and the order of channels are measured on; None for none, then
            the scale is the one in the VAE's configuration.
        image_size: Side; default: that of the VAE.
        order: Measure the order of channels by their low frequencies.
        levels: B.
        value_range: Scaled latents of +-this lie at the ends of the level axis.
        scheme: ``gaussian``, ``uniform`` or ``lloyd``.
        mode: ``paper`` or ``channel``.
        max_saturation: Largest share of latents that may be cut off, see ``PostTrainingConfig``; 1 accepts any.

    Returns:
        Facts and, with images, ``error``: mean squared error of scaled latents, ``image_error``: of images against
        those of the VAE alone, ``saturation``: share of latents beyond the last level, ``cut_off``: of those, the
        share that loses more than latents between levels do, ``measured_range`` and ``reach`` in units of the scale.
        ``notes`` say what was not measured.

    Raises:
        MmpostError: MMP-C117 for options that do not fit together, MMP-E080 to MMP-E084, MMP-C090, MMP-C091.
    """
    for name, value, known in (("scheme", scheme, SCHEMES), ("mode", mode, MODES)):
        if value not in known:
            raise MmpostError("MMP-C117", f"--{name} {value} is not known.", f"Known: {', '.join(known)}.")
    tokenizer = QuantizedVAETokenizer.from_vae(
        vae,
        image_size=image_size,
        levels=levels,
        value_range=value_range,
        # Lloyd's levels are those of measured latents; without images they are those of normal ones.
        scheme=scheme,
        max_saturation=max_saturation,
    ).to(opening.device())
    facts: dict[str, Any] = {
        "levels": levels,
        "range": value_range,
        "scheme": scheme,
        "channels": tokenizer.groups,
        "token_grid": list(tokenizer.grid),
        "image_size": tokenizer.config.image_size,
        "reach": tokenizer.quantizer.reach,
        "notes": [],
    }
    found = images(tokenizer.config.image_size)
    if found is None and mode != "paper":
        raise MmpostError("MMP-C117", f"--mode {mode} is measured on images.", "Give --data.")
    out.mkdir(parents=True, exist_ok=True)
    if found is not None:
        pixels, _ = found.stacked()
        batches = [from_uint8(part).to(opening.device()) for part in pixels.split(BATCH)]
        tokenizer.fit(batches, mode=mode)
        facts |= quantizing_error(tokenizer, batches)
        if order:
            facts |= _order(tokenizer, batches, out)
    else:
        facts["notes"].append("without --data the scale is that of the VAE's configuration and no latent was measured")
    tokenizer.save_pretrained(out)
    return facts


@torch.no_grad()
def quantizing_error(tokenizer: QuantizedVAETokenizer, batches: list[Tensor]) -> dict[str, Any]:
    """What quantizing adds to the VAE's own error.

    Returns:
        ``error``: mean squared error of latents in units of their standard deviation; ``image_error``: of decoded
        images in [-1, 1] against those of unquantized latents; ``saturation``, ``cut_off`` and ``measured_range`` as
        ``bridge_vae``.
    """
    tokenizer.eval()
    quantizer = tokenizer.quantizer
    quantizer.reset_saturation()
    latent, image, count = 0.0, 0.0, 0
    for batch in batches:
        z = tokenizer.encode(batch)
        quantized = tokenizer.quantize(z).latents
        scaled = ((quantized - z) * quantizer.scale).double()
        latent += float(scaled.square().mean()) * len(batch)
        image += float((tokenizer.decode(quantized) - tokenizer.decode(z)).double().square().mean()) * len(batch)
        count += len(batch)
    return {
        "error": latent / count,
        "image_error": image / count,
        "saturation": quantizer.saturation_rate,
        "cut_off": quantizer.cut_off_rate,
        "measured_range": [round(end, 4) for end in quantizer.measured],
    }


@torch.no_grad()
def _order(tokenizer: QuantizedVAETokenizer, batches: list[Tensor], out: Path) -> dict[str, Any]:
    latents = torch.cat([tokenizer.encode(batch).cpu() for batch in batches])
    found = dimension_order(latents).tolist()
    shares = low_frequency_share(latents).tolist()
    (out / ORDER_FILE).write_text(json.dumps({"order": found, "low_frequency_share": shares}) + "\n")
    return {"order": found}
