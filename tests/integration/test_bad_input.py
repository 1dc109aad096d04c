"""Whatever is wrong with the input: one clear message, the exit code of its family, and nothing dropped silently."""

import json
import re
import subprocess
import sys

import pytest

SFT = ["sft", "sft.yaml", "model_name_or_path=tiny-qwen2.5-vl", "max_steps=2", "train.batch_size=2"]
GRPO = [
    *("grpo", "grpo.yaml", "model_name_or_path=tiny-qwen2.5-vl", "max_steps=2", "prompts_per_step=2"),
    *("num_generations=2", "max_completion_length=4", "rewards=[reward.py:brevity]"),
]


def says(done, code, exit_code, text):
    """One message with its code, and no traceback, warning or crash file beside it."""
    assert done.code == exit_code, done.err
    last = done.err.strip().splitlines()[-1]
    assert last.endswith(f"[{code}]"), done.err
    assert re.search(text, last), last
    assert done.err.count("[MMP-") == 1
    assert "Traceback" not in done.err
    assert "Warning" not in done.err


def change_row(path, number, **fields):
    """Replace fields of the 1-based row; None removes one."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = {**rows[number - 1], **fields}
    rows[number - 1] = {name: value for name, value in row.items() if value is not None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows[number - 1]


def test_missing_image(mmpost, project):
    change_row(project / "sft.jsonl", 3, images=["images/gone.png"])
    done = mmpost(*SFT)
    says(done, "MMP-D007", 3, r"^sft\.jsonl:3: image file not found: 'images/gone\.png'\. Looked in:")
    assert done.err.count("\n") == 1
    assert not (project / "runs").exists()


def test_truncated_jpeg(mmpost, project):
    from PIL import Image

    Image.effect_noise((64, 64), 50).convert("RGB").save(project / "whole.jpg")
    whole = (project / "whole.jpg").read_bytes()
    (project / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    change_row(project / "sft.jsonl", 2, images=["torn.jpg"])
    done = mmpost(*SFT)
    says(done, "MMP-D008", 3, r"^sft\.jsonl:2: cannot decode image 'torn\.jpg'")
    assert done.err.count("\n") == 1


def test_mark_without_image(mmpost, project):
    change_row(project / "sft.jsonl", 7, images=[])
    says(mmpost(*SFT), "MMP-D004", 3, r"^sft\.jsonl:7: 1 <image> marks in user/system text but 0 entries in 'images'")


def test_all_faulty_rows_are_named_together(mmpost, project):
    change_row(project / "sft.jsonl", 3, images=["images/gone.png"])
    change_row(project / "sft.jsonl", 9, images=["images/lost.png"])
    done = mmpost(*SFT)
    assert done.code == 3
    assert [line[:12] for line in done.err.splitlines()] == ["sft.jsonl:3:", "sft.jsonl:9:"]


def test_empty_file(mmpost, project):
    (project / "sft.jsonl").write_text("")
    says(mmpost(*SFT), "MMP-D029", 3, r"sft\.jsonl")


def test_row_longer_than_max_length(mmpost, project):
    change_row(
        project / "sft.jsonl",
        5,
        messages=[{"role": "user", "content": "<image>" + "word " * 90}, {"role": "assistant", "content": "yes"}],
    )
    done = mmpost(*SFT, "max_length=80")
    says(done, "MMP-D014", 3, r"^sft\.jsonl:5: \d+ tokens \(text \d+, image \d+, video 0, audio 0\) exceed data\.max_l")
    # A run that could not start leaves nothing that would stand in the way of the next try.
    assert not (project / "runs" / "sft").exists()
    dropped = mmpost(*SFT, "max_length=80", "on_long=drop", "train.overwrite=true")
    assert dropped.code == 0
    events = (project / "runs" / "sft" / "events.jsonl").read_text()
    assert events.count('"dropped"') == events.count("sft.jsonl:5: ") == 1


def test_no_row_fits(mmpost, project):
    done = mmpost(*SFT, "max_length=10", "on_long=drop")
    assert done.code == 3
    assert done.err.count("[MMP-D014]") == 20


def test_prompt_longer_than_max_length(mmpost, project):
    change_row(project / "grpo.jsonl", 5, messages=[{"role": "user", "content": "<image>" + "word " * 90}])
    says(mmpost(*GRPO, "max_length=80"), "MMP-D014", 3, r"^grpo\.jsonl:5: ")


def test_quarantined_rows_are_counted_and_written(mmpost, project, rows_of):
    change_row(project / "sft.jsonl", 3, images=["images/gone.png"])
    done = mmpost(*SFT, "on_bad_row=quarantine", "max_bad_share=0.1")
    assert done.code == 0
    assert "1 faulty rows left out; see bad_rows.jsonl" in done.err
    (row,) = rows_of(project / "runs" / "sft" / "bad_rows.jsonl")
    assert (row["origin"], row["code"]) == ("sft.jsonl:3", "MMP-D007")
    manifest = json.loads((project / "runs" / "sft" / "data_manifest.json").read_text())
    assert (manifest[0]["rows"], manifest[0]["left_out"]) == (19, 1)


def test_too_many_bad_rows(mmpost, project):
    for number in (3, 9):
        change_row(project / "sft.jsonl", number, images=["images/gone.png"])
    done = mmpost(*SFT, "on_bad_row=quarantine")
    assert (done.code, done.err.rstrip()[-10:]) == (3, "[MMP-D050]")


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ("raise ValueError('no unit')", "MMP-R120", r"reward 'mine' raised ValueError: no unit \(.*bad\.py:2\)"),
        ("return [1.0]", "MMP-R121", r"reward 'mine' returned 1 scores for 4 completions"),
        ("return ['good'] * len(completions)", "MMP-R121", r"reward 'mine' returned 'good' for completion 1"),
    ],
)
def test_reward_that_fails(mmpost, project, body, code, text):
    (project / "bad.py").write_text(f"def mine(prompts, completions, **columns):\n    {body}\n")
    done = mmpost(*GRPO[:-1], "rewards=[bad.py:mine]", "log.progress=none")
    says(done, code, 6, text)
    assert not (project / "runs" / "grpo").exists()


def test_missing_reward_column(mmpost, project):
    change_row(project / "grpo.jsonl", 4, solution=None)
    done = mmpost(*GRPO[:-1], "rewards=[answer]")
    says(done, "MMP-D019", 3, r"^reward 'answer' needs column 'solution', which 1 of 20 rows lack; columns:")


def test_missing_reward_function(mmpost, project):
    says(mmpost(*GRPO[:-1], "rewards=[reward.py:brevty]"), "MMP-C007", 2, "has no object 'brevty'")
    says(mmpost(*GRPO[:-1], "rewards=[answr]"), "MMP-C006", 2, "Did you mean 'answer'")


def test_output_folder_without_write_permission(mmpost, project):
    closed = project / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    try:
        done = mmpost(*SFT, "output_dir=closed/run")
        says(done, "MMP-E020", 4, r"^cannot write to output folder 'closed/run': Permission denied\.")
        assert list(closed.iterdir()) == []
    finally:
        closed.chmod(0o755)


def test_output_folder_of_another_run(mmpost, project):
    assert mmpost(*SFT).code == 0
    before = (project / "runs/sft/final/model.safetensors").read_bytes()
    done = mmpost(*SFT, "seed=7")
    says(done, "MMP-E021", 4, r"^'runs/sft' holds a run with another configuration: train\.seed \(was 42, now 7\)\.")
    assert (project / "runs/sft/final/model.safetensors").read_bytes() == before
    assert mmpost(*SFT, "seed=7", "overwrite=true").code == 0


def test_missing_model_folder(mmpost, project):
    done = mmpost("sft", "sft.yaml", "model_name_or_path=runs/nothing/final", "output_dir=runs/new")
    says(done, "MMP-E030", 4, r"^no model folder 'runs/nothing/final'\.")
    assert not (project / "runs" / "new").exists()
    says(mmpost("eval", "demo_vqa", "--model", "./nothing", "--limit", "1"), "MMP-E030", 4, "'./nothing'")


def test_unknown_task(mmpost, project):
    for done in (
        mmpost("eval", "demo_vqq", "--model", "tiny-qwen2.5-vl"),
        mmpost("data", "check", "task:demo_vqq"),
        mmpost(*SFT, "data.train=[task:demo_vqq]"),
        mmpost(*SFT, "eval.tasks=[demo_vqq]"),
    ):
        says(done, "MMP-C006", 2, r"^unknown name 'demo_vqq' among tasks\. Did you mean 'demo_vqa'\? Known: ")
    assert not (project / "runs").exists()


def test_unknown_command_and_missing_argument(mmpost, project):
    says(mmpost("sfd"), "MMP-C000", 2, "No such command 'sfd'")
    says(mmpost("eval", "demo_vqa"), "MMP-C000", 2, "Missing option '--model'")
    assert not (project / "crash.txt").exists()


BLOCKED = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "datasets", "gradio", "sklearn", "accelerate", "peft"}:
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Refuse())
from mmpost.cli import run

for words in json.loads(sys.argv[1]):
    for stream in (sys.stdout, sys.stderr):
        print(f"== {' '.join(words)}", file=stream)
    print(f"exit {run(words)}", file=sys.stderr)
"""


def test_config_errors_and_help_answer_without_torch(project):
    (project / "typo.yaml").write_text("train:\n  max_steps: 3\n  learning_rte: 1e-4\n")
    (project / "type.yaml").write_text("data:\n  train: [sft.jsonl]\ntrain:\n  max_steps: ten\n")
    wrong = {
        "sft typo.yaml": r"^typo\.yaml:3: unknown key 'train\.learning_rte'; did you mean 'train\.learning_rate'\? "
        r"\[MMP-C001\]$",
        "sft type.yaml": r"^type\.yaml:4: train\.max_steps: expected a whole number.*'ten'.* \[MMP-C004\]$",
        "grpo nothing.yaml": r"^no config file 'nothing\.yaml'.* \[MMP-C009\]$",
        "sft sft.yaml max_steps=ten": r"^command line: train\.max_steps: expected a whole number.* \[MMP-C004\]$",
    }
    fine = ["--help", "sft --help", "grpo --help", "grpo --help rewards", "eval --help", "data check --help", "version"]
    commands = [command.split() for command in [*wrong, *fine]]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(commands)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    told = dict(part.split("\n", 1) for part in done.stderr.split("== ")[1:])
    assert list(told) == [*wrong, *fine]
    for command, text in wrong.items():
        message, exit_line = told[command].splitlines()
        assert re.search(text, message), message
        assert exit_line == "exit 2"
    assert [told[command] for command in fine] == ["exit 0\n"] * len(fine)
    shown = dict(part.split("\n", 1) for part in done.stdout.split("== ")[1:])
    assert all(len(line) <= 80 for command in fine[1:4] for line in shown[command].splitlines()[5:])
    assert "num_generations" in shown["grpo --help"]
