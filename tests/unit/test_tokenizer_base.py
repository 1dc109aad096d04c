"""What all tokenizers do: round trips, modes, saving and opening, and one message for each thing that can be wrong."""

import argparse
import json
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost_tokenizers import TOKENIZERS
from mmpost_tokenizers.base import DiscreteTokenizer, build_tokenizer
from mmpost_tokenizers.cnn import CNNConfig, CNNTokenizer
from mmpost_tokenizers.perturbation import LatentPerturbation
from mmpost_tokenizers.published import PUBLISHED
from mmpost_tokenizers.published.files import read_tensors
from mmpost_tokenizers.quantizers import QUANTIZERS
from mmpost_tokenizers.quantizers.configs import (
    BSQConfig,
    EMAConfig,
    FSQConfig,
    LFQConfig,
    MultiScaleConfig,
    ProductConfig,
    ResidualConfig,
    VQConfig,
)
from mmpost_tokenizers.vit import ViTConfig, ViTTokenizer

PLAIN = VQConfig(codebook_size=32, dim=4, l2_norm=False)
QUANTIZERS_TRIED = {
    "vq": VQConfig(codebook_size=32, dim=4),
    "vq_ema": EMAConfig(codebook_size=32, dim=4),
    "lfq": LFQConfig(dim=5),
    "bsq": BSQConfig(dim=5),
    "fsq": FSQConfig(levels=(8, 5)),
    "product": ProductConfig(groups=2, part=PLAIN),
    "residual": ResidualConfig(depth=2, part=PLAIN),
    "multi_scale": MultiScaleConfig(part=PLAIN, scales=(1, 2, 4)),
}


def cnn(quantizer):
    return CNNConfig(
        image_size=8,
        quantizer=quantizer,
        block_out_channels=(4, 8),
        layers_per_block=1,
        z_channels=8,
        norm_groups=4,
        lowest_attention=False,
        mid_attention=False,
    )


def vit(quantizer):
    return ViTConfig(image_size=32, quantizer=quantizer, shape=(16, 2, 2), patch_size=8, num_latent_tokens=6)


@pytest.fixture(
    params=[*(("cnn", name) for name in QUANTIZERS_TRIED), ("vit", "vq"), ("vit", "residual")], ids="-".join
)
def tokenizer(request):
    kind, name = request.param
    torch.manual_seed(0)
    return build_tokenizer({"cnn": cnn, "vit": vit}[kind](QUANTIZERS_TRIED[name])).eval()


@pytest.fixture
def small():
    torch.manual_seed(0)
    return CNNTokenizer(cnn(QUANTIZERS_TRIED["vq"]))


def images(tokenizer, batch=2):
    size = tokenizer.config.image_size
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_tables_name_what_exists():
    for kind, names in (("tokenizers", TOKENIZERS), ("quantizers", QUANTIZERS), ("published", PUBLISHED)):
        for name in names:
            assert callable(Catalog(kind, names).get(name))
    assert set(QUANTIZERS_TRIED) == set(QUANTIZERS)


def test_round_trip_through_tokens(tokenizer):
    pictures = images(tokenizer)
    z = tokenizer.encode(pictures)
    assert z.shape == (2, *tokenizer.grid, tokenizer.quantizer.dim)
    outcome = tokenizer.quantize(z)
    indices = tokenizer.tokenize(pictures)
    assert indices.shape == (2, *tokenizer.index_shape)
    assert torch.equal(indices, outcome.indices)
    decoded = tokenizer.decode(outcome.latents)
    assert decoded.shape == pictures.shape
    # The straight-through sum z + (e - z) is not bitwise e.
    torch.testing.assert_close(tokenizer.decode_indices(indices), decoded, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokenizer.reconstruct(pictures), decoded.clamp(-1, 1))
    assert torch.equal(tokenizer.detokenize(indices), tokenizer.decode_indices(indices).clamp(-1, 1))


def test_decode_never_quantizes_again(tokenizer):
    z = tokenizer.encode(images(tokenizer))
    between = z + 0.3
    assert not torch.allclose(tokenizer.decode(between), tokenizer.decode(tokenizer.quantize(between).latents))


def test_saved_and_opened_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    opened = DiscreteTokenizer.from_pretrained(tmp_path / "saved")
    assert type(opened) is type(tokenizer)
    assert opened.config == tokenizer.config
    assert not opened.training
    state, reopened = tokenizer.state_dict(), opened.state_dict()
    assert list(state) == list(reopened)
    assert all(torch.equal(state[name], reopened[name]) for name in state)
    assert torch.equal(opened.reconstruct(images(tokenizer)), tokenizer.reconstruct(images(tokenizer)))
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]


def test_decoder_parameters_are_all_that_decoding_uses(tokenizer):
    listed = {id(parameter) for parameter in tokenizer.decoder_parameters()}
    indices = tokenizer.tokenize(images(tokenizer))
    tokenizer.decode(tokenizer.lookup(indices).detach()).sum().backward()
    moved = {id(parameter) for parameter in tokenizer.parameters() if parameter.grad is not None}
    assert moved <= listed
    assert id(tokenizer.last_layer) in moved
    encoder = {id(parameter) for parameter in tokenizer.encoder.parameters()} | {
        id(parameter) for parameter in tokenizer.quantizer.parameters()
    }
    assert not listed & encoder


def test_reconstruction_trains_encoder_and_decoder_but_no_codes(tokenizer):
    outcome = tokenizer.quantize(tokenizer.encode(images(tokenizer)))
    moved = LatentPerturbation(1.0, 1.0, 3)(tokenizer, outcome.indices, generator=torch.Generator().manual_seed(0))
    assert moved.changed.any()
    latents = tokenizer.quantizer.straight_through(outcome, moved.indices)
    tokenizer.decode(latents).square().mean().backward()
    assert all(parameter.grad is None for parameter in tokenizer.quantizer.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in tokenizer.encoder.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in tokenizer.decoder_parameters())


def test_shortcuts_put_the_mode_back(small):
    small.train()
    small.encoder.eval()
    before = [part.training for part in small.modules()]
    small.detokenize(small.tokenize(images(small)))
    small.reconstruct(images(small))
    assert [part.training for part in small.modules()] == before
    assert small.training
    assert not small.reconstruct(images(small)).requires_grad


def said(error):
    return str(error.value)


def test_wrong_images_and_indices(small):
    with pytest.raises(MmpostError) as caught:
        small.encode(torch.zeros(2, 3, 16, 8))
    assert said(caught) == (
        "images of shape (2, 3, 16, 8), but this tokenizer takes [B, 3, 8, 8]. Resize them to 8 pixels. [MMP-C074]"
    )
    with pytest.raises(MmpostError, match=re.escape("indices from 0 to 32, but codes are 0..31.")) as caught:
        small.detokenize(torch.arange(32).view(2, 4, 4) + torch.eye(4, dtype=torch.int64)[3] * 1)
    assert caught.value.code == "MMP-C075"
    with pytest.raises(
        MmpostError, match=re.escape("indices of shape (2, 5), but this tokenizer has [4, 4] per image.")
    ):
        small.decode_indices(torch.zeros(2, 5, dtype=torch.int64))


def test_a_folder_without_a_tokenizer(tmp_path, small):
    with pytest.raises(MmpostError) as caught:
        DiscreteTokenizer.from_pretrained(tmp_path)
    assert said(caught) == (f"no config.json in '{tmp_path}'. Name a folder written by save_pretrained. [MMP-E070]")
    small.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MmpostError, match=re.escape("no model.safetensors in")):
        DiscreteTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["no/such-tokenizer-in-the-cache", "not a hub id at all"])
def test_a_hub_id_that_is_not_there(name):
    with pytest.raises(MmpostError, match=f"no tokenizer '{name}': ") as caught:
        DiscreteTokenizer.from_pretrained(name)
    assert caught.value.code == "MMP-E070"


def test_missing_unexpected_and_reshaped_tensors_are_named_together(tmp_path, small):
    small.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["decoder.conv_in.bias"]
    tensors["extra"] = torch.zeros(2)
    tensors["quantizer.weight"] = torch.zeros(31, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(MmpostError) as caught:
        DiscreteTokenizer.from_pretrained(tmp_path)
    assert said(caught) == (
        f"{tmp_path / 'model.safetensors'} does not fit the model: missing decoder.conv_in.bias; unexpected extra; "
        "of another shape quantizer.weight [31, 4] instead of [32, 4]. Check model and checkpoint. [MMP-E071]"
    )


def test_many_missing_tensors_are_counted(tmp_path, small):
    small.save_pretrained(tmp_path)
    save_file({"quantizer.weight": torch.zeros(32, 4)}, tmp_path / "model.safetensors")
    count = len(small.state_dict()) - 1 - 5
    with pytest.raises(MmpostError, match=f"and {count} more. Check"):
        DiscreteTokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_of_another_kind(tmp_path, small):
    small.save_pretrained(tmp_path)
    assert type(CNNTokenizer.from_pretrained(tmp_path)) is CNNTokenizer
    with pytest.raises(MmpostError, match="is of a CNNTokenizer, not of a ViTTokenizer") as caught:
        ViTTokenizer.from_pretrained(tmp_path)
    assert caught.value.code == "MMP-E072"


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (lambda table: table.update(depth=3), "MMP-C071", "tokenizer 'cnn' has no field depth. Known: image_size, "),
        (lambda table: table.pop("image_size"), "MMP-C071", "tokenizer 'cnn' lacks image_size. Set it."),
        (
            lambda table: table.update(kind="cnm"),
            "MMP-C006",
            "unknown name 'cnm' among tokenizers. Did you mean 'cnn'?",
        ),
        (lambda table: table.update(mmpost_format=2), "MMP-E072", "is no tokenizer configuration of this toolkit"),
        (lambda table: table.update(image_size=9), "MMP-C071", "image_size=9 is not a multiple of 2, a token's side."),
    ],
)
def test_damaged_configurations(tmp_path, small, change, code, text):
    small.save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    change(table)
    (tmp_path / "config.json").write_text(json.dumps(table))
    with pytest.raises(MmpostError, match=re.escape(text)) as caught:
        DiscreteTokenizer.from_pretrained(tmp_path)
    assert caught.value.code == code


def test_a_configuration_that_is_no_json(tmp_path, small):
    small.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MmpostError, match="cannot be read as JSON") as caught:
        DiscreteTokenizer.from_pretrained(tmp_path)
    assert caught.value.code == "MMP-E072"


def test_truncated_weights(tmp_path, small):
    small.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MmpostError, match="cannot be read: ") as caught:
        DiscreteTokenizer.from_pretrained(tmp_path)
    assert caught.value.code == "MMP-E073"


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles_are_not_run(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "extra": Bomb(str(tmp_path / "boom"))}, tmp_path / "bad.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(str(tmp_path / "boom"))))
    for name in ("bad.pt", "plain.pt"):
        with pytest.raises(MmpostError, match="it was not opened, because that could run code") as caught:
            read_tensors(tmp_path / name)
        assert caught.value.code == "MMP-E073"
    assert not (tmp_path / "boom").exists()


def test_published_containers(tmp_path):
    tensors, old = {"a": torch.arange(3.0)}, {"a": torch.zeros(3)}
    arguments = argparse.Namespace(lr=1e-4, name="run")
    torch.save({"model": old, "ema": tensors, "args": arguments, "steps": 3}, tmp_path / "trained.pt")
    torch.save({"state_dict": tensors}, tmp_path / "nested.pth")
    torch.save(tensors, tmp_path / "flat.bin")
    save_file(tensors, tmp_path / "flat.safetensors")
    for name in ("trained.pt", "nested.pth", "flat.bin", "flat.safetensors"):
        assert torch.equal(read_tensors(tmp_path / name)["a"], tensors["a"])
    torch.save({"steps": 3}, tmp_path / "none.pt")
    with pytest.raises(MmpostError, match="holds no table of tensors"):
        read_tensors(tmp_path / "none.pt")
    with pytest.raises(MmpostError, match="no file") as caught:
        read_tensors(tmp_path / "missing.pt")
    assert caught.value.code == "MMP-E070"
