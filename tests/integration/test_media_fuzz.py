"""Mutated sound and video files: no hang beyond the limit, the parent lives, nothing less than was promised.

The default run has a few dozen files, ``-m slow`` a thousand. A file is mutated by its number alone, so a failure names
the file to look at.
"""

import contextlib
import io
import os
import time
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from mmpost.config.schema import MediaSection
from mmpost.core.errors import MmpostError
from mmpost.media import audio, limits, video

av = pytest.importorskip("av")
soundfile = pytest.importorskip("soundfile")

LIMIT_S = 10.0
SECTION = MediaSection(decode_timeout=LIMIT_S, fps=50, max_frames=64, decoder="pyav")
RATE, SECONDS, FRAMES, FPS = 16000, 1.5, 30, 20
MUTATIONS = ("flip_body", "flip_head", "truncate", "wrong_extension", "empty", "huge_header", "insert", "zero_block")
HEAD_BYTES = 512  # flips in front of here may change what is promised
MEMORY_KB = 3_000_000


def tone():
    at = np.arange(int(RATE * SECONDS)) / RATE
    return (0.4 * np.sin(2 * np.pi * 440 * at) + 0.05 * np.random.default_rng(0).standard_normal(len(at))).astype("f4")


def sound_bytes(container, subtype):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(), RATE, format=container, subtype=subtype)
    return buffer.getvalue()


def picture(number, width=64, height=48):
    pixels = np.random.default_rng(number).integers(0, 60, (height, width, 3), dtype=np.uint8)
    pixels[:, 2 * number : 2 * number + 8] = 220
    return pixels


def video_bytes(container, codec, pixel_format="yuv420p", with_sound=False):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixel_format
        track = out.add_stream("aac", rate=RATE) if with_sound else None
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if track is not None:
            frame = av.AudioFrame.from_ndarray(tone()[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = RATE, 0
            out.mux(track.encode(frame))
            out.mux(track.encode(None))
    return buffer.getvalue()


def m4a_bytes():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        track = out.add_stream("aac", rate=RATE)
        frame = av.AudioFrame.from_ndarray(tone()[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        out.mux(track.encode(frame))
        out.mux(track.encode(None))
    return buffer.getvalue()


def gif_bytes():
    buffer = io.BytesIO()
    frames = [Image.fromarray(picture(number)) for number in range(FRAMES)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=50)
    return buffer.getvalue()


MAKERS = {
    "wav": lambda: sound_bytes("WAV", "PCM_16"),
    "f32.wav": lambda: sound_bytes("WAV", "FLOAT"),
    "flac": lambda: sound_bytes("FLAC", "PCM_16"),
    "mp3": lambda: sound_bytes("MP3", "MPEG_LAYER_III"),
    "ogg": lambda: sound_bytes("OGG", "VORBIS"),
    "opus": lambda: sound_bytes("OGG", "OPUS"),
    "m4a": m4a_bytes,
    "mp4": lambda: video_bytes("mp4", "libx264", with_sound=True),
    "webm": lambda: video_bytes("webm", "libvpx-vp9"),
    "mkv": lambda: video_bytes("matroska", "libx264"),
    "avi": lambda: video_bytes("avi", "mpeg4"),
    "gif": gif_bytes,
}
VIDEO = ("mp4", "webm", "mkv", "avi", "gif")


@pytest.fixture(scope="module")
def originals():
    return {name: make() for name, make in MAKERS.items()}


def flip(data, rng, low, high):
    out = bytearray(data)
    for at in rng.integers(low, high, rng.integers(1, 6)):
        out[at] ^= 1 << rng.integers(8)
    return bytes(out)


def mutated(data, mutation, rng):
    body = min(HEAD_BYTES, len(data) // 4)
    match mutation:
        case "flip_body":
            return flip(data, rng, body, len(data))
        case "flip_head":
            return flip(data, rng, 0, body)
        case "truncate":
            return data[: rng.integers(1, len(data))]
        case "empty":
            return b""
        case "huge_header":
            at = int(rng.integers(0, body - 4))
            return (
                data[:at] + rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]) + data[at + 4 :]
            )
        case "insert":
            at = int(rng.integers(0, len(data)))
            return data[:at] + rng.bytes(int(rng.integers(1, 400))) + data[at:]
        case "zero_block":
            at = int(rng.integers(body, len(data)))
            size = min(int(rng.integers(16, 2000)), len(data) - at)
            return data[:at] + bytes(size) + data[at + size :]
    return data


def length(name, path):
    """Seconds of sound or number of frames that we accept."""
    if name in VIDEO:
        seen = video.load(str(path), section=SECTION)
        assert len(seen.frames) == len(seen.times) >= 1
        return seen.total_frames
    heard = audio.load(str(path), section=SECTION)
    assert np.isfinite(heard.samples).all()
    return heard.seconds


def extension(name, mutation):
    if mutation != "wrong_extension":
        return name.rpartition(".")[2]
    return {"wav": "mp3", "mp4": "wav", "gif": "mp4"}.get(name, "raw")


def outcome(originals, number, folder):
    """What becomes of file ``number``: (name, mutation, length or code, seconds)."""
    rng = np.random.default_rng([7, number])
    name = list(MAKERS)[number % len(MAKERS)]
    mutation = MUTATIONS[(number // len(MAKERS)) % len(MUTATIONS)]
    path = folder / f"{number}.{extension(name, mutation)}"
    path.write_bytes(mutated(originals[name], mutation, rng))
    began = time.monotonic()
    try:
        result = length(name, path)
    except MmpostError as error:
        result = error.code
    path.unlink()
    return name, mutation, result, time.monotonic() - began


def broken_law(name, mutation, result, seconds):
    """The law that an outcome breaks, or None."""
    if seconds > LIMIT_S + 5:
        return f"took {seconds:.1f} s"
    full = FRAMES if name in VIDEO else SECONDS - 0.06  # the slack of codecs that work in blocks
    accepted = not isinstance(result, str)
    if mutation == "empty" and result != "MMP-D008":
        return f"an empty file gave {result}"
    if mutation == "wrong_extension" and (not accepted or result < full):
        return f"the extension changed the result to {result}"
    if mutation in ("truncate", "flip_body", "zero_block", "insert") and accepted and result < full:
        return f"silently fewer: {result} of {full}"
    return None


def check(originals, numbers, folder):
    parent = os.getpid()
    wrong, codes = [], {}
    for number in numbers:
        name, mutation, result, seconds = outcome(originals, number, folder)
        law = broken_law(name, mutation, result, seconds)
        if law:
            wrong.append(f"file {number} ({name}, {mutation}): {law}")
        kind = result if isinstance(result, str) else "accepted"
        codes[kind] = codes.get(kind, 0) + 1
    assert os.getpid() == parent
    assert not wrong, "\n".join(wrong)
    return codes


def test_undamaged_files_are_whole(originals, tmp_path):
    for name, data in originals.items():
        path = tmp_path / f"a.{name}"
        path.write_bytes(data)
        assert length(name, path) >= (FRAMES if name in VIDEO else SECONDS - 0.06), name


def test_mutated_files_of_every_format(originals, tmp_path):
    codes = check(originals, range(len(MAKERS) * len(MUTATIONS)), tmp_path)
    assert codes["accepted"] >= len(MAKERS)  # all wrong extensions at least
    assert codes["MMP-D008"] >= len(MAKERS)  # all empty files at least


@pytest.mark.slow
def test_a_thousand_mutated_files(originals, tmp_path):
    codes = check(originals, range(1000), tmp_path)
    assert sum(codes.values()) == 1000


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_the_decode_process_stays_small_after_huge_headers(originals, tmp_path):
    for number in range(30):
        name = ("wav", "avi", "gif")[number % 3]
        path = tmp_path / f"{number}.{name}"
        path.write_bytes(mutated(originals[name], "huge_header", np.random.default_rng([11, number])))
        with contextlib.suppress(MmpostError):
            length(name, path)
    assert limits.pid() is not None
    with open(f"/proc/{limits.pid()}/status", encoding="ascii") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert peak < MEMORY_KB
