import io
import json

import numpy as np
import pytest
from PIL import Image

from mmpost.config.schema import Source
from mmpost.data.check import check, leakage, summary, summary_lines
from mmpost.data.source import read_rows, read_source


def png(seed=0):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def talk(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def samples_of(*rows, **options):
    return read_rows(rows, name="d.jsonl", **options).samples


def found(*rows, command=None, media="none", id_scope=None, **options):
    return [
        str(fault) for fault in check(samples_of(*rows, **options), command=command, media=media, id_scope=id_scope)
    ]


GOOD = {"messages": talk("Q", "A")}
PROMPT = {"prompt": "Q", "solution": "A"}


def test_good_rows_have_no_faults():
    assert found(GOOD, {**GOOD, "id": "x"}, command="sft") == []
    assert found(PROMPT, command="grpo") == []
    assert found(GOOD, PROMPT) == []


def test_d013():
    assert found(PROMPT, command="sft") == [
        "d.jsonl:1: last message is 'user'; sft needs assistant, grpo needs user [MMP-D013]"
    ]
    assert found(GOOD, PROMPT, command="grpo") == [
        "d.jsonl:1: last message is 'assistant'; sft needs assistant, grpo needs user [MMP-D013]"
    ]


def test_pairs_serve_both_commands_because_the_answer_is_a_column_too():
    for pair in ({"question": "Q", "answer": "A"}, {"instruction": "Q", "output": "A"}):
        for command in ("sft", "grpo"):
            assert found(pair, command=command) == []


def test_d012():
    text = "assistant message {} is empty; nothing would be learned [MMP-D012]"
    row = {"messages": talk("Q", "", "Q", " \n", "Q", "A")}
    assert found(row, command="sft") == [f"d.jsonl:1: {text.format(2)}", f"d.jsonl:1: {text.format(4)}"]
    assert found(row) == found(row, command="sft")
    untrained = {"messages": [*talk("Q"), {"role": "assistant", "content": "", "train": False}, *talk("Q", "A")]}
    assert found(untrained, command="sft") == []


def test_d016():
    rows = [{**GOOD, "id": "a"}, {**GOOD, "id": "b"}, {**GOOD, "id": "a"}]
    assert found(*rows) == ["d.jsonl:3: id 'a' already used in d.jsonl:1 [MMP-D016]"]
    scope = {}
    assert found(rows[0], id_scope=scope) == []
    other = read_rows([GOOD, rows[0]], name="d.jsonl").samples
    assert [fault.code for fault in check(other, command=None, media="none", id_scope=scope)] == ["MMP-D016"]
    elsewhere = read_rows([rows[0]], name="e.jsonl").samples  # ids are unique inside a source
    assert check(elsewhere, command=None, media="none", id_scope=scope) == []


def test_d007(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    rows = [
        {"messages": talk("<image>Q", "A"), "images": "gone.png"},
        {"messages": talk("<video><audio>Q", "A"), "video": "v.mp4", "audio": "a.wav"},
    ]
    (tmp_path / "data" / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = read_source(Source(path="data/d.jsonl"))
    tail = f"Looked in: data, {tmp_path}. Set Source.media_root [MMP-D007]"
    expected = [
        f"data/d.jsonl:1: image file not found: 'gone.png'. {tail}",
        f"data/d.jsonl:2: video file not found: 'v.mp4'. {tail}",
        f"data/d.jsonl:2: audio file not found: 'a.wav'. {tail}",
    ]
    for roots in (table.roots, ()):
        for media in ("exists", "decode"):
            faults = check(table.samples, command=None, media=media, id_scope=None, roots=roots)
            assert [str(fault) for fault in faults] == expected
    rooted = read_source(Source(path="data/d.jsonl", media_root="pics"))
    fault = check(rooted.samples, command=None, media="exists", id_scope=None, roots=rooted.roots)[0]
    assert str(fault) == (
        "data/d.jsonl:1: image file not found: 'gone.png'. Looked in: pics. Set Source.media_root [MMP-D007]"
    )
    assert check(table.samples, command="sft", media="none", id_scope=None) == []


def test_d008_and_urls(tmp_path):
    (tmp_path / "bad.png").write_bytes(png()[:40])
    (tmp_path / "good.png").write_bytes(png())
    row = {
        "messages": talk("<image><image><image><image>Q", "A"),
        "images": ["bad.png", "good.png", {"bytes": b"junk"}, "https://example.com/a.png"],
    }
    exists = found(row, row, media="exists", media_root=str(tmp_path))
    assert [text[-10:] for text in exists] == ["[MMP-D035]"] * 2
    decode = found(row, row, media="decode", media_root=str(tmp_path))
    assert [text[-10:] for text in decode] == ["[MMP-D008]", "[MMP-D008]", "[MMP-D035]"] * 2
    assert decode[0].startswith(f"d.jsonl:1: cannot decode image '{tmp_path}/bad.png': Pillow: ")
    assert decode[3].startswith("d.jsonl:2: cannot decode image ")
    assert "cannot decode image '<bytes>': Pillow: not an image" in decode[1]


def test_d040():
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "score": 1}
    assert found(row, row, command="grpo") == [
        "'grpo' does not train on preference data (d.jsonl); columns found: chosen, rejected, score [MMP-D040]"
    ]
    assert found(row) == []


# Leakage.


def test_d018():
    train = samples_of(*({"messages": talk(f"Q{i}", "A")} for i in range(10)))
    evaluation = read_rows([{"messages": talk(f"Q{i}", "A")} for i in range(6, 14)], name="e.jsonl").samples
    assert str(leakage(train, evaluation)) == (
        "e.jsonl: 4 of 8 rows are in both training and evaluation data (same content hash); "
        "first: e.jsonl:1 = d.jsonl:7, e.jsonl:2 = d.jsonl:8, e.jsonl:3 = d.jsonl:9 [MMP-D018]"
    )
    assert leakage(train, evaluation[4:]) is None
    assert leakage([], evaluation) is None


def test_leakage_sees_prompts_whose_answer_is_a_column():
    train = samples_of({"messages": talk("Q", "A")})
    assert leakage(train, samples_of({"prompt": "Q", "solution": "A"})) is not None
    assert leakage(samples_of({"prompt": "Q"}), train) is not None
    assert leakage(train, samples_of({"messages": talk("Q", "B")})) is None


def test_leakage_sees_one_file_under_two_spellings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    (tmp_path / "sub").mkdir()
    train = samples_of({"prompt": "<image>Q", "image": "a.png"})
    assert leakage(train, samples_of({"prompt": "<image>Q", "image": "sub/../a.png"})) is not None
    assert leakage(train, samples_of({"prompt": "<image>Q", "image": str(tmp_path / "a.png")})) is not None
    assert leakage(train, samples_of({"prompt": "<image>Q", "image": "b.png"})) is None


# Summary.


def test_summary_counts_rows_faults_media_and_lengths():
    rows = [{"messages": talk("<image>" + "x" * i, "y"), "image": "gone.png"} for i in range(1, 101)]
    table = read_rows([*rows, {"other": 1}, {"messages": [{"role": "x"}, {"role": "y"}]}], name="d.jsonl",
                      on_bad_row="skip", max_bad_share=1.0)  # fmt: skip
    faults = table.faults + check(table.samples, command="sft", media="exists", id_scope=None)[:3]
    result = json.loads(json.dumps(summary([table], faults, count_tokens=lambda s: {"text": 2, "image": len(s.id)})))
    (source,) = result["sources"]
    assert (source["name"], source["rows"], source["bad"]) == ("d.jsonl", 102, 5)
    assert source["by_code"] == {"MMP-D002": 1, "MMP-D003": 2, "MMP-D007": 3}
    assert source["media"] == {"image": 100}
    assert source["chars"] == {"p50": 51, "p90": 91, "p99": 100, "max": 101}
    assert source["tokens"]["total"] == {"p50": 4, "p90": 4, "p99": 4, "max": 5}
    assert source["longest"][0] == {"origin": "d.jsonl:100", "id": "100", "length": 5}
    assert len(source["longest"]) == 5
    assert result["total"] == {
        "rows": 102,
        "bad": 5,
        "by_code": {"MMP-D002": 1, "MMP-D003": 2, "MMP-D007": 3},
        "media": {"image": 100},
    }


def test_summary_lines():
    table = read_rows([PROMPT, {"prompt": "long question"}], name="d.jsonl")
    assert summary_lines(summary([table])) == [
        "d.jsonl: 2 rows, 0 bad",
        "  media: none",
        "  characters: p50 1, p90 13, p99 13, max 13",
        "  long row: d.jsonl:2 (13 characters)",
        "  long row: d.jsonl:1 (1 characters)",
        "total: 2 rows, 0 bad",
    ]


def test_summary_of_nothing_good():
    table = read_rows([{"x": 1}], name="d.jsonl", on_bad_row="skip", max_bad_share=1.0)
    assert summary([table])["sources"][0]["chars"] == {"p50": 0, "p90": 0, "p99": 0, "max": 0}


@pytest.mark.parametrize("command", ["sft", "grpo", None])
def test_faults_come_in_the_order_of_the_rows(command):
    rows = [{"messages": talk("Q", ""), "id": "a"}, {"messages": talk("Q"), "id": "a"}, GOOD]
    numbers = [int(text.split(":")[1]) for text in found(*rows, command=command)]
    assert numbers == sorted(numbers)
    assert 2 in numbers
