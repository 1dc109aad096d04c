import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mmpost.core.errors import MmpostError
from mmpost.media import image


def encoded(picture, format="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width=24, height=16, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def code_of(call):
    with pytest.raises(MmpostError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "TIFF", "GIF", "JPEG"])
def test_every_format_gives_rgb_of_the_header_size(format, tmp_path):
    path = tmp_path / f"a.{format.lower()}"
    path.write_bytes(encoded(noise(), format))
    loaded = image.load(str(path))
    assert (loaded.mode, loaded.size) == ("RGB", (24, 16))
    assert image.size(str(path)) == loaded.size
    if format in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(noise()))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_the_standard_says(orientation, format):
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste((255, 255, 255), (0, 0, 16, 8))  # one white corner: top left
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Transpose members that undo the camera's turn
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(inverse[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    data = encoded(stored, format, exif=exif, **options)
    loaded = image.load(data)
    assert loaded.size == image.size(data) == (32, 16)
    difference = np.abs(np.asarray(loaded, dtype=int) - np.asarray(upright, dtype=int))
    assert difference.max() <= 12  # JPEG loss at quality 95; a wrong turn differs by 255


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unreadable_exif_does_not_stop_an_image():
    data = encoded(noise(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert image.load(data).size == (24, 16) == image.size(data)


def test_cmyk_jpeg_becomes_rgb():
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    data = encoded(red.convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    loaded = np.asarray(image.load(data), dtype=int)
    assert np.abs(loaded - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    loaded = np.asarray(image.load(encoded(Image.fromarray(ramp), format)))
    expected = (ramp.astype(float) / 257).round().astype(np.uint8)
    np.testing.assert_array_equal(loaded, np.repeat(expected[..., None], 3, axis=2))


def test_sixteen_bit_colour_keeps_its_high_byte():
    raw = b"".join(b"\0" + struct.pack(">3H", 0xFFFF, 0x8000, 0x00FF) * 2 for _ in range(2))
    header = struct.pack(">2I5B", 2, 2, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    np.testing.assert_array_equal(np.asarray(image.load(data))[0, 0], [255, 128, 0])


def test_alpha_is_put_on_white():
    rgba = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (10, 20, 30, 255))
    rgba.putpixel((2, 0), (0, 0, 0, 128))
    row = np.asarray(image.load(encoded(rgba)))[0]
    assert row[0].tolist() == [255, 255, 255]
    assert row[1].tolist() == [10, 20, 30]
    assert np.abs(row[2].astype(int) - 127).max() <= 1


def test_palette_transparency_is_put_on_white():
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    loaded = np.asarray(image.load(encoded(picture, transparency=0)))
    assert loaded.tolist() == [[[255, 255, 255], [0, 0, 255]]]
    opaque = np.asarray(image.load(encoded(picture)))
    assert opaque.tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_one_pixel_of_every_mode(mode):
    loaded = image.load(encoded(Image.new(mode, (1, 1))))
    assert (loaded.mode, loaded.size) == ("RGB", (1, 1))


def test_float_pixels_are_refused():
    error = code_of(lambda: image.load(encoded(Image.new("F", (2, 2), 0.5), "TIFF"), origin="d.jsonl:4"))
    assert str(error) == (
        "d.jsonl:4: cannot decode image '<bytes>': Pillow: floating-point pixels have no agreed brightness; "
        "convert the file to 8 or 16 bits. Other backends: none [MMP-D008]"
    )


def test_paths_bytes_data_uris_and_base64_are_the_same_image(tmp_path):
    data = encoded(noise())
    (tmp_path / "a b.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    refs = [
        data,
        str(tmp_path / "a b.png"),
        (tmp_path / "a b.png").as_uri(),
        text,
        f"data:image/png;base64,{text}",
    ]
    for ref in refs:
        np.testing.assert_array_equal(np.asarray(image.load(ref)), np.asarray(noise()))
        assert image.size(ref) == (24, 16)


def test_relative_paths_are_looked_up_in_the_roots_in_order(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(encoded(noise(seed=seed)))
    roots = [tmp_path / "none", tmp_path / "two", tmp_path / "one"]
    np.testing.assert_array_equal(np.asarray(image.load("a.png", roots=roots)), np.asarray(noise(seed=2)))


def test_missing_file_names_the_folders(tmp_path):
    error = code_of(lambda: image.load("a.png", origin="d.jsonl:3", roots=[tmp_path, tmp_path / "x"]))
    assert str(error) == (
        f"d.jsonl:3: image file not found: 'a.png'. Looked in: {tmp_path}, {tmp_path}/x. "
        "Set Source.media_root [MMP-D007]"
    )


def test_urls_are_not_downloaded():
    error = code_of(lambda: image.load("https://example.com/a.png", origin="d.jsonl:3"))
    assert str(error) == (
        "d.jsonl:3: image 'https://example.com/a.png' is a URL, and nothing is downloaded while rows are "
        "read. "
        "Download it first and put the file's path in the row [MMP-D035]"
    )


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_files_are_an_error(format, share, tmp_path):
    data = encoded(noise(64, 64), format)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(len(data) * share)])
    error = code_of(lambda: image.load(str(path), origin="d.jsonl:9"))
    assert error.code == "MMP-D008"
    assert str(error).startswith(f"d.jsonl:9: cannot decode image '{path}': Pillow: ")
    assert str(error).endswith(". Other backends: none [MMP-D008]")


def outcome(call, data):
    """None or the code of the only error type that may come out."""
    try:
        call(data)
    except MmpostError as error:
        return error.code
    return None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"])
def test_damage_anywhere_gives_a_typed_error_or_an_image(format):
    rng = np.random.default_rng(5)
    data = encoded(noise(8, 8), format)
    damaged = [data[:end] for end in range(0, len(data), 3)]
    for _ in range(60):
        broken = bytearray(data)
        broken[rng.integers(len(data))] = rng.integers(256)
        damaged.append(bytes(broken))
    outcomes = {outcome(call, one) for one in damaged for call in (image.load, image.size)}
    assert "MMP-D008" in outcomes
    assert outcomes <= {None, "MMP-D008", "MMP-D027"}


def test_empty_and_foreign_files(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello, world")
    empty = code_of(lambda: image.load(str(tmp_path / "empty.png")))
    assert (
        str(empty) == f"cannot decode image '{tmp_path}/empty.png': Pillow: the file is empty. "
        "Other backends: none [MMP-D008]"
    )
    text = code_of(lambda: image.size(str(tmp_path / "text.png")))
    assert "not an image (the file starts with 68 65 6c 6c 6f 2c 20 77)" in str(text)
    folder = code_of(lambda: image.load(str(tmp_path)))
    assert "file system: Is a directory" in str(folder)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    assert code_of(lambda: image.load(eps)).code == "MMP-D008"


def test_broken_base64():
    error = code_of(lambda: image.load("data:image/png;base64,iVBORw0KGgo!", origin="d.jsonl:1"))
    assert str(error).startswith("d.jsonl:1: cannot decode image '<bytes>': base64: ")
    assert error.code == "MMP-D008"


@pytest.mark.parametrize("call", [image.load, image.size])
def test_decompression_bomb_names_its_size(call):
    header = struct.pack(">2I5B", 20000, 10000, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", header), (b"IDAT", b""))
    ]
    error = code_of(lambda: call(b"\x89PNG\r\n\x1a\n" + b"".join(chunks), origin="d.jsonl:2"))
    assert str(error) == (
        "d.jsonl:2: image '<bytes>' is 20000\u00d710000 (200.0 MP); larger than Pillow's safety limit [MMP-D027]"
    )


def test_size_reads_the_header_only():
    data = encoded(noise(64, 48), "JPEG")
    assert image.size(data[: len(data) // 2]) == (64, 48)


def test_encode_is_lossless():
    np.testing.assert_array_equal(np.asarray(image.load(image.encode(noise()))), np.asarray(noise()))
