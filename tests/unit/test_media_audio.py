import base64
import io
import math
import struct

import numpy as np
import pytest

from mmpost.config.schema import MediaSection
from mmpost.core.errors import MmpostError
from mmpost.media import audio
from mmpost.media.backends import sound

soundfile = pytest.importorskip("soundfile")
av = pytest.importorskip("av")

SECTION = MediaSection(sample_rate=16000, max_audio_seconds=30)


def tone(seconds=1.0, rate=16000, hertz=440.0, level=0.4):
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples, rate=16000, format="WAV", subtype=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def container_bytes(samples, rate, format, codec, with_pictures=False):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as out:
        pictures = out.add_stream("mpeg4", rate=10) if with_pictures else None
        track = out.add_stream(codec, rate=rate)
        if pictures is not None:
            pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "yuv420p"
            for number in range(10):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * number, np.uint8), format="rgb24")
                frame.pts = number
                out.mux(pictures.encode(frame))
            out.mux(pictures.encode(None))
        if samples is not None:
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, 0
            out.mux(track.encode(frame))
            out.mux(track.encode(None))
    return buffer.getvalue()


def refused(ref, code, section=SECTION, **options):
    with pytest.raises(MmpostError) as caught:
        audio.load(ref, section=section, **options)
    assert caught.value.code == code, str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 1 / 32000),
        ("WAV", "FLOAT", 0),
        ("FLAC", "PCM_24", 1e-6),
        ("AIFF", "PCM_16", 1 / 32000),
        ("AU", "PCM_16", 1 / 32000),
        ("CAF", "PCM_16", 1 / 32000),
        ("W64", "PCM_16", 1 / 32000),
        ("RF64", "PCM_16", 1 / 32000),
        ("OGG", "VORBIS", 0.1),
    ],
)
def test_formats_of_libsndfile_give_the_samples(format, subtype, tolerance, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(encoded(tone(), format=format, subtype=subtype))
    heard = audio.load(str(path), section=SECTION)
    reader = "wav" if format == "WAV" else "soundfile"
    assert (heard.rate, heard.source_rate, heard.channels, heard.backend) == (16000, 16000, 1, reader)
    assert heard.samples.dtype == np.float32
    assert heard.seconds == 1.0
    np.testing.assert_allclose(heard.samples, tone(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("format", "codec"), [("mp4", "aac"), ("matroska", "aac"), ("webm", "libopus")])
def test_sound_tracks_of_containers(format, codec):
    rate = 48000 if codec == "libopus" else 44100
    heard = audio.load(container_bytes(tone(2.0, rate), rate, format, codec), section=SECTION)
    assert (heard.backend, heard.source_rate) == ("pyav", rate)
    assert abs(heard.seconds - 2.0) < 0.05
    spectrum = np.abs(np.fft.rfft(heard.samples[8000:24000]))
    assert int(spectrum.argmax()) == 440


def test_sound_of_a_video_and_video_without_sound():
    with_sound = container_bytes(tone(1.0, 44100), 44100, "mp4", "aac", with_pictures=True)
    assert abs(audio.load(with_sound, section=SECTION).seconds - 1.0) < 0.05
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    assert "has no sound track" in str(refused(buffer.getvalue(), "MMP-D085"))


def test_references_of_every_kind_give_the_same(tmp_path):
    data = encoded(tone(0.5), format="WAV")
    (tmp_path / "a.wav").write_bytes(data)
    text = base64.b64encode(data).decode()
    wanted = audio.load(data, section=SECTION).samples
    for ref in (f"file://{tmp_path}/a.wav", f"data:audio/wav;base64,{text}", text):
        np.testing.assert_array_equal(audio.load(ref, section=SECTION).samples, wanted)
    np.testing.assert_array_equal(audio.load("a.wav", section=SECTION, roots=[tmp_path]).samples, wanted)
    flac = base64.b64encode(encoded(tone(0.5), format="FLAC")).decode()
    np.testing.assert_allclose(audio.load(flac, section=SECTION).samples, wanted, rtol=0, atol=1 / 16000)
    refused("https://example.org/a.wav", "MMP-D035")
    refused("missing.wav", "MMP-D007", roots=[tmp_path])


def test_a_truncated_wav_is_an_error_and_not_a_short_clip(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(tone(2.0))[:20000])
    with soundfile.SoundFile(path) as opened:
        assert 0 < opened.frames < 32000  # libsndfile passes it in silence
    error = refused(str(path), "MMP-D080", origin="rows.jsonl:7")
    assert str(error) == (
        f"rows.jsonl:7: audio '{path}' promises 64000 bytes of sound but holds 19956. Copy or record the file again, "
        "or leave the row out with data.on_bad_row=quarantine [MMP-D080]"
    )


@pytest.mark.parametrize(("format", "code"), [("MP3", "MMP-D080"), ("OGG", "MMP-D088"), ("FLAC", None)])
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_compressed_files_that_were_cut_are_errors(format, code, share):
    data = encoded(tone(2.0), format=format)
    with pytest.raises(MmpostError) as caught:
        audio.load(data[: int(len(data) * share)], section=SECTION)
    assert caught.value.code in ((code,) if code else ("MMP-D008", "MMP-D080"))


def test_an_ogg_file_that_ends_between_two_pages_is_cut():
    data = encoded(np.random.default_rng(0).standard_normal(64000).astype("f4") * 0.1, format="OGG")
    pages = [at for at in range(len(data)) if data[at : at + 4] == b"OggS"]
    assert "promises a last page but holds none" in str(refused(data[: pages[-1]], "MMP-D080"))


def test_a_damaged_ogg_page_is_an_error():
    data = bytearray(encoded(tone(2.0), format="OGG"))
    data[len(data) // 2] ^= 1
    assert "a damaged page at byte" in str(refused(bytes(data), "MMP-D088"))


def test_a_cut_sound_track_of_a_container_is_an_error():
    data = container_bytes(tone(4.0, 44100), 44100, "matroska", "aac")
    for share in (0.5, 0.8):
        with pytest.raises(MmpostError) as caught:
            audio.load(data[: int(len(data) * share)], section=SECTION)
        assert caught.value.code in ("MMP-D080", "MMP-D088")
    m4a = container_bytes(tone(4.0, 44100), 44100, "mp4", "aac")
    refused(m4a[: len(m4a) // 2], "MMP-D008")  # its index is at the end


def test_streamed_wav_without_a_length_is_whole():
    data = bytearray(encoded(tone(1.0)))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    assert data[36:40] == b"data"
    assert audio.load(bytes(data), section=SECTION).seconds == 1.0


@pytest.mark.parametrize(("milliseconds", "accepted"), [(0, False), (20, False), (49, False), (50, True)])
def test_clips_that_would_give_no_token_are_refused(milliseconds, accepted):
    data = encoded(tone(milliseconds / 1000))
    if accepted:
        assert len(audio.load(data, section=SECTION).samples) == 16 * milliseconds
    else:
        error = refused(data, "MMP-D081")
        assert f"lasts {milliseconds} ms; at least 50 ms is needed" in str(error)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite_are_an_error(value):
    samples = tone()
    samples[[10, 4000]] = value
    assert "holds 2 samples that are not finite" in str(refused(encoded(samples, subtype="FLOAT"), "MMP-D082"))


def test_stereo_is_one_clip_and_not_one_clip_per_sample():
    stereo = np.stack([tone(hertz=440), tone(hertz=880)], axis=1)
    heard = audio.load(encoded(stereo, subtype="FLOAT"), section=SECTION)
    assert (heard.samples.shape, heard.channels, heard.notes) == ((16000,), 2, ())
    np.testing.assert_allclose(heard.samples, stereo.mean(axis=1), rtol=0, atol=1e-6)


def test_channels_of_opposite_phase_do_not_cancel():
    stereo = np.stack([0.5 * tone(), -tone()], axis=1)
    stereo[:, 0] = -stereo[:, 1] * 0.95
    heard = audio.load(encoded(stereo, subtype="FLOAT"), section=SECTION)
    np.testing.assert_array_equal(heard.samples, stereo[:, 1])
    assert heard.notes == ("channels cancel each other; channel 2 of 2 is used alone [MMP-D090]",)


def test_silence_is_sound():
    heard = audio.load(encoded(np.zeros((16000, 2), np.float32)), section=SECTION)
    assert (heard.notes, float(np.abs(heard.samples).max())) == ((), 0.0)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_resampling_keeps_length_pitch_and_level(rate):
    heard = audio.load(encoded(tone(1.0, rate), rate, subtype="FLOAT"), section=SECTION)
    assert (len(heard.samples), heard.source_rate) == (16000, rate)
    middle = slice(2000, 14000)
    np.testing.assert_allclose(heard.samples[middle], tone()[middle], rtol=0, atol=2e-3)


def test_tones_above_the_new_band_vanish():
    heard = audio.load(encoded(tone(1.0, 44100, hertz=12000.0), 44100, subtype="FLOAT"), section=SECTION)
    assert np.abs(heard.samples[2000:14000]).max() < 1e-3  # without a filter it would come back at 4 kHz


def test_both_resamplers_agree_in_the_band():
    torchaudio = pytest.importorskip("torchaudio")
    assert torchaudio is not None
    rng = np.random.default_rng(0)
    at = np.arange(44100) / 44100
    samples = sum(0.05 * np.sin(2 * np.pi * hertz * at + rng.uniform(0, 6)) for hertz in range(200, 7000, 400))
    samples = samples.astype(np.float32)
    first, second = sound.resample(samples, 44100, 16000), sound._resample_torchaudio(samples, 44100, 16000)
    assert len(first) == len(second) == 16000
    inside = slice(800, 15200)
    noise = np.square(first[inside] - second[inside]).mean() / np.square(first[inside]).mean()
    assert 10 * math.log10(noise) < -60


def test_too_long_is_an_error_and_a_part_is_read_alone():
    section = MediaSection(max_audio_seconds=2)
    data = encoded(np.concatenate([tone(3.0), tone(3.0, hertz=880)]), subtype="FLOAT")
    assert str(refused(data, "MMP-D011", section)) == (
        "audio '<bytes>' lasts 6.0 s; the adapter uses 2 s per clip. "
        "Raise data.media.max_audio_seconds or split the clip [MMP-D011]"
    )
    part = audio.load(data, section=section, start=3.0, end=5.0)
    np.testing.assert_array_equal(part.samples, tone(3.0, hertz=880)[:32000])
    refused(data, "MMP-D089", section, start=6.5)
    refused(data, "MMP-D089", section, start=5.0, end=9.0)
    track = container_bytes(np.concatenate([tone(3.0, 44100), tone(3.0, 44100, hertz=880)]), 44100, "mp4", "aac")
    refused(track, "MMP-D011", section)
    heard = audio.load(track, section=section, start=4.0, end=5.0)
    assert abs(heard.seconds - 1.0) < 0.03
    assert int(np.abs(np.fft.rfft(heard.samples[:16000], 16000)).argmax()) == pytest.approx(880, abs=2)


def test_huge_headers_are_refused_before_memory_is_taken():
    data = bytearray(encoded(tone(0.1)))
    data[22:24] = struct.pack("<H", 0xFFFF)  # channels
    with pytest.raises(MmpostError) as caught:
        audio.load(bytes(data), section=SECTION)
    assert caught.value.code in ("MMP-D008", "MMP-D083")
    fast = bytearray(encoded(tone(0.1)))
    fast[24:28] = struct.pack("<I", 2_000_000_000)  # samples per second
    assert "which cannot be right" in str(refused(bytes(fast), "MMP-D083"))
    long = bytearray(encoded(tone(0.1)))
    long[40:44] = struct.pack("<I", 0x70000000)
    assert "promises 1879048192 bytes of sound but holds 3200" in str(refused(bytes(long), "MMP-D080"))


def test_what_is_no_sound_says_so(tmp_path):
    assert "the file is empty" in str(refused(b"", "MMP-D008"))
    (tmp_path / "a.wav").write_text("not a sound " * 50)
    message = str(refused(str(tmp_path / "a.wav"), "MMP-D008"))
    assert "soundfile" in message
    assert "PyAV" in message
    refused(str(tmp_path), "MMP-D008")


def test_content_decides_and_not_the_extension(tmp_path):
    (tmp_path / "a.raw").write_bytes(encoded(tone(), format="FLAC"))
    (tmp_path / "b.wav").write_bytes(container_bytes(tone(1.0, 44100), 44100, "mp4", "aac"))
    assert audio.load(str(tmp_path / "a.raw"), section=SECTION).backend == "soundfile"
    assert audio.load(str(tmp_path / "b.wav"), section=SECTION).backend == "pyav"


def test_integer_samples_are_scaled():
    heard = audio.load(encoded(np.array([0, 16384, -32768] * 2000, np.int16)), section=SECTION)
    np.testing.assert_array_equal(heard.samples[:3], np.array([0.0, 0.5, -1.0], np.float32))
