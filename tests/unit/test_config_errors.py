"""Exact texts of what is said about a bad configuration."""

from __future__ import annotations

import pytest
from pydantic import Field

from mmpost.config.load import load, split_arguments
from mmpost.config.run import GRPOConfig, SFTConfig
from mmpost.config.schema import Settings
from mmpost.core.errors import ManyErrors, MmpostError

HELP = "'mmpost grpo --help{}' lists the options"
CHECK = "Check indentation, colons and quotes there."

IN_FILE = [
    (
        "data:\n  max_lenght: 9",
        "C001",
        "a.yaml:2: unknown key 'data.max_lenght'; did you mean 'data.max_length'?",
    ),
    ("trian: {seed: 1}", "C001", "a.yaml:1: unknown key 'trian'; did you mean 'train'?"),
    ("learning_rat: 1", "C001", "a.yaml:1: unknown key 'learning_rat'; did you mean 'train.learning_rate'?"),
    (
        "train: {max_length: 9}",
        "C001",
        "a.yaml:1: unknown key 'train.max_length'; did you mean 'data.max_length'?",
    ),
    ("train: {zzz: 9}", "C001", f"a.yaml:1: unknown key 'train.zzz'; {HELP.format(' train')}"),
    ("zzz: 9", "C001", f"a.yaml:1: unknown key 'zzz'; {HELP.format('')}"),
    (
        "data:\n  train:\n  - path: a\n    weigth: 2",
        "C001",
        "a.yaml:4: unknown key 'data.train.0.weigth'; did you mean 'data.train.0.weight'?",
    ),
    ("peft: {r: 8}", "C001", "a.yaml:1: 'peft.r' needs peft.kind=lora; here peft.kind is 'full'"),
    ("peft: {kind: full, r: 8}", "C001", "a.yaml:1: 'peft.r' needs peft.kind=lora; here peft.kind is 'full'"),
    ("peft: {kind: lora, rr: 8}", "C001", "a.yaml:1: unknown key 'peft.rr'; did you mean 'peft.r'?"),
    ("train:\n  max_steps: ten", "C004", "a.yaml:2: train.max_steps: expected a whole number, got 'ten'"),
    ("max_steps: 1.5", "C004", "a.yaml:1: train.max_steps: expected a whole number, got 1.5"),
    ("max_steps: true", "C004", "a.yaml:1: train.max_steps: expected a whole number, got true"),
    (
        "max_steps: '10'",
        "C004",
        "a.yaml:1: train.max_steps: expected a whole number, got '10'; remove the quotes",
    ),
    ("max_steps: 0", "C004", "a.yaml:1: train.max_steps: expected a whole number of at least 1, got 0"),
    ("seed: null", "C004", "a.yaml:1: train.seed: expected a whole number, got null"),
    ("seed: [1]", "C004", "a.yaml:1: train.seed: expected a whole number, got [1]"),
    ("top_p: 0", "C004", "a.yaml:1: grpo.top_p: expected a number above 0 and of at most 1, got 0"),
    (
        "adam_beta1: 1",
        "C004",
        "a.yaml:1: train.adam_beta1: expected a number of at least 0 and below 1, got 1",
    ),
    ("learning_rate: .inf", "C004", "a.yaml:1: train.learning_rate: expected a number, got inf"),
    ("learning_rate: .nan", "C004", "a.yaml:1: train.learning_rate: expected a number, got nan"),
    ("learning_rate: fast", "C004", "a.yaml:1: train.learning_rate: expected a number, got 'fast'"),
    ("overwrite: 1", "C004", "a.yaml:1: train.overwrite: expected true or false, got 1"),
    ("overwrite: maybe", "C004", "a.yaml:1: train.overwrite: expected true or false, got 'maybe'"),
    (
        "bf16: atuo",
        "C004",
        "a.yaml:1: train.bf16: expected true, false or 'auto', got 'atuo'; did you mean 'auto'?",
    ),
    (
        "on_long: eror",
        "C004",
        "a.yaml:1: data.on_long: expected one of error, drop, got 'eror'; did you mean 'error'?",
    ),
    (
        "lr_scheduler_type: Cosine",
        "C004",
        "a.yaml:1: train.lr_scheduler_type: expected one of cosine, linear, constant, got 'Cosine'; "
        "did you mean 'cosine'?",
    ),
    (
        "freeze: [vision]",
        "C004",
        "a.yaml:1: model.freeze.0: expected one of vision_tower, audio_tower, projector, language_model, got 'vision'; "
        "did you mean 'vision_tower'?",
    ),
    (
        "stabilise: clipp",
        "C004",
        "a.yaml:1: loss.stabilise: expected one of clip, dual, delta, sapo, vespo, luffy, offseq, entropy_top, "
        "clip_cov, got 'clipp'; did you mean 'clip'?",
    ),
    (
        "peft: {kind: lroa}",
        "C004",
        "a.yaml:1: peft.kind: expected one of lora, full, got 'lroa'; did you mean 'lora'?",
    ),
    ("peft: [lora]", "C004", "a.yaml:1: peft: expected a mapping of options, got [lora]"),
    (
        "train: a.jsonl",
        "C004",
        "a.yaml:1: train: expected a mapping of options, got 'a.jsonl'; did you mean 'data.train'?",
    ),
    ("data:\n  train: 3", "C004", "a.yaml:2: data.train: expected a list, got 3"),
    ("data:\n  train:\n  - {weight: 1}", "C004", "a.yaml:3: data.train.0: 'path' is missing"),
    ("data:\n  train:\n  - a\n  - 3", "C004", "a.yaml:4: data.train.1: expected a mapping of options, got 3"),
    ("data: {columns: {image: [a]}}", "C004", "a.yaml:1: data.columns.image: expected text, got [a]"),
    ("eval: {tasks: [a, {b: 1}]}", "C004", "a.yaml:1: eval.tasks.1: expected text, got {b: 1}"),
    ("rewards: [{nam: x}]", "C001", "a.yaml:1: unknown key 'rewards.0.nam'; did you mean 'rewards.0.name'?"),
    ("attn_implementation: null", "C004", "a.yaml:1: model.attn_implementation: expected text, got null"),
    (
        "revision: '${ENV:HOME}'",
        "C004",
        "a.yaml:1: model.revision: ${ENV:HOME} is allowed in the log section only",
    ),
    (
        "run_name: '${ENV:MMPOST_NO_SUCH}'",
        "C004",
        "a.yaml:1: log.run_name: the environment variable MMPOST_NO_SUCH is not set",
    ),
    ("- 1", "C004", "a.yaml:1: expected a mapping of options, got [1]"),
    ("train:\n  seed: 1\n  seed: 2", "C005", "a.yaml:3: 'train.seed' is given twice (first on line 2)"),
    ("train:\n  seed: 1\nseed: 2", "C005", "a.yaml:3: 'train.seed' is given twice (first on line 2)"),
    ("extends: b.yaml", "C009", "a.yaml:1: extends: no config file 'b.yaml'; there are: a.yaml"),
    ("extends: [1]", "C004", "a.yaml:1: extends: expected the name of a file, got 1"),
    ("extends: a.yaml", "C010", "a.yaml:1: extends goes in a circle: a.yaml -> a.yaml. Remove one of them."),
    ("a: [1\nb: 2", "C010", f"a.yaml:2: not valid YAML: expected ',' or ']', but got ':'. {CHECK}"),
    (
        "train:\n\tseed: 1",
        "C010",
        "a.yaml:2: not valid YAML: found character '\\t' that cannot start any token. Indent with spaces, not tabs.",
    ),
    ("? [a]\n: 1", "C010", "a.yaml:1: a key must be a word. Put quotes around the text."),
    ("log: !run {}", "C010", "a.yaml:1: the tag '!run' is not supported. Remove it."),
    ("log:\n  run_name: \x01", "C010", "a.yaml:2: not valid YAML: a control character. Remove it."),
    ("<<: 3", "C010", "a.yaml:1: '<<' needs a mapping. Write '<<: *name'."),
]

ON_COMMAND_LINE = [
    ("train.sede=1", "C001", "command line: unknown key 'train.sede'; did you mean 'train.seed'?"),
    ("trian.seed=1", "C001", "command line: unknown key 'trian.seed'; did you mean 'train.seed'?"),
    (
        "media.max_pixels=1",
        "C001",
        "command line: unknown key 'media.max_pixels'; did you mean 'data.media.max_pixels'?",
    ),
    ("peft.r=8", "C001", "command line: 'peft.r' needs peft.kind=lora; here peft.kind is 'full'"),
    (
        "data.train.0.weight=1",
        "C001",
        "command line: no 'data.train.0': 'data.train' has 0 items. Add one with data.train+=VALUE.",
    ),
    ("max_steps=ten", "C004", "command line: train.max_steps: expected a whole number, got 'ten'"),
    ("--max-steps", "C004", "command line: train.max_steps: expected a whole number, got true"),
    ("seed+=1", "C004", "command line: train.seed: only a list can be extended with +="),
    ("columns={a: x, a: y}", "C005", "command line: columns: 'a' is given twice"),
    (
        "data.train=[a",
        "C010",
        f"command line: data.train: not valid YAML: expected ',' or ']', but got '<stream end>'. {CHECK}",
    ),
    (
        "foo",
        "C008",
        "command line: 'foo' is neither an option, a config nor data. "
        "Write KEY=VALUE, a config file that ends in .yaml, or a data file.",
    ),
    ("seed", "C008", "command line: 'seed' is neither an option, a config nor data. Write seed=VALUE."),
    ("gone.yaml", "C009", "no config file 'gone.yaml'; there are: a.yaml"),
    ("aa.yaml", "C009", "no config file 'aa.yaml'; did you mean 'a.yaml'?"),
    ("no/a.yaml", "C009", "no config file 'no/a.yaml': there is no folder 'no'."),
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def failure(*arguments: str) -> MmpostError:
    with pytest.raises(MmpostError) as caught:
        load(GRPOConfig, *split_arguments(arguments))
    return caught.value


@pytest.mark.parametrize(("text", "code", "message"), IN_FILE)
def test_mistake_in_a_file(tmp_path, text, code, message):
    (tmp_path / "a.yaml").write_text(text)
    assert str(failure("a.yaml")) == f"{message} [MMP-{code}]"


@pytest.mark.parametrize(("argument", "code", "message"), ON_COMMAND_LINE)
def test_mistake_on_the_command_line(tmp_path, argument, code, message):
    (tmp_path / "a.yaml").write_text("")
    error = failure(argument)
    assert str(error) == f"{message} [MMP-{code}]"
    assert error.exit_code == 2


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"train:\n  seed: \xff")
    assert str(failure("a.yaml")) == "a.yaml:2: not UTF-8 (byte 0xff). Save the file as UTF-8. [MMP-C010]"


def test_a_folder_is_no_config(tmp_path):
    (tmp_path / "a.yaml").mkdir()
    message = "'a.yaml' is a folder, not a config file. Name a .yaml file in it. [MMP-C009]"
    assert str(failure("a.yaml")) == message


def test_a_circle_names_its_files(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("seed: 1\nextends: a.yaml")
    chain = "a.yaml -> b.yaml -> a.yaml"
    assert str(failure("a.yaml")) == f"b.yaml:2: extends goes in a circle: {chain}. Remove one of them. [MMP-C010]"


def test_three_mistakes_are_reported_together(tmp_path):
    (tmp_path / "a.yaml").write_text("train:\n  max_steps: ten\ndata:\n  max_lenght: 9\nmodle: {}\n")
    error = failure("a.yaml")
    assert isinstance(error, ManyErrors)
    assert str(error).splitlines() == [
        "a.yaml:2: train.max_steps: expected a whole number, got 'ten' [MMP-C004]",
        "a.yaml:4: unknown key 'data.max_lenght'; did you mean 'data.max_length'? [MMP-C001]",
        "a.yaml:5: unknown key 'modle'; did you mean 'model'? [MMP-C001]",
    ]


def test_mistakes_of_all_files_and_the_command_line_are_reported_together(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: x")
    (tmp_path / "b.yaml").write_text("a: [")
    error = failure("a.yaml", "b.yaml", "gone.yaml", "foo", "top_p=2")
    assert isinstance(error, ManyErrors)
    assert [one.code for one in error.errors] == ["MMP-C004", "MMP-C010", "MMP-C009", "MMP-C008", "MMP-C004"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"learning_rat": 1},
            "SFTConfig: unknown key 'learning_rat'; did you mean 'train.learning_rate'? [MMP-C001]",
        ),
        ({"max_steps": "ten"}, "SFTConfig: train.max_steps: expected a whole number, got 'ten' [MMP-C004]"),
        ({"r": 8}, "SFTConfig: 'peft.r' needs peft.kind=lora; here peft.kind is 'full' [MMP-C001]"),
        ({"seed": 1, "train": {"seed": 2}}, "SFTConfig: 'train.seed' is given twice [MMP-C005]"),
    ],
)
def test_mistake_in_python(values, message):
    with pytest.raises(MmpostError) as caught:
        SFTConfig(**values)
    assert str(caught.value) == message


class _Twice(Settings):
    """A section with an option that another one has, too."""

    seed: int = 0


class _Ambiguous(GRPOConfig):
    twice: _Twice = Field(default_factory=_Twice)


def test_a_bare_name_of_two_sections_is_refused_everywhere(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 3")
    for arguments, place in ((["a.yaml"], "a.yaml:1: "), (["seed=3"], "")):
        with pytest.raises(MmpostError) as caught:
            load(_Ambiguous, *split_arguments(arguments))
        assert str(caught.value) == f"{place}'seed' is ambiguous: train.seed, twice.seed [MMP-C003]"
    with pytest.raises(MmpostError, match=r"'seed' is ambiguous: train\.seed, twice\.seed \[MMP-C003\]"):
        _Ambiguous(seed=1)
