"""Draw codes from a generator: guidance, temperature, top-k, top-p, and tokens that are given.

Every random number is a function of (seed, sample number, place in the sequence), so an image depends neither on the
batch it shared nor on the device's random state; only rounding of the logits may differ between batch sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mmpost.core import seeding
from mmpost.core.errors import MmpostError
from mmpost_tokenizers.generator.classes import check_classes
from mmpost_tokenizers.generator.layout import check_codes
from mmpost_tokenizers.generator.model import Decoder, TokenGenerator
from mmpost_tokenizers.generator.options import SamplingSection

Kind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class Guidance:
    """Weight of classifier-free guidance at each place of the grid.

    Attributes:
        scale: Weight at the end, s; 1 is plain conditional sampling, which skips the unconditional pass.
        kind: ``constant``: s everywhere (LlamaGen). ``linear``: from 1 to s. ``cosine``: that of RAR,
            1 + (s - 1) * (1 - cos(pi * (step / N) ** power)) / 2.
        power: Exponent of ``cosine``.
    """

    scale: float = 1.0
    kind: Kind = "constant"
    power: float = 1.0

    def weights(self, steps: int) -> np.ndarray:
        """Weights of ``steps`` places, float64 ``[steps]``."""
        share = np.arange(steps) / steps
        if self.kind == "constant":
            share = np.ones(steps)
        elif self.kind == "cosine":
            share = (1 - np.cos(math.pi * share**self.power)) / 2
        return 1 + (self.scale - 1) * share


@dataclass(frozen=True, slots=True)
class Sampling:
    """How codes are drawn.

    Attributes:
        guidance: Applied to the logits before everything else.
        temperature: Logits are divided by it; 0 takes the most likely code.
        top_k: Only the most likely codes are kept; 0 keeps all.
        top_p: Smallest set of codes with at least this probability is kept; 1 keeps all.
        seed: Seed of the draws.
        batch_size: Images generated together.
        bf16: Run the model in bfloat16; the draws stay in float64.
    """

    guidance: Guidance = field(default_factory=Guidance)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 64
    bf16: bool = False

    @classmethod
    def of(cls, section: SamplingSection, *, bf16: bool = False) -> Sampling:
        """From the options of a command."""
        return cls(
            Guidance(section.guidance, section.guidance_schedule, section.guidance_power),
            section.temperature,
            section.top_k,
            section.top_p,
            section.seed,
            section.batch_size,
            bf16,
        )


def generate(
    model: TokenGenerator,
    class_ids: Tensor,
    *,
    sampling: Sampling,
    numbers: np.ndarray | None = None,
    forced_tokens: Tensor | None = None,
    keep_prob: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw the codes of one image per class id.

    Args:
        model: The generator; it is run in evaluation mode without gradient.
        class_ids: int64 ``[B]``; ``num_classes`` stands for "no class".
        sampling: Guidance, temperature, cuts, seed.
        numbers: Number of each sample, int64 ``[B]``, which keys its draws; None counts from 0.
        forced_tokens: Codes ``[B, *grid]`` or ``[B, *grid, G]`` of real images, kept with probability ``keep_prob``.
        keep_prob: Preservation ratio sigma in [0, 1]; the places to keep are drawn once per image, and the mixture of
            kept and drawn codes is what the model sees as context.
        progress: Called with images done and images in all after each batch.

    Returns:
        int64 codes on the CPU, ``[B, *grid]`` or ``[B, *grid, G]``.

    Raises:
        MmpostError: MMP-C101, MMP-C105, MMP-C106 for codes, classes or options that do not fit.

    Source: arXiv 2509.12474, section on post-training (preservation ratio).
    """
    _check(model, class_ids, sampling, forced_tokens, keep_prob)
    layout = model.config.layout
    numbers = np.arange(len(class_ids)) if numbers is None else np.asarray(numbers, dtype=np.int64)
    drawn = []
    was_training = bool(getattr(model, "training", False))
    model.eval()
    try:
        for start in range(0, len(class_ids), sampling.batch_size):
            rows = slice(start, start + sampling.batch_size)
            forced = None if forced_tokens is None else forced_tokens[rows].reshape(-1, layout.length)
            drawn.append(_batch(model, class_ids[rows], numbers[rows], sampling, forced, keep_prob))
            if progress is not None:
                progress(min(start + sampling.batch_size, len(class_ids)), len(class_ids))
    finally:
        getattr(model, "train", lambda _: None)(was_training)
    codes = torch.cat(drawn) if drawn else torch.empty(0, layout.length, dtype=torch.long)
    return codes.reshape(-1, *layout.shape)


def keep_mask(seed: int, numbers: np.ndarray, positions: int, keep_prob: float) -> np.ndarray:
    """Which places keep the real code, bool ``[len(numbers), positions]``; all groups of a place share one draw."""
    draws = seeding.uniform(seed, "generator.keep", numbers[:, None], np.arange(positions))
    return draws < keep_prob


def guided(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance on logits: l_u + w * (l_c - l_u)."""
    return unconditional + weight * (conditional - unconditional)


def probabilities(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Float64 probabilities ``[B, K]`` after temperature, top-k and top-p, in this order."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    scaled = logits.double() / temperature
    if 0 < top_k < logits.shape[-1]:
        least = scaled.topk(top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probability = scaled.softmax(-1)
    if top_p < 1:
        ordered, index = probability.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probability = torch.zeros_like(probability).scatter(-1, index, ordered)
    return probability


def draw(probability: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the distribution function: int64 ``[B]`` from ``[B, K]`` and ``[B]`` in [0, 1).

    The probabilities need not sum to 1; a code of probability 0 is never drawn.
    """
    edges = probability.cumsum(-1)
    chosen = torch.searchsorted(edges, uniform[:, None] * edges[:, -1:], right=True)[:, 0]
    # The product of u and the last edge may round up to that edge: then the last code with any probability is meant.
    last = probability.shape[-1] - 1 - (probability > 0).flip(-1).int().argmax(-1)
    return torch.minimum(chosen, last)


def _batch(
    model: TokenGenerator,
    class_ids: Tensor,
    numbers: np.ndarray,
    sampling: Sampling,
    forced: Tensor | None,
    keep_prob: float,
) -> Tensor:
    """Codes ``[B, N * G]`` of one batch."""
    layout, device = model.config.layout, model.device
    weights = sampling.guidance.weights(layout.positions).repeat(layout.groups)
    draws = seeding.uniform(sampling.seed, "generator.sample", numbers[:, None], np.arange(layout.length))
    uniform = torch.from_numpy(draws).to(device)
    kept = keep_mask(sampling.seed, numbers, layout.positions, keep_prob).repeat(layout.groups, 1)
    keep, given = torch.from_numpy(kept).to(device), None if forced is None else forced.to(device)
    codes = torch.zeros(len(class_ids), layout.length, dtype=torch.long, device=device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=sampling.bf16):
        step = _Guided(model, class_ids.to(device), weights)
        for place in range(layout.length):
            logits = step(place, None if place == 0 else codes[:, place - 1])
            probability = probabilities(
                logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
            )
            fresh = draw(probability, uniform[:, place])
            codes[:, place] = fresh if given is None else torch.where(keep[:, place], given[:, place], fresh)
    return codes.cpu()


class _Guided:
    """Logits of the next code under guidance; conditional and unconditional rows share one pass."""

    def __init__(self, model: TokenGenerator, class_ids: Tensor, weights: np.ndarray) -> None:
        self._weights = weights
        self._both = bool((weights != 1).any())
        null = torch.full_like(class_ids, model.config.num_classes)
        self._decoder: Decoder = model.decoder(torch.cat([class_ids, null]) if self._both else class_ids)

    def __call__(self, place: int, codes: Tensor | None) -> Tensor:
        """Logits ``[B, K]`` of the code at ``place``."""
        if not self._both:
            return self._decoder.advance(codes).float()
        logits = self._decoder.advance(None if codes is None else codes.repeat(2)).float()
        conditional, unconditional = logits.chunk(2)
        return guided(conditional, unconditional, float(self._weights[place]))


def _check(
    model: TokenGenerator, class_ids: Tensor, sampling: Sampling, forced: Tensor | None, keep_prob: float
) -> None:
    check_classes(class_ids, model.config.num_classes + 1)
    wrong = (
        f"temperature {sampling.temperature} is negative" if sampling.temperature < 0
        else f"top_p {sampling.top_p} is not in (0, 1]" if not 0 < sampling.top_p <= 1
        else f"top_k {sampling.top_k} is negative" if sampling.top_k < 0
        else f"keep_prob {keep_prob} is not in [0, 1]" if not 0 <= keep_prob <= 1
        else "keep_prob needs forced_tokens" if keep_prob and forced is None
        else f"{len(forced)} forced images for {len(class_ids)} classes"
        if forced is not None and len(forced) != len(class_ids)
        else ""
    )  # fmt: skip
    if wrong:
        raise MmpostError("MMP-C106", f"sampling: {wrong}.", "Correct the option")
    if forced is not None:
        check_codes(forced, model.config.layout)
