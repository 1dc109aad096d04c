"""Pictures of tokenizers: sources, bad files with their exact messages, exact pixels, order, waiting."""

import itertools
import json
import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mmpost.core.errors import MmpostError
from mmpost.media import image as media
from mmpost_tokenizers.batches import ImageBatches, Waiting, evaluation_batches
from mmpost_tokenizers.image_files import list_file
from mmpost_tokenizers.images import Cutting, images_from, images_from_arrays, to_uint8
from mmpost_tokenizers.opening import chosen, open_images, resident
from mmpost_tokenizers.options import ImageSource, ImagesSection


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two classes of two good PNG files each."""
    for number, name in enumerate(["cat/1.png", "cat/2.png", "dog/1.png", "dog/sub/2.PNG"]):
        path = tmp_path / "good" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(16, 16, seed=number)).save(path)
    return tmp_path / "good"


@pytest.fixture
def bad_folder(folder):
    """The good files and one of every kind that a user may have by accident."""
    Image.fromarray(noise(40, 40)).save(folder / "cat/whole.jpg")
    content = (folder / "cat/whole.jpg").read_bytes()
    (folder / "cat/whole.jpg").unlink()
    (folder / "cat/truncated.jpg").write_bytes(content[: len(content) // 2])
    Image.fromarray(noise(1, 1)).save(folder / "dog/dot.png")
    (folder / "dog/text.jpg").write_text("no picture")
    (folder / "dog/readme.txt").write_text("about dogs")
    (folder / ".DS_Store").write_text("")
    return folder


def test_folder_gives_exact_pixels_in_a_fixed_order(folder):
    pictures = images_from(folder, size=16)
    assert pictures.keys == ("cat/1.png", "cat/2.png", "dog/1.png", "dog/sub/2.PNG")
    assert pictures.labels == (0, 0, 1, 1)
    assert pictures.classes == ("cat", "dog")
    image, label, key = pictures[2]
    assert (label, key) == (1, "dog/1.png")
    assert image.dtype == torch.float32
    assert np.array_equal(to_uint8(image).permute(1, 2, 0), noise(16, 16, seed=2))
    assert pictures.notes == ()


def test_uint8_round_trip_is_exact_and_rounds_to_the_nearest():
    from mmpost_tokenizers.images import from_uint8

    every = torch.arange(256).to(torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every)), every)
    assert to_uint8(torch.tensor([-2.0, -1.0, 1.0, 2.0])).tolist() == [0, 0, 255, 255]
    # 127.5 x + 128, truncated, would give 100 for 99.9 / 127.5 - 1 + 0.6 / 127.5
    assert to_uint8(torch.tensor([100.4 / 127.5 - 1, 100.6 / 127.5 - 1])).tolist() == [100, 101]


def test_bad_files_are_listed_in_one_error(bad_folder):
    with pytest.raises(MmpostError) as caught:
        images_from(bad_folder, size=16)
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 of 7 images cannot be used:"
    assert lines[1].startswith(f"  cannot decode image '{bad_folder}/cat/truncated.jpg': Pillow: ")
    assert lines[2] == f"  image '{bad_folder}/dog/dot.png' is 1 x 1 px; the shorter side must have 8."
    assert lines[3] == (
        f"  cannot decode image '{bad_folder}/dog/text.jpg': Pillow: not an image (the file starts with "
        "6e 6f 20 70 69 63 74 75)."
    )
    assert lines[4] == " Mend or remove them, or set on_bad=quarantine to go on with the other 4 [MMP-D071]"


def test_headers_do_not_show_damage_behind_them(bad_folder, monkeypatch):
    """Headers find the file of one pixel and the one that is no image, and miss the truncated one."""
    with pytest.raises(MmpostError) as caught:
        images_from(bad_folder, size=16, depth="header")
    assert str(caught.value).splitlines()[0] == "2 of 7 images cannot be used:"
    for name in ("dog/dot.png", "dog/text.jpg"):
        (bad_folder / name).unlink()
    pictures = images_from(bad_folder, size=16, depth="header")
    assert "cat/truncated.jpg" in pictures.keys
    with pytest.raises(MmpostError, match=r"cannot decode image '.*/cat/truncated\.jpg': Pillow: ") as caught:
        list(evaluation_batches(pictures, batch_size=2))
    assert caught.value.code == "MMP-D008"
    # Few files are decoded; many only where faulty ones are to be left out.
    with pytest.raises(MmpostError, match="1 of 5 images cannot be used"):
        images_from(bad_folder, size=16, depth="auto")
    monkeypatch.setattr("mmpost_tokenizers.image_files.DECODE_UP_TO", 4)
    assert images_from(bad_folder, size=16, depth="auto").notes[1] == (
        "5 images: only their headers were looked at; check=decode looks inside first"
    )
    kept = images_from(bad_folder, size=16, depth="auto", on_bad="quarantine")
    assert [key for key, _ in kept.bad] == ["cat/truncated.jpg"]


def test_a_file_is_decoded_once_while_it_stays_the_same(bad_folder, tmp_path, monkeypatch):
    decoded = []
    load = media.load
    monkeypatch.setattr("mmpost_tokenizers.image_files.media.load", lambda path: decoded.append(path) or load(path))
    Image.new("CMYK", (16, 16)).save(bad_folder / "dog/z.jpg")

    def opened():
        decoded.clear()
        found = images_from(bad_folder, size=16, on_bad="quarantine", depth="decode", cache=tmp_path / "cache")
        return found, sorted(path.rpartition("/")[2] for path in decoded)

    first, names = opened()
    assert names == ["1.png", "1.png", "2.PNG", "2.png", "truncated.jpg", "z.jpg"]
    second, names = opened()
    # A bad file is never remembered; remarks and bad files are told again.
    assert names == ["truncated.jpg"]
    assert (second.keys, second.notes, second.labels) == (first.keys, first.notes, first.labels)
    assert [str(error) for _, error in second.bad] == [str(error) for _, error in first.bad]
    (bad_folder / "cat/1.png").write_bytes((bad_folder / "cat/1.png").read_bytes()[:60])
    Image.fromarray(noise(16, 16)).save(bad_folder / "cat/truncated.jpg")
    third, names = opened()
    assert names == ["1.png", "truncated.jpg"]
    assert [key for key, _ in third.bad] == ["cat/1.png", "dog/dot.png", "dog/text.jpg"]
    # The size that is asked for may change without decoding again.
    decoded.clear()
    with pytest.raises(MmpostError, match=r"is 16 x 16 px; the shorter side must have 17\."):
        images_from(bad_folder, size=16, min_side=17, depth="decode", cache=tmp_path / "cache")
    assert [path.rpartition("/")[2] for path in decoded] == []
    for file in (tmp_path / "cache").iterdir():
        file.write_text("{torn")
    assert len(opened()[1]) == 6


def test_only_the_files_that_are_used_are_looked_at(bad_folder):
    """Two of seven files: the first and the fourth of the sorted list, which are good."""
    pictures = images_from(bad_folder, size=16, limit=2)
    assert pictures.keys == ("cat/1.png", "dog/1.png")
    assert (pictures.labels, pictures.classes) == ((0, 1), ("cat", "dog"))
    with pytest.raises(MmpostError, match="2 of 5 images cannot be used"):
        images_from(bad_folder, size=16, limit=5)


def test_options_reach_the_check(bad_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("dog/dot.png", "dog/text.jpg"):
        (bad_folder / name).unlink()
    sources = [ImageSource(path=str(bad_folder))]
    found = open_images(sources, ImagesSection(check="header"), size=16, seed=0, training=True)
    assert len(found) == 5
    assert not (tmp_path / "cache").exists()
    with pytest.raises(MmpostError, match="1 of 5 images cannot be used"):
        open_images(sources, ImagesSection(), size=16, seed=0, training=True)
    assert len(list((tmp_path / "cache/mmpost/images").glob("*.json"))) == 1


def test_chosen_pictures_of_a_set_in_memory(folder):
    pictures = images_from(folder, size=16)
    for whole in (pictures, resident(pictures)):
        some = chosen(whole, [3, 0])
        assert some.keys == ("dog/sub/2.PNG", "cat/1.png")
        assert torch.equal(some[0][0], pictures[3][0])
        assert some[1][1:] == (0, "cat/1.png")


def test_quarantine_uses_the_good_files_and_lists_the_others(bad_folder, tmp_path):
    kept = tmp_path / "lists" / "bad.jsonl"
    pictures = images_from(bad_folder, size=16, on_bad="quarantine", quarantine_file=kept)
    assert pictures.keys == ("cat/1.png", "cat/2.png", "dog/1.png", "dog/sub/2.PNG")
    assert [key for key, _ in pictures.bad] == ["cat/truncated.jpg", "dog/dot.png", "dog/text.jpg"]
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(row["file"], row["code"]) for row in rows] == [
        ("cat/truncated.jpg", "MMP-D008"),
        ("dog/dot.png", "MMP-D074"),
        ("dog/text.jpg", "MMP-D008"),
    ]
    assert pictures.notes == (
        "2 files are no images and were left out (1 .txt, 1 hidden)",
        f"3 of 7 images cannot be used and were left out; they are listed in {kept}",
    )


def test_quarantine_without_any_good_file_is_an_error(tmp_path):
    Image.fromarray(noise(1, 1)).save(tmp_path / "dot.png")
    with pytest.raises(MmpostError, match="none of 1 images can be used") as caught:
        images_from(tmp_path, size=16, on_bad="quarantine")
    assert caught.value.code == "MMP-D073"


def test_empty_folder_and_missing_folder(tmp_path):
    with pytest.raises(MmpostError) as caught:
        images_from(tmp_path, size=16)
    assert str(caught.value).startswith(
        f"{tmp_path}: the folder holds no image files, but no files at all. Known: .avif"
    )
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(MmpostError, match=r"holds no image files, but 1 other files \(1 \.json\)") as caught:
        images_from(tmp_path, size=16)
    assert caught.value.code == "MMP-D070"
    with pytest.raises(MmpostError, match="no such file or folder") as caught:
        images_from(tmp_path / "nowhere", size=16)
    assert caught.value.code == "MMP-D030"


def test_cmyk_and_16_bits_and_transparency_are_converted_and_told(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / "b.png")
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "c.png")
    pictures = images_from(tmp_path, size=16)
    assert pictures.notes == (
        "1 in CMYK, converted to RGB",
        "1 with 16 bits, scaled to 8",
        "1 with transparency, put on white",
    )
    red, green, blue = to_uint8(pictures[0][0]).float().mean((1, 2))
    assert red > 200
    assert max(green, blue) < 60
    # Clipped, all but the first value would be 255.
    assert np.array_equal(to_uint8(pictures[1][0])[0].flatten(), np.arange(256))
    assert (to_uint8(pictures[2][0]) == 255).all()


def test_split_is_a_folder_of_the_folder(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        Image.fromarray(noise(16, 16)).save(tmp_path / split / f"{split}.png")
    assert images_from(tmp_path, size=16, split="val").keys == ("val.png",)
    with pytest.raises(MmpostError) as caught:
        images_from(tmp_path, size=16, split="vla")
    assert str(caught.value) == f"{tmp_path}/vla: no such file or folder. Did you mean '{tmp_path}/val'? [MMP-D030]"


def test_list_of_files(folder):
    listed = folder / "list.txt"
    listed.write_text("# good ones\ndog/1.png\t1\ncat/2.png\t0\n\n")
    pictures = images_from(listed, size=16)
    assert (pictures.keys, pictures.labels) == (("dog/1.png", "cat/2.png"), (1, 0))
    listed.write_text("dog/1.png\tdog\n")
    with pytest.raises(MmpostError) as caught:
        list_file(listed)
    assert str(caught.value) == f"{listed}:1: the class 'dog' is not a number. Write 0, 1, 2, ... [MMP-D072]"
    listed.write_text("gone.png\n")
    with pytest.raises(MmpostError, match="image file not found"):
        images_from(listed, size=16)
    assert images_from([folder / "cat/1.png"], size=16).labels == (-1,)


def test_sheets(tmp_path):
    tiles = noise(6, 16, channels=0).reshape(6, 4, 4)
    Image.fromarray(tiles.reshape(2, 3, 4, 4).swapaxes(1, 2).reshape(8, 12)).save(tmp_path / "hat.png")
    described = {
        "side_px": 4,
        "sheets": [
            {"file": "hat.png", "label": "hat", "official_positions": {"train": [7, 2, 9, 4], "heldout": [1, 0]}}
        ],
    }
    notes = tmp_path / "hats.json"
    notes.write_text(json.dumps(described))
    held = images_from(notes, size=4, split="heldout", crop="pad")
    assert (held.keys, held.labels, held.classes) == (("heldout/hat/1", "heldout/hat/0"), (0, 0), ("hat",))
    assert np.array_equal(to_uint8(held[1][0])[2], tiles[5])
    padded = images_from(notes, size=8, split="train", crop="pad")
    square = to_uint8(padded[0][0])[0].numpy()
    assert np.array_equal(square[2:6, 2:6], tiles[0])
    assert square.sum() == tiles[0].sum()
    assert len(images_from(notes, size=4)) == 6
    with pytest.raises(MmpostError, match="there is no split 'test' among train, heldout"):
        images_from(notes, size=4, split="test")
    described["sheets"][0]["sha256"] = "0" * 64
    notes.write_text(json.dumps(described))
    with pytest.raises(MmpostError, match="another SHA-256") as caught:
        images_from(notes, size=4)
    assert caught.value.code == "MMP-D075"


def test_photographs_are_divided_by_area():
    train = images_from("sklearn:photos", size=64, split="train")
    held = images_from("sklearn:photos", size=64, split="heldout")
    assert train.classes == ("china", "flower")
    assert set(train.labels) == {0, 1}

    def columns(pictures):
        return {int(key.split("@")[1].split(",")[0]) for key in pictures.keys}

    assert max(columns(train)) + 64 <= 448 <= min(columns(held))
    assert 60 < len(train) < 160


def test_center_crop_takes_the_middle_and_random_crops_differ_by_epoch():
    wide = noise(8, 20)[None]
    middle = images_from_arrays(wide, cutting=Cutting(8))
    assert np.array_equal(to_uint8(middle[0][0]).permute(1, 2, 0), wide[0, :, 6:14])
    assert torch.equal(middle[5, 0][0], middle[0, 0][0])
    cut = images_from_arrays(wide, cutting=Cutting(8, "random", flip=True), seed=3)
    epochs = [cut[epoch, 0][0] for epoch in range(40)]
    assert len({bytes(to_uint8(image).numpy()) for image in epochs}) > 20
    assert torch.equal(cut[7, 0][0], epochs[7])
    only_flip = images_from_arrays(noise(8, 8)[None], cutting=Cutting(8, flip=True))
    flipped = sum(not torch.equal(only_flip[epoch, 0][0], middle_of(only_flip)) for epoch in range(400))
    assert 160 < flipped < 240


def middle_of(pictures):
    return images_from_arrays(pictures.source.array, cutting=Cutting(8))[0][0]


def test_arrays_of_another_kind_are_refused():
    with pytest.raises(MmpostError) as caught:
        images_from_arrays(np.zeros((2, 3, 8, 8)), cutting=Cutting(8))
    assert str(caught.value) == (
        "an array of float64 [2, 3, 8, 8] is no set of pictures. Give uint8 [N, H, W] or [N, H, W, 3] [MMP-D076]"
    )
    with pytest.raises(MmpostError, match="2 pictures have 1 labels"):
        images_from_arrays(np.zeros((2, 8, 8), np.uint8), [1], cutting=Cutting(8))


def numbered(count=10):
    return images_from_arrays(noise(count * 4, 4, channels=0).reshape(count, 4, 4), cutting=Cutting(4))


def taken(batches, count):
    return [keys for _, _, keys in itertools.islice(batches, count)]


def test_order_is_resumable_and_an_epoch_shows_every_picture_once():
    pictures = numbered()
    whole = taken(ImageBatches(pictures, batch_size=3, seed=5), 20)
    assert sorted(list(itertools.chain(*whole))[:10]) == sorted(pictures.keys)
    assert whole[0] != taken(ImageBatches(pictures, batch_size=3, seed=6), 1)[0]
    first = ImageBatches(pictures, batch_size=3, seed=5)
    assert taken(first, 7) == whole[:7]
    again = ImageBatches(pictures, batch_size=3, seed=5)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert taken(again, 5) == whole[7:12]
    with pytest.raises(MmpostError) as caught:
        ImageBatches(numbered(11), batch_size=3, seed=5).load_state_dict(first.state_dict())
    assert str(caught.value).startswith("the data are not those of the saved state: size was 10 and is 11.")


def test_processes_share_the_batch_of_one_process():
    pictures = numbered()
    alone = taken(ImageBatches(pictures, batch_size=4, seed=5), 5)
    parts = [taken(ImageBatches(pictures, batch_size=2, seed=5, rank=rank, world=2), 5) for rank in (0, 1)]
    assert [left + right for left, right in zip(*parts, strict=True)] == alone


def test_workers_give_the_same_batches(folder):
    pictures = images_from(folder, size=8, crop="random", flip=True, seed=1)
    alone, helped = (
        list(itertools.islice(ImageBatches(pictures, batch_size=3, seed=2, workers=workers), 3)) for workers in (0, 1)
    )
    for (left, labels, keys), (right, other_labels, other_keys) in zip(alone, helped, strict=True):
        assert torch.equal(left, right)
        assert torch.equal(labels, other_labels)
        assert keys == other_keys
    assert pickle.loads(pickle.dumps(pictures)).keys == pictures.keys


def test_a_file_that_breaks_later_gives_one_clear_message(folder):
    pictures = images_from(folder, size=16)
    (folder / "cat/2.png").write_text("gone")
    for workers in (0, 1):
        with pytest.raises(MmpostError, match="cannot decode image") as caught:
            list(evaluation_batches(pictures, batch_size=2, workers=workers))
        assert caught.value.code == "MMP-D008"


def test_evaluation_shows_every_picture_once_in_order():
    pictures = numbered(7)
    batches = list(evaluation_batches(pictures, batch_size=3))
    assert [len(images) for images, _, _ in batches] == [3, 3, 1]
    assert tuple(itertools.chain(*(keys for _, _, keys in batches))) == pictures.keys


def test_fingerprint_knows_contents_and_cutting(folder):
    first = images_from(folder, size=16).fingerprint
    assert images_from(folder, size=16).fingerprint == first
    assert images_from(folder, size=8).fingerprint != first
    Image.fromarray(noise(16, 16, seed=9)).save(folder / "cat/1.png")
    assert images_from(folder, size=16).fingerprint != first


def test_waiting_share_is_the_time_inside_next():
    def slow():
        for number in range(5):
            time.sleep(0.03)
            yield number

    waiting = Waiting()
    for _ in waiting.timed(slow()):
        time.sleep(0.01)
    assert waiting.first_s >= 0.03
    assert 0.5 < waiting.share < 0.9
