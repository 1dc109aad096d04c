"""The ViT tokenizer: published sizes, grids, prefixes, and what a latent token may see."""

import re

import pytest
import torch

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.quantizers.configs import VQConfig
from mmpost_tokenizers.vit import ViTConfig, ViTTokenizer

VQ = VQConfig(codebook_size=32, dim=4)


def small(**options):
    shape = {"image_size": 32, "quantizer": VQ, "shape": (16, 1, 2), "patch_size": 8, "num_latent_tokens": 4}
    torch.manual_seed(0)
    return ViTTokenizer(ViTConfig(**{**shape, **options})).eval()


# RobusTok is counted without its DINOv2 for the semantic loss.
@pytest.mark.parametrize(
    ("config", "grid", "millions"),
    [
        (ViTConfig.robustok(), (16, 16), 172),
        (ViTConfig.titok(), (32,), 641),
        (ViTConfig.titok(encoder="base", decoder="base", num_latent_tokens=64), (64,), 205),
        (ViTConfig.titok(encoder="small", decoder="large", num_latent_tokens=256, two_stage=False), (256,), 330),
    ],
)
def test_published_sizes(config, grid, millions):
    with torch.device("meta"):
        tokenizer = ViTTokenizer(config)
    assert tokenizer.grid == grid
    assert round(sum(parameter.numel() for parameter in tokenizer.parameters()) / 1e6) == millions


@pytest.mark.parametrize("positions", ["learned", "shared"])
@pytest.mark.parametrize("pixels", ["linear", "linear_conv"])
def test_shapes(positions, pixels):
    tokenizer = small(positions=positions, pixels=pixels)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert tokenizer.grid == ((2, 2) if positions == "shared" else (4,))
    assert tokenizer.tokenize(images).shape == (2, *tokenizer.grid)
    assert tokenizer.reconstruct(images).shape == images.shape


@pytest.mark.parametrize(
    ("backbone", "prefix"),
    [("vit_small_patch16_224", 1), ("vit_small_patch14_reg4_dinov2", 5), ("vit_medium_patch16_gap_256", 0)],
)
@pytest.mark.parametrize("positions", ["learned", "shared"])
def test_any_plain_vit_will_do(backbone, prefix, positions):
    tokenizer = small(backbone=backbone, positions=positions)
    assert tokenizer.encoder.num_prefix == prefix
    assert tokenizer.reconstruct(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_latent_grid_may_be_coarser_than_the_patches():
    tokenizer = small(positions="shared", num_latent_tokens=9)
    assert tokenizer.grid == (3, 3)
    assert tokenizer.reconstruct(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_two_backbones_of_two_sizes():
    tokenizer = small(decoder_backbone="vit_tiny_patch16_224", decoder_shape=(24, 2, 3))
    assert (tokenizer.encoder.width, tokenizer.decoder.width) == (16, 24)
    assert tokenizer.reconstruct(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_patches_of_the_decoder_are_laid_out_as_images():
    tokenizer = small()
    head = tokenizer.to_pixels
    tokens = torch.randn(1, 16, 16)
    rows, columns, colours = torch.meshgrid(torch.arange(8), torch.arange(8), torch.arange(3), indexing="ij")
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_((rows * 100 + columns * 10 + colours).flatten())
        images = head(tokens)
    assert images[0, :, 8 + 5, 16 + 3].tolist() == [530, 531, 532]


def test_range_of_pixels():
    plain, unit = small(), small(unit_range=True)
    unit.load_state_dict(plain.state_dict())
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(unit.encode(images), plain.encode((images + 1) / 2))
    latents = plain.encode(images)
    assert torch.equal(unit.decode(latents), plain.decode(latents) * 2 - 1)


def test_interleaved_latents_only_reorder_numbers():
    plain, scrambled = small(), small(interleaved_latents=True)
    scrambled.load_state_dict(plain.state_dict())
    outputs = {}
    for name, tokenizer in (("plain", plain), ("scrambled", scrambled)):
        tokenizer.quant_conv = torch.nn.Identity()
        outputs[name] = tokenizer.features(torch.ones(1, 3, 32, 32))[0]
    assert torch.equal(outputs["scrambled"], outputs["plain"].reshape(16, 4).T)


def test_pretrained_weights_that_cannot_be_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    tokenizer = small(backbone="vit_tiny_patch16_224", shape=None)
    with pytest.raises(MmpostError, match="no pretrained weights for 'vit_tiny_patch16_224': ") as caught:
        tokenizer.load_backbones()
    assert caught.value.code == "MMP-E075"


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ({"backbone": "vit_enormous"}, "MMP-C078", "has no model 'vit_enormous'."),
        ({"backbone": "resnet18", "shape": None}, "MMP-C078", "'resnet18' is "),
        ({"positions": "shared", "num_latent_tokens": 5}, "MMP-C071", "num_latent_tokens=5 is not a square number"),
        ({"image_size": 30}, "MMP-C071", "tokenizer 'vit': image_size=30 is not a multiple of patch_size."),
        ({"pixels": "maskgit"}, "MMP-C071", "patch_size=8 is not 16, as maskgit needs."),
    ],
)
def test_shapes_that_do_not_fit(options, code, text):
    with pytest.raises(MmpostError, match=re.escape(text)) as caught:
        small(**options)
    assert caught.value.code == code
