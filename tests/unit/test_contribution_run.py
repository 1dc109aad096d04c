"""Votes of models that can be foreseen, journals, and the files of a split."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmpost import load_data
from mmpost.api.contribution import contribution
from mmpost.api.data import Data, prepare
from mmpost.api.model import load_model
from mmpost.config.schema import DataSection, RewardSpec
from mmpost.contribution.nulls import Replacer, parse
from mmpost.contribution.rows import write_rows
from mmpost.contribution.score import Plan, score_rows
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Part, Sample, Turn
from mmpost.media import film, image, wav
from mmpost.rewards.score import resolve
from mmpost.rollout.generate import Sampling

pytest.importorskip("soundfile")
RATE = 16000


def sample(number, hertz=None, answer="a"):
    wave = 0.3 * np.sin(2 * np.pi * (hertz or 200 + 37 * number) * np.arange(3200) / RATE)
    parts = (Part("audio", ref=wav.encode(wave, RATE)), Part("text", f"High or low? {number}"))
    turns = (Turn("user", parts), Turn("assistant", (Part("text", answer),)))
    return Sample(f"r{number}", turns, {"solution": answer, "options": ["a", "b"]}, f"rows.jsonl:{number}", "rows")


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-qwen2-audio", peft=None)


@pytest.fixture
def deaf():
    """A model whose features of sounds are all zero."""
    model = load_model("tiny-qwen2-audio", peft=None)
    projector = next(m for name, m in model.policy.named_modules() if name.endswith("multi_modal_projector"))
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.zero_()
    return model


def plan(null, k=3, temperature=1.0):
    return Plan("audio", parse(null, "audio"), k, "answer", Sampling(4, temperature, seed=5), 64)


def votes(model, rows, null, **options):
    rewards = resolve([RewardSpec(name="answer")])
    return score_rows(model, rows, range(len(rows)), plan(null, **options), rewards)


def test_silence_gives_as_many_tokens(model):
    rows = [sample(number) for number in range(3)]
    replace = Replacer(rows, "audio", section=model.adapter.section, seed=0)
    for name in ("silence", "noise"):
        (null,) = parse(name, "audio")
        for number, row in enumerate(rows):
            before, after = (
                model.adapter.encode_prompt(row.prompt()),
                model.adapter.encode_prompt(replace(number, null).prompt()),
            )
            assert torch.equal(before.ids, after.ids)
            assert not torch.equal(before.media["input_features"], after.media["input_features"])


def test_a_deaf_model_has_no_contribution(deaf, model):
    """The same draws with and without: what does not listen says the same."""
    rows = [sample(number) for number in range(4)]
    for one in votes(deaf, rows, "silence,noise,shuffle"):
        for name in ("silence", "noise", "shuffle"):
            assert one[name] == one["with"]
    heard = votes(model, rows, "silence")
    assert any(one["silence"]["answer"] != one["with"]["answer"] for one in heard)


def test_number_of_votes(model):
    rows = [sample(0), sample(1)]
    drawn = votes(model, rows, "all")
    assert {name: len(entry["right"]) for name, entry in drawn[0].items()} == {
        "with": 3, "silence": 3, "noise": 3, "none": 3, "shuffle": 3,
    }  # fmt: skip
    greedy = votes(model, rows, "all", temperature=0.0)
    assert {name: len(entry["right"]) for name, entry in greedy[0].items()} == {
        "with": 1, "silence": 1, "noise": 3, "none": 1, "shuffle": 3,
    }  # fmt: skip


def test_votes_do_not_depend_on_the_other_rows_of_a_batch(model):
    rows = [sample(number) for number in range(6)]
    rewards = resolve([RewardSpec(name="answer")])
    whole = score_rows(model, rows, range(6), plan("silence,shuffle"), rewards)
    halves = [score_rows(model, rows, part, plan("silence,shuffle"), rewards) for part in (range(3), range(3, 6))]
    assert whole == halves[0] + halves[1]


def test_rows_without_a_solution_are_counted_and_kept(model, tmp_path):
    rows = [sample(0), Sample("u", sample(1).turns, {"solution": None}, "rows.jsonl:2", "rows")]
    found = contribution([Data("rows", rows)], [model], tmp_path, sampling=Sampling(3))
    assert found["labels"]["robust"]["unscored"] == 1
    assert found["accuracy"]["with"]["n"] == 1
    assert "u" in [json.loads(line)["id"] for line in (tmp_path / "other.jsonl").read_text().splitlines()]


def test_every_row_is_in_exactly_one_file_and_both_commands_read_it(model, tmp_path):
    rows = [sample(number) for number in range(5)]
    found = contribution([Data("rows", rows)], [model], tmp_path, sampling=Sampling(3), rule="paper", null="none")
    files = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("weak", "strong", "other")}
    assert sorted(json.loads(line)["id"] for lines in files.values() for line in lines) == [f"r{n}" for n in range(5)]
    assert len(files["strong"]) == found["labels"]["paper"]["strong"] == 5
    for command in ("sft", "grpo"):
        data = load_data(tmp_path / "strong.jsonl")
        prepare([data], DataSection(), command=command)
        for before, after in zip(rows, data, strict=True):
            assert after.turns[0].text == before.turns[0].text
            assert after.columns["solution"] == "a"
            assert after.columns["contribution"]["label"] == "strong"
            with open(after.media("audio")[0].ref, "rb") as file:
                assert file.read() == before.media("audio")[0].ref


def test_paths_are_written_as_seen_from_the_file(tmp_path):
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "a.wav").write_bytes(sample(0).media()[0].ref)
    turns = (Turn("user", (Part("audio", ref=str(tmp_path / "sounds" / "a.wav")), Part("text", "<audio> is a word"))),)
    write_rows([Sample("x", turns, {}, "o")], tmp_path / "deep" / "rows.jsonl")
    assert json.loads((tmp_path / "deep" / "rows.jsonl").read_text()) == {
        "id": "x",
        "prompt": [
            {
                "role": "user",
                "content": [
                    {"type": "audio", "audio": "../sounds/a.wav"},
                    {"type": "text", "text": "\\<audio> is a word"},
                ],
            }
        ],
    }
    (back,) = load_data(tmp_path / "deep" / "rows.jsonl").samples
    assert back.turns[0].text == "<audio> is a word"
    assert len(back.media()) == 1


def test_other_options_in_the_same_folder_are_refused(model, tmp_path):
    rows = [Data("rows", [sample(0), sample(1)])]
    contribution(rows, [model], tmp_path, sampling=Sampling(3))
    with pytest.raises(MmpostError, match=r"holds work with other options: k\. .*\[MMP-R226\]"):
        contribution(rows, [model], tmp_path, sampling=Sampling(3), k=2)


def test_a_journal_that_is_cut_anywhere_is_finished_to_the_same_bytes(model, tmp_path):
    """What a kill can leave behind: the beginning of the file, up to any byte."""
    rows = [Data("rows", [sample(number) for number in range(40)])]

    def files():
        contribution(rows, [model], tmp_path, sampling=Sampling(2, 0.0), null="none")
        return [(tmp_path / name).read_bytes() for name in ("votes/m0-00000.jsonl", "scores.jsonl", "strong.jsonl")]

    whole = files()
    ends = [place + 1 for place, byte in enumerate(whole[0]) if byte == 10]
    assert len(ends) == 3  # what the work is, 32 rows, 8 rows
    for cut in (0, ends[0] // 2, ends[1] - 1, ends[1] + 7):
        (tmp_path / "votes" / "m0-00000.jsonl").write_bytes(whole[0][:cut])
        assert files() == whole


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"modality": "smell"}, "unknown name 'smell' among modalities. Known: audio, image, video [MMP-C006]"),
        ({"rule": "best"}, "unknown name 'best' among rules. Known: robust, paper [MMP-C006]"),
        ({"null": "loud"}, "--null 'loud' is not known for audio."),
    ],
)
def test_unknown_words(model, tmp_path, options, text):
    with pytest.raises(MmpostError) as caught:
        contribution([Data("rows", [sample(0)])], [model], tmp_path, sampling=Sampling(3), **options)
    assert text in str(caught.value)


def test_a_model_given_twice_is_refused(tmp_path):
    with pytest.raises(MmpostError, match="a model is given twice"):
        contribution([Data("rows", [sample(0)])], ["a", "a"], tmp_path, sampling=Sampling(3))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_pictures_and_films_are_taken_away_too(kind):
    pytest.importorskip("av")
    model = load_model("tiny-qwen2.5-vl", peft=None)
    rows = []
    for number in range(3):
        frames = np.full((4, 28, 56, 3), 60 * number, np.uint8)
        frames[:, :, :28] = 255
        ref = film.encode(frames, np.arange(4) / 2, 2.0)
        if kind == "image":
            ref = image.encode(Image.fromarray(frames[0]))
        turns = (Turn("user", (Part(kind, ref=ref), Part("text", "Where?"))),)
        rows.append(Sample(f"r{number}", turns, {"solution": "a"}, f"rows.jsonl:{number}"))
    replace = Replacer(rows, kind, section=model.adapter.section, seed=0)
    for name in ("silence", "noise", "shuffle"):
        (null,) = parse(name, kind)
        for number, row in enumerate(rows):
            before, after = model.adapter.encode_prompt(row), model.adapter.encode_prompt(replace(number, null))
            assert torch.equal(before.ids, after.ids)
            assert torch.equal(before.positions, after.positions)
            assert any(not torch.equal(before.media[key], after.media[key]) for key in before.media)
    asked = Plan(kind, parse("all", kind), 1, "answer", Sampling(2), 8)
    found = score_rows(model, rows, range(3), asked, resolve([RewardSpec(name="answer")]))
    assert all(list(one) == ["with", "silence", "noise", "none", "shuffle"] for one in found)
