import io
import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mmpost.core.errors import MmpostError
from mmpost.runs.folder import RunFolder

CONFIG = "train:\n  learning_rate: 0.001  # sft.yaml:3\n  seed: 1\n  save_steps: 10\nlog:\n  samples: 8\n"
COMMAND = ["mmpost", "sft", "my file.yaml"]


def start(path, config=CONFIG, *, overwrite=False):
    return RunFolder.open(path, command=COMMAND, config_yaml=config, overwrite=overwrite)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(path, config=CONFIG, *, overwrite=False):
    with pytest.raises(MmpostError) as caught:
        start(path, config, overwrite=overwrite)
    return caught.value


def test_a_new_folder_explains_itself(tmp_path):
    run = start(tmp_path / "runs" / "a")
    assert (run.resuming, run.finished) == (False, False)
    assert (run.path / "config.yaml").read_text() == CONFIG
    assert (run.path / "command.txt").read_text() == "mmpost sft 'my file.yaml'\n"
    env = json.loads((run.path / "env.json").read_text())
    assert env["python"] == sys.version.split()[0]
    assert env["packages"]["numpy"] == np.__version__
    assert sorted(p.name for p in run.path.iterdir() if p.name != "git.patch") == [
        "command.txt",
        "config.yaml",
        "env.json",
    ]


def test_git_patch_holds_the_uncommitted_change(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("old = 1\n")
    git("add", "code.py")
    git("commit", "-m", "first")
    (tmp_path / "code.py").write_text("new = 2\n")
    monkeypatch.chdir(tmp_path)
    run = start(tmp_path / "run")
    patch = (run.path / "git.patch").read_text()
    assert "-old = 1\n+new = 2\n" in patch
    git("checkout", "code.py")
    git("apply", str(run.path / "git.patch"))
    assert (tmp_path / "code.py").read_text() == "new = 2\n"


def test_outside_a_checkout_there_is_no_patch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert not (start(tmp_path / "run").path / "git.patch").exists()


@pytest.mark.parametrize("status", [None, "interrupted", "failed"])
def test_an_unfinished_run_with_the_same_config_goes_on(tmp_path, status):
    first = start(tmp_path / "a")
    if status:
        first.finish(status)
    run = start(tmp_path / "a", CONFIG.replace("save_steps: 10", "save_steps: 20").replace("samples: 8", "samples: 2"))
    assert (run.resuming, run.finished) == (True, False)
    assert "save_steps: 20" in (run.path / "config.yaml").read_text()
    assert not (run.path / "status.json").exists()


def test_a_finished_run_is_recognised_and_left_alone(tmp_path):
    start(tmp_path / "a").finish("finished", 10)
    run = start(tmp_path / "a", CONFIG.replace("save_steps: 10", "save_steps: 20"))
    assert (run.resuming, run.finished) == (False, True)
    assert "save_steps: 10" in (run.path / "config.yaml").read_text()
    assert json.loads((run.path / "status.json").read_text())["step"] == 10


def test_another_config_is_refused_with_its_keys(tmp_path):
    start(tmp_path / "a")
    error = refused(tmp_path / "a", CONFIG.replace("0.001", "0.002"))
    assert str(error) == (
        f"'{tmp_path / 'a'}' holds a run with another configuration: "
        "train.learning_rate (was 0.001, now 0.002). "
        "Choose another train.output_dir, or train.overwrite=true to delete that run. [MMP-E021]"
    )


def test_at_most_five_differing_keys_are_listed(tmp_path):
    names = "abcdefg"
    start(tmp_path / "a", "".join(f"{n}: 1\n" for n in names))
    error = refused(tmp_path / "a", "".join(f"{n}: 2\n" for n in names))
    assert error.what.count("(was 1, now 2)") == 5
    assert error.what.endswith(" and 2 more.")


def test_overwrite_deletes_a_run(tmp_path):
    run = start(tmp_path / "a")
    run.log({"step": 1})
    (run.path / "checkpoints" / "step-000001").mkdir(parents=True)
    again = start(tmp_path / "a", "other: 1\n", overwrite=True)
    assert (again.resuming, again.finished) == (False, False)
    assert not (again.path / "metrics.jsonl").exists()
    assert not (again.path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("name", "overwrite"), [("thesis.tex", True), ("config.yaml", True), ("config.yaml", False), ("final", False)]
)
def test_a_folder_that_is_no_run_is_never_touched(tmp_path, overwrite, name):
    (tmp_path / name).write_text("years of work")
    error = refused(tmp_path, overwrite=overwrite)
    assert str(error) == (
        f"output folder '{tmp_path}' holds '{name}' but no run; its files are never deleted. "
        "Choose another train.output_dir. [MMP-E022]"
    )
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "years of work"


def test_a_folder_with_other_files_becomes_a_run_folder_and_keeps_them(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    RunFolder.open(tmp_path, command=["mmpost", "sft"], config_yaml=CONFIG, overwrite=False)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "config.yaml").is_file()


@pytest.mark.parametrize("below", [False, True])
def test_a_read_only_folder_is_refused_even_for_root(tmp_path, below):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    path = folder / "run" if below else folder
    try:
        error = refused(path)
        assert str(error) == (
            f"cannot write to output folder '{path}': {os.strerror(13)}. Choose another train.output_dir. [MMP-E020]"
        )
        assert list(folder.iterdir()) == []
    finally:
        folder.chmod(stat.S_IRWXU)


@pytest.mark.parametrize("below", [False, True])
def test_a_file_in_the_way_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run" if below else tmp_path / "file"
    error = refused(path)
    assert error.code == "MMP-E020"
    assert error.what.startswith(f"cannot write to output folder '{path}': ")


def test_numbers_that_are_not_finite_become_null_and_are_named(tmp_path):
    run = start(tmp_path / "a")
    run.log(
        {
            "step": np.int64(3),
            "loss": float("nan"),
            "lr": np.float32(0.5),
            "reward": {"total": np.float64("inf"), "by_name": {"a.b": -float("inf")}},
            "mem_gb": [1.0, float("nan")],
            "flags": np.array([True, False]),
        }
    )
    assert lines(run.path / "metrics.jsonl") == [
        {
            "step": 3,
            "loss": None,
            "lr": 0.5,
            "reward": {"total": None, "by_name": {"a.b": None}},
            "mem_gb": [1.0, None],
            "flags": [True, False],
            "nonfinite": ["loss", "reward.total", "reward.by_name.a.b", "mem_gb.1"],
        }
    ]


def test_a_line_after_a_torn_one_is_readable(tmp_path):
    run = start(tmp_path / "a")
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    run.log({"step": 3})
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n'


def test_truncating_and_logging_again_gives_the_same_file(tmp_path):
    run, whole = start(tmp_path / "a"), start(tmp_path / "b")
    for step in range(1, 11):
        whole.log({"step": step})
    for step in range(1, 8):
        if step == 5:
            offsets = run.offsets()
        run.log({"step": step})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    resumed = start(tmp_path / "a")
    resumed.truncate(offsets)
    for step in range(5, 11):
        resumed.log({"step": step})
    assert (run.path / "metrics.jsonl").read_bytes() == (whole.path / "metrics.jsonl").read_bytes()


def test_truncate_cuts_a_torn_line_and_later_samples(tmp_path):
    run = start(tmp_path / "a")
    run.write_samples(5, [{"step": 5}])
    run.write_samples(10, [{"step": 10}])
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    run.truncate({"metrics.jsonl": 10_000, "events.jsonl": 77}, step=5)
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert [p.name for p in (run.path / "samples").iterdir()] == ["step-000005.jsonl"]
    assert not (run.path / "events.jsonl").exists()


def test_offsets_of_a_run_without_logs_are_zero(tmp_path):
    assert start(tmp_path / "a").offsets() == {"metrics.jsonl": 0, "events.jsonl": 0}


def test_samples_keep_their_keys_and_get_thumbnails(tmp_path):
    run = start(tmp_path / "a")
    image = Image.new("RGB", (16, 8), "red")
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    image.save(tmp_path / "red.png")
    media = [
        {"type": "image", "ref": ref}
        for ref in (image, encoded.getvalue(), tmp_path / "red.png", str(tmp_path / "red.png"))
    ]
    row = {"step": 50, "prompt": "q", "rewards": {"a": np.float32(1), "b": None}, "completion": "\ud83d"}
    file = run.write_samples(50, [{**row, "media": [*media, {"type": "audio", "ref": b"RIFF"}]}])
    assert file == run.path / "samples" / "step-000050.jsonl"
    (written,) = lines(file)
    thumbs = {item["thumb"] for item in written["media"][:4]}
    assert len(thumbs) == 1  # the same picture, once on disk
    assert written["media"][4] == {"thumb": None, "type": "audio"}
    assert written["rewards"] == {"a": 1.0, "b": None}
    (thumb,) = thumbs
    assert thumb.startswith("samples/media/")
    assert len(thumb.removeprefix("samples/media/").removesuffix(".jpg")) == 16
    assert Image.open(run.path / thumb).size == (112, 56)


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (3, 90), (100, 20), (112, 10), (160, 160), (640, 480), (50, 2000)])
def test_thumbnails_have_a_longer_side_of_112_to_160(tmp_path, size):
    run = start(tmp_path / "a")
    (row,) = lines(run.write_samples(1, [{"media": [{"type": "image", "ref": Image.new("L", size)}]}]))
    assert 112 <= max(Image.open(run.path / row["media"][0]["thumb"]).size) <= 160


def test_small_pictures_are_enlarged_without_blur(tmp_path):
    run = start(tmp_path / "a")
    board = Image.fromarray((np.indices((16, 16)).sum(0) % 2 * 255).astype("uint8"))
    (row,) = lines(run.write_samples(1, [{"media": [{"type": "image", "ref": board}]}]))
    pixels = np.asarray(Image.open(run.path / row["media"][0]["thumb"]).convert("L")).astype(int)
    centres = pixels[3::7, 3::7]
    assert np.abs(centres - np.asarray(board)).max() < 40


def test_an_unreadable_picture_is_named_not_fatal(tmp_path):
    run = start(tmp_path / "a")
    (row,) = lines(run.write_samples(1, [{"media": [{"type": "image", "ref": b"no picture"}]}]))
    assert row["media"][0]["thumb"] is None
    assert "cannot identify image file" in row["media"][0]["error"]


def test_events_are_appended(tmp_path):
    run = start(tmp_path / "a")
    run.event("R102", "completions hit the limit", step=4)
    (event,) = lines(run.path / "events.jsonl")
    assert {key: event[key] for key in ("kind", "text", "step")} == {
        "kind": "R102",
        "text": "completions hit the limit",
        "step": 4,
    }


def test_evaluations_name_their_sample_file(tmp_path):
    run = start(tmp_path / "a")
    file = run.write_eval(
        "digits", {"n": 1, "metrics": {"accuracy": {"value": np.float64(1)}}}, [{"doc_id": 0, "media": []}]
    )
    result = json.loads(file.read_text())
    assert result == {
        "schema": 1,
        "n": 1,
        "metrics": {"accuracy": {"value": 1.0}},
        "samples": "digits.samples.jsonl",
    }
    assert lines(run.path / "eval" / result["samples"]) == [{"doc_id": 0, "media": []}]
    with pytest.raises(ValueError, match="one file name"):
        run.write_eval("../digits", {}, [])


def test_only_complete_checkpoints_count(tmp_path):
    run = start(tmp_path / "a")
    for step in (100, 50, 150):
        (run.path / "checkpoints" / f"step-{step:06d}" / "trainer_state").mkdir(parents=True)
    for step in (100, 50):
        (run.path / "checkpoints" / f"step-{step:06d}" / "trainer_state" / "state.json").write_text("{}")
    assert [p.name for p in run.checkpoints()] == ["step-000050", "step-000100"]


def test_finish_takes_the_step_from_the_log(tmp_path):
    run = start(tmp_path / "a")
    run.log({"step": 7})
    run.finish("interrupted")
    status = json.loads((run.path / "status.json").read_text())
    assert (status["status"], status["step"]) == ("interrupted", 7)


def test_added_environment_keeps_what_was_there(tmp_path):
    run = start(tmp_path / "a")
    run.add_environment({"device": "cpu"})
    env = json.loads((run.path / "env.json").read_text())
    assert env["device"] == "cpu"
    assert "python" in env


def test_no_module_of_the_package_loads_torch():
    code = (
        "import sys, mmpost.runs.folder, mmpost.runs.live, mmpost.runs.report, mmpost.runs.browse\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'datasets', 'jinja2', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
