import json

import pytest
import torch
from diffusers import AutoencoderKL

from mmpost.core.errors import MmpostError
from mmpost_tokenizers import TOKENIZERS
from mmpost_tokenizers.bridge.levels import PostTrainingConfig
from mmpost_tokenizers.bridge.vae import QuantizedVAETokenizer, mar_kl16, open_vae


def small_vae(**fields):
    torch.manual_seed(0)
    shape = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 8,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    }
    return AutoencoderKL(**{**shape, **fields}).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("vae")
    small_vae().save_pretrained(place)
    return place


@pytest.fixture
def images():
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def from_vae(folder, **options):
    return QuantizedVAETokenizer.from_vae(folder, **{"max_saturation": None, **options})


def test_mar_kl16_has_the_parameters_of_the_reference():
    with torch.device("meta"):
        vae = mar_kl16()
    counts = [sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder, vae)]
    assert counts == [28_265_760, 38_188_931, 66_456_019]
    assert vae.config.scaling_factor == 0.2325
    with torch.device("meta"):
        latents = vae.encode(torch.zeros(1, 3, 256, 256)).latent_dist.mean
    assert latents.shape == (1, 16, 16, 16)


def test_tokens_of_images_and_back(folder, images):
    tokenizer = from_vae(folder)
    indices = tokenizer.tokenize(images)
    assert indices.dtype == torch.int64
    assert indices.shape == (6, 4, 4, 4)
    assert (tokenizer.groups, tokenizer.codebook_size, tokenizer.grid) == (4, 64, (4, 4))
    assert tokenizer.index_shape == (4, 4, 4)
    with torch.no_grad():
        direct = tokenizer.decode(tokenizer.quantize(tokenizer.encode(images)).latents)
    torch.testing.assert_close(tokenizer.decode_indices(indices), direct, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokenizer.reconstruct(images), direct.clamp(-1, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokenizer.detokenize(indices), direct.clamp(-1, 1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_latents_are_those_of_the_vae_normalised_as_it_says(folder, images):
    tokenizer, vae = from_vae(folder, posterior="mode"), small_vae()
    mode = vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(tokenizer.encode(images), ((mode - 0.25) * 0.5).permute(0, 2, 3, 1))
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(images)), vae.decode(mode).sample)


@torch.no_grad()
def test_mean_and_deviation_per_channel_take_the_place_of_the_factors(tmp_path, images):
    means, deviations = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 3.0, 4.0]
    small_vae(latents_mean=means, latents_std=deviations, scaling_factor=1.0).save_pretrained(tmp_path)
    tokenizer = from_vae(tmp_path, posterior="mode")
    mode = small_vae().encode(images).latent_dist.mode().permute(0, 2, 3, 1)
    torch.testing.assert_close(tokenizer.encode(images), (mode - torch.tensor(means)) / torch.tensor(deviations))


def test_sample_of_the_posterior(folder, images):
    tokenizer, mode = from_vae(folder), from_vae(folder, posterior="mode")
    with torch.no_grad():
        posterior = small_vae().encode(images).latent_dist
        noise = (tokenizer.encode(images) - mode.encode(images)) / 0.5 / posterior.std.permute(0, 2, 3, 1)
    # 384 values: five standard errors of mean and deviation.
    assert abs(float(noise.mean())) < 5 / 384**0.5
    assert abs(float(noise.std()) - 1) < 5 / (2 * 384) ** 0.5
    assert not torch.equal(from_vae(folder, seed=1).encode(images), tokenizer.encode(images))


def test_a_picture_has_the_same_tokens_in_any_batch(folder, images):
    tokenizer = from_vae(folder)
    together = tokenizer.tokenize(images)
    alone = torch.cat([tokenizer.tokenize(images[i : i + 1]) for i in (5, 3)])
    # Convolutions may round differently for another batch size.
    assert (alone == together[[5, 3]]).float().mean() > 0.99
    assert torch.equal(tokenizer.tokenize(images), together)


@torch.no_grad()
def test_error_of_the_round_trip_falls_with_the_number_of_levels(folder, images):
    errors = []
    for levels in (4, 8, 16, 32, 64):
        tokenizer = from_vae(folder, levels=levels, posterior="mode").fit([images])
        z = tokenizer.encode(images)
        errors.append(float((tokenizer.decode(tokenizer.quantize(z).latents) - tokenizer.decode(z)).pow(2).mean()))
    assert errors == sorted(errors, reverse=True)


def test_saved_and_opened(tmp_path, folder, images):
    assert TOKENIZERS["bridge"] == "mmpost_tokenizers.bridge.vae:QuantizedVAETokenizer"
    tokenizer = from_vae(folder, levels=32, seed=3).fit([images], mode="channel")
    tokenizer.save_pretrained(tmp_path)
    again = QuantizedVAETokenizer.from_pretrained(tmp_path)
    assert again.config == tokenizer.config
    assert again.config.quantizer == PostTrainingConfig(dim=4, levels=32, mode="channel", max_saturation=None)
    assert torch.equal(again.tokenize(images), tokenizer.tokenize(images))
    assert torch.equal(again.reconstruct(images), tokenizer.reconstruct(images))
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["kind"], written["vae"]["latent_channels"]) == ("bridge", 4)


def test_a_pipeline_folder_has_its_vae_inside(tmp_path, folder, images):
    small_vae().save_pretrained(tmp_path / "vae")
    assert torch.equal(from_vae(tmp_path).tokenize(images), from_vae(folder).tokenize(images))


def test_perturbed_tokens_are_near_levels(folder, images):
    from mmpost_tokenizers.perturbation import LatentPerturbation

    tokenizer = from_vae(folder)
    clean = tokenizer.tokenize(images)
    moved = LatentPerturbation(alpha=1.0, beta=1.0, delta=3).train()(
        tokenizer, clean, generator=torch.Generator().manual_seed(0)
    )
    inside = (clean > 0) & (clean < 63)
    assert int((moved.indices - clean).abs()[inside].max()) <= 2
    assert (moved.indices != clean).float().mean() == pytest.approx(2 / 3, abs=0.15)


def test_only_the_decoder_can_be_post_trained(folder):
    tokenizer = from_vae(folder)
    names = {id(weight): name for name, weight in tokenizer.named_parameters()}
    trained = {names[id(weight)] for weight in tokenizer.decoder_parameters()}
    assert trained == {n for n in names.values() if n.startswith(("vae.decoder.", "vae.post_quant_conv."))}
    assert names[id(tokenizer.last_layer)] == "vae.decoder.conv_out.weight"


def test_a_vae_with_a_wider_range_is_refused_once_in_clear_words(tmp_path, images):
    small_vae(scaling_factor=500.0).save_pretrained(tmp_path)
    many = images.repeat(12, 1, 1, 1)
    with pytest.raises(MmpostError) as error:
        from_vae(tmp_path, max_saturation=0.01).tokenize(many)
    text = str(error.value)
    assert text.startswith("the range cuts off ")
    assert "but 64 levels with range 5 reach 4.43; 1.0% may be cut off. Raise --range to " in text
    assert text.endswith("accept it with --max-saturation 1. [MMP-E081]")
    from_vae(tmp_path, max_saturation=0.01).fit([many], mode="channel").tokenize(many)
    accepted = from_vae(tmp_path, max_saturation=None)
    accepted.tokenize(many)
    assert accepted.quantizer.saturation_rate > 0.5


def test_messages(tmp_path, folder):
    with pytest.raises(MmpostError) as error:
        from_vae(folder, image_size=9)
    assert str(error.value) == (
        "bridge: this VAE does not fit: images of 9 pixels are no multiple of its step of 2. "
        "Choose another image_size or VAE. [MMP-C097]"
    )
    with pytest.raises(MmpostError) as error:
        from_vae(folder, posterior="mean")
    assert str(error.value) == "bridge: posterior='mean' is not one of sample, mode. Correct posterior. [MMP-C090]"
    with pytest.raises(MmpostError, match=r"cannot open the VAE .*MMP-E080"):
        open_vae(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(MmpostError) as error:
        open_vae(tmp_path)
    assert str(error.value) == (
        f"'{tmp_path}' is VQModel, not an AutoencoderKL. TokenBridge takes continuous VAEs of that class. [MMP-E080]"
    )


def test_weights_that_lack_a_key(tmp_path):
    from safetensors.torch import load_file, save_file

    small_vae().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, file)
    with pytest.raises(MmpostError) as error:
        open_vae(tmp_path)
    assert str(error.value) == (
        f"the weights of the VAE '{tmp_path}' do not fit its configuration. missing: encoder.conv_in.bias. "
        "Download or save it again. [MMP-E083]"
    )
