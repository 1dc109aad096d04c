"""Which channel of a latent is predicted first: those whose energy lies most in low spatial frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

from mmpost.core.errors import MmpostError

# Of the released model: step c of the head predicts latent channel MAR_ORDER[c] of the MAR KL-16 VAE. For any other VAE
# it means nothing; measure with ``dimension_order``.
MAR_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)


def low_frequency_share(latents: Tensor, cutoff: float = 0.25) -> Tensor:
    """Share of each channel's energy at low frequencies, averaged over images.

    Args:
        latents: ``[N, H, W, C]``.
        cutoff: Frequencies with ``|f_y|`` and ``|f_x|`` up to this many cycles per sample count as low, the constant
            part included; in (0, 0.5].

    Returns:
        float64 ``[C]`` in [0, 1]. An image whose channel is 0 everywhere does not count; a channel without any other
        image has share 0.

    Raises:
        MmpostError: MMP-C093 for another shape or cut-off.
    """
    if latents.ndim != 4 or not latents.shape[0] or not 0 < cutoff <= 0.5:
        raise MmpostError(
            "MMP-C093",
            f"bridge: channel order from latents of shape {tuple(latents.shape)} with cutoff {cutoff:g}.",
            "Give latents [N, H, W, C] of at least one image, and a cutoff in (0, 0.5].",
        )
    height, width = latents.shape[1:3]
    energy = torch.fft.fft2(latents.detach().double(), dim=(1, 2)).abs() ** 2
    low_y = torch.fft.fftfreq(height, device=latents.device).abs() <= cutoff
    low_x = torch.fft.fftfreq(width, device=latents.device).abs() <= cutoff
    low = (low_y[:, None] & low_x)[None, :, :, None]
    whole = energy.sum((1, 2))
    share = (energy * low).sum((1, 2)) / whole.clamp(min=torch.finfo(torch.float64).tiny)
    return share.sum(0) / (whole > 0).sum(0).clamp(min=1)


def dimension_order(latents: Tensor, cutoff: float = 0.25) -> Tensor:
    """Channels sorted by ``low_frequency_share``, largest first: int64 ``[C]``; ties keep the order of the channels.

    Source: arXiv 2503.16430, section 4.3. The paper does not give its cut-off.
    """
    return torch.argsort(low_frequency_share(latents, cutoff), descending=True, stable=True)


def inverse(order: Tensor) -> Tensor:
    """Permutation that undoes ``order``.

    Raises:
        MmpostError: MMP-C094 when ``order`` is no permutation.
    """
    back = torch.argsort(order)
    if order.ndim != 1 or order[back].tolist() != list(range(len(order))):
        what = f"bridge: the channel order {order.tolist()} is not a permutation of 0..{order.numel() - 1}."
        raise MmpostError("MMP-C094", what, "Take the order that dimension_order returns.")
    return back
