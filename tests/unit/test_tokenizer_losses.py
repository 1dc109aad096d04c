"""Laws of the training losses and the discriminators of tokenizers."""

import math

import pytest
import torch

from mmpost.core.errors import MmpostError
from mmpost_tokenizers import losses
from mmpost_tokenizers.discriminators import DinoDiscriminator, PatchGAN, augment


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_reconstruction_by_hand():
    output, target = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 1.0]])
    assert losses.reconstruction_loss(output, target, "l2") == 2.5
    assert losses.reconstruction_loss(output, target, "l1") == 1.5


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    # relu(1 - 2) = 0, relu(1 - 0.5) = 0.5; relu(1 - 3) = 0, relu(1 + 1) = 2.
    assert losses.hinge_discriminator(real, fake) == pytest.approx(0.5 * (0.25 + 1.0))
    assert losses.hinge_generator(fake) == 1.0


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    likelihood, adversarial = 3 * weight.sum(), (weight * torch.tensor([0.0, 0.5])).sum()
    found = losses.adaptive_weight(likelihood, adversarial, weight)
    assert found.item() == pytest.approx(3 * math.sqrt(2) / (0.5 + 1e-4), rel=1e-6)
    assert not found.requires_grad
    assert weight.grad is None
    # No gradient of the adversary at all: the limit, not infinity.
    assert losses.adaptive_weight(1e6 * weight.sum(), 0 * weight.sum(), weight) == 1e4


def test_lecam_pulls_towards_running_means():
    lecam = losses.LeCam(decay=0.5)
    lecam.update(torch.tensor([2.0]), torch.tensor([-4.0]))
    assert (lecam.real.item(), lecam.fake.item()) == (1.0, -2.0)
    # relu(0 - (-2))^2 = 4; relu(1 - 0.5)^2 = 0.25.
    assert lecam(torch.tensor([0.0]), torch.tensor([0.5])).item() == pytest.approx(4.25)
    assert lecam(torch.tensor([-2.0]), torch.tensor([1.0])) == 0
    assert losses.LeCam().decay == 0.999


def test_binary_entropy_loss_has_its_extremes():
    half, sure = torch.full((8, 4), 0.5), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert losses.binary_entropy_loss(half).item() == pytest.approx(0.0, abs=1e-6)
    # Certain tokens, an even batch: the least value, minus the number of bits times ln 2.
    assert losses.binary_entropy_loss(sure).item() == pytest.approx(-2 * math.log(2))


def test_semantic_loss_is_ln_batch_for_empty_features_and_falls_for_matching_ones():
    tokens = noise(4, 2, 2, 8)
    assert losses.semantic_loss(tokens, torch.zeros(4, 8)).item() == pytest.approx(math.log(4))
    pooled = tokens.mean((1, 2))
    right = losses.semantic_loss(tokens, pooled, scale=10, normalise=True)
    wrong = losses.semantic_loss(tokens, pooled.roll(1, 0), scale=10, normalise=True)
    assert right < math.log(4) < wrong


def test_semantic_loss_is_symmetric_in_its_sides():
    tokens, features = noise(3, 1, 1, 5), noise(3, 5, seed=1)
    swapped = losses.semantic_loss(features[:, None, None], tokens.flatten(1))
    assert losses.semantic_loss(tokens, features).item() == pytest.approx(swapped.item(), rel=1e-5)


def test_feature_loss_is_a_distance_with_gradient_and_no_training():
    measure = losses.DeepFeatureLoss()
    image = noise(2, 3, 16, 16).clamp(-1, 1)
    assert measure(image, image) == 0
    small, large = measure(image + 0.05 * noise(2, 3, 16, 16, seed=1), image), measure(-image, image)
    assert 0 < small < large
    other = image.clone().requires_grad_()
    measure(other, -image).backward()
    assert other.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in measure.parameters())
    assert measure.name == "features"
    # Same weights in every run, whatever the global stream is.
    torch.manual_seed(123)
    assert torch.equal(losses.DeepFeatureLoss().stages[0].weight, measure.stages[0].weight)


def test_lpips_without_its_weights_is_refused(tmp_path):
    with pytest.raises(MmpostError) as caught:
        losses.LPIPSLoss(tmp_path / "vgg.pth")
    assert str(caught.value) == (
        f"losses.perceptual is lpips, but there is no file '{tmp_path / 'vgg.pth'}' with the VGG16 trunk. "
        "Set losses.perceptual_weights to vgg16-397923af.pth, or losses.perceptual=features. [MMP-C112]"
    )


def test_lpips_takes_the_trunk_of_a_file(tmp_path, monkeypatch):
    import torchvision

    torch.manual_seed(0)
    trunk = torchvision.models.vgg16(weights=None).features
    state = {f"features.{name}": value for name, value in trunk.state_dict().items()}
    torch.save(state, tmp_path / "vgg.pth")
    measure = losses.LPIPSLoss(tmp_path / "vgg.pth")
    assert torch.equal(measure.net.net.state_dict()["slice3.10.weight"], trunk[10].weight)
    image = noise(1, 3, 32, 32).clamp(-1, 1)
    assert measure(image, image) == 0
    assert measure(image, -image) > 0
    # Other weights than the published ones have another name, in every log.
    assert measure.name == f"vgg16_layout_{measure.sha256[:8]}"
    # The published file is not at hand; one whose hash begins as its does is taken for it.
    monkeypatch.setattr(losses, "VGG_TRUNK", measure.sha256[:8])
    assert losses.LPIPSLoss(tmp_path / "vgg.pth").name == "lpips"
    torch.save({"classifier.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(MmpostError, match=r"other.pth' holds no VGG16 trunk: KeyError.*MMP-C112"):
        losses.LPIPSLoss(tmp_path / "other.pth")


def test_patchgan_has_the_published_shape():
    judge = PatchGAN(64, 3)
    # LlamaGen's discriminator: 2 765 633 weights with BatchNorm.
    assert sum(weight.numel() for weight in judge.parameters()) == 2_764_737 + 896
    assert PatchGAN(8, 3)(noise(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    small = PatchGAN(8, 2, "group")
    assert small(noise(1, 3, small.smallest_side, small.smallest_side)).numel() >= 1


def test_dino_discriminator_judges_tokens_of_five_depths():
    judge = DinoDiscriminator(model="vit_tiny_patch16_224", pretrained=False)
    images = noise(2, 3, 32, 32).clamp(-1, 1).requires_grad_()
    logits = judge(images)
    # Input tokens and four depths, 14 x 14 patches each.
    assert logits.shape == (2, 5 * 196)
    logits.mean().backward()
    assert images.grad.abs().sum() > 0
    judge.train()
    assert not judge.trunk.training
    assert not any(weight.requires_grad for weight in judge.trunk.parameters())
    assert all(weight.requires_grad for weight in judge.heads.parameters())


def test_augmentation_is_drawn_from_its_generator_and_cuts_squares():
    images = torch.ones(4, 3, 20, 20)
    first = augment(images, torch.Generator().manual_seed(1))
    assert torch.equal(first, augment(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(2)))
    # A white image stays flat except where it was cut or where nothing moved in.
    holes = (first == 0).all(1).flatten(1).sum(1)
    assert (holes > 0).all()
    assert augment(images, torch.Generator().manual_seed(1), cutout=0).ne(0).float().mean() > first.ne(0).float().mean()
