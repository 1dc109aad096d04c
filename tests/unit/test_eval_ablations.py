"""Columns without sound or picture in an evaluation, against a count by hand."""

import numpy as np
import pytest

from mmpost.api.evaluate import Results, _replaced
from mmpost.api.model import load_model
from mmpost.config.schema import RewardSpec
from mmpost.core.sample import Part, Sample, Turn
from mmpost.eval.harness import evaluate
from mmpost.media import audio, wav
from mmpost.rewards.score import Reward

pytest.importorskip("soundfile")
RATE = 16000


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-qwen2-audio", peft=None)


def sample(number, sound=True):
    wave = 0.3 * np.sin(2 * np.pi * (200 + 50 * number) * np.arange(3200) / RATE)
    heard = (Part("audio", ref=wav.encode(wave, RATE)),) if sound else ()
    turns = (Turn("user", (*heard, Part("text", f"High? {number}"))), Turn("assistant", (Part("text", "x"),)))
    return Sample(str(number), turns, {"solution": "x", "number": number}, f"rows.jsonl:{number}")


def test_rows_with_sound_are_asked_twice_more(model):
    rows = [sample(0), sample(1, sound=False), sample(2), sample(3)]
    replaced = _replaced(model, rows, None)
    assert {key: list(found) for key, found in replaced.items()} == {
        ("audio", "silence"): [0, 2, 3],
        ("audio", "none"): [0, 2, 3],
    }
    assert not audio.load(replaced["audio", "silence"][2].media()[0].ref).samples.any()
    assert not replaced["audio", "none"][2].media()
    assert _replaced(model, rows, []) == {}
    assert list(_replaced(model, rows, ["noise"])) == [("audio", "noise")]


def test_columns_are_counted_by_hand(model):
    rows = [sample(number) for number in range(6)] + [sample(6, sound=False)]
    calls = []

    def judge(prompts, completions, *, number, **columns):
        calls.append(list(number))
        # With sound rows 0 to 3 are right, on silence row 0, without any rows 0, 1 and 5; row 6 is right.
        right = [{0, 1, 2, 3, 6}, {0}, {0, 1, 5}][len(calls) - 1]
        return [float(one in right) for one in number]

    shown = []
    result, records = evaluate(
        model,
        rows,
        Reward("judge", judge, RewardSpec(name="judge")),
        task="t",
        version="1",
        batch_size=4,
        max_new_tokens=2,
        ablations=_replaced(model, rows, None),
        progress=lambda done, total: shown.append((done, total)),
    )
    assert calls == [list(range(7)), list(range(6)), list(range(6))]
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(5 / 7)
    silence, none = result["ablations"]["audio"]["silence"], result["ablations"]["audio"]["none"]
    # Row 6 has no sound, and is in neither column.
    assert (silence["with"]["value"], silence["without"]["value"]) == (pytest.approx(4 / 6), pytest.approx(1 / 6))
    assert (none["with"]["n"], none["without"]["value"]) == (6, 0.5)
    assert silence["difference"]["value"] == pytest.approx(3 / 6)
    assert none["difference"]["value"] == pytest.approx(1 / 6)
    low, high = silence["difference"]["ci"]
    assert 0 < low < 0.5 < high <= 1
    assert records[5]["ablations"]["audio:none"]["accuracy"] == 1.0
    assert "ablations" not in records[6]
    assert shown[-1] == (19, 19)
    table = Results({"t": result}, {"t": records}).table().splitlines()
    assert table[-2].split() == [
        "t",
        "audio:",
        "silence",
        "6",
        "0.667",
        "0.167",
        "+0.500",
        f"[{low:+.3f},",
        f"{high:+.3f}]",
    ]


def test_rows_of_text_have_no_columns(model):
    rows = [sample(0, sound=False)]
    reward = Reward("judge", lambda prompts, completions, **columns: [1.0], RewardSpec(name="judge"))
    options = {"task": "t", "version": "1", "max_new_tokens": 2, "ablations": _replaced(model, rows, None)}
    result, _ = evaluate(model, rows, reward, **options)
    assert "ablations" not in result
    assert len(Results({"t": result}, {"t": []}).table().splitlines()) == 2
