import os
import struct

import numpy as np
import pytest

from mmpost.config.schema import MediaSection
from mmpost.media import audio, limits
from mmpost.media.backends import pcm
from mmpost.media.backends.sound_rules import Want
from tests.unit.test_media_audio import SECTION, encoded, refused, soundfile, tone

WANT = Want(rate=16000, max_seconds=30, min_seconds=0.05)


def wav(payload, *, tag=1, channels=1, rate=16000, bits=16, size=None, before=b"", fields=b""):
    shape = (
        struct.pack("<HHIIHH", tag, channels, rate, rate * channels * bits // 8, channels * bits // 8, bits) + fields
    )
    data = b"data" + struct.pack("<I", len(payload) if size is None else size) + payload
    body = b"WAVEfmt " + struct.pack("<I", len(shape)) + shape + before + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def noise(count, channels=1, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, channels)).astype(np.float32)


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
@pytest.mark.parametrize("format", ["WAV", "WAVEX"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_the_samples_are_those_of_libsndfile(subtype, format, channels, tmp_path):
    path = tmp_path / "a.wav"
    for count in (800, 16001, 40000):
        soundfile.write(path, noise(count, channels), 16000, format=format, subtype=subtype)
        theirs = soundfile.read(path, dtype="float32", always_2d=True)[0]
        assert np.array_equal(pcm.read(str(path), None, WANT), theirs)
        assert np.array_equal(pcm.read(None, path.read_bytes(), WANT), theirs)


def test_the_decode_process_gives_the_same_clip(monkeypatch):
    for channels in (1, 2):
        blob = encoded(noise(20000, channels))
        direct = audio.load(blob, section=SECTION)
        with monkeypatch.context() as patch:
            patch.setattr(pcm, "read", lambda *_: None)
            decoded = audio.load(blob, section=SECTION)
        assert (direct.backend, decoded.backend) == ("wav", "soundfile")
        assert np.array_equal(direct.samples, decoded.samples)
        assert (direct.rate, direct.seconds, direct.channels) == (decoded.rate, decoded.seconds, decoded.channels)


def test_no_process_is_started_for_plain_files():
    limits.close()
    audio.load(encoded(tone()), section=SECTION)
    assert limits.pid() is None
    audio.load(encoded(tone(), format="FLAC"), section=SECTION)
    assert limits.pid() is not None


def test_windows_are_those_of_libsndfile():
    samples = noise(32000)
    blob = encoded(samples, subtype="FLOAT")
    for start, end in ((0.0, 1.0), (0.5, None), (0.25, 1.75), (1.9, 2.0)):
        want = Want(16000, 30, 0.05, start, end)
        part = samples[round(start * 16000) : None if end is None else round(end * 16000)]
        assert np.array_equal(pcm.read(None, blob, want), part)
    for start, end in ((2.0, None), (-1.0, None), (0.0, 2.5), (1.0, 0.5), (0.0, 0.01)):
        assert pcm.read(None, blob, Want(16000, 30, 0.05, start, end)) is None


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"RIFF",
        wav(bytes(4000))[:40],
        wav(bytes(4000))[:-2],  # cut
        wav(bytes(4000), size=4001),
        wav(bytes(4001)),  # half a sample
        wav(bytes(4000), size=0xFFFFFFFF),
        wav(bytes(4000), size=0),
        wav(bytes(4000), rate=8000),
        wav(bytes(4000), bits=24),
        wav(bytes(4000), bits=8),
        wav(bytes(4000), tag=2),
        wav(bytes(4000), channels=0),
        wav(bytes(4000), channels=100),
        wav(bytes(8000), tag=3, bits=64),
        wav(bytes(4000), tag=0xFFFE, fields=b"\x16\0\x10\0\0\0\0\0" + b"\1\0" + bytes(14)),
        wav(bytes(4000), before=b"LIST" + struct.pack("<I", 5000) + bytes(5000)),  # the sound lies far behind
        wav(bytes(1000)),  # too short
        b"RIFX" + wav(bytes(4000))[4:],
    ],
)
def test_everything_unusual_is_left_to_the_decoder(blob):
    assert pcm.read(None, blob, WANT) is None


def test_other_chunks_are_passed_over():
    payload = (noise(4000)[:, 0] * 32767).astype("<i2")
    for before in (b"LIST" + struct.pack("<I", 6) + b"abcdef", b"junk" + struct.pack("<I", 3) + b"abc\0"):
        found = pcm.read(None, wav(payload.tobytes(), before=before) + b"tail", WANT)
        assert np.array_equal(found[:, 0], payload / np.float32(32768))


def test_no_mutated_file_gives_other_samples_than_libsndfile(tmp_path):
    # What is read without a decoder must be what the decoder would have given, whatever happened to the file.
    rng = np.random.default_rng(0)
    taken = 0
    for seed in range(400):
        blob = bytearray(encoded(noise(2000, 1 + seed % 2, seed), subtype=("PCM_16", "FLOAT")[seed % 2]))
        for _ in range(int(rng.integers(1, 4))):
            blob[int(rng.integers(0, 60))] = int(rng.integers(0, 256))
        if seed % 3 == 0:
            blob = blob[: int(rng.integers(0, len(blob)))]
        found = pcm.read(None, bytes(blob), WANT)
        if found is not None:
            taken += 1
            path = tmp_path / "a.wav"
            path.write_bytes(blob)
            theirs, rate = soundfile.read(path, dtype="float32", always_2d=True)
            assert rate == 16000
            assert np.array_equal(found, theirs, equal_nan=True)
    assert taken > 20


def test_pipes_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    assert pcm.read(str(tmp_path / "pipe.wav"), None, WANT) is None
    assert pcm.read(str(tmp_path), None, WANT) is None
    assert pcm.read(str(tmp_path / "none"), None, WANT) is None


def test_errors_are_those_of_the_decoder():
    whole = encoded(tone(1.0))
    assert "32000" in str(refused(whole[:-100], "MMP-D080"))
    refused(encoded(tone(1.0)), "MMP-D011", section=MediaSection(sample_rate=16000, max_audio_seconds=0.5))
    refused(encoded(np.full(1600, np.nan, np.float32), subtype="FLOAT"), "MMP-D082")
    refused(whole, "MMP-D089", start=5.0)
    loud = encoded(np.full(1600, 1e30, np.float32), subtype="FLOAT")
    assert "holds samples of up to 1e+30" in str(refused(loud, "MMP-D082"))
