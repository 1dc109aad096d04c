"""The questions about sounds: balanced, planted as they say, and split by recording."""

import hashlib
import json
import re
from collections import Counter
from importlib.resources import files

import numpy as np
import pytest

from mmpost.core.errors import MmpostError
from mmpost.media import audio
from mmpost_tasks import demo_audio

pytest.importorskip("soundfile")


def test_files_are_those_of_the_list():
    data = files("mmpost_tasks") / "data"
    notes = json.loads((data / "sounds.json").read_text())
    assert [sheet["label"] for sheet in notes["sheets"]] == list(demo_audio.CLASSES)
    for sheet in notes["sheets"]:
        assert hashlib.sha256((data / sheet["file"]).read_bytes()).hexdigest() == sheet["sha256"]


def test_no_recording_is_in_both_splits():
    train, heldout = demo_audio.recordings("train"), demo_audio.recordings("heldout")
    for label in demo_audio.CLASSES:
        names = [{one.name for one in split[label]} for split in (train, heldout)]
        assert not names[0] & names[1]
        assert min(map(len, names)) >= 2
        sounds = {one.samples.tobytes() for split in (train, heldout) for one in split[label]}
        assert len(sounds) == len(names[0]) + len(names[1])
        for one in (*train[label], *heldout[label]):
            assert 0.08 <= len(one.samples) / one.rate <= 1.0
            assert np.abs(one.samples).max() == pytest.approx(0.9, abs=0.01)


def test_kinds_and_answers_are_balanced_in_every_prefix():
    rows = demo_audio.load("pool", limit=48)
    counts = Counter((row.columns["kind"], row.columns["solution"]) for row in rows)
    assert set(counts.values()) == {4}
    assert len(counts) == 12


def test_listen_rows_say_nothing_and_hint_rows_say_all():
    facts = {fact: label for label, said in demo_audio.HINTS.items() for fact in said}
    assert len(facts) == 2 * len(demo_audio.CLASSES)
    places = []
    for row in demo_audio.load("train", limit=240):
        text = row.turns[0].text
        said = [label for fact, label in facts.items() if fact in text]
        assert said == ([row.columns["solution"]] if row.columns["kind"] == "hint" else [])
        options = re.search(r"Options: (.*?)\.", text)[1].split(", ")
        assert options == row.columns["options"]
        assert len(set(options)) == demo_audio.OPTIONS
        places.append(options.index(row.columns["solution"]))
        assert row.turns[1].text == f"<answer>{row.columns['solution']}</answer>"
        # The recording is of the class.
        names = {one.name for one in demo_audio.recordings("train")[row.columns["solution"]]}
        assert row.columns["sound"] in names
    # 60 expected at each of four places; 5 standard deviations are 34.
    assert all(abs(count - 60) < 34 for count in np.bincount(places, minlength=4))


def test_clips_last_a_second_and_blind_rows_have_none():
    rows = demo_audio.load("heldout", limit=6)
    assert rows == demo_audio.load("heldout", limit=6, seed=7)
    for row in rows:
        sound = audio.load(row.media("audio")[0].ref)
        assert len(sound.samples) == 16000
        assert 0.09 < np.abs(sound.samples).max() < 0.52
    assert not any(row.media() for row in demo_audio.load("blind", limit=6))
    pool, other = demo_audio.load("pool", limit=6), demo_audio.load("pool", limit=6, seed=1)
    assert pool == demo_audio.load("pool", limit=6)
    assert pool != other


def test_unknown_split():
    with pytest.raises(MmpostError, match=r"\[MMP-C006\]"):
        demo_audio.load("test")
