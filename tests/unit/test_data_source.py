import hashlib
import io
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmpost.config.schema import Source
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost.data import CONTAINERS, READERS
from mmpost.data.source import read_rows, read_source


def png(seed=0):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def row(text="Q", answer="A", **more):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], **more}


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def refused(path, /, **options):
    policy = {key: options.pop(key) for key in ("on_bad_row", "max_bad_share") if key in options}
    with pytest.raises(MmpostError) as caught:
        read_source(Source(path=str(path), **options), **policy)
    assert caught.value.exit_code == 3
    return str(caught.value)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_name_in_the_tables_can_be_imported():
    pytest.importorskip("datasets")
    for kind, table in (("readers", READERS), ("containers", CONTAINERS)):
        assert all(Catalog(kind, table).get(name) is not None for name in table)


def test_the_package_is_light():
    heavy = ["torch", "transformers", "datasets", "sklearn", "PIL", "pyarrow", "numpy"]
    code = f"import sys, mmpost.data, mmpost.media; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_path_env())
    assert done.stdout.strip() == "[]"


def test_reading_files_imports_no_datasets(here):
    write(here / "a.jsonl", row())
    code = (
        "import sys\nfrom mmpost.config.schema import Source\nfrom mmpost.data.source import read_source\n"
        "read_source(Source(path='a.jsonl'))\nprint('datasets' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_path_env())
    assert done.stdout.split() == ["False", "False"]


def _path_env():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


# Containers.


def test_jsonl(here):
    path = write(here / "train.jsonl", "\ufeff", row("Q1"), "\n", row("Q2", id="x"), "  \n", row("Q3"))
    table = read_source(Source(path="train.jsonl"))
    assert [(s.id, s.origin, s.turns[0].text) for s in table.samples] == [
        ("1", "train.jsonl:1", "Q1"),
        ("x", "train.jsonl:3", "Q2"),
        ("5", "train.jsonl:5", "Q3"),
    ]
    assert (table.name, table.rows, table.faults) == ("train", 3, [])
    assert {sample.source for sample in table.samples} == {"train"}
    with open(path, "rb") as file:
        assert table.sha256 == hashlib.sha256(file.read()).hexdigest()


def test_json_list_and_json_lines_under_the_suffix_json(here):
    (here / "list.json").write_text(json.dumps([row("Q1"), row("Q2")], indent=1))
    write(here / "lines.json", row("Q1"), row("Q2"))
    write(here / "one.json", row("Q1"))
    for name, count in (("list.json", 2), ("lines.json", 2), ("one.json", 1)):
        assert [s.origin for s in read_source(Source(path=name)).samples] == [
            f"{name}:{n}" for n in range(1, count + 1)
        ]
    (here / "object.json").write_text(json.dumps({"data": [row()]}, indent=1))
    assert refused("object.json") == "object.json: the file is one object; expected a list of rows [MMP-D032]"


def test_parquet_with_embedded_and_named_images(here):
    rows = [
        row("<image>Q1", images=[{"bytes": png(), "path": None}], solution="1"),
        row("<image>Q2", images=[{"bytes": None, "path": "pics/b.png"}], solution="2"),
        row("Q3", images=[], solution=None),
    ]
    pq.write_table(pa.Table.from_pylist(rows), here / "d.parquet")
    table = read_source(Source(path="d.parquet"))
    assert [[part.ref for part in s.media()] for s in table.samples] == [[png()], ["pics/b.png"], []]
    assert [s.columns["solution"] for s in table.samples] == ["1", "2", None]
    assert [s.origin for s in table.samples] == ["d.parquet:1", "d.parquet:2", "d.parquet:3"]


def test_verl_parquet(here):
    rows = [
        {
            "data_source": "geo3k",
            "prompt": [{"role": "user", "content": "<image>x?"}],
            "images": [{"bytes": png(), "path": None}],
            "reward_model": {"style": "rule", "ground_truth": "42"},
            "extra_info": {"index": 0, "split": "train"},
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), here / "geo.parquet")
    (sample,) = read_source(Source(path="geo.parquet")).samples
    assert sample.columns["solution"] == "42"
    assert sample.media()[0].ref == png()


def test_d021(here):
    pq.write_table(pa.table({"messages": [1, 2]}), here / "m.parquet")
    expected = "expected a list of structs with role and content [MMP-D021]"
    assert refused("m.parquet") == f"m.parquet: parquet column 'messages' has type int64; {expected}"
    pq.write_table(pa.table({"prompt": ["a"], "pics": [1.5]}), here / "i.parquet")
    expected = "expected string, binary, struct<bytes, path>, or a list of these [MMP-D021]"
    text = refused("i.parquet", columns={"images": "pics"})
    assert text == f"i.parquet: parquet column 'pics' has type double; {expected}"


def test_damaged_parquet(here):
    (here / "d.parquet").write_bytes(b"PAR1 no")
    assert refused("d.parquet").startswith("d.parquet: cannot be read as parquet: ")
    pq.write_table(pa.Table.from_pylist([row() for _ in range(50)]), here / "cut.parquet")
    data = (here / "cut.parquet").read_bytes()
    (here / "cut.parquet").write_bytes(data[: len(data) // 2] + data[-400:])
    assert refused("cut.parquet").endswith("[MMP-D034]")


def test_folder_of_shards(here):
    (here / "set" / "data").mkdir(parents=True)
    for i, split in enumerate(["train", "train", "test"]):
        pq.write_table(pa.Table.from_pylist([row(f"{split}{i}")]), here / "set" / "data" / f"{split}-0000{i}.parquet")
    assert [s.id for s in read_source(Source(path="set")).samples] == ["1", "2", "3"]
    table = read_source(Source(path="set", split="train"))
    assert [s.turns[0].text for s in table.samples] == ["train0", "train1"]
    assert table.samples[1].origin == "set/data/train-00001.parquet:1"
    assert refused("set", split="val").startswith("set: no file of the split 'val' among test-00002.parquet, ")


def test_folders_and_files_that_are_no_data(here):
    (here / "empty").mkdir()
    (here / "mixed").mkdir()
    write(here / "mixed" / "a.jsonl", row())
    (here / "mixed" / "a.parquet").touch()
    (here / "a.csv").touch()
    fix = "Give a .json, .jsonl, .parquet file or a folder of one kind [MMP-D034]"
    assert refused("empty") == f"empty: the folder holds no data files. {fix}"
    assert refused("mixed") == f"mixed: the folder holds both .parquet and .jsonl files. {fix}"
    assert refused("a.csv") == f"a.csv: the suffix '.csv' is not known. {fix}"
    assert refused("mixed/a.jsonl", split="test") == (
        "mixed/a.jsonl: a file has no splits, so 'test' cannot be chosen. Remove split [MMP-D033]"
    )


def test_d001(here):
    write(here / "a.jsonl", row(), '{"messages": [}\n', "{} {}\n", row())
    (here / "b.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    assert refused("a.jsonl").splitlines() == [
        "a.jsonl:2: not valid JSON at column 15: Expecting value [MMP-D001]",
        "a.jsonl:3: not valid JSON at column 4: Extra data [MMP-D001]",
    ]
    assert refused("b.jsonl") == "b.jsonl:1: not valid JSON at column 13: not UTF-8 (byte 0xff) [MMP-D001]"
    (here / "c.json").write_text("[\n{},\n{]\n]")
    assert refused("c.json").startswith("c.json:3: not valid JSON at column 2: ")
    (here / "deep.jsonl").write_text("[" * 100_000 + "\n")
    assert refused("deep.jsonl") == "deep.jsonl:1: not valid JSON at column 1: nested too deeply [MMP-D001]"


def test_d029(here):
    for name, content in (("a.jsonl", ""), ("b.jsonl", "\n \n"), ("c.json", "[]"), ("d.json", "")):
        (here / name).write_text(content)
        assert refused(name) == f"{name}: no rows; expected one JSON object per line [MMP-D029]"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), here / "e.parquet")
    assert refused("e.parquet") == "e.parquet: no rows [MMP-D029]"


def test_d030(here):
    write(here / "train.jsonl", row())
    assert refused("trian.jsonl") == ("trian.jsonl: no such file or folder. Did you mean 'train.jsonl'? [MMP-D030]")
    assert refused("zzz.parquet") == ("zzz.parquet: no such file or folder. Data files in '.': train.jsonl [MMP-D030]")
    (here / "data").mkdir()
    write(here / "data" / "eval.jsonl", row())
    assert refused("data/evl.jsonl").endswith("Did you mean 'data/eval.jsonl'? [MMP-D030]")
    assert refused("dta/eval.jsonl").endswith("Did you mean 'data'? [MMP-D030]")
    assert refused("data/eval").startswith("data/eval: no such file or folder.")  # no hub id: the folder exists


# Media paths.


def test_relative_media_are_found_beside_the_file_then_in_the_working_directory(here):
    (here / "data").mkdir()
    (here / "data" / "near.png").write_bytes(png())
    (here / "far.png").write_bytes(png())
    absolute = str(here / "far.png")
    images = ["near.png", "far.png", "gone.png", absolute, "../far.png", "https://example.com/a.png"]
    write(here / "data" / "d.jsonl", row("<image>" * 6, images=images))
    table = read_source(Source(path="data/d.jsonl"))
    assert [part.ref for part in table.samples[0].media()] == [
        "data/near.png",
        "far.png",
        "data/gone.png",
        absolute,
        "data/../far.png",
        "https://example.com/a.png",
    ]
    assert table.roots == ("data", "")
    rooted = read_source(Source(path="data/d.jsonl", media_root="pics"))
    assert [part.ref for part in rooted.samples[0].media()][:2] == ["pics/near.png", "pics/far.png"]


# Options of a source.


def test_limit_columns_system_and_name(here):
    write(here / "d.jsonl", *({"chat": row(f"Q{i}")["messages"], "label": i} for i in range(5)))
    columns = {"messages": "chat", "solution": "label", "images": "absent"}
    source = Source(path="d.jsonl", limit=2, columns=columns, system="S", name="mine")
    table = read_source(source, extra_columns={"task": "t", "solution": "not this one"})
    assert (table.name, table.rows, len(table.samples)) == ("mine", 2, 2)
    assert [dict(s.columns) for s in table.samples] == [{"solution": i, "task": "t"} for i in range(2)]
    assert [turn.role for turn in table.samples[0].turns] == ["system", "user", "assistant"]


def test_columns_can_be_swapped():
    (sample,) = read_rows([{"prompt": "A", "query": "B"}], columns={"prompt": "query", "query": "prompt"}).samples
    assert (sample.turns[0].text, sample.columns["query"]) == ("B", "A")


def test_a_reader_of_the_users_own(here):
    (here / "mine.py").write_text(
        "from mmpost.core.sample import Part, Sample, Turn\n"
        "def read(row):\n"
        "    turn = Turn('user', (Part('text', row.values['q']),))\n"
        "    return Sample(str(row.number), (turn,), origin=row.origin)\n"
    )
    table = read_rows([{"q": "hello"}], format="mine.py:read")
    assert table.samples[0].turns[0].text == "hello"


def test_an_object_without_rows():
    with pytest.raises(MmpostError) as caught:
        read_rows(5, name="d")
    assert str(caught.value) == "d: data is int; expected rows or a path [MMP-D032]"


def test_tasks_are_not_read_here():
    with pytest.raises(ValueError, match="given by the task"):
        read_source(Source(path="task:x"))


# Policies.


@pytest.fixture
def half_bad(here):
    lines = [row(f"Q{i}") for i in range(9)]
    write(here / "d.jsonl", *lines, {"messages": [{"role": "x"}], "blob": 1}, "{broken\n")
    return Source(path="d.jsonl")


@pytest.mark.parametrize("policy", ["skip", "quarantine"])
def test_bad_rows_are_left_out_and_kept_with_their_reason(half_bad, policy):
    table = read_source(half_bad, on_bad_row=policy, max_bad_share=0.2)
    assert (table.rows, len(table.samples)) == (11, 9)
    assert [fault.code for fault in table.faults] == ["MMP-D003", "MMP-D001"]
    assert json.loads(json.dumps(table.bad_rows)) == [
        {
            "origin": "d.jsonl:10",
            "code": "MMP-D003",
            "reason": str(table.faults[0]),
            "raw": {"messages": [{"role": "x"}], "blob": 1},
        },
        {
            "origin": "d.jsonl:11",
            "code": "MMP-D001",
            "reason": str(table.faults[1]),
            "raw": "{broken",
        },
    ]


def test_d050(half_bad):
    text = refused("d.jsonl", on_bad_row="quarantine", max_bad_share=0.05)
    assert text == (
        "d.jsonl: 2 of 11 rows are faulty (18.2%), more than data.max_bad_share allows (5.0%). "
        "First: d.jsonl:10: message 1 has role 'x'; expected system, user, assistant or tool. "
        "Correct the rows or raise data.max_bad_share [MMP-D050]"
    )
    assert len(read_source(half_bad, on_bad_row="skip", max_bad_share=2 / 11).samples) == 9


def test_raw_media_of_bad_rows_are_not_copied():
    table = read_rows([{"x": [b"abc"]}], on_bad_row="skip", max_bad_share=1.0)
    assert table.bad_rows[0]["raw"] == {"x": ["<3 bytes>"]}


# The datasets library.


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("datasets")


def image_set(library):
    rows = {
        "prompt": ["<image>Q1", "<image><image>Q2"],
        "images": [[{"bytes": png(1), "path": None}], [{"bytes": png(2), "path": None}] * 2],
    }
    features = library.Features({"prompt": library.Value("string"), "images": library.Sequence(library.Image())})
    return library.Dataset.from_dict(rows, features=features)


def test_dataset_objects_keep_their_media_encoded(library):
    expected = [[png(1)], [png(2)] * 2]
    data = image_set(library)
    for given in (data, data.to_iterable_dataset()):
        table = read_rows(given, name="hf")
        assert [[part.ref for part in sample.media()] for sample in table.samples] == expected
        assert [sample.origin for sample in table.samples] == ["hf:1", "hf:2"]
    assert isinstance(data[0]["images"][0], Image.Image)  # the caller's object is unchanged


def test_media_features_inside_messages_are_found(library):
    part = {"type": library.Value("string"), "image": library.Image()}
    features = library.Features({"messages": [{"role": library.Value("string"), "content": [part]}]})
    image = {"type": "image", "image": {"bytes": png(), "path": None}}
    data = library.Dataset.from_dict({"messages": [[{"role": "user", "content": [image]}]]}, features=features)
    assert read_rows(data).samples[0].media()[0].ref == png()


def test_saved_data_sets(library, here):
    data = image_set(library)
    data.save_to_disk(str(here / "saved"))
    table = read_source(Source(path="saved"))
    assert [len(sample.media()) for sample in table.samples] == [1, 2]
    library.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(here / "splits"))
    assert read_source(Source(path="splits")).rows == 2
    assert read_source(Source(path="splits", split="test")).rows == 1
    assert refused("splits", split="val") == (
        "splits: has no split 'val'; it has train, test. Choose one with Source.split [MMP-D033]"
    )
    with pytest.raises(MmpostError) as caught:
        read_rows({"a": data, "b": data}, name="hf")
    assert str(caught.value) == "hf: has the splits a, b. Choose one with Source.split [MMP-D033]"


def test_d026(library, monkeypatch):
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refused("nobody/nothing-here") == (
        "nobody/nothing-here is not in the local cache and offline mode is on; "
        f"expected under {library.config.HF_DATASETS_CACHE} [MMP-D026]"
    )
