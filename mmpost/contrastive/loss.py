r"""Contrastive losses that know the order of two sounds.

With unit vectors z, scales s and T(x) the scene x with its sounds in the other order, for the sound of scene i

    L_a(i) = -log e^{s z_a(i).z_t(i)} / ( sum_j e^{s z_a(i).z_t(j)} + alpha_same e^{s z_a(i).z_T(t)(i)}
                                          + alpha_cross sum_{j!=i} e^{s z_a(i).z_T(t)(j)} )

and L_t(i) with sound and text exchanged, and a scale of its own. The loss is the mean over i of (L_a + L_t) / 2, plus
beta times the same for the reversed scenes as positives of their own. With all three at 0 it is CLAP's symmetric
InfoNCE.

Source: the temporal extension of InfoNCE in "Test of Time: Instilling Video-Language Models with a Sense of Time",
arXiv 2301.02074, which TeminAL (arXiv 2408.09269) carries over to sound.
Differs: TeminAL publishes neither code nor its constants, so this is the family's loss and not claimed to be TeminAL's
own weighting; 1, 1, 1 are our defaults. Captions that are true of a sound are left out of its negatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# 1 / temperature of the two directions: sounds that ask captions, captions that ask sounds.
Scales = tuple[Tensor | float, Tensor | float]


@dataclass(frozen=True, slots=True)
class Weights:
    """How much reversed scenes count.

    Attributes:
        alpha_same: A scene's own reverse as a negative, at least 0.
        alpha_cross: The reverses of the other scenes as negatives, at least 0.
        beta: The reversed scenes as positives of their own, at least 0.
    """

    alpha_same: float = 1.0
    alpha_cross: float = 1.0
    beta: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether reversed scenes count for nothing."""
        return not (self.alpha_same or self.alpha_cross or self.beta)


@dataclass(frozen=True, slots=True)
class Embedded:
    """Unit vectors of the scenes of a batch.

    Attributes:
        audio: float ``[B, D]``.
        text: float ``[B, D]``, of the captions in the same order.
    """

    audio: Tensor
    text: Tensor


@dataclass(frozen=True, slots=True)
class True_:  # noqa: N801 - ``True`` is taken
    """Which captions are true of which sounds, bool ``[B, B]`` each.

    Attributes:
        plain: Captions of the scenes, of the scenes (reversed ones of reversed ones likewise).
        crossed: Captions of reversed scenes, of the scenes: true for scenes without an order.
    """

    plain: Tensor
    crossed: Tensor


def temporal_nce(forward: Embedded, reverse: Embedded | None, scales: Scales, true: True_, weights: Weights) -> Tensor:
    """The loss of a batch.

    Args:
        forward: The scenes.
        reverse: The same scenes reversed; None only where ``weights.plain``.
        scales: s of L_a and of L_t.
        true: Which pairs are no negatives.
        weights: Of the reversed scenes.

    Returns:
        Scalar, in nats.
    """
    loss = _one_way(forward, reverse, scales, true, weights)
    if weights.beta:
        assert reverse is not None
        # Whether a reversed caption is true of a reversed sound is the same as without reversing both.
        turned = True_(true.plain, true.crossed)
        loss = loss + weights.beta * _one_way(reverse, forward, scales, turned, weights)
    return loss


def _one_way(forward: Embedded, reverse: Embedded | None, scales: Scales, true: True_, weights: Weights) -> Tensor:
    """Mean of (L_a + L_t) / 2."""
    other = reverse if weights.alpha_same or weights.alpha_cross else None
    audio = _half(
        forward.audio, forward.text, other.text if other else None, scales[0], true.plain, true.crossed, weights
    )
    # For a caption the sounds are asked: the tables are read along the other axis.
    text = _half(
        forward.text, forward.audio, other.audio if other else None, scales[1], true.plain.T, true.crossed.T, weights
    )
    return (audio + text) / 2


def _half(
    query: Tensor,
    keys: Tensor,
    turned: Tensor | None,
    scale: Tensor | float,
    plain: Tensor,
    crossed: Tensor,
    weights: Weights,
) -> Tensor:
    """Mean over i of -log of the share of the own key, of all keys and the weighted keys of reversed scenes."""
    count = len(query)
    own = torch.eye(count, dtype=torch.bool, device=query.device)
    logits = scale * query @ keys.T
    shares = [logits.masked_fill(plain & ~own, -torch.inf)]
    if turned is not None:
        alpha = torch.where(own, weights.alpha_same, weights.alpha_cross).to(logits)
        shares.append((scale * query @ turned.T + alpha.log()).masked_fill(crossed, -torch.inf))
    total = torch.cat(shares, dim=1).logsumexp(1)
    return (total - logits.diagonal()).mean()
