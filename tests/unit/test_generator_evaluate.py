"""Scores of a generator: names, class balance, and which images they are made of."""

import json
import math

import numpy as np
import pytest
import torch

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.cnn import CNNConfig, CNNTokenizer
from mmpost_tokenizers.frechet import Moments, frechet_distance
from mmpost_tokenizers.generator.evaluate import balanced_labels, evaluate_generator, generated_images
from mmpost_tokenizers.generator.identity import layout_of
from mmpost_tokenizers.generator.model import ClassConditionalGenerator, GeneratorConfig
from mmpost_tokenizers.generator.sample import Guidance, Sampling, generate
from mmpost_tokenizers.images import Cutting, images_from_arrays, to_uint8
from mmpost_tokenizers.quantizers.configs import VQConfig
from mmpost_tokenizers.set_scores import precision_recall
from mmpost_tokenizers.statistics import reference_of

SAMPLING = Sampling(guidance=Guidance(1.5), seed=2, batch_size=8)


class Colours:
    """Mean and spread of each channel, with logits of their own."""

    name, dim, sha256 = "colours", 6, "0" * 64

    def __init__(self, *, is_inception=False):
        self.is_inception = is_inception

    def __call__(self, images):
        pixels = images.flatten(2).float() / 255
        return torch.cat([pixels.mean(2), pixels.std(2)], 1)

    def logits(self, features):
        return features * 5


@pytest.fixture(scope="module")
def parts():
    torch.set_num_threads(1)
    config = CNNConfig(
        image_size=8, quantizer=VQConfig(codebook_size=16, dim=4), block_out_channels=(8,), layers_per_block=1,
        z_channels=8, stem_patch=4, norm_groups=4, lowest_attention=False, mid_attention=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = CNNTokenizer(config).eval()
    generator = ClassConditionalGenerator(GeneratorConfig(layout_of(tokenizer), 3, "test"), seed=1).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    return tokenizer, generator, images_from_arrays(pixels, cutting=Cutting(8))


def keys_of(value):
    if isinstance(value, dict):
        return [key for name, inner in value.items() for key in (name, *keys_of(inner))]
    return []


def test_labels_are_balanced():
    assert torch.bincount(balanced_labels(50_000, 1000)).unique().tolist() == [50]
    assert torch.bincount(balanced_labels(11, 3)).tolist() == [4, 4, 3]


def test_scores_are_those_of_the_sampled_images(parts):
    tokenizer, generator, real = parts
    extractor = Colours()
    reference = reference_of(real, extractor)
    results = evaluate_generator(generator, tokenizer, reference, extractor, samples=30, sampling=SAMPLING)
    codes = generate(generator, torch.arange(30) % 3, sampling=SAMPLING)
    features = extractor(to_uint8(tokenizer.detokenize(codes)))
    expected = frechet_distance(reference.moments, Moments.of(features))
    # Convolutions of another batch size round differently, and a rounded pixel may differ by one.
    assert results["gfd"] == pytest.approx(expected, rel=1e-3)
    assert (results["precision"], results["recall"]) == pytest.approx(
        precision_recall(reference.features, features), abs=0.05
    )
    assert results["noise_floor"] == reference.noise_floor
    assert results["images"] == 30
    assert results["sampling"]["guidance"] == {"scale": 1.5, "kind": "constant", "power": 1.0}
    assert results["tokenizer_sha256"] == layout_of(tokenizer).tokenizer_sha256
    assert json.loads(json.dumps(results))["gfd"] == results["gfd"]


def test_only_inception_may_be_called_fid(parts):
    tokenizer, generator, real = parts
    reference = reference_of(real, Colours())
    plain = evaluate_generator(generator, tokenizer, reference, Colours(), samples=30, sampling=SAMPLING)
    assert [key for key in keys_of(plain) if "fid" in key.lower() or "inception_score" in key] == []
    named = evaluate_generator(
        generator, tokenizer, reference, Colours(is_inception=True), samples=30, sampling=SAMPLING
    )
    assert named["gfid"] == plain["gfd"]
    assert "gfd" not in named
    assert named["inception_score"] >= 1


def test_class_accuracy_compares_with_the_class_that_was_asked_for(parts):
    tokenizer, generator, real = parts
    reference = reference_of(real, Colours())
    asked = iter(torch.arange(30).split(8))

    def classify(images):
        # Right for every image but the fifth of each batch.
        answer = next(asked) % 3
        answer[4:5] = (answer[4:5] + 1) % 3
        assert images.dtype == torch.uint8
        assert len(images) == len(answer)
        return answer

    results = evaluate_generator(
        generator, tokenizer, reference, Colours(), samples=30, sampling=SAMPLING, classify=classify
    )
    assert results["class_accuracy"] == pytest.approx(26 / 30)


def test_images_of_another_tokenizer_are_refused(parts):
    tokenizer, generator, _ = parts
    layout = layout_of(tokenizer)
    stranger = ClassConditionalGenerator(
        GeneratorConfig(type(layout)(16, 1, (2, 2), "f" * 64), num_classes=3, size="test")
    )
    with pytest.raises(MmpostError, match=r"the generator and the tokenizer do not belong together.*MMP-C102"):
        next(generated_images(stranger, tokenizer, torch.arange(3), sampling=SAMPLING))
    post_trained = type(tokenizer)(tokenizer.config)
    post_trained.load_state_dict(tokenizer.state_dict())
    with torch.no_grad():
        post_trained.last_layer.mul_(1.1)
    batches = list(generated_images(generator, post_trained, torch.arange(10) % 3, sampling=SAMPLING))
    assert [len(batch) for batch in batches] == [8, 2]
    assert math.prod(batches[0].shape[1:]) == 3 * 8 * 8
