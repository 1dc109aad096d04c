import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mmpost.runs.folder import RunFolder
from mmpost.runs.report import Stage, changed_options, write_report, write_staged_report

CONFIG = """model:
  model_name_or_path: tiny-vlm
  freeze: [vision_tower]  # digits.yaml:3
peft:
  kind: full
data:
  train:
    - path: task:digits  # digits.yaml:5
      weight: 1.0
train:
  output_dir: runs/digits  # command line
  learning_rate: 0.002  # digits.yaml:9
  max_steps: 120  # command line
  seed: 0
log:
  run_name: digits <b>toy</b>  # digits.yaml:20
"""
WORDS = ("three", "seven", "four", "nine")


def digit(rng: np.random.Generator, size: int = 16) -> Image.Image:
    return Image.fromarray((rng.random((size, size, 3)) * 255).astype("uint8"))


def fill(run: RunFolder, kind: str, *, steps: int = 120, media: bool = True) -> None:
    rng = np.random.default_rng(0)
    tokens = 0
    for step in range(1, steps + 1):
        tokens += 4096
        fall = math.exp(-step / 40)
        record = {
            "step": step,
            "epoch": step / 60,
            "time": 1.7e9 + 0.5 * step,
            "lr": 2e-3 * (1 - step / steps),
            "grad_norm": np.float32(0.4 + fall + 0.2 * rng.random()),
            "tokens_total": tokens,
            "phase_s": {"data": 0.02, "reward": 0.01, "train": 0.2, "sync": 0.005, "rollout": 0.3},
        }
        if kind == "sft":
            record["loss"] = record["nll"] = 2.3 * fall + 0.3 + 0.1 * rng.standard_normal()
            del record["phase_s"]["rollout"], record["phase_s"]["reward"]
        else:
            total = 0.9 - 0.6 * fall + 0.05 * rng.standard_normal()
            parts = {"accuracy": total - 0.1, "format": min(1.0, 0.7 + step / steps), "length": 0.3}
            record["surrogate"] = 1e-3 * rng.standard_normal()
            record["reward"] = {"total": total, "by_name": parts, "std_within": 0.3 * fall + 0.02}
            record |= {"zero_spread": 1 - fall, "truncated": 0.3 * fall, "entropy": 1.2 * fall + 0.1}
            record |= {
                "kl": float("nan") if step == 60 else 0.02 * step / steps,
                "logp_gap": 1e-6,
                "clip_share": 0.0,
            }
            record["completion_length"] = 12 + 4 * rng.random()
        run.log(record)
        if step % 30 == 0:
            value = 0.9 - 0.6 * fall
            run.log(
                {
                    "step": step,
                    "eval": {"digits": {"accuracy": value, "ci": [value - 0.04, value + 0.04], "n": 500}},
                }
            )
        if step % 40 == 0:
            rows = [sample(rng, step, index, media=media) for index in range(8)]
            run.write_samples(step, rows)
            run.event("checkpoint", f"checkpoints/step-{step:06d}", step=step)
    run.event("R101", "all answers in a group get the same reward, so there is nothing to learn", step=80)
    run.event("citation", "Shao et al. 2024. DeepSeekMath.")


def sample(rng: np.random.Generator, step: int, index: int, *, media: bool) -> dict:
    right = bool(rng.random() < 0.6)
    return {
        "step": step,
        "row_id": f"row-{index}",
        "source": "digits",
        "prompt": "Which number does the picture show? <script>alert(1)</script>",
        "media": [{"type": "image", "ref": digit(rng)}] if media else [],
        "completion": f"<think>I see strokes.</think> {WORDS[index % 4]}",
        "rewards": {"accuracy": float(right), "format": 1.0, "length": None},
        "advantage": rng.standard_normal(),
        "tokens": 14,
        "truncated": index == 7,
        "answer": WORDS[index % 4] if right else WORDS[(index + 1) % 4],
        "solution": None,
    }


def write_eval(run: RunFolder, accuracy: float) -> None:
    rng = np.random.default_rng(1)
    groups = {
        f"group {letter}": round(accuracy + shift, 3)
        for letter, shift in zip("abcd", (0.04, -0.1, 0.0, -0.2), strict=True)
    }
    rows = [
        {
            "doc_id": index,
            "input": "Which number?",
            "target": "three",
            "resps": ["it is three"],
            "filtered_resps": ["three"],
            "accuracy": int(rng.random() < accuracy),
            "media": [{"type": "image", "ref": digit(rng)}],
            "group": f"group {'abcd'[index % 4]}",
        }
        for index in range(40)
    ]
    result = {
        "model": {"name": "tiny-vlm", "params": 1_200_000},
        "task": {"name": "digits", "version": "1.0"},
        "n": 500,
        "metrics": {"accuracy": {"value": accuracy, "ci": [accuracy - 0.04, accuracy + 0.04], "n": 500, "unparsed": 3}},
        "by_group": {name: {"value": v, "ci": [max(0, v - 0.08), v + 0.08], "n": 125} for name, v in groups.items()},
        "seconds": 3.2,
    }
    run.write_eval("digits", result, rows)


@pytest.fixture
def make_run(tmp_path):
    def make(name: str = "digits", kind: str = "grpo", accuracy: float = 0.83) -> RunFolder:
        command = ["mmpost", kind, "digits.yaml", "train.max_steps=120"]
        run = RunFolder.open(tmp_path / name, command=command, config_yaml=CONFIG, overwrite=False)
        fill(run, kind)
        write_eval(run, accuracy)
        run.finish("finished")
        return run

    return make


class Checker(HTMLParser):
    """Collects what a browser would load, and checks that elements close in order."""

    VOID = frozenset({"meta", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.resources: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.resources += [v for k, v in attrs if k in {"src", "href", "xlink:href", "data", "action", "xmlns"} and v]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def check(path) -> Checker:
    html = path.read_text("utf-8")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.stack == []
    assert all(r.startswith(("data:image/", "#")) for r in checker.resources)
    assert not re.search(r"https?://|url\(|@import", html)
    assert "script" not in checker.tags
    assert path.stat().st_size <= 5_000_000
    return checker


def test_report_is_one_escaped_file_without_resources(make_run):
    run = make_run()
    out = write_report(run.path)
    checker = check(out)
    html = out.read_text("utf-8")
    assert out == run.path / "report.html"
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "digits &lt;b&gt;toy&lt;/b&gt;" in html
    for words in (
        "Reward by name",
        "Entropy",
        "Held-out accuracy",
        "Learning rate",
        "Lowest reward",
        "Citations",
    ):
        assert words in checker.texts
    assert any("83.0 %" in text for text in checker.texts)
    assert sum(tag == "img" for tag in checker.tags) >= 24


def test_every_numeric_key_gets_a_chart_even_an_unknown_one(make_run):
    run = make_run()
    run.log({"step": 121, "my_own_number": 4.0})
    checker = check(write_report(run.path))
    assert "my_own_number" in checker.texts


def test_report_says_which_values_were_not_finite(make_run):
    text = write_report(make_run().path).read_text("utf-8")
    assert "Values that were not finite are gaps in the curves: kl." in text


@pytest.mark.parametrize(
    "missing",
    [
        "metrics.jsonl",
        "config.yaml",
        "env.json",
        "events.jsonl",
        "status.json",
        "samples",
        "eval",
        "command.txt",
    ],
)
def test_report_of_an_incomplete_folder_is_written(make_run, missing):
    run = make_run()
    (run.path / missing).rename(run.path.parent / "elsewhere")
    check(write_report(run.path))


def test_report_after_a_crash_counts_the_torn_line(make_run):
    run = make_run()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 121, "los')
    (run.path / "status.json").unlink()
    html = write_report(run.path).read_text("utf-8")
    assert "1 unreadable lines in the logs were left out" in html
    assert 'class="pill unfinished"' in html


def test_report_of_an_empty_folder_is_written(tmp_path):
    check(write_report(tmp_path))


def test_report_shrinks_below_the_limit_and_says_so(make_run):
    run = make_run()
    noise = np.random.default_rng(2)
    rows = [sample(noise, 200, index, media=False) for index in range(40)]
    run.write_samples(200, rows)
    big = run.path / "samples" / "media" / "big.jpg"
    big.write_bytes(noise.bytes(300_000))
    lines = [{**row, "media": [{"type": "image", "thumb": "samples/media/big.jpg"}]} for row in rows]
    (run.path / "samples" / "step-000200.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = check(write_report(run.path))
    assert any("samples of each kind are shown, to keep this file under 5 MB." in text for text in html.texts)


def test_report_embeds_no_file_outside_the_run_folder(make_run, tmp_path):
    run = make_run()
    (tmp_path / "private.jpg").write_bytes(b"not for the report")
    row = {
        "step": 200,
        "prompt": "q",
        "completion": "a",
        "rewards": {"r": 9.0},
        "media": [{"type": "image", "thumb": "../private.jpg"}],
    }
    (run.path / "samples" / "step-000200.jsonl").write_text(json.dumps(row))
    html = write_report(run.path).read_text("utf-8")
    assert "bm90IGZvciB0aGUgcmVwb3J0" not in html


def test_staged_report_shows_summary_and_stages(make_run, tmp_path):
    runs = {"sft": make_run("sft", "sft", 0.71), "grpo": make_run("grpo", "grpo", 0.83)}
    stages = [Stage("init", None, None)] + [Stage(n, r.path, r.path / "eval" / "digits.json") for n, r in runs.items()]
    summary = {
        "task": "digits",
        "model_params": 1_234_567,
        "n_eval": 500,
        "seeds": [0, 1],
        "stages": [
            {"name": "init", "accuracy": 0.1, "ci": [0.08, 0.13], "seconds": 2.0},
            {"name": "sft", "accuracy": 0.71, "ci": [0.67, 0.75], "seconds": 40.0},
            {"name": "grpo", "accuracy": 0.83, "ci": [0.8, 0.86], "seconds": 75.0},
        ],
        "grpo_minus_sft": {"mean": 0.12, "ci": [0.07, 0.17]},
        "seconds": 117.0,
    }
    out = write_staged_report(
        stages, tmp_path / "out" / "report.html", title="Digits", summary=summary, notes=["A toy."]
    )
    checker = check(out)
    for words in ("+12.0 points [+7.0, +17.0]", "10.0 % → 71.0 % → 83.0 %", "1.23 M", "A toy.", "1:57"):
        assert words in checker.texts
    assert checker.resources[:3] == ["#stage-1", "#stage-2", "#stage-3"]


def test_several_gains_over_one_start_are_no_chain(tmp_path):
    summary = {
        "stages": [{"name": name, "accuracy": 0.5, "ci": [0.4, 0.6]} for name in ("sft", "grpo", "random_vote")],
        "grpo_minus_sft": {"mean": 0.05, "ci": [0.01, 0.09]},
        "random_vote_minus_sft": {"mean": -0.02, "ci": [-0.04, 0.0]},
        "recovered": {"share": 0.78, "ci": [0.5, None]},
    }
    texts = check(write_staged_report([], tmp_path / "r.html", title="t", summary=summary, notes=[])).texts
    for words in ("GRPO minus SFT", "+5.0 points [+1.0, +9.0]", "RANDOM VOTE minus SFT", "78.0 %"):
        assert words in texts
    assert not any("→" in words for words in texts)
    assert "time" not in texts


def test_staged_report_names_a_missing_evaluation(tmp_path):
    out = write_staged_report(
        [Stage("sft", None, tmp_path / "digits.json")], tmp_path / "r.html", title="t", summary={}, notes=[]
    )
    assert "digits.json is missing or unreadable." in check(out).texts


def test_changed_options_follow_the_source_comments():
    options = {option.key: (option.value, option.source) for option in changed_options(CONFIG)}
    assert options == {
        "model.freeze": ("[vision_tower]", "digits.yaml:3"),
        "data.train.0.path": ("task:digits", "digits.yaml:5"),
        "train.output_dir": ("runs/digits", "command line"),
        "train.learning_rate": ("0.002", "digits.yaml:9"),
        "train.max_steps": ("120", "command line"),
        "log.run_name": ("digits <b>toy</b>", "digits.yaml:20"),
    }


def test_changed_options_without_comments_follow_the_schema():
    text = "train: {seed: 42, learning_rate: 0.5}\nmodel:\n  freeze:\n  - projector\n"
    assert [option.key for option in changed_options(text)] == ["train.learning_rate", "model.freeze"]


def test_comment_of_the_next_key_is_not_taken():
    text = "a:\n- x\n- y\nb: 1  # here\nc: |\n  # not a comment\nd: 2  # there\n"
    assert [(o.key, o.source) for o in changed_options(text)] == [("b", "here"), ("d", "there")]
