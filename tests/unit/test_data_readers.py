import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from mmpost.core.errors import MmpostError
from mmpost.core.sample import Part
from mmpost.data.source import read_rows


def png(seed=0):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def one(row, **options):
    return read_rows([row], name="d.jsonl", **options).samples[0]


def shape(sample):
    """Turns as (role, [text or (kind, ref)])."""
    return [
        (turn.role, [part.text if part.kind == "text" else (part.kind, part.ref) for part in turn.parts])
        for turn in sample.turns
    ]


def texts_of(row, **options):
    """Every fault of a row, as printed."""
    table = read_rows([row], name="d.jsonl", on_bad_row="skip", max_bad_share=1.0, **options)
    assert len(table.samples) + len(table.bad_rows) == 1
    return [str(fault) for fault in table.faults]


def talk(content, answer="yes"):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


# One row per family: what is read from it.

FAMILIES = {
    "messages with marks": (
        {
            "id": "r1",
            "messages": talk("<image>What is <image>?"),
            "images": ["a.jpg", "b.jpg"],
            "solution": "x",
        },
        [("user", [("image", "a.jpg"), "What is ", ("image", "b.jpg"), "?"]), ("assistant", ["yes"])],
        {"solution": "x"},
    ),
    "messages with parts": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "Q"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
            ]
        },
        [("system", ["Be brief."]), ("user", [("image", "a.jpg"), "Q"]), ("assistant", ["A"])],
        {},
    ),
    "all media": (
        {"messages": talk("<audio><video><image>"), "images": "i.png", "videos": ["v.mp4"], "audio": "a.wav"},
        [("user", [("audio", "a.wav"), ("video", "v.mp4"), ("image", "i.png")]), ("assistant", ["yes"])],
        {},
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": "<image>\nLook"},
                {"from": "function_call", "value": '{"name": "zoom", "arguments": {}}'},
                {"from": "observation", "value": "<image> seen"},
                {"from": "gpt", "value": "A cat"},
            ],
            "image": "cat.jpg",
            "system": "Help.",
        },
        [
            ("system", ["Help."]),
            ("user", [("image", "cat.jpg"), "\nLook"]),
            ("assistant", ['{"name": "zoom", "arguments": {}}']),
            ("tool", ["<image> seen"]),
            ("assistant", ["A cat"]),
        ],
        {"system": "Help."},
    ),
    "prompt text": (
        {"prompt": "How many?", "image": "a.jpg", "solution": "3", "level": 2},
        [("user", [("image", "a.jpg"), "How many?"])],
        {"solution": "3", "level": 2},
    ),
    "prompt messages": (
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}],
            "images": ["a"],
        },
        [("user", [("image", "a"), "Q"])],
        {},
    ),
    "prompt and completion": (
        {"prompt": "Q", "completion": "A"},
        [("user", ["Q"]), ("assistant", ["A"])],
        {"completion": "A"},
    ),
    "messages that end with the user": (
        {"messages": [{"role": "user", "content": "Q"}], "solution": "4"},
        [("user", ["Q"])],
        {"solution": "4"},
    ),
    "question only": ({"question": "Q", "images": []}, [("user", ["Q"])], {}),
    "question and answer": (
        {"question": "Q", "answer": 7},
        [("user", ["Q"]), ("assistant", ["7"])],
        {"answer": 7},
    ),
    "answer that is no text": ({"question": "Q", "answer": [1, 2]}, [("user", ["Q"])], {"answer": [1, 2]}),
    "alpaca": (
        {"instruction": "Add", "input": "1 2", "output": "3", "history": [["a", "b"]]},
        [("user", ["a"]), ("assistant", ["b"]), ("user", ["Add\n1 2"]), ("assistant", ["3"])],
        {"output": "3"},
    ),
    "query and response": (
        {"query": "<image>Q", "response": "A", "images": ["a"]},
        [("user", [("image", "a"), "Q"]), ("assistant", ["A"])],
        {"response": "A"},
    ),
    "verl": (
        {
            "data_source": "geo3k",
            "prompt": [{"role": "user", "content": "<image>x?"}],
            "images": [{"bytes": b"PNG", "path": None}],
            "reward_model": {"style": "rule", "ground_truth": "42"},
            "extra_info": {"index": 3},
        },
        [("user", [("image", b"PNG"), "x?"])],
        {
            "data_source": "geo3k",
            "reward_model": {"style": "rule", "ground_truth": "42"},
            "extra_info": {"index": 3},
            "solution": "42",
        },
    ),
    "preference": (
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        [("user", ["Q"])],
        {"chosen": "good", "rejected": "bad"},
    ),
    "text as messages": ({"messages": "Q"}, [("user", ["Q"])], {}),
    "JSON text as messages": (
        {"messages": json.dumps(talk("Q"))},
        [("user", ["Q"]), ("assistant", ["yes"])],
        {},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_round_trip(name):
    row, turns, columns = FAMILIES[name]
    sample = one(row)
    assert shape(sample) == turns
    assert dict(sample.columns) == columns
    assert (sample.id, sample.origin) == (str(row.get("id", 1)), "d.jsonl:1")


def test_absent_and_null_columns_are_the_same():
    nulls = {"messages": None, "conversations": None, "prompt": "Q", "images": None}
    assert shape(one(nulls)) == [("user", ["Q"])]


PNG = png()
BASE64 = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": PNG},
        {"type": "image", "image": {"bytes": PNG, "path": "ignored.png"}},
        {"type": "image", "base64": BASE64},
        {"type": "image", "image": f"data:image/png;base64,{BASE64}"},
        {"type": "image", "image": BASE64},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}},
        {"type": "image_url", "image_url": f"data:image/png;base64,{BASE64}"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
        {"type": "image", "text": None, "path": None, "image": {"bytes": PNG, "path": None}},
        {"image": PNG},
    ],
)
def test_every_spelling_of_an_embedded_image(part):
    sample = one({"messages": talk([part, {"type": "text", "text": "Q"}])})
    assert sample.turns[0].parts == (Part("image", ref=PNG), Part("text", "Q"))


def test_other_part_spellings():
    parts = [
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "video_url", "video_url": {"url": "v.mp4"}},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"RIFF").decode(), "format": "wav"}},
        {"type": "image", "source": {"type": "url", "url": "https://example.com/b.png"}},
        {"type": "action", "action": {"b": 1, "a": [0.5]}},
        {"type": "text", "text": "a"},
        {"type": "input_text", "text": "b"},
    ]
    assert shape(one({"messages": talk(parts)}))[0][1] == [
        ("image", "https://example.com/a.png"),
        ("video", "v.mp4"),
        ("audio", b"RIFF"),
        ("image", "https://example.com/b.png"),
        ("action", '{"a": [0.5], "b": 1}'),
        "ab",
    ]


def test_pillow_images_in_python_rows_become_files():
    picture = Image.open(io.BytesIO(PNG))
    (part,) = one({"prompt": "Q", "image": picture}).media("image")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(part.ref))), np.asarray(picture))


def test_tool_calls_become_json_text():
    call = {"type": "function", "function": {"name": "zoom", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "done"},
    ]
    assert shape(one({"messages": messages}))[1:] == [
        ("assistant", ['{"name": "zoom", "arguments": {"x": 1}}']),
        ("tool", ["done"]),
    ]


@pytest.mark.parametrize(("key", "value"), [("train", False), ("loss", False), ("loss", 0.0), ("weight", 0)])
def test_messages_can_be_kept_out_of_the_loss(key, value):
    messages = [*talk("Q"), {"role": "assistant", "content": "no", key: value}]
    assert [turn.train for turn in one({"messages": messages}).turns] == [True, True, False]


def test_same_content_has_the_same_hash_in_every_spelling():
    rows = [
        {"messages": talk("<image>Q"), "images": "a.jpg"},
        {"messages": talk([{"type": "image"}, {"type": "text", "text": "Q"}]), "image": ["a.jpg"]},
        {"messages": talk([{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "Q"}], [{"text": "yes"}])},
        {
            "conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "yes"}],
            "image": "a.jpg",
        },
        {"query": "Q", "response": "yes", "image": "a.jpg"},
    ]
    assert len({one(row).content_hash() for row in rows}) == 1


def test_system_of_the_source_goes_before_rows_without_one():
    assert shape(one({"prompt": "Q"}, system="S")) == [("system", ["S"]), ("user", ["Q"])]
    own = {"messages": [{"role": "system", "content": "own"}, *talk("Q")]}
    assert shape(one(own, system="S"))[0] == ("system", ["own"])


# Marks.


def test_escaped_marks_are_literal_and_assistant_text_is_left_alone():
    row = {"messages": talk(r"\<image> <image> \\<audio>", r"<image> \<image>"), "images": ["a"]}
    assert shape(one(row)) == [
        ("user", ["<image> ", ("image", "a"), r" \<audio>"]),
        ("assistant", [r"<image> \<image>"]),
    ]


def random_dialogue(rng):
    """A conversation whose marks are known: (messages, entries per kind, expected parts)."""
    pieces = ["a", " ", "\n", "<", ">", "<img>", "imag", "<images>", "é", "\\"]
    entries = {"image": [], "video": [], "audio": []}
    messages, expected = [], []
    for _ in range(rng.integers(1, 5)):
        role = str(rng.choice(["system", "user", "assistant", "tool"]))
        text, parts = "", []
        for _ in range(rng.integers(0, 7)):
            kind = str(rng.choice(list(entries)))
            choice = rng.integers(4)
            if choice == 0 and not text.endswith("\\"):
                text += f"<{kind}>"
                if role in ("user", "system"):
                    ref = f"{kind}{len(entries[kind])}"
                    entries[kind].append(ref)
                    parts.append((kind, ref))
                else:
                    parts.append(f"<{kind}>")
            elif choice == 1:
                text += f"\\<{kind}>"
                parts.append(f"<{kind}>" if role in ("user", "system") else f"\\<{kind}>")
            else:
                piece = str(rng.choice(pieces))
                text += piece
                parts.append(piece)
        merged = []
        for part in parts:
            if isinstance(part, str) and merged and isinstance(merged[-1], str):
                merged[-1] += part
            else:
                merged.append(part)
        messages.append({"role": role, "content": text})
        expected.append((role, merged))
    return messages, entries, expected


@pytest.mark.parametrize("seed", range(300))
def test_marks_are_never_miscounted(seed):
    rng = np.random.default_rng(seed)
    messages, entries, expected = random_dialogue(rng)
    row = {
        "messages": messages,
        "images": entries["image"],
        "videos": entries["video"],
        "audios": entries["audio"],
    }
    sample = one(row)
    assert shape(sample) == expected
    # One entry more or fewer is always noticed, with the right numbers.
    kind = str(rng.choice(list(entries)))
    count = len(entries[kind])
    wrong = count + 1 if count == 0 or rng.integers(2) else count - 1
    row[f"{kind}s"] = [f"f{i}" for i in range(wrong)]
    (text,) = texts_of(row)
    assert text.startswith(f"d.jsonl:1: {count} <{kind}> marks in user/system text but {wrong} entries in '{kind}s'")


# Exact messages.


def test_d002():
    assert texts_of({"id": 1, "dialog": [{"role": "user", "content": "Q"}], "n": 3}) == [
        "d.jsonl:1: no conversation found. Fields present: id, dialog, n. "
        "Expected one of messages, conversations, prompt, instruction, query. "
        "Map yours with data.columns={messages: dialog} [MMP-D002]"
    ]
    assert texts_of({"problem": "long enough", "x": "y"})[0].endswith("data.columns={messages: problem} [MMP-D002]")
    assert "Fields present: none." in texts_of({})[0]


def test_the_advice_of_d002_works():
    sample = one({"problem": "Q", "solution": "4"}, columns={"messages": "problem"})
    assert shape(sample) == [("user", ["Q"])]
    assert dict(sample.columns) == {"solution": "4"}


def test_d002_for_a_named_format():
    (text,) = texts_of({"messages": talk("Q")}, format="sharegpt")
    assert text.startswith("d.jsonl:1: no conversation found. Fields present: messages.")


def test_d003():
    row = {"messages": [{"role": "human", "content": "Q"}, {"role": "asistant", "content": "A"}, {"role": "x"}]}
    expected = "expected system, user, assistant or tool"
    assert texts_of(row) == [
        f"d.jsonl:1: message 1 has role 'human'; {expected}; did you mean 'user'? [MMP-D003]",
        f"d.jsonl:1: message 2 has role 'asistant'; {expected}; did you mean 'assistant'? [MMP-D003]",
        f"d.jsonl:1: message 3 has role 'x'; {expected} [MMP-D003]",
    ]


def test_d004():
    tail = r"Marks inside assistant text are not counted; write \<image> for a literal [MMP-D004]"
    head = "d.jsonl:1: "
    assert texts_of({"messages": talk("<image><image>"), "images": ["a.jpg"]}) == [
        f"{head}2 <image> marks in user/system text but 1 entries in 'images' (a.jpg). {tail}"
    ]
    assert texts_of({"messages": talk("Q", "<image>"), "image": b"x"}) == [
        f"{head}0 <image> marks in user/system text but 1 entries in 'image' (<bytes>). {tail}"
    ]
    assert texts_of({"messages": talk("<image>")}) == [
        f"{head}1 <image> marks in user/system text but 0 entries in 'images' (none). {tail}"
    ]
    assert texts_of({"messages": talk("Q"), "images": list("abcd")}) == [
        f"{head}0 <image> marks in user/system text but 4 entries in 'images' (a, b, c, ...). {tail}"
    ]


def test_d005():
    expected = "expected a path or a list of paths [MMP-D005]"
    assert texts_of({"messages": talk("<image>"), "images": 5}) == [f"d.jsonl:1: 'images' is int; {expected}"]
    assert texts_of({"messages": talk("<image>"), "image": ["a", None]}) == [
        f"d.jsonl:1: 'image' is a list with NoneType; {expected}"
    ]
    assert texts_of({"messages": talk("<image>"), "images": [""]}) == [
        f"d.jsonl:1: 'images' is a list with an empty text; {expected}"
    ]
    assert texts_of({"messages": talk([{"type": "image", "image": 3}])}) == [f"d.jsonl:1: 'image' is int; {expected}"]


def test_d006():
    assert texts_of({"messages": talk([{"type": "text", "text": "Q"}, {"type": "pdf"}, {"x": 1}])}) == [
        "d.jsonl:1: content part 2 has type 'pdf'; expected text, image, video, audio or action [MMP-D006]",
        "d.jsonl:1: content part 3 has type 'None'; expected text, image, video, audio or action [MMP-D006]",
    ]


def test_d008_for_broken_base64():
    (text,) = texts_of({"messages": talk([{"type": "image", "base64": "@@@"}])})
    assert text.startswith("d.jsonl:1: cannot decode image '<bytes>': base64: ")
    assert text.endswith(". Other backends: none [MMP-D008]")


def test_d028():
    head = "d.jsonl:1: tool/action payload is not an object: "
    assert texts_of({"messages": talk([{"type": "action", "action": 3}])}) == [f"{head}it is int [MMP-D028]"]
    calls = {"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "zoom()"}]}
    assert texts_of(calls) == [f"{head}Expecting value at column 1 [MMP-D028]"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ([1], "row is list; expected an object"),
        ({"messages": {}}, "'messages' is dict; expected a list of messages"),
        ({"messages": []}, "'messages' without messages is list; expected a list of messages"),
        ({"messages": ["hi"]}, "message 1 is str; expected an object with role and content"),
        ({"messages": talk(5)}, "content of message 1 is int; expected a text or a list of parts"),
        ({"messages": talk([5])}, "content part 1 is int; expected an object with a type"),
        ({"messages": talk([{"type": "text", "text": 5}])}, "text of content part 1 is int; expected a text"),
        ({"prompt": 5}, "'prompt' is int; expected a text or a list of messages"),
        ({"query": ["a"]}, "'query' is list; expected a text"),
        ({"query": "a", "history": ["b"]}, "an entry of 'history' is str; expected a question and an answer"),
        (
            {"messages": talk("<image>"), "image": "a", "images": ["b"]},
            "'image' and 'images' are both given; expected one of them",
        ),
    ],
)
def test_d032_wrong_shapes(row, text):
    assert texts_of(row) == [f"d.jsonl:1: {text} [MMP-D032]"]


def test_all_faults_of_all_rows_are_raised_together():
    rows = [{"messages": [{"role": "x"}, {"role": "y"}]}, {"prompt": "fine"}, {"other": 1}]
    with pytest.raises(MmpostError) as caught:
        read_rows(rows, name="d.jsonl")
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["1", "1", "3"]
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("seed", range(200))
def test_no_row_of_odd_values_raises_anything_else(seed):
    rng = np.random.default_rng(seed)
    odd = [
        None,
        0,
        1.5,
        True,
        "",
        "x",
        "<image>",
        [],
        [None],
        {},
        {"role": "user"},
        {"type": "image"},
        b"",
        b"x",
    ]
    odd += [
        talk("Q"),
        talk(None),
        [{"role": "user", "content": [{"type": "text"}]}],
        [[]],
        {"url": 3},
        [{"from": 1}],
    ]
    # fmt: off
    names = [
        "messages", "conversations", "prompt", "images", "image", "videos", "audio", "query", "response", "id",
        "chosen", "rejected", "history", "instruction", "input", "output", "question", "answer", "system",
        "reward_model", "completion",
    ]
    # fmt: on
    row = {str(name): odd[rng.integers(len(odd))] for name in rng.choice(names, size=rng.integers(0, 7))}
    assert all(text.startswith("d.jsonl:1: ") for text in texts_of(row))
