import io
import os
import struct
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from mmpost.config.schema import MediaSection
from mmpost.core.errors import MmpostError
from mmpost.media import probe, video
from mmpost.media.backends.timeline import choose

av = pytest.importorskip("av")

WIDTH, HEIGHT = 96, 64
BACKENDS = ("pyav", "decord", "torchcodec")


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every back end that works on this machine."""
    found = probe.check_video(request.param)
    if not found.works:
        pytest.skip(found.detail)
    return request.param


def picture(number, total, width=WIDTH, height=HEIGHT):
    """Grey that tells the number of the frame, with a white bar on the left."""
    pixels = np.full((height, width, 3), 20 + round(180 * number / max(1, total - 1)), np.uint8)
    pixels[:, : width // 8] = 255
    return pixels


def encoded(codec="libx264", format="mp4", n=40, fps=20, stamps=None, options=None, pixel_format="yuv420p", sound=0.0):
    """A film; ``stamps`` are the frames' times in units of 1 / fps."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as out:
        stream = out.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixel_format
        track = out.add_stream("aac", rate=44100) if sound else None
        for number in range(n):
            frame = av.VideoFrame.from_ndarray(picture(number, n), format="rgb24")
            frame.pts = number if stamps is None else stamps[number]
            frame.time_base = Fraction(1, fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if track is not None:
            wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(44100 * sound)) / 44100)
            frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 0
            out.mux(track.encode(frame))
            out.mux(track.encode(None))
    return buffer.getvalue()


def numbers(frames, total=40):
    """Which pictures these are."""
    grey = frames[:, :, frames.shape[2] // 2 :].reshape(len(frames), -1).mean(axis=1)
    return np.round((grey - 20) / 180 * (total - 1)).astype(int).tolist()


def section(**options):
    return MediaSection(**{"fps": 4, "max_frames": 64, "decoder": "pyav", **options})


def refused(ref, code, where=None, **options):
    with pytest.raises(MmpostError) as caught:
        video.load(ref, section=where or section(), **options)
    assert caught.value.code == code, str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("codec", "format", "options"),
    [
        ("libx264", "mp4", {}),
        ("libx264", "matroska", {"bf": "2"}),
        ("libx265", "mp4", {"x265-params": "log-level=none"}),
        ("mpeg4", "avi", {"qscale": "2"}),
        ("libvpx-vp9", "webm", {}),
    ],
)
def test_frames_and_times_are_right_with_every_back_end(codec, format, options, backend):
    if codec not in av.codecs_available:
        pytest.skip(codec)
    seen = video.load(encoded(codec, format, options=options), section=section(decoder=backend))
    assert seen.frames.shape == (8, HEIGHT, WIDTH, 3)
    assert seen.frames.dtype == np.uint8
    np.testing.assert_allclose(seen.times, np.arange(8) / 4, atol=1e-3)
    assert np.abs(np.array(numbers(seen.frames)) - np.arange(0, 40, 5)).max() <= 1
    assert (seen.total_frames, seen.backend, seen.variable, seen.notes) == (40, backend, False, ())
    assert (seen.fps, seen.duration, seen.sampled_fps) == pytest.approx((20, 2.0, 4), abs=1e-3)


def test_av1_decodes_and_decord_says_why_not():
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("no AV1 encoder")
    data = encoded("libsvtav1", n=20)
    # This encoder gives a process of root real-time priority, which later tests and their children would keep.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    seen = video.load(data, section=section(decoder="auto"))
    assert (seen.codec, seen.backend, seen.total_frames) == ("av1", "pyav", 20)
    if not probe.check_video("decord").works:
        pytest.skip("no decord")
    message = refused(data, "MMP-D008", section(decoder="decord"))
    assert "decord: its FFmpeg of 2021 cannot decode av1. Other backends: pyav, torchcodec" in message


def test_variable_rates_keep_their_true_times(backend):
    stamps = [*range(20), *range(20, 20 + 5 * 20, 5)]  # one second at 20 per second, five seconds at 4
    seen = video.load(encoded(stamps=stamps, format="matroska"), section=section(fps=2, decoder=backend))
    assert seen.variable
    np.testing.assert_allclose(seen.times, np.arange(12) / 2, atol=1e-3)
    # Frame 20 is at 1 s. By number and mean rate (40 frames in 6 s) it would be taken for the frame at 3 s.
    assert [stamps[number] / 20 for number in numbers(seen.frames)] == pytest.approx(seen.times, abs=0.3)


def test_times_of_b_frames_are_those_of_showing_not_of_storing():
    data = encoded(options={"bf": "3", "x264-params": "b-adapt=0"}, format="matroska")
    with av.open(io.BytesIO(data)) as container:
        stored = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert stored != sorted(stored)
    seen = video.load(data, section=section(fps=20))
    np.testing.assert_allclose(seen.times, np.arange(40) / 20, atol=1e-3)
    assert np.all(np.diff(numbers(seen.frames)) >= 0)


def test_edit_lists_hide_frames():
    data = bytearray(encoded(options={"bf": "0"}))
    at = data.find(b"elst")
    assert at > 0
    assert struct.unpack(">I", data[at + 8 : at + 12])[0] == 1
    data[at + 16 : at + 20] = struct.pack(">i", 10 * 512)  # begin with frame 10 (ticks of 1/10240 s)
    for place in (at + 12, data.find(b"mvhd") + 20, data.find(b"tkhd") + 24):  # 1.5 s are left
        assert struct.unpack(">I", data[place : place + 4])[0] == 2000
        data[place : place + 4] = struct.pack(">I", 1500)
    with av.open(io.BytesIO(bytes(data))) as container:
        assert container.streams.video[0].time_base == Fraction(1, 10240)
        shown = sum(1 for _ in container.decode(video=0))
    seen = video.load(bytes(data), section=section(fps=20))
    assert seen.total_frames == shown == 30
    assert np.abs(np.array(numbers(seen.frames[:5])) - np.arange(10, 15)).max() <= 1
    assert seen.times[0] == 0


def test_seeking_gives_the_same_frames_as_reading_on():
    data = encoded(n=240, options={"g": "12"})
    sparse = video.load(data, section=section(fps=1))
    every = video.load(data, section=section(fps=20, max_frames=240))
    assert every.frames.shape[0] == 240
    np.testing.assert_array_equal(sparse.frames, every.frames[::20])
    part = video.load(data, section=section(fps=20), start=9.0, end=10.0)
    np.testing.assert_array_equal(part.frames, every.frames[180:200])
    np.testing.assert_allclose(part.times, every.times[180:200])


def test_max_frames_widens_the_grid_over_the_whole_clip():
    seen = video.load(encoded(), section=section(fps=20, max_frames=5))
    np.testing.assert_allclose(seen.times, [0, 0.4, 0.8, 1.2, 1.6], atol=1e-3)


def test_fewer_frames_than_asked_for_are_all_there_is_and_said():
    seen = video.load(encoded(n=6, fps=2), section=section(fps=10), origin="a.jsonl:3")
    assert len(seen.frames) == 6
    assert seen.notes == ("a.jsonl:3: video '<bytes>' has 6 readable frames; 30 requested at fps 10 [MMP-D010]",)


def test_one_frame_is_a_video():
    seen = video.load(encoded(n=1), section=section())
    assert (len(seen.frames), seen.times.tolist()) == (1, [0.0])


def test_padding_repeats_the_last_frame_and_its_time():
    seen = video.load(encoded(n=7, fps=4), section=section()).padded(4)
    assert seen.frames.shape[0] == len(seen.times) == 8
    np.testing.assert_array_equal(seen.frames[6], seen.frames[7])
    assert seen.times[6] == seen.times[7]
    assert seen.padded(4) is seen


def turned(data, a, b, c, d):
    """The same MP4 with another display matrix."""
    out = bytearray(data)
    at = out.find(b"tkhd") + 44
    out[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return bytes(out)


@pytest.mark.parametrize(
    ("degrees", "matrix", "side"),
    [(90, (0, 1, -1, 0), "top"), (180, (-1, 0, 0, -1), "right"), (270, (0, -1, 1, 0), "bottom")],
)
@pytest.mark.parametrize("most", [10**6, WIDTH * HEIGHT // 4])
def test_the_turn_of_a_phone_is_applied_once(degrees, matrix, side, most, backend):
    seen = video.load(turned(encoded(), *matrix), section=section(decoder=backend, video_max_pixels=most))
    shrink = 1 if most == 10**6 else 2
    upright = (HEIGHT // shrink, WIDTH // shrink)
    assert seen.frames.shape[1:3] == (upright[::-1] if degrees != 180 else upright)
    assert seen.rotation == degrees
    frame = seen.frames[0].astype(int)
    edges = {"top": frame[1], "bottom": frame[-2], "left": frame[:, 1], "right": frame[:, -2]}
    assert max(edges, key=lambda name: edges[name].mean()) == side


def test_frames_are_shrunk_in_proportion_and_never_enlarged():
    small = video.load(encoded(), section=section(video_max_pixels=24 * 16))
    assert small.frames.shape[1:3] == (16, 24)
    assert video.load(encoded(), section=section(video_max_pixels=10**7)).frames.shape[1:3] == (HEIGHT, WIDTH)


@pytest.mark.parametrize("format", ["mp4", "matroska", "avi"])
@pytest.mark.parametrize("share", [0.6, 0.95])
def test_cut_films_are_errors_with_every_back_end(format, share, backend, tmp_path):
    codec = "mpeg4" if format == "avi" else "libx264"
    options = {"movflags": "faststart"} if format == "mp4" else {}
    noise = np.random.default_rng(0)
    path = tmp_path / "film"
    with av.open(str(path), "w", format=format, options=options) as out:
        stream = out.add_stream(codec, rate=20)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(60):
            pixels = noise.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    data = path.read_bytes()
    with pytest.raises(MmpostError) as caught:
        video.load(data[: int(len(data) * share)], section=section(decoder=backend))
    assert caught.value.code in ("MMP-D080", "MMP-D088", "MMP-D008")
    if format == "matroska":
        assert caught.value.code in ("MMP-D080", "MMP-D088")


def test_a_header_that_counts_too_many_frames_is_an_error():
    data = bytearray(encoded(options={"bf": "0", "g": "1"}))
    at = data.find(b"stts")
    entries = struct.unpack(">I", data[at + 8 : at + 12])[0]
    assert entries == 1
    size = data.find(b"stsz")
    count = struct.unpack(">I", data[size + 12 : size + 16])[0]
    assert count == 40
    data[at + 12 : at + 16] = struct.pack(">I", 400)
    mdhd = data.find(b"mdhd")
    data[mdhd + 20 : mdhd + 24] = struct.pack(">I", 400 * 512)
    with pytest.raises(MmpostError) as caught:
        video.load(bytes(data), section=section())
    assert caught.value.code in ("MMP-D080", "MMP-D008")


def test_what_is_no_film_says_what_it_is(tmp_path):
    assert "the file is empty" in refused(b"", "MMP-D008")
    assert "PyAV" in refused(b"not a film " * 100, "MMP-D008")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        track = out.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        out.mux(track.encode(frame))
        out.mux(track.encode(None))
    assert "has no video stream" in refused(buffer.getvalue(), "MMP-D085")
    assert "has no time stamps" in refused(encoded(format="h264"), "MMP-D086")
    refused(str(tmp_path / "none.mp4"), "MMP-D007")


def test_parts_outside_of_the_film_are_errors():
    refused(encoded(), "MMP-D089", start=5.0)
    refused(encoded(), "MMP-D089", start=1.0, end=0.5)
    refused(encoded(), "MMP-D089", start=0.5, end=30.0)


def test_sound_comes_with_the_pictures_when_asked_for():
    data = encoded(sound=2.0)
    assert video.load(data, section=section()).audio is None
    seen = video.load(data, section=section(), start=0.5, end=1.5, with_audio=True)
    assert seen.audio is not None
    assert abs(seen.audio.seconds - 1.0) < 0.03
    assert seen.times[0] == 0.5
    refused(encoded(), "MMP-D085", with_audio=True)


def animation(format, n=10, **options):
    buffer = io.BytesIO()
    frames = [Image.fromarray(picture(number, n)) for number in range(n)]
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_keep_their_own_times(format):
    data = animation(format, duration=[100, 300] * 5)
    seen = video.load(data, section=section(fps=10))
    assert (seen.total_frames, seen.backend, seen.variable) == (10, "pillow", True)
    assert seen.duration == pytest.approx(2.0)
    np.testing.assert_allclose(seen.times, np.cumsum([0, 100, 300, 100, 300, 100, 300, 100, 300, 100]) / 1000)
    assert numbers(seen.frames, 10) == list(range(10))
    assert refused(data[: len(data) * 2 // 3], "MMP-D080")


def test_a_still_picture_is_one_frame():
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 6), (0, 0, 0, 0)).save(buffer, "PNG")
    seen = video.load(buffer.getvalue(), section=section())
    assert seen.frames.shape == (1, 6, 8, 3)
    assert seen.frames.min() == 255  # transparency is put on white


def test_a_huge_frame_size_is_refused_before_memory_is_taken():
    picture_bytes = bytearray(animation("GIF"))
    picture_bytes[6:10] = b"\xff\xff\xff\xff"
    assert "has frames that are too large" in refused(bytes(picture_bytes), "MMP-D083")
    film = bytearray(encoded("rawvideo", "avi", n=3, pixel_format="bgr24"))
    at = film.find(b"strf") + 12
    film[at : at + 8] = struct.pack("<ii", 10000, 8000)
    assert "has frames of 10000x8000 pixels, more than 67 million" in refused(bytes(film), "MMP-D083")


def test_a_back_end_that_does_not_load_names_what_is_missing():
    found = probe.check_video("torchcodec")
    if found.works:
        pytest.skip("torchcodec works here")
    message = refused(encoded(), "MMP-E092", section(decoder="torchcodec"))
    assert "video back end 'torchcodec' does not work here:" in message
    assert "Set data.media.decoder=auto" in message


def test_auto_takes_the_first_back_end_that_has_decoded_a_clip():
    assert probe.proven_backend() == "pyav"
    assert video.load(encoded(), section=section(decoder="auto")).backend == "pyav"


def test_the_probe_tells_every_decoder():
    names = [finding.name for finding in probe.findings()]
    assert names == ["images", "sound", "sound rates", "pyav", "torchcodec", "decord"]
    for finding in probe.findings():
        assert finding.works or (finding.detail and finding.fix)


@pytest.mark.parametrize("fps", [0.5, 1, 2, 7.3, 24])
@pytest.mark.parametrize("most", [1, 3, 16, 1000])
def test_choice_is_ascending_bounded_and_near_the_grid(fps, most):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        times = np.cumsum(rng.exponential(0.1, int(rng.integers(1, 200))))
        end = float(times[-1]) + 0.1
        choice = choose(times, end, fps=fps, max_frames=most, part=(0.0, None))
        assert 1 <= len(choice.picks) <= choice.wanted <= most
        assert np.all(np.diff(choice.picks) > 0)
        span = end - float(times[0])
        step = max(1 / fps, span / most)
        grid = times[0] + np.arange(choice.wanted) * step
        best = {int(np.abs(times - at).argmin()) for at in grid}
        assert {float(times[pick]) for pick in choice.picks} == {float(times[pick]) for pick in best}
