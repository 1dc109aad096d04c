"""What stands in the place of a medium: as long and as large, silent or noisy, and somebody else's."""

import io
import wave

import numpy as np
import pytest
from PIL import Image

from mmpost.config.schema import MediaSection
from mmpost.contribution.nulls import NAMES, Replacer, parse, require_media
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Part, Sample, Turn
from mmpost.media import audio, film, image, video, wav

pytest.importorskip("soundfile")
pytest.importorskip("av")
RATE = 16000


def sample(number, kind, *refs):
    parts = (*(Part(kind, ref=ref) for ref in refs), Part("text", f"What is it? {number}"))
    turns = (Turn("user", parts), Turn("assistant", (Part("text", "a"),)))
    return Sample(str(number), turns, {"solution": "a"}, f"rows.jsonl:{number}")


def tone(hertz, samples):
    return wav.encode(0.3 * np.sin(2 * np.pi * hertz * np.arange(samples) / RATE), RATE)


def picture(colour, size=(20, 12)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def clip(value, count=4):
    frames = np.full((count, 16, 24, 3), value, np.uint8)
    frames[:, :8] += np.arange(count, dtype=np.uint8)[:, None, None, None] * 20
    return film.encode(frames, np.arange(count) / 2, 2.0)


def replacer(rows, kind, seed=0):
    return Replacer(rows, kind, section=MediaSection(), seed=seed)


def null(name, kind="audio"):
    (found,) = parse(name, kind)
    return found


def refs(row, kind):
    return [part.ref for part in row.media(kind)]


# -- names -----------------------------------------------------------------------------------------------------------


def test_all_names_every_null_once():
    assert [one.name for one in parse("none, all", "audio")] == ["none", "silence", "noise", "shuffle"]
    assert [one.name for one in parse("all", "video")] == list(NAMES)
    assert parse("silence:30", "audio")[0].seconds == 30.0


@pytest.mark.parametrize(
    ("words", "kind"),
    [("quiet", "audio"), ("silence:30", "image"), ("noise:3", "audio"), ("silence:x", "audio"), ("", "audio")],
)
def test_unknown_names_are_refused(words, kind):
    with pytest.raises(MmpostError, match=r"\[MMP-C004\]"):
        parse(words, kind)


def test_rows_without_the_medium_are_named():
    rows = [sample(1, "audio", tone(300, 1600)), sample(2, "image", picture("red")), sample(3, "audio")]
    with pytest.raises(MmpostError) as caught:
        require_media(rows, "audio")
    assert str(caught.value) == (
        "2 of 3 rows have no audio; first: rows.jsonl:2, rows.jsonl:3. Leave them out, or choose another --modality. "
        "[MMP-D060]"
    )


# -- sound -----------------------------------------------------------------------------------------------------------


def test_silence_is_zeros_of_the_same_length_and_the_rest_of_the_row_stays():
    rows = [sample(1, "audio", tone(300, 12345), tone(500, 4000))]
    got = replacer(rows, "audio")(0, null("silence"))
    for before, after in zip(refs(rows[0], "audio"), refs(got, "audio"), strict=True):
        assert len(audio.load(after).samples) == len(audio.load(before).samples)
        assert not audio.load(after).samples.any()
    assert (got.id, got.columns, got.turns[1]) == (rows[0].id, rows[0].columns, rows[0].turns[1])
    assert got.turns[0].text == rows[0].turns[0].text


def test_thirty_seconds_of_silence():
    got = replacer([sample(1, "audio", tone(300, 1600))], "audio")(0, null("silence:30"))
    assert audio.load(refs(got, "audio")[0]).seconds == 30.0


def test_noise_is_as_loud_and_new_for_every_vote():
    rows = [sample(1, "audio", tone(300, 16000))]
    replace = replacer(rows, "audio")
    first, second = (audio.load(refs(replace(0, null("noise"), vote), "audio")[0]).samples for vote in (0, 1))
    power = np.sqrt(np.mean(audio.load(refs(rows[0], "audio")[0]).samples ** 2))
    assert len(first) == 16000
    assert np.sqrt(np.mean(first**2)) == pytest.approx(power, rel=0.02)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    again = audio.load(refs(replacer(rows, "audio")(0, null("noise"), 0), "audio")[0]).samples
    assert np.array_equal(first, again)
    other = audio.load(refs(replacer(rows, "audio", seed=1)(0, null("noise"), 0), "audio")[0]).samples
    assert not np.array_equal(first, other)
    # White: no frequency stands out.
    spectrum = np.abs(np.fft.rfft(first)) ** 2
    assert spectrum.max() < 25 * spectrum.mean()


def test_none_leaves_the_words():
    got = replacer([sample(1, "audio", tone(300, 1600))], "audio")(0, null("none"))
    assert not got.media()
    assert got.turns[0].text == "What is it? 1"


def test_shuffle_lends_the_media_of_every_other_row_equally_often():
    rows = [sample(number, "audio", tone(200 + number, 1600)) for number in range(5)]
    replace = replacer(rows, "audio")
    names = [refs(row, "audio")[0] for row in rows]
    drawn = [names.index(refs(replace(2, null("shuffle"), vote), "audio")[0]) for vote in range(2000)]
    counts = np.bincount(drawn, minlength=5)
    assert counts[2] == 0
    # Four others with 500 each expected; 5 standard deviations of a binomial are 97.
    assert all(abs(count - 500) < 97 for count in counts[[0, 1, 3, 4]])


def test_shuffle_never_lends_the_same_sound():
    same = tone(300, 1600)
    rows = [sample(1, "audio", same), sample(2, "audio", same), sample(3, "audio", tone(400, 1600))]
    replace = replacer(rows, "audio")
    assert all(refs(replace(0, null("shuffle"), vote), "audio") == refs(rows[2], "audio") for vote in range(20))
    with pytest.raises(MmpostError, match=r"rows.jsonl:1: no other row .* \[MMP-D061\]"):
        replacer(rows[:2], "audio")(0, null("shuffle"))


# -- pictures and films ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["silence", "noise"])
def test_pictures_keep_their_size(name):
    data = Image.new("RGB", (20, 12), "red")
    data.paste("blue", (0, 0, 10, 12))
    buffer = io.BytesIO()
    data.save(buffer, "PNG")
    got = replacer([sample(1, "image", buffer.getvalue())], "image")(0, null(name, "image"))
    pixels = np.asarray(image.load(refs(got, "image")[0]))
    assert pixels.shape == (12, 20, 3)
    if name == "silence":
        assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [[128, 0, 128]]
    else:
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200


@pytest.mark.parametrize("name", ["silence", "noise"])
def test_films_keep_their_frames_and_times(name):
    rows = [sample(1, "video", clip(100))]
    before = video.load(refs(rows[0], "video")[0])
    got = replacer(rows, "video")(0, null(name, "video"))
    after = video.load(refs(got, "video")[0])
    assert after.frames.shape == before.frames.shape
    assert after.times == pytest.approx(before.times)
    assert (len(np.unique(after.frames)) == 1) is (name == "silence")


def test_films_are_written_without_loss():
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    times = np.array([0.0, 0.5, 1.0, 2.0, 2.5])
    got = video.load(film.encode(frames, times, 2.0), section=MediaSection(fps=30.0))
    assert np.array_equal(got.frames[np.searchsorted(got.times, times)], frames)


def test_wav_is_read_by_the_standard_library():
    with wave.open(io.BytesIO(wav.encode(np.array([0.0, 1.0, -2.0, 0.5]), 8000))) as file:
        assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (1, 8000, 2)
        assert np.frombuffer(file.readframes(4), "<i2").tolist() == [0, 32767, -32767, 16384]
