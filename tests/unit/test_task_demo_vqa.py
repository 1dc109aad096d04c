import hashlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from importlib.resources import files

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mmpost.config.schema import Source
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Part, Sample, Turn
from mmpost.data.source import read_source
from mmpost.media import image
from mmpost.rewards import REWARDS
from mmpost_tasks import TASKS, tiles
from mmpost_tasks.build_fashion_sheets import sheet_of
from mmpost_tasks.demo_vqa import KINDS, ROWS, SHOES, TASK, load
from mmpost_tasks.export import write_jsonl

PICTURES = {
    ("digits", "train"): (985, "89fd01f1a6df3d65"),
    ("digits", "unlabelled"): (355, "6a0d6de5fe7deb78"),
    ("digits", "heldout"): (457, "a046e40ee1c3429a"),
    ("clothes", "train"): (1800, "9519d646b4d8ead9"),
    ("clothes", "unlabelled"): (800, "74b208f42f95252a"),
    ("clothes", "heldout"): (600, "9dfc8744023d60c4"),
}
QUESTIONS = {"unlabelled": "4130060c7b19708b", "heldout": "68294ff34a27bb79", "train": "93b3523d227a6497"}


@pytest.fixture(scope="module")
def rows():
    return {split: load(split) for split in tiles.SPLITS}


def _fingerprint(domain, split):
    digest = hashlib.sha256()
    for label, shown in tiles.load(domain, split).items():
        digest.update(json.dumps([label, shown.ids]).encode() + shown.pixels.tobytes())
    return sum(len(t.ids) for t in tiles.load(domain, split).values()), digest.hexdigest()[:16]


def _words(samples):
    told = [[s.id, s.turns[0].text, s.columns["solution"], s.columns["pictures"]] for s in samples]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _labels(split):
    return {
        name: label
        for domain in tiles.LABELS
        for label, shown in tiles.load(domain, split).items()
        for name in shown.ids
    }


def _truth(sample, shown):
    asked, kind = sample.turns[0].text, sample.columns["kind"]
    if kind == "read":
        places = {"left": shown[0], "middle": shown[len(shown) // 2], "right": shown[-1]}
        return next((label for place, label in places.items() if place in asked), shown[0])
    if kind == "name":
        return "ABCD"[sample.columns["choices"].index(shown[0])]
    if kind == "count":
        return str(sum(label in SHOES for label in shown))
    return str({"larger": max, "sum": sum}[kind](int(label) for label in shown))


@pytest.mark.parametrize(("domain", "split"), PICTURES)
def test_splits_of_pictures_never_change(domain, split):
    assert _fingerprint(domain, split) == PICTURES[domain, split]


@pytest.mark.parametrize("split", QUESTIONS)
def test_questions_never_change(rows, split):
    # A new value here means a new TASK.version: scores before and after do not compare.
    assert _words(rows[split]) == QUESTIONS[split]


def test_no_picture_occurs_twice_in_or_across_splits():
    digests = Counter(
        hashlib.sha256(tile.tobytes()).hexdigest()
        for domain in tiles.LABELS
        for split in tiles.SPLITS
        for shown in tiles.load(domain, split).values()
        for tile in shown.pixels
    )
    assert len(digests) == 1797 + 3200
    assert set(digests.values()) == {1}


def test_digits_are_those_of_scikit_learn_with_their_labels():
    bunch = load_digits()
    for split in tiles.SPLITS:
        for label, shown in tiles.load("digits", split).items():
            positions = [int(name.rpartition("/")[2]) for name in shown.ids]
            assert set(bunch.target[positions]) == {int(label)}
            np.testing.assert_array_equal(np.round(bunch.images[positions] * 255 / 16), shown.pixels)


def test_sheets_match_their_notes():
    folder = files("mmpost_tasks") / "data"
    notes = json.loads((folder / "fashion.json").read_text())
    sizes = []
    for sheet, label in zip(notes["sheets"], tiles.CLOTHES, strict=True):
        data = (folder / sheet["file"]).read_bytes()
        sizes.append(len(data))
        assert (sheet["label"], sheet["sha256"]) == (label, hashlib.sha256(data).hexdigest())
        shown = [tiles.load("clothes", split)[label].pixels for split in tiles.SPLITS]
        grid = np.asarray(image.load(data))[:, :, 0]
        np.testing.assert_array_equal(sheet_of(np.concatenate(shown)), grid)
    assert max(sizes) < 500_000
    assert sum(sizes) < 1_900_000
    assert "Copyright (c) 2017 Zalando SE" in (folder / "LICENSE-fashion-mnist.txt").read_text()


def test_questions_use_only_pictures_of_their_split(rows):
    for split, samples in rows.items():
        assert {name for s in samples for name in s.columns["pictures"]} <= _labels(split).keys()


def test_images_show_the_pictures_they_name(rows):
    pixels = {
        name: tile
        for domain in tiles.LABELS
        for shown in tiles.scaled(domain, "heldout", 28).values()
        for name, tile in zip(shown.ids, shown.pixels, strict=True)
    }
    for sample in rows["heldout"]:
        (part,) = sample.media("image")
        grey = np.asarray(image.load(part.ref))[:, :, 0]
        np.testing.assert_array_equal(grey, np.concatenate([pixels[n] for n in sample.columns["pictures"]], axis=1))


@pytest.mark.parametrize("split", tiles.SPLITS)
def test_answers_are_right(rows, split):
    names = _labels(split)
    for sample in rows[split]:
        truth = _truth(sample, [names[name] for name in sample.columns["pictures"]])
        assert sample.columns["solution"] == truth
        assert sample.turns[1].text == f"<answer>{truth}</answer>"
        for letter, choice in zip("ABCD", sample.columns["choices"] or (), strict=False):
            assert f"({letter}) {choice} " in sample.turns[0].text


@pytest.mark.parametrize("split", tiles.SPLITS)
def test_no_answer_is_worth_guessing(rows, split):
    answers = defaultdict(Counter)
    for sample in rows[split]:
        answers[sample.columns["kind"]][sample.columns["solution"]] += 1
    for kind in KINDS:
        counts = answers[kind.name]
        assert counts.total() == ROWS[split] // len(KINDS)
        assert max(counts.values()) - min(counts.values()) <= 1
    # The kind of clothes at each letter is as flat, so that the options do not tell the answer either.
    named = Counter(
        (s.columns["solution"], s.columns["choices"]["ABCD".index(s.columns["solution"])])
        for s in rows[split]
        if s.columns["kind"] == "name"
    )
    assert len(named) == 40
    assert max(named.values()) - min(named.values()) <= 1


def test_no_question_is_asked_twice(rows):
    hashes = [sample.prompt().content_hash() for samples in rows.values() for sample in samples]
    assert len(set(hashes)) == len(hashes) == sum(ROWS.values())


def test_seed_changes_only_the_training_questions(rows):
    assert _words(load("heldout", seed=7)) == _words(rows["heldout"])
    assert _words(load("unlabelled", seed=7)) == _words(rows["unlabelled"])
    other = load("train", limit=100, seed=7)
    assert not {s.id for s in other} & {s.id for s in rows["train"]}
    assert [s.turns[0].text for s in other] != [s.turns[0].text for s in rows["train"][:100]]


@pytest.mark.parametrize("limit", [0, 1, 33])
def test_limit_takes_the_first_rows(rows, limit):
    assert load("train", limit=limit) == rows["train"][:limit]


def test_rows_know_where_they_come_from(rows):
    sample = rows["train"][16]
    assert (sample.id, sample.origin) == ("train-0-17", "task:demo_vqa/train:17")
    assert [part.kind for part in sample.turns[0].parts] == ["image", "text"]


@pytest.mark.parametrize("tile_px", [28, 56])
def test_images_are_whole_tiles(tile_px):
    for sample in load("heldout", limit=20, tile_px=tile_px):
        shown = image.load(sample.media("image")[0].ref)
        assert shown.size == (tile_px * len(sample.columns["pictures"]), tile_px)


def test_unknown_split_names_the_known_ones():
    with pytest.raises(MmpostError) as caught:
        TASK.load("test")
    assert str(caught.value) == (
        "unknown name 'test' among splits of demo_vqa. Known: train, unlabelled, heldout [MMP-C006]"
    )


def test_reference_answers_earn_every_reward_and_wrong_ones_do_not(rows):
    samples = rows["heldout"]
    columns = {name: [s.columns[name] for s in samples] for name in ("solution", "choices")}
    right = [s.turns[1].text for s in samples]
    wrong = [f"<answer>{'20' if s.columns['choices'] is None else 'E'}</answer>" for s in samples]
    prompts = [[{"role": "user", "content": s.turns[0].text}] for s in samples]
    answer = Catalog("rewards", REWARDS).get(TASK.rewards[0])
    assert set(answer(prompts, right, **columns)) == {1.0}
    assert set(answer(prompts, wrong, **columns)) == {0.0}
    assert set(Catalog("rewards", REWARDS).get(TASK.rewards[1])(prompts, right, **columns)) == {1.0}


def test_task_is_found_by_name():
    assert Catalog("tasks", TASKS).get("demo_vqa") is TASK
    assert TASK.splits.keys() == set(tiles.SPLITS)


def test_exported_rows_are_read_back(rows, tmp_path):
    samples = rows["heldout"][:10]
    path = write_jsonl(samples, tmp_path / "new", name="sft")
    assert path == tmp_path / "new" / "sft.jsonl"
    for sample, read in zip(samples, read_source(Source(path=str(path))).samples, strict=True):
        assert (read.id, [t.text for t in read.turns]) == (sample.id, [t.text for t in sample.turns])
        assert read.columns == {key: value for key, value in sample.columns.items() if value is not None}
        (here,), (there,) = sample.media("image"), read.media("image")
        assert image.load(there.ref).tobytes() == image.load(here.ref).tobytes()


def test_exported_rows_are_plain_messages(rows, tmp_path):
    first = json.loads(write_jsonl(rows["heldout"][:1], tmp_path).read_text())
    assert first["messages"][0]["content"] == "<image>" + rows["heldout"][0].turns[0].text
    assert first["images"] == ["images/heldout-0-1-0.png"]
    assert first["solution"] == rows["heldout"][0].columns["solution"]


def test_prompts_are_exported_without_the_answer(rows, tmp_path):
    path = write_jsonl(rows["train"][:5], tmp_path, name="grpo", answers=False)
    messages = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert [[m["role"] for m in row] for row in messages] == [["user"]] * 5


def test_a_literal_mark_survives_export(rows, tmp_path):
    shown = rows["heldout"][0].media("image")[0]
    asked = Turn("user", (Part("text", "What does <image> mean? "), shown))
    sample = Sample("a", (asked, Turn("assistant", (Part("text", "<image> is a mark"),))))
    (read,) = read_source(Source(path=str(write_jsonl([sample], tmp_path)))).samples
    assert [t.text for t in read.turns] == [t.text for t in sample.turns]
    assert [part.kind for part in read.turns[0].parts] == ["text", "image"]


def test_export_refuses_other_media(tmp_path):
    sample = Sample("a", (Turn("user", (Part("audio", ref="a.wav"),)),), origin="x:1")
    with pytest.raises(ValueError, match="x:1: cannot write audio to messages JSONL"):
        write_jsonl([sample], tmp_path)


def test_names_are_listed_without_heavy_imports():
    code = "import sys, mmpost_tasks; print(sorted({'sklearn', 'PIL', 'torch', 'numpy'} & sys.modules.keys()))"
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert done.stdout.strip() == "[]"
