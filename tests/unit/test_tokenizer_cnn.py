"""The CNN tokenizer: published sizes, cheap stems, and that VQ does not fall into diffusers' traps."""

import re

import pytest
import torch
from diffusers import VQModel
from torch.nn import functional

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.cnn import CNNConfig, CNNTokenizer
from mmpost_tokenizers.quantizers.configs import VQConfig

VQ = VQConfig(codebook_size=32, dim=4, l2_norm=False)


def small(**options):
    shape = {"image_size": 16, "quantizer": VQ, "block_out_channels": (8, 16), "layers_per_block": 1, "z_channels": 8}
    torch.manual_seed(0)
    return CNNTokenizer(CNNConfig(**{**shape, "norm_groups": 4, **options}))


@pytest.mark.parametrize(("downsample", "side"), [(16, 16), (8, 32)])
def test_published_sizes(downsample, side):
    with torch.device("meta"):
        tokenizer = CNNTokenizer(CNNConfig.llamagen(downsample=downsample))
    assert tokenizer.grid == (side, side)
    assert (tokenizer.codebook_size, tokenizer.quantizer.dim, tokenizer.quantizer.l2_norm) == (16384, 8, True)
    millions = sum(parameter.numel() for parameter in tokenizer.parameters()) / 1e6
    assert round(millions) == {16: 72, 8: 70}[downsample]


def test_attention_stands_after_each_block_of_the_lowest_level():
    names = dict(small(block_out_channels=(8, 8, 16), layers_per_block=2, image_size=16).named_modules())
    encoder = {name.split(".to_q")[0] for name in names if name.startswith("encoder") and name.endswith("to_q")}
    decoder = {name.split(".to_q")[0] for name in names if name.startswith("decoder") and name.endswith("to_q")}
    assert encoder == {
        "encoder.down_blocks.2.attentions.0",
        "encoder.down_blocks.2.attentions.1",
        "encoder.mid_block.attentions.0",
    }
    assert decoder == {"decoder.mid_block.attentions.0", *(f"decoder.up_blocks.0.attentions.{n}" for n in range(3))}
    bare = small(lowest_attention=False, mid_attention=False)
    assert not any(name.endswith("to_q") for name, _ in bare.named_modules())


@pytest.mark.parametrize(("stem", "grid"), [(1, (8, 8)), (2, (4, 4)), (4, (2, 2))])
def test_stem_patches(stem, grid):
    tokenizer = small(stem_patch=stem)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert tokenizer.grid == grid
    assert tokenizer.tokenize(images).shape == (2, *grid)
    assert tokenizer.reconstruct(images).shape == images.shape
    assert tokenizer.last_layer.shape[0] == 3 * stem * stem


def test_a_stem_keeps_pixels_where_they_are():
    """An image of which one quarter is changed changes only tokens that can see that quarter."""
    tokenizer = small(stem_patch=2, lowest_attention=False, mid_attention=False, image_size=64)
    # GroupNorm looks at the whole image; without it only convolutions are left.
    for module in tokenizer.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    images = torch.rand(1, 3, 64, 64)
    changed = images.clone()
    changed[..., :8, :8] += 1
    moved = (tokenizer.encode(images) - tokenizer.encode(changed)).abs().sum(-1)[0]
    assert moved[0, 0] > 1e-3
    # Convolutions of other sizes of work may round differently.
    assert moved[10:, :].max() < 1e-6
    assert moved[:, 10:].max() < 1e-6


def test_agrees_with_diffusers_around_a_non_code():
    """``VQModel.decode`` snaps a latent to a code unless it is told not to; ours never does."""
    torch.manual_seed(0)
    reference = VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        vq_embed_dim=4,
        num_vq_embeddings=32,
    ).eval()
    tokenizer = small().eval()
    for part in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        getattr(tokenizer, part).load_state_dict(getattr(reference, part).state_dict())
    tokenizer.quantizer.weight.data.copy_(reference.quantize.embedding.weight)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z = tokenizer.encode(images)
        maps = reference.encode(images).latents
        assert torch.equal(z.permute(0, 3, 1, 2), maps)
        between = z + 0.1
        maps = between.permute(0, 3, 1, 2)
        torch.testing.assert_close(
            tokenizer.decode(between), reference.decode(maps, force_not_quantize=True).sample, atol=1e-5, rtol=1e-5
        )
        assert not torch.allclose(tokenizer.decode(between), reference.decode(maps).sample, atol=1e-3)
        codes, loss, (_, _, indices) = reference.quantize(reference.encode(images).latents)
        outcome = tokenizer.quantize(z)
        assert torch.equal(outcome.indices.flatten(), indices)
        # legacy=True multiplies the term of the codes by beta; ours multiplies the commitment.
        assert reference.quantize.legacy
        error = functional.mse_loss(codes, maps - 0.1)
        torch.testing.assert_close(loss, 1.25 * error, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(outcome.losses["commit"], 0.25 * error, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(outcome.losses["vq"], error, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"norm_groups": 5}, "tokenizer 'cnn': norm_groups=5 does not divide [8, 16]."),
        ({"image_size": 20, "stem_patch": 4}, "image_size=20 is not a multiple of 8, a token's side."),
    ],
)
def test_shapes_that_do_not_fit(options, text):
    with pytest.raises(MmpostError, match=re.escape(text)) as caught:
        small(**options)
    assert caught.value.code == "MMP-C071"
