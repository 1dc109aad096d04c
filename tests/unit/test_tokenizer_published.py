"""Published layouts, written down here a second time from the released code, and their forward passes.

Files are made from random weights. ``*_shapes`` give the published name and shape of every tensor; ``*_forward``
compute the published reconstruction from such a table with plain functions and none of our classes.
"""

import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.cnn import CNNConfig, CNNTokenizer
from mmpost_tokenizers.published import llamagen, robustok, titok
from mmpost_tokenizers.quantizers.configs import VQConfig
from mmpost_tokenizers.vit import ViTConfig, ViTTokenizer, scaled


def layer(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def filled(shapes, seed=0):
    draws = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        fan = math.prod(shape[1:]) or 1
        tensors[name] = torch.randn(shape, generator=draws) / fan**0.5
        if "norm" in name or "ln_" in name:
            tensors[name] = 1 + 0.1 * torch.randn(shape, generator=draws)
    return tensors


def published_shapes(table):
    return {name: rename.shape for name, rename in table.items()}


def sub(tensors, prefix):
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + ".")}


def conv(x, t, name, **options):
    return functional.conv2d(x, t[f"{name}.weight"], t.get(f"{name}.bias"), **options)


def group_norm(x, t, name):
    return functional.group_norm(x, 32, t[f"{name}.weight"], t[f"{name}.bias"], 1e-6)


def nearest_unit(z, codes):
    """Unit codes nearest to latents with channels last."""
    unit, codes = functional.normalize(z, dim=-1), functional.normalize(codes, dim=-1)
    return codes[(unit[..., None, :] - codes).square().sum(-1).argmin(-1)]


# -- LlamaGen ----------------------------------------------------------------------------------------------------------


def residual_shapes(name, inputs, outputs):
    shapes = layer(f"{name}.norm1", inputs) | layer(f"{name}.conv1", outputs, inputs, 3, 3)
    shapes |= layer(f"{name}.norm2", outputs) | layer(f"{name}.conv2", outputs, outputs, 3, 3)
    return shapes | (layer(f"{name}.nin_shortcut", outputs, inputs, 1, 1) if inputs != outputs else {})


def attention_shapes(name, width):
    shapes = layer(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= layer(f"{name}.{part}", width, width, 1, 1)
    return shapes


def llamagen_half(side, widths, blocks, ends):
    """Encoder or decoder; ``widths`` in the order in which levels are passed."""
    lowest = len(widths) - 1 if side == "encoder" else 0
    shapes, width = layer(f"{side}.conv_in", widths[0], ends[0], 3, 3), widths[0]
    for level, outputs in enumerate(widths):
        place = f"{side}.conv_blocks.{level}"
        for block in range(blocks):
            shapes |= residual_shapes(f"{place}.res.{block}", width, outputs)
            width = outputs
            shapes |= attention_shapes(f"{place}.attn.{block}", width) if level == lowest else {}
        if level < len(widths) - 1:
            shapes |= layer(f"{place}.{'downsample' if side == 'encoder' else 'upsample'}.conv", width, width, 3, 3)
    middle = widths[lowest]
    for index in (0, 2):
        shapes |= residual_shapes(f"{side}.mid.{index}", middle, middle)
    shapes |= attention_shapes(f"{side}.mid.1", middle) | layer(f"{side}.norm_out", width)
    return shapes | layer(f"{side}.conv_out", ends[1], width, 3, 3)


def llamagen_shapes(widths, z=256, codes=16384, dim=8):
    shapes = llamagen_half("encoder", widths, 2, (3, z)) | llamagen_half("decoder", widths[::-1], 3, (z, 3))
    shapes |= layer("quant_conv", dim, z, 1, 1) | layer("post_quant_conv", z, dim, 1, 1)
    return shapes | {"quantize.embedding.weight": (codes, dim)}


def residual(x, t):
    inner = conv(functional.silu(group_norm(x, t, "norm1")), t, "conv1", padding=1)
    inner = conv(functional.silu(group_norm(inner, t, "norm2")), t, "conv2", padding=1)
    return inner + (conv(x, t, "nin_shortcut") if "nin_shortcut.weight" in t else x)


def attention(x, t):
    normed = group_norm(x, t, "norm")
    q, k, v = (conv(normed, t, name).flatten(2) for name in "qkv")
    weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(2)
    return x + conv((v @ weights.transpose(1, 2)).view_as(x), t, "proj_out")


def middle(x, t):
    return residual(attention(residual(x, sub(t, "mid.0")), sub(t, "mid.1")), sub(t, "mid.2"))


def levels(x, t, count, blocks, lowest, change):
    for level in range(count):
        part = sub(t, f"conv_blocks.{level}")
        for block in range(blocks):
            x = residual(x, sub(part, f"res.{block}"))
            x = attention(x, sub(part, f"attn.{block}")) if level == lowest else x
        x = change(x, part) if level < count - 1 else x
    return x


def llamagen_forward(t, images, count):
    encoder, decoder = sub(t, "encoder"), sub(t, "decoder")

    def smaller(x, part):
        return conv(functional.pad(x, (0, 1, 0, 1)), part, "downsample.conv", stride=2)

    def larger(x, part):
        return conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), part, "upsample.conv", padding=1)

    x = middle(levels(conv(images, encoder, "conv_in", padding=1), encoder, count, 2, count - 1, smaller), encoder)
    x = conv(functional.silu(group_norm(x, encoder, "norm_out")), encoder, "conv_out", padding=1)
    z = conv(x, t, "quant_conv").permute(0, 2, 3, 1)
    codes = nearest_unit(z, t["quantize.embedding.weight"]).permute(0, 3, 1, 2)
    x = conv(conv(codes, t, "post_quant_conv"), decoder, "conv_in", padding=1)
    x = levels(middle(x, decoder), decoder, count, 3, 0, larger)
    return conv(functional.silu(group_norm(x, decoder, "norm_out")), decoder, "conv_out", padding=1)


SMALL_CNN = CNNConfig(
    image_size=16, quantizer=VQConfig(codebook_size=64, dim=8), block_out_channels=(32, 32, 64), z_channels=16
)


@pytest.fixture(scope="module")
def llamagen_tensors():
    return filled(llamagen_shapes((32, 32, 64), z=16, codes=64))


@pytest.mark.parametrize(
    ("downsample", "widths", "millions"),
    [(16, (128, 128, 256, 256, 512), 72), (8, (128, 256, 256, 512), 70)],
)
def test_all_tensors_of_the_published_llamagen_models(downsample, widths, millions):
    shapes = llamagen_shapes(widths)
    with torch.device("meta"):
        tokenizer = CNNTokenizer(CNNConfig.llamagen(downsample=downsample))
    assert published_shapes(llamagen.table(tokenizer)) == shapes
    assert round(sum(math.prod(shape) for shape in shapes.values()) / 1e6) == millions


@pytest.mark.parametrize("container", ["model", "ema"])
def test_llamagen_reconstructs_as_published(tmp_path, llamagen_tensors, container):
    used = {"quantize.codebook_used": torch.zeros(65536)}
    torch.save({container: llamagen_tensors | used, "steps": 1}, tmp_path / "vq.pt")
    tokenizer = llamagen.load_llamagen(tmp_path / "vq.pt", SMALL_CNN)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        expected = llamagen_forward(llamagen_tensors, images, 3)
        outcome = tokenizer.decode(tokenizer.quantize(tokenizer.encode(images)).latents)
    assert expected.std() > 0.05
    torch.testing.assert_close(outcome, expected, atol=2e-4, rtol=1e-3)


def test_opened_published_models_can_be_saved_as_ours(tmp_path, llamagen_tensors):
    save_file(llamagen_tensors, tmp_path / "vq.safetensors")
    tokenizer = llamagen.load_llamagen(tmp_path / "vq.safetensors", SMALL_CNN)
    tokenizer.save_pretrained(tmp_path / "ours")
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(CNNTokenizer.from_pretrained(tmp_path / "ours").tokenize(images), tokenizer.tokenize(images))


def test_published_names_are_in_the_message(tmp_path, llamagen_tensors):
    tensors = dict(llamagen_tensors)
    del tensors["encoder.mid.1.q.weight"]
    tensors["encoder.mid.1.query.weight"] = torch.zeros(1)
    tensors["decoder.conv_out.weight"] = torch.zeros(3, 32, 1, 1)
    torch.save({"model": tensors}, tmp_path / "vq.pt")
    with pytest.raises(MmpostError) as caught:
        llamagen.load_llamagen(tmp_path / "vq.pt", SMALL_CNN)
    assert str(caught.value) == (
        f"{tmp_path / 'vq.pt'} does not fit the model: missing encoder.mid.1.q.weight; "
        "unexpected encoder.mid.1.query.weight; of another shape decoder.conv_out.weight [3, 32, 1, 1] "
        "instead of [3, 32, 3, 3]. Check model and checkpoint. [MMP-E071]"
    )


# -- ViTs --------------------------------------------------------------------------------------------------------------


def layer_norm(x, t, name, eps):
    return functional.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def linear(x, t, name):
    weight = t[f"{name}.weight"]
    return functional.linear(x, weight.flatten(1), t[f"{name}.bias"])


def self_attention(x, qkv, heads):
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def patches_of(images, weight, bias, size):
    return functional.conv2d(images, weight, bias, stride=size).flatten(2).transpose(1, 2)


# -- TiTok -------------------------------------------------------------------------------------------------------------


def titok_half(side, width, depth, places, latents):
    shapes = {
        f"{side}.class_embedding": (1, width),
        f"{side}.positional_embedding": (places + 1, width),
        f"{side}.latent_token_positional_embedding": (latents, width),
    }
    shapes |= layer(f"{side}.ln_pre", width) | layer(f"{side}.ln_post", width)
    for block in range(depth):
        name = f"{side}.transformer.{block}"
        shapes |= layer(f"{name}.ln_1", width) | layer(f"{name}.ln_2", width)
        shapes |= {f"{name}.attn.in_proj_weight": (3 * width, width), f"{name}.attn.in_proj_bias": (3 * width,)}
        shapes |= layer(f"{name}.attn.out_proj", width, width)
        shapes |= layer(f"{name}.mlp.c_fc", 4 * width, width) | layer(f"{name}.mlp.c_proj", width, 4 * width)
    return shapes


def maskgit_shapes():
    def block(name, inputs, outputs):
        shapes = layer(f"{name}.norm1", inputs) | layer(f"{name}.norm2", outputs)
        shapes |= {f"{name}.conv1.weight": (outputs, inputs, 3, 3), f"{name}.conv2.weight": (outputs, outputs, 3, 3)}
        return shapes | ({f"{name}.nin_shortcut.weight": (outputs, outputs, 1, 1)} if inputs != outputs else {})

    shapes = layer("pixel_decoder.conv_in", 512, 256, 3, 3)
    for index in range(2):
        shapes |= block(f"pixel_decoder.mid.{index}", 512, 512)
    for level, (inputs, outputs) in enumerate([(128, 128), (256, 128), (256, 256), (512, 256), (512, 512)]):
        shapes |= block(f"pixel_decoder.up.{level}.block.0", inputs, outputs)
        shapes |= block(f"pixel_decoder.up.{level}.block.1", outputs, outputs)
        shapes |= layer(f"pixel_decoder.up.{level}.upsample_conv", outputs, outputs, 3, 3) if level else {}
    shapes |= layer("pixel_decoder.norm_out", 128) | layer("pixel_decoder.conv_out", 3, 128, 3, 3)
    return shapes | {"pixel_quantize.embedding.weight": (1024, 256)}


def titok_shapes(encoder, decoder, *, places, latents, codes, dim, two_stage):
    """``encoder`` and ``decoder``: width and depth."""
    shapes = titok_half("encoder", *encoder, places, latents) | titok_half("decoder", *decoder, places, latents)
    width = decoder[0]
    shapes |= layer("encoder.patch_embed", encoder[0], 3, 16, 16) | layer("encoder.conv_out", dim, encoder[0], 1, 1)
    shapes |= layer("decoder.decoder_embed", width, dim)
    shapes |= {"latent_tokens": (latents, encoder[0]), "decoder.mask_token": (1, 1, width)}
    shapes |= {"quantize.embedding.weight": (codes, dim)}
    if two_stage:
        shapes |= layer("decoder.ffn.0", 2 * width, width, 1, 1) | layer("decoder.ffn.2", 1024, 2 * width, 1, 1)
        return shapes | maskgit_shapes()
    return shapes | layer("decoder.ffn.0", 768, width, 1, 1) | layer("decoder.conv_out", 3, 3, 3, 3)


def titok_transformer(x, t, depth, heads):
    x = layer_norm(x, t, "ln_pre", 1e-5)
    for block in range(depth):
        part = sub(t, f"transformer.{block}")
        normed = layer_norm(x, part, "ln_1", 1e-5)
        qkv = functional.linear(normed, part["attn.in_proj_weight"], part["attn.in_proj_bias"])
        x = x + linear(self_attention(x, qkv, heads), part, "attn.out_proj")
        inner = functional.gelu(linear(layer_norm(x, part, "ln_2", 1e-5), part, "mlp.c_fc"))
        x = x + linear(inner, part, "mlp.c_proj")
    return x


def titok_encode(t, images, depth, heads, *, two_stage):
    """Latents ``[B, N, dim]`` of images in [0, 1]."""
    encoder, batch = sub(t, "encoder"), len(images)
    patches = patches_of(images, encoder["patch_embed.weight"], encoder["patch_embed.bias"], 16)
    image_side = torch.cat([encoder["class_embedding"].expand(batch, 1, -1), patches], 1)
    latents = t["latent_tokens"] + encoder["latent_token_positional_embedding"]
    x = torch.cat([image_side + encoder["positional_embedding"], latents.expand(batch, -1, -1)], 1)
    x = titok_transformer(x, encoder, depth, heads)[:, image_side.shape[1] :]
    x = layer_norm(x, encoder, "ln_post", 1e-5)
    if two_stage:  # read as if channels came first
        x = x.reshape(batch, x.shape[2], x.shape[1]).transpose(1, 2)
    return linear(x, encoder, "conv_out")


def titok_decode(t, codes, depth, heads, *, two_stage):
    """Images in [0, 1] from codes ``[B, N, dim]``."""
    decoder, batch = sub(t, "decoder"), len(codes)
    places = len(decoder["positional_embedding"]) - 1
    side = math.isqrt(places)
    masks = decoder["mask_token"].expand(batch, places, -1)
    image_side = torch.cat([decoder["class_embedding"].expand(batch, 1, -1), masks], 1)
    latents = linear(codes, decoder, "decoder_embed") + decoder["latent_token_positional_embedding"]
    x = torch.cat([image_side + decoder["positional_embedding"], latents], 1)
    x = titok_transformer(x, decoder, depth, heads)[:, 1 : 1 + places]
    x = layer_norm(x, decoder, "ln_post", 1e-5)
    if two_stage:
        chances = linear(linear(x, decoder, "ffn.0").tanh(), decoder, "ffn.2").softmax(-1)
        maps = (chances @ t["pixel_quantize.embedding.weight"]).transpose(1, 2).unflatten(2, (side, side))
        return maskgit_decode(sub(t, "pixel_decoder"), maps)
    x = linear(x, decoder, "ffn.0").unflatten(2, (16, 16, 3)).unflatten(1, (side, side))
    rows = [torch.cat(list(row.unbind(1)), dim=2) for row in x.unbind(1)]  # each [B, 16, 16 side, 3]
    return conv(torch.cat(rows, dim=1).permute(0, 3, 1, 2), decoder, "conv_out", padding=1)


def maskgit_decode(t, x):
    def block(x, t):
        inner = conv(functional.silu(group_norm(x, t, "norm1")), t, "conv1", padding=1)
        inner = conv(functional.silu(group_norm(inner, t, "norm2")), t, "conv2", padding=1)
        return inner + (conv(inner, t, "nin_shortcut") if "nin_shortcut.weight" in t else x)

    x = conv(x, t, "conv_in", padding=1)
    for name in ("mid.0", "mid.1"):
        x = block(x, sub(t, name))
    for level in (4, 3, 2, 1, 0):
        part = sub(t, f"up.{level}")
        x = block(block(x, sub(part, "block.0")), sub(part, "block.1"))
        if level:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), part, "upsample_conv", padding=1)
    return conv(functional.silu(group_norm(x, t, "norm_out")), t, "conv_out", padding=1)


@pytest.mark.parametrize(
    ("config", "encoder", "decoder", "rest"),
    [
        (ViTConfig.titok(), (1024, 24), (1024, 24), {"latents": 32, "codes": 4096, "dim": 12, "two_stage": True}),
        (
            ViTConfig.titok(encoder="small", decoder="large", num_latent_tokens=256, two_stage=False),
            (512, 8),
            (1024, 24),
            {"latents": 256, "codes": 8192, "dim": 64, "two_stage": False},
        ),
    ],
)
def test_all_tensors_of_published_titoks(config, encoder, decoder, rest):
    with torch.device("meta"):
        tokenizer = ViTTokenizer(config)
    assert published_shapes(titok.table(tokenizer)) == titok_shapes(encoder, decoder, places=256, **rest)


@pytest.mark.parametrize("two_stage", [True, False])
def test_titok_reconstructs_as_published(tmp_path, two_stage):
    quantizer = VQConfig(codebook_size=32, dim=6)
    config = scaled(
        ViTConfig.titok(two_stage=two_stage, quantizer=quantizer), shape=(32, 2, 4), image_size=32, num_latent_tokens=5
    )
    shapes = titok_shapes((32, 2), (32, 2), places=4, latents=5, codes=32, dim=6, two_stage=two_stage)
    tensors = filled(shapes)
    save_file(tensors, tmp_path / "model.safetensors")
    tokenizer = titok.load_titok(tmp_path / "model.safetensors", config)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z = titok_encode(tensors, images, 2, 4, two_stage=two_stage)
        torch.testing.assert_close(tokenizer.features(images * 2 - 1), z, atol=1e-4, rtol=1e-3)
        codes = nearest_unit(z, tensors["quantize.embedding.weight"])
        expected = titok_decode(tensors, codes, 2, 4, two_stage=two_stage)
        outcome = tokenizer.decode(tokenizer.lookup(tokenizer.tokenize(images * 2 - 1)))
    assert expected.std() > 0.01
    torch.testing.assert_close((outcome + 1) / 2, expected, atol=2e-4, rtol=1e-3)


def titok_json(**changes):
    model = {
        "codebook_size": 4096,
        "token_size": 12,
        "use_l2_norm": True,
        "commitment_cost": 0.25,
        "vit_enc_model_size": "large",
        "vit_dec_model_size": "large",
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": 32,
        "finetune_decoder": True,
    }
    return json.dumps({"model": {"vq_model": model | changes}, "dataset": {"preprocessing": {"crop_size": 256}}})


def test_published_titok_configurations(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(titok_json())
    assert titok.published_config(path) == ViTConfig.titok()
    one = {"codebook_size": 8192, "token_size": 64, "use_l2_norm": False, "finetune_decoder": False, "is_legacy": False}
    path.write_text(titok_json(**one, vit_enc_model_size="base", num_latent_tokens=128))
    assert titok.published_config(path) == ViTConfig.titok(encoder="base", num_latent_tokens=128, two_stage=False)
    for text in (titok_json(quantize_mode="vae"), titok_json(finetune_decoder=False), "{}", "{"):
        path.write_text(text)
        with pytest.raises(MmpostError, match="is not the configuration of a TiTok") as caught:
            titok.load_titok(tmp_path)
        assert caught.value.code == "MMP-E072"


# -- RobusTok ----------------------------------------------------------------------------------------------------------


def dino_shapes(side, width, depth, places):
    shapes = {f"{side}.model.cls_token": (1, 1, width), f"{side}.model.pos_embed": (1, places + 1, width)}
    for block in range(depth):
        name = f"{side}.model.blocks.{block}"
        shapes |= layer(f"{name}.norm1", width) | layer(f"{name}.norm2", width)
        shapes |= layer(f"{name}.attn.qkv", 3 * width, width) | layer(f"{name}.attn.proj", width, width)
        shapes |= {f"{name}.ls1.gamma": (width,), f"{name}.ls2.gamma": (width,)}
        shapes |= layer(f"{name}.mlp.fc1", 4 * width, width) | layer(f"{name}.mlp.fc2", width, 4 * width)
    shapes |= layer(f"{side}.model.norm", width)
    return shapes | {f"{side}.lvl_embed.weight": (2, width)}


def robustok_shapes(width=768, depth=12, places=256, latents=256, codes=4096, dim=64):
    shapes = dino_shapes("encoder", width, depth, places) | dino_shapes("decoder", width, depth, places)
    shapes |= layer("encoder.model.patch_embed.proj", width, 3, 16, 16)
    shapes |= {"encoder.latent_tokens": (1, latents, width), "decoder.mask_token": (1, 1, width)}
    shapes |= layer("decoder.to_pixel.model", 768, width)
    shapes |= layer("quant_conv", dim, width, 1, 1) | layer("post_quant_conv", width, dim, 1, 1)
    return shapes | {"quantize.embedding.weight": (codes, dim)}


def dino(x, t, depth, heads):
    for block in range(depth):
        part = sub(t, f"blocks.{block}")
        normed = layer_norm(x, part, "norm1", 1e-6)
        attended = linear(self_attention(x, linear(normed, part, "attn.qkv"), heads), part, "attn.proj")
        x = x + part["ls1.gamma"] * attended
        inner = functional.gelu(linear(layer_norm(x, part, "norm2", 1e-6), part, "mlp.fc1"))
        x = x + part["ls2.gamma"] * linear(inner, part, "mlp.fc2")
    return layer_norm(x, t, "norm", 1e-6)


def with_class_token(x, t):
    return torch.cat([t["cls_token"].expand(len(x), -1, -1), x], 1) + t["pos_embed"]


def robustok_forward(t, images, depth, heads):
    batch, encoder, decoder = len(images), sub(t, "encoder.model"), sub(t, "decoder.model")
    x = patches_of(images, encoder["patch_embed.proj.weight"], encoder["patch_embed.proj.bias"], 16)
    places = x.shape[1]
    latents = with_class_token(t["encoder.latent_tokens"].expand(batch, -1, -1), encoder)[:, 1:]
    level = t["encoder.lvl_embed.weight"]
    x = torch.cat([with_class_token(x, encoder) + level[0], latents + level[1]], 1)
    z = linear(dino(x, encoder, depth, heads)[:, -latents.shape[1] :], t, "quant_conv")
    codes = linear(nearest_unit(z, t["quantize.embedding.weight"]), t, "post_quant_conv")
    level = t["decoder.lvl_embed.weight"]
    masks = with_class_token(t["decoder.mask_token"].expand(batch, places, -1), decoder)
    x = torch.cat([masks + level[0], with_class_token(codes, decoder) + level[1]], 1)
    x = linear(dino(x, decoder, depth, heads)[:, 1 : 1 + places], t, "decoder.to_pixel.model")
    side = math.isqrt(places)
    x = x.view(batch, side, side, 16, 16, 3)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(batch, 3, side * 16, side * 16)


def test_all_tensors_of_the_published_robustok():
    with torch.device("meta"):
        tokenizer = ViTTokenizer(ViTConfig.robustok())
    assert published_shapes(robustok.table(tokenizer)) == robustok_shapes()


def test_robustok_reconstructs_as_published(tmp_path):
    config = scaled(ViTConfig.robustok(codebook_size=32, dim=6), shape=(32, 2, 4), image_size=32, num_latent_tokens=4)
    tensors = filled(robustok_shapes(32, 2, 4, 4, 32, 6))
    extras = {
        "semantic_model.cls_token": torch.zeros(1, 1, 32),
        "quantize.ema_vocab_hit_SV": torch.zeros(32),
        "encoder.lvl1LC": torch.zeros(1, 9, dtype=torch.int64),
        "decoder.lvl1LC": torch.zeros(1, 10, dtype=torch.int64),
    }
    torch.save({"model": {}, "ema": tensors | extras}, tmp_path / "robustok.pt")
    tokenizer = robustok.load_robustok(tmp_path / "robustok.pt", config)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        expected = robustok_forward(tensors, images, 2, 4)
        outcome = tokenizer.decode(tokenizer.quantize(tokenizer.encode(images)).latents)
    assert expected.std() > 0.05
    torch.testing.assert_close(outcome, expected, atol=2e-4, rtol=1e-3)


def test_another_vit_is_no_robustok(tmp_path):
    save_file(filled(robustok_shapes(32, 1, 4, 4, 32, 6)), tmp_path / "one.safetensors")
    config = scaled(ViTConfig.robustok(codebook_size=32, dim=6), shape=(32, 2, 4), image_size=32, num_latent_tokens=4)
    with pytest.raises(MmpostError, match=re.escape("missing decoder.model.blocks.1.attn.proj.bias, ")):
        robustok.load_robustok(tmp_path / "one.safetensors", config)
