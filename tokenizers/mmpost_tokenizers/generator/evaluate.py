"""How good generated images are: Fréchet distance, precision and recall, and with Inception weights IS and KID.

Scores made with anything but the standard Inception weights are not called FID; see ``features.key_for``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from mmpost_tokenizers.base import DiscreteTokenizer
from mmpost_tokenizers.features import FeatureExtractor, extract, on_device
from mmpost_tokenizers.generator.identity import layout_of, require_same
from mmpost_tokenizers.generator.model import TokenGenerator
from mmpost_tokenizers.generator.sample import Sampling, generate
from mmpost_tokenizers.images import to_uint8
from mmpost_tokenizers.set_scores import generation_scores
from mmpost_tokenizers.statistics import Reference


def balanced_labels(count: int, classes: int) -> Tensor:
    """int64 ``[count]``: every class equally often, up to one; 50,000 of 1,000 classes give 50 of each."""
    return torch.arange(count) % classes


def generated_images(
    generator: TokenGenerator,
    tokenizer: DiscreteTokenizer,
    labels: Tensor,
    *,
    sampling: Sampling,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Batches uint8 ``[B, 3, S, S]`` on the tokenizer's device, one image per label, in order.

    Raises:
        MmpostError: MMP-C102 when generator and tokenizer do not belong together, MMP-C105 and MMP-C106 as
            ``generate``.
    """
    require_same(generator.config.layout, layout_of(tokenizer), owner="the generator", other="the tokenizer")
    device = next(tokenizer.parameters()).device
    codes = generate(generator, labels, sampling=sampling, progress=progress)
    for batch in codes.split(sampling.batch_size):
        yield to_uint8(tokenizer.detokenize(batch.to(device)))


def evaluate_generator(
    generator: TokenGenerator,
    tokenizer: DiscreteTokenizer,
    reference: Reference,
    extractor: FeatureExtractor,
    *,
    samples: int,
    sampling: Sampling,
    classify: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores of freshly drawn images of all classes.

    Args:
        generator: Trained on the tokenizer's codes.
        tokenizer: Decodes; may be post-trained.
        reference: Features of real images by the same extractor; its noise floor is the difference that means nothing.
        extractor: What makes features.
        samples: Images to draw; 50,000 for published figures, and at least twice the extractor's features.
        sampling: Guidance, temperature, cuts, seed.
        classify: uint8 images ``[B, 3, S, S]`` to class numbers ``[B]``, for the share of samples that show their
            class. Meaningful at toy scale; the classifier must not be one that training saw.
        progress: Called with images done and images in all.

    Returns:
        ``gfid`` or ``gfd``, ``precision``, ``recall`` and the rest of ``set_scores.generation_scores``;
        ``noise_floor``, ``class_accuracy`` with ``classify``, ``sampling`` and ``tokenizer_sha256``.

    Raises:
        MmpostError: MMP-C102 when generator and tokenizer do not belong together; MMP-V070 for too few images.
    """
    labels = balanced_labels(samples, generator.config.num_classes)
    scored = on_device(extractor, next(tokenizer.parameters()).device)
    right: list[Tensor] = []

    def watched() -> Iterator[Tensor]:
        done = 0
        for images in generated_images(generator, tokenizer, labels, sampling=sampling, progress=progress):
            if classify is not None:
                right.append(classify(images).cpu() == labels[done : done + len(images)])
            done += len(images)
            yield images

    features = extract(scored, watched())
    logits = cast(Any, extractor).logits(features) if extractor.is_inception else None
    results: dict[str, Any] = generation_scores(
        reference.features, features, extractor, fake_logits=logits, seed=sampling.seed
    )
    results["noise_floor"] = reference.noise_floor
    if classify is not None:
        results["class_accuracy"] = float(torch.cat(right).double().mean())
    results["sampling"] = asdict(sampling)
    results["tokenizer_sha256"] = generator.config.layout.tokenizer_sha256
    return results
