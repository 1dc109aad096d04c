"""Feature extractors: names that do not lie, weights from files, determinism."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.features import (
    FeatureExtractor,
    LayeredExtractor,
    describe,
    extract,
    key_for,
    open_extractor,
    title_for,
)
from mmpost_tokenizers.toy_features import ClassifierFeatures, RandomConvFeatures


@pytest.fixture(scope="module")
def digits():
    """uint8 images [N, 3, 8, 8] and labels."""
    bunch = load_digits()
    pixels = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))
    return pixels[:, None].expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(bunch.target)


@pytest.fixture(scope="module")
def classifier(digits):
    return ClassifierFeatures.fit(digits[0][:1200], digits[1][:1200], source="digits", seed=3, steps=120)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random tensors under the names of the published file, without the counters that it may lack."""
    from mmpost_tokenizers.inception import fid_network

    draw = torch.Generator().manual_seed(1)
    weights = {}
    for name, value in fid_network().state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        scale = (2 / max(1, value[0].numel())) ** 0.5 if value.ndim > 1 else 0.1
        noise = torch.randn(value.shape, generator=draw) * scale
        weights[name] = noise.abs() + 0.5 if name.endswith("running_var") else noise
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(weights, path)
    return path


def images(n, side, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_only_inception_may_be_called_fid(classifier):
    class Inception:
        name, dim, is_inception, sha256 = "inception-v3-2015-12-05", 2048, True, "6726825d" + "0" * 56

        def __call__(self, images):
            return images

    assert [key_for(prefix, Inception()) for prefix in ("r", "p", "g", "")] == ["rfid", "pfid", "gfid", "fid"]
    assert title_for("r", Inception()) == "rFID"
    for other in (classifier, RandomConvFeatures()):
        keys = [key_for(prefix, other) for prefix in ("r", "p", "g", "")]
        assert keys == ["rfd", "pfd", "gfd", "fd"]
        assert "fid" not in " ".join([*keys, title_for("r", other), other.name, *describe(other)]).lower()
    assert title_for("p", classifier) == "pFD[digits-cnn32-seed3]"


def test_extractors_meet_the_protocols(classifier):
    for extractor in (classifier, RandomConvFeatures(dim=20)):
        assert isinstance(extractor, FeatureExtractor)
        assert isinstance(extractor, LayeredExtractor)
        assert extractor(images(2, 16)).shape == (2, extractor.dim)
        assert len(extractor.sha256) == 64


def test_classifier_is_good_and_a_function_of_its_seed(digits, classifier):
    assert classifier.facts["accuracy"] > 0.9
    held_out = (classifier.classify(digits[0][1200:]) == digits[1][1200:]).float().mean()
    assert held_out > 0.85
    first, again, other = (
        ClassifierFeatures.fit(digits[0][:100], digits[1][:100], source="digits", seed=seed, steps=3)
        for seed in (1, 1, 2)
    )
    assert first.sha256 == again.sha256 != other.sha256
    assert describe(classifier)["accuracy"] == classifier.facts["accuracy"]


def test_classifier_file_gives_the_same_extractor(classifier, tmp_path):
    classifier.save(tmp_path / "digits.safetensors")
    loaded = open_extractor(str(tmp_path / "digits.safetensors"))
    assert describe(loaded) == describe(classifier)
    assert torch.equal(loaded(images(4, 8)), classifier(images(4, 8)))


def test_features_do_not_depend_on_the_batch(classifier):
    pictures = images(7, 8)
    torch.testing.assert_close(extract(classifier, pictures.split(3)), classifier(pictures))
    with pytest.raises(MmpostError, match="no images to evaluate on"):
        extract(classifier, [])


def test_too_little_to_learn_from_is_said():
    with pytest.raises(MmpostError) as caught:
        ClassifierFeatures.fit(images(12, 8), [0] * 12, source="x", seed=0)
    assert str(caught.value) == (
        "a classifier cannot be trained on 12 images of 1 classes. Give at least 10 labelled images of two classes, "
        "or take another feature extractor [MMP-V075]"
    )


def test_inception_from_a_file(inception_file, monkeypatch):
    from mmpost_tokenizers.inception import InceptionFeatures

    monkeypatch.setenv("MMPOST_FEATURE_WEIGHTS", str(inception_file))
    extractor = open_extractor("auto")
    # Weights in the right layout are not the weights of FID.
    assert not extractor.is_inception
    assert extractor.name == f"inception-v3-layout-{extractor.sha256[:8]}"
    weights = torch.load(inception_file, weights_only=True)
    official = InceptionFeatures(weights, sha256=extractor.sha256, official=(extractor.sha256[:8],))
    assert key_for("r", official) == "rfid"
    assert official.name == "inception-v3-2015-12-05"
    pictures = images(1, 32)
    features = extractor(pictures)
    assert features.shape == (1, 2048)
    assert bool(torch.isfinite(features).all())
    torch.testing.assert_close(extractor.logits(features), features @ weights["fc.weight"].T)


def test_inception_pools_as_the_network_of_fid_does():
    from mmpost_tokenizers.inception import fid_network

    net = fid_network().eval()
    ones = torch.ones(1, 192, 5, 5)
    block = net.Mixed_5b
    # A mean that counted the padding would be smaller than 1 at the border.
    torch.testing.assert_close(block._forward(ones)[-1], block.branch_pool(ones))
    last, noise = net.Mixed_7c, torch.randn(1, 2048, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(last._forward(noise)[-1], last.branch_pool(F.max_pool2d(noise, 3, 1, 1)))
    assert net.fc.out_features == 1008
    assert not any(name.startswith("AuxLogits") for name in net.state_dict())


def test_resize_reads_corners_of_pixels():
    from mmpost_tokenizers.inception import tf1_resize

    row = torch.tensor([0.0, 10.0, 20.0, 30.0]).expand(1, 1, 4, 4)
    # Output i reads input i / 2: 0, .5, 1, 1.5 ...; behind the last pixel it stays.
    wanted = torch.tensor([0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 30.0])
    torch.testing.assert_close(tf1_resize(row, 8)[0, 0, 3], wanted)
    assert torch.equal(tf1_resize(row, 4), row)


def test_mobilenet_from_a_file(tmp_path):
    from torchvision.models import mobilenet_v2

    torch.save(mobilenet_v2().state_dict(), tmp_path / "mobilenet.pth")
    extractor = open_extractor(str(tmp_path / "mobilenet.pth"))
    assert extractor.name == f"mobilenetv2-{extractor.sha256[:8]}"
    assert extractor(images(1, 40)).shape == (1, 96)
    assert [feature_map.shape[1] for feature_map in extractor.layers(images(1, 40))] == [16, 24, 32, 96, 1280]


def test_weights_that_do_not_fit_are_named(tmp_path, monkeypatch, inception_file):
    weights = torch.load(inception_file, weights_only=True)
    weights["extra"] = weights.pop("fc.bias")
    weights["fc.weight"] = weights["fc.weight"][:1000]
    torch.save(weights, tmp_path / "wrong.pth")
    with pytest.raises(MmpostError) as caught:
        open_extractor(str(tmp_path / "wrong.pth"))
    assert str(caught.value) == (
        "Inception-v3 weights: tensors do not fit: 1 missing (fc.bias); 1 unknown (extra); 1 of another shape "
        "(fc.weight). Give another file [MMP-V074]"
    )
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(MmpostError, match="it cannot be read"):
        open_extractor(str(tmp_path / "text.pth"))
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(MmpostError, match="those of neither Inception-v3 nor MobileNetV2"):
        open_extractor(str(tmp_path / "other.pth"))
    monkeypatch.delenv("MMPOST_FEATURE_WEIGHTS", raising=False)
    with pytest.raises(MmpostError, match="MMPOST_FEATURE_WEIGHTS is not set") as caught:
        open_extractor()
    assert caught.value.code == "MMP-V073"
