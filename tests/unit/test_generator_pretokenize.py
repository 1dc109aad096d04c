"""Codes of an image set: crops, one file, resumption, and refusal of what does not belong together."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.cnn import CNNConfig, CNNTokenizer
from mmpost_tokenizers.generator import identity
from mmpost_tokenizers.generator.layout import CodeLayout
from mmpost_tokenizers.generator.pretokenize import CROPS, Codes, cut, pretokenize, source_size
from mmpost_tokenizers.images import ArrayPixels, Cutting, images_from, images_from_arrays
from mmpost_tokenizers.inputs import differing
from mmpost_tokenizers.quantizers.configs import ProductConfig, VQConfig

PLAIN = VQConfig(codebook_size=32, dim=4)


def build(quantizer=PLAIN, seed=0):
    torch.set_num_threads(1)
    config = CNNConfig(
        image_size=8, quantizer=quantizer, block_out_channels=(8,), layers_per_block=1, z_channels=8, stem_patch=4,
        norm_groups=4, lowest_attention=False, mid_attention=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CNNTokenizer(config)


class Counted(ArrayPixels):
    """Pixels in memory; remembers which pictures were opened."""

    opened: ClassVar = []

    def pixels(self, index):
        self.opened.append(index)
        return ArrayPixels.pixels(self, index)


def pictures_of(count, size, name="p"):
    """Noise images with labels."""
    pixels = np.random.default_rng(5).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    keys = [f"{name}/{i:02d}.\N{LATIN SMALL LETTER E WITH ACUTE}" for i in range(count)]
    made = images_from_arrays(pixels, [i % 3 for i in range(count)], cutting=Cutting(size), keys=keys)
    return dataclasses.replace(made, source=Counted(pixels))


def stack(pictures):
    return torch.stack([pictures[i][0] for i in range(len(pictures))])


@pytest.fixture(scope="module")
def tokenizer():
    return build()


def test_codes_are_those_of_tokenize_with_labels_and_keys(tokenizer, tmp_path):
    pictures = pictures_of(7, 8)
    tokenizer.train()
    codes = pretokenize(pictures, tokenizer, tmp_path, batch_size=3, shard_size=4)
    assert tokenizer.training
    assert torch.equal(codes.codes[:, 0].long(), tokenizer.tokenize(stack(pictures)))
    assert codes.codes.shape == (7, 1, 2, 2)
    assert codes.codes.dtype == torch.uint16
    assert codes.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert codes.keys == [pictures.keys[i] for i in range(7)]
    assert codes.layout == identity.layout_of(tokenizer)
    assert [file.name for file in tmp_path.iterdir()] == ["codes.safetensors"]


def test_groups_keep_their_axis(tmp_path):
    tokenizer = build(ProductConfig(groups=2, part=PLAIN))
    codes = pretokenize(pictures_of(3, 8), tokenizer, tmp_path)
    assert codes.layout.shape == (2, 2, 2)
    assert (codes.layout.groups, codes.layout.grid, codes.layout.codebook_size) == (2, (2, 2), 32)
    assert codes.codes.shape == (3, 1, 2, 2, 2)


def test_ten_crops(tokenizer, tmp_path):
    assert [source_size(256, crops) for crops in CROPS] == [256, 256, 281, 281]
    pictures = pictures_of(2, 10)
    codes = pretokenize(pictures, tokenizer, tmp_path, crops=10)
    assert codes.codes.shape == (2, 10, 2, 2)
    image = pictures[1][0]
    views = [image[:, 1:9, 1:9], image[:, :8, :8], image[:, :8, 2:], image[:, 2:, :8], image[:, 2:, 2:]]
    views = torch.stack(views + [view.flip(-1) for view in views])
    assert torch.equal(cut(image, 8, 10), views)
    assert torch.equal(cut(image, 8, 5), views[:5])
    assert torch.equal(cut(image, 8, 2), views[[0, 5]])
    assert torch.equal(codes.codes[1].long(), tokenizer.tokenize(views))


def test_crops_that_cannot_be_cut():
    with pytest.raises(MmpostError) as caught:
        cut(torch.zeros(3, 8, 9), 10, 10)
    assert str(caught.value) == (
        "an image of 9x8 pixels cannot give 10 crop(s) of 10. Open the images with size=11 [MMP-C107]"
    )
    with pytest.raises(MmpostError, match="12x12 pixels cannot give 1 crop"):
        cut(torch.zeros(3, 12, 12), 10, 1)
    with pytest.raises(MmpostError, match=r"crops=3 is not one of 1, 2, 5, 10\."):
        cut(torch.zeros(3, 8, 8), 8, 3)


def test_a_second_call_goes_on_after_the_last_shard(tokenizer, tmp_path):
    pictures = pictures_of(9, 8)
    whole = pretokenize(pictures, tokenizer, tmp_path / "whole", shard_size=4)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 8:
            raise Stop

    with pytest.raises(Stop):
        pretokenize(pictures, tokenizer, tmp_path / "cut", shard_size=4, progress=stop)
    assert not (tmp_path / "cut" / "codes.safetensors").exists()
    Counted.opened.clear()
    again = pretokenize(pictures, tokenizer, tmp_path / "cut", shard_size=4)
    assert Counted.opened == [8]
    assert torch.equal(again.codes, whole.codes)
    assert again.keys == whole.keys
    assert (tmp_path / "cut" / "codes.safetensors").read_bytes() == (
        tmp_path / "whole" / "codes.safetensors"
    ).read_bytes()


def test_a_damaged_file_ends_the_call_and_a_mended_one_costs_no_other_shard(tokenizer, tmp_path):
    """With headers alone the damage shows when its turn comes; shards without the file stay."""
    (tmp_path / "data").mkdir()
    draw = np.random.default_rng(0)
    for number in range(6):
        pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number}.png")
    whole = (tmp_path / "data" / "4.png").read_bytes()
    (tmp_path / "data" / "4.png").write_bytes(whole[:60])
    out, done = tmp_path / "codes", []

    def call():
        done.clear()
        pictures = images_from(tmp_path / "data", size=8, depth="header")
        return pretokenize(pictures, tokenizer, out, shard_size=2, progress=lambda at, _: done.append(at))

    with pytest.raises(MmpostError, match=r"cannot decode image '.*4\.png'.*MMP-D008"):
        call()
    assert done == [2, 4]
    assert len(list((out / "shards").glob("*.safetensors"))) == 2
    (tmp_path / "data" / "4.png").write_bytes(whole)
    # The picture of an earlier shard changes as well: only that shard is made again.
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "data" / "0.png")
    codes = call()
    assert done == [2, 4, 6]
    pictures = images_from(tmp_path / "data", size=8)
    assert torch.equal(codes.codes[:, 0].long(), tokenizer.tokenize(stack(pictures)))


def test_finished_codes_are_taken_and_others_refused(tokenizer, tmp_path):
    pictures = pictures_of(3, 8)
    first = pretokenize(pictures, tokenizer, tmp_path)
    assert torch.equal(pretokenize(pictures, tokenizer, tmp_path).codes, first.codes)
    others = {
        "number of images; names of images; classes of images; contents of images (size or time of a file)":
            (pictures_of(4, 8), tokenizer, 1),
        "names of images": (pictures_of(3, 8, name="q"), tokenizer, 1),
        "classes of images": (dataclasses.replace(pictures, labels=(0, 1, 1)), tokenizer, 1),
        "contents of images (size or time of a file)": (changed(pictures), tokenizer, 1),
        "size, crop or flip": (dataclasses.replace(pictures, cutting=Cutting(8, "pad")), tokenizer, 1),
        "number of crops": (pictures, tokenizer, 2),
        "weights of the tokenizer": (pictures, build(seed=1), 1),
    }  # fmt: skip
    for differs, (images, other, crops) in others.items():
        with pytest.raises(MmpostError) as caught:
            pretokenize(images, other, tmp_path, crops=crops)
        assert str(caught.value) == (
            f"'{tmp_path}' holds codes of something else; what differs: {differs}. "
            "Choose another folder, or delete this one [MMP-T077]"
        )
    named = dataclasses.replace(pictures, classes=("ant", "bee", "cow"))
    with pytest.raises(MmpostError, match="what differs: classes of images"):
        pretokenize(named, tokenizer, tmp_path)


def changed(pictures):
    """One pixel of one picture is another."""
    pixels = pictures.source.array.copy()
    pixels[1, 0, 0, 0] ^= 1
    return dataclasses.replace(pictures, source=Counted(pixels))


def test_a_file_that_changed_is_seen_without_reading_any(tokenizer, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), len(name), np.uint8)).save(tmp_path / "data" / name / "1.png")
    out = tmp_path / "codes"
    first = pretokenize(images_from(tmp_path / "data", size=8), tokenizer, out)
    assert first.classes == ("cat", "dog")
    assert Codes.open(out).classes == ("cat", "dog")
    pretokenize(images_from(tmp_path / "data", size=8), tokenizer, out)
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "data" / "dog" / "1.png")
    with pytest.raises(MmpostError, match=r"what differs: contents of images \(size or time of a file\)\."):
        pretokenize(images_from(tmp_path / "data", size=8), tokenizer, out)
    (tmp_path / "data" / "cat").rename(tmp_path / "data" / "eel")
    with pytest.raises(MmpostError, match="what differs: names of images; classes of images"):
        pretokenize(images_from(tmp_path / "data", size=8), tokenizer, out)


def test_marks_tell_codes_apart():
    layout = CodeLayout(32, 1, (2,), "a" * 64)
    plain = Codes(layout, torch.tensor([[[1, 2]], [[3, 4]]], dtype=torch.uint16), torch.tensor([0, 1]), ["a", "b"])
    others = {
        "codes": dataclasses.replace(plain, codes=torch.tensor([[[1, 2]], [[3, 5]]], dtype=torch.uint16)),
        "classes of images": dataclasses.replace(plain, classes=("x", "y")),
        "names of images": dataclasses.replace(plain, keys=["a", "c"]),
        "tokenizer": dataclasses.replace(plain, layout=dataclasses.replace(layout, tokenizer_sha256="b" * 64)),
    }
    assert differing(plain.marks(), dataclasses.replace(plain).marks()) == []
    for name, other in others.items():
        assert differing(plain.marks(), other.marks()) == [name]
    assert differing(plain.marks(), plain.subset(torch.tensor([0])).marks()) == [
        "number of images", "names of images", "classes of images", "codes",
    ]  # fmt: skip


def test_no_file(tmp_path):
    with pytest.raises(MmpostError) as caught:
        Codes.open(tmp_path / "x.safetensors")
    assert str(caught.value) == (
        f"'{tmp_path / 'x.safetensors'}' holds no codes. Write it with `mmpost tokenizer pretokenize` [MMP-T076]"
    )


def test_hash_sees_encoder_and_quantizer_but_not_the_decoder(tokenizer):
    changed = build()
    before = identity.token_hash(changed)
    assert before == identity.token_hash(tokenizer)
    with torch.no_grad():
        for parameter in changed.decoder_parameters():
            parameter.add_(1)
    assert identity.token_hash(changed) == before
    for part in (changed.encoder, changed.quant_conv, changed.quantizer):
        with torch.no_grad():
            next(part.parameters()).flatten()[0] += 1
        after = identity.token_hash(changed)
        assert after != before
        before = after


def test_frozen_state_and_decoder_are_all_tensors(tokenizer):
    frozen = identity.frozen_state(tokenizer)
    names = set(tokenizer.state_dict())
    assert {name for name in names if name not in frozen} == {
        name for name in names if name.startswith(("decoder.", "post_quant_conv."))
    }


def test_layouts_that_differ_are_refused():
    layout = CodeLayout(32, 1, (2, 2), "a" * 64)
    with pytest.raises(MmpostError) as caught:
        identity.require_same(
            layout, dataclasses.replace(layout, codebook_size=64), owner="the generator", other="the tokenizer"
        )
    assert str(caught.value) == (
        "the generator and the tokenizer do not belong together: codebook size 32 against 64. "
        "Use the tokenizer that the codes were made with [MMP-C102]"
    )


def test_something_without_codes_is_refused():
    with pytest.raises(MmpostError, match=r"Linear has no codes that a generator could learn.*MMP-C101"):
        identity.layout_of(torch.nn.Linear(1, 1))
