"""Merging, overrides, provenance and round trips of configurations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmpost.config.help import render
from mmpost.config.load import find_recipe, load, resolved_yaml, split_arguments
from mmpost.config.run import GRPOConfig, SFTConfig, check_batch
from mmpost.config.schema import LoraSettings, TrainSection
from mmpost.core.errors import MmpostError


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sft(*arguments: str) -> SFTConfig:
    return load(SFTConfig, *split_arguments(arguments)).config


def test_bare_names_go_to_their_section():
    config = GRPOConfig(output_dir=Path("runs/rl"), num_generations=4, max_pixels=99, beta=0.1, rewards="format")
    assert (config.train.output_dir, config.grpo.num_generations) == ("runs/rl", 4)
    assert (config.data.media.max_pixels, config.loss.kl.beta) == (99, 0.1)
    assert [reward.name for reward in config.rewards] == ["format"]


def test_sections_and_bare_names_mix():
    config = SFTConfig(train=TrainSection(max_steps=3), learning_rate=1e-4, r=8, peft="lora")
    assert (config.train.max_steps, config.train.learning_rate, config.peft.r) == (3, 1e-4, 8)
    assert SFTConfig(peft=LoraSettings(r=4)).peft == LoraSettings(r=4)


def test_assignment_is_checked():
    config = GRPOConfig(rewards=["a", {"name": "b", "weight": 2}])
    assert [(reward.name, reward.weight) for reward in config.rewards] == [("a", 1.0), ("b", 2.0)]
    with pytest.raises(ValueError, match="max_steps"):
        config.train.max_steps = 0


@pytest.mark.parametrize(
    ("written", "path", "value"),
    [
        ("learning_rate=1e-6", "train.learning_rate", 1e-6),
        ("learning_rate=1", "train.learning_rate", 1.0),
        ("max_steps=1e3", "train.max_steps", 1000),
        ("train.overwrite=on", "train.overwrite", True),
        ("train.overwrite=No", "train.overwrite", False),
        ("--train.overwrite", "train.overwrite", True),
        ("bf16=off", "train.bf16", False),
        ("bf16=auto", "train.bf16", "auto"),
        ("run_name=on", "log.run_name", "on"),
        ("run_name=2024", "log.run_name", "2024"),
        ("revision=12345e7", "model.revision", "12345e7"),
        ("revision=007", "model.revision", "007"),
        ("run_name=null", "log.run_name", None),
        ("run_name='null'", "log.run_name", "null"),
        ("run_name=a=b", "log.run_name", "a=b"),
        ("stabilise=clip", "loss.stabilise", ["clip"]),
        ("freeze=[]", "model.freeze", []),
        ("freeze+=projector", "model.freeze", ["vision_tower", "audio_tower", "projector"]),
        ("freeze.0=projector", "model.freeze", ["projector", "audio_tower"]),
        ("columns.image=picture", "data.columns", {"image": "picture"}),
        ("--train.learning-rate=1e-6", "train.learning_rate", 1e-6),
    ],
)
def test_values_of_overrides(written, path, value):
    found = sft(written)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_a_word_after_two_dashes_takes_the_next_argument():
    config = sft("--data.max_length", "64", "--seed", "7", "--train.overwrite", "max_steps=2")
    assert (config.data.max_length, config.train.seed, config.train.overwrite, config.train.max_steps) == (
        64,
        7,
        True,
        2,
    )


def test_data_on_the_command_line(tmp_path):
    (tmp_path / "photos").mkdir()
    files, overrides = split_arguments(["a.yaml", "my.jsonl", "photos", "task:demo", "seed=1", "foo"])
    assert files == ["a.yaml"]
    assert overrides[-2:] == ["seed=1", "foo"]
    config = load(
        SFTConfig, [], [*overrides[:-1], "data.train+={path: c.jsonl, weight: 2}", "data.train.0.weight=3"]
    ).config
    assert [(source.path, source.weight) for source in config.data.train] == [
        ("my.jsonl", 3.0),
        ("photos", 1.0),
        ("task:demo", 1.0),
        ("c.jsonl", 2.0),
    ]


def test_files_merge_left_to_right_and_lists_are_replaced(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "data: {train: [x.jsonl, y.jsonl], columns: {a: b}}\ntrain: {seed: 1, max_steps: 5}"
    )
    (tmp_path / "b.yaml").write_text("data: {train: z.jsonl, columns: {c: d}}\nseed: 2")
    config = sft("a.yaml", "b.yaml")
    assert [source.path for source in config.data.train] == ["z.jsonl"]
    assert config.data.columns == {"a": "b", "c": "d"}
    assert (config.train.seed, config.train.max_steps) == (2, 5)


def test_a_file_wins_over_what_it_extends(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/one.yaml").write_text("seed: 1\nmax_steps: 1\nsave_steps: 1")
    (tmp_path / "base/two.yaml").write_text("extends: one.yaml\nmax_steps: 2\nsave_steps: 2")
    (tmp_path / "a.yaml").write_text("extends: base/two.yaml\nsave_steps: 3")
    loaded = load(SFTConfig, ["a.yaml"], [])
    assert (loaded.config.train.seed, loaded.config.train.max_steps, loaded.config.train.save_steps) == (
        1,
        2,
        3,
    )
    assert loaded.sources["train.seed"] == "base/one.yaml:1"
    assert loaded.sources["train.max_steps"] == "base/two.yaml:2"
    assert loaded.sources["train.save_steps"] == "a.yaml:2"
    assert loaded.sources["train.learning_rate"] == "default"


def test_yaml_aliases_and_merge_keys(tmp_path):
    (tmp_path / "a.yaml").write_text("data:\n  train:\n  - &first {path: x, limit: 3}\n  - {<<: *first, path: y}\n")
    assert [(source.path, source.limit) for source in sft("a.yaml").data.train] == [("x", 3), ("y", 3)]


def test_switching_the_kind(tmp_path):
    (tmp_path / "a.yaml").write_text("peft: {kind: lora, r: 4}")
    assert sft("a.yaml", "peft=lora").peft == LoraSettings(r=4)
    assert sft("a.yaml", "peft.lora_alpha=8").peft == LoraSettings(r=4, lora_alpha=8)
    assert sft("a.yaml", "peft.kind=full").peft.kind == "full"
    assert sft("a.yaml", "peft=null").peft.kind == "full"
    assert sft("r=2", "peft.kind=lora").peft == LoraSettings(r=2)


def test_an_empty_section_has_its_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("train:\n  # nothing yet\npeft:\n")
    assert sft("a.yaml") == SFTConfig()


def test_paths_beside_the_config_are_found(tmp_path):
    demo = tmp_path / "demo"
    (demo / "images").mkdir(parents=True)
    for name in ("train.jsonl", "both.jsonl"):
        (demo / name).touch()
    (tmp_path / "both.jsonl").touch()
    (demo / "a.yaml").write_text(
        "model: {model_name_or_path: images}\n"
        "data: {train: [{path: train.jsonl, media_root: images}, both.jsonl, gone.jsonl, 'task:train.jsonl']}"
    )
    config = sft("demo/a.yaml")
    assert [source.path for source in config.data.train] == [
        "demo/train.jsonl",
        "both.jsonl",
        "gone.jsonl",
        "task:train.jsonl",
    ]
    assert (config.data.train[0].media_root, config.model.model_name_or_path) == (
        "demo/images",
        "demo/images",
    )
    assert sft("demo/a.yaml", "data.train=train.jsonl").data.train[0].path == "train.jsonl"


def test_resolved_yaml_names_sources_and_is_valid_input(tmp_path):
    (tmp_path / "a.yaml").write_text("peft: lora\ndata:\n  train:\n  - path: x.jsonl\n    system: 'yes: 1e-3 # no'\n")
    loaded = load(
        GRPOConfig,
        ["a.yaml"],
        ["seed=7", "rewards=[{name: f, args: {a: '1e-6', b: 1e-6, c: 'on', d: null}}]"],
    )
    text = resolved_yaml(loaded)
    lines = [line.strip() for line in text.splitlines() if "  # " in line]
    assert "seed: 7  # command line" in lines
    assert "kind: lora  # a.yaml:1" in lines
    assert "- path: x.jsonl  # a.yaml:4" in lines
    assert len(lines) == 6
    (tmp_path / "again.yaml").write_text(text)
    assert load(GRPOConfig, ["again.yaml"], []).config == loaded.config


def test_values_from_the_environment_are_masked(tmp_path, monkeypatch):
    monkeypatch.setenv("MMPOST_TEST_NAME", "secret")
    (tmp_path / "a.yaml").write_text("log: {run_name: 'x-${ENV:MMPOST_TEST_NAME}'}")
    loaded = load(SFTConfig, ["a.yaml"], [])
    assert loaded.config.log.run_name == "x-secret"
    assert "secret" not in resolved_yaml(loaded)


@pytest.mark.parametrize(
    "text",
    [
        "on",
        "1e-6",
        "null",
        "",
        "2024-01-01",
        "a: b",
        "# x",
        "two\nlines",
        "'",
        '"',
        "ü \u2028",
        "0x1F",
        "- a",
        "~",
        " x ",
    ],
)
def test_text_survives_a_round_trip(tmp_path, text):
    config = GRPOConfig(run_name=text, rewards=[{"name": "f", "args": {"value": text}}], columns={"key": text})
    (tmp_path / "a.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert GRPOConfig.from_yaml("a.yaml") == config
    assert yaml.safe_load(config.to_yaml())["log"]["run_name"] == text


def test_from_yaml_takes_several_files_and_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1")
    (tmp_path / "b.yaml").write_text("max_steps: 2")
    config = SFTConfig.from_yaml(["a.yaml", tmp_path / "b.yaml"], "train.save_steps=3")
    assert (config.train.seed, config.train.max_steps, config.train.save_steps) == (1, 2, 3)


def test_diff_names_every_option_that_differs():
    first, second = SFTConfig(seed=1, peft="lora"), SFTConfig(seed=2, data={"train": "x"})
    assert first.diff(first) == {}
    difference = first.diff(second)
    assert difference["train.seed"] == (1, 2)
    assert difference["peft.kind"] == ("lora", "full")
    assert difference["peft.r"] == (16, None)
    assert difference["data.train"] == ([], [{"path": "x"}])
    assert SFTConfig(data={"train": "y"}).diff(SFTConfig(data={"train": "x"})) == {"data.train.0.path": ("y", "x")}


def test_batch_equation_of_grpo(tmp_path):
    (tmp_path / "a.yaml").write_text("grpo:\n  prompts_per_step: 16\nper_device_train_batch_size: 3\n")
    loaded = load(GRPOConfig, ["a.yaml"], ["gradient_accumulation_steps=20"])
    with pytest.raises(MmpostError) as caught:
        check_batch(loaded.config, 2, loaded.sources)
    assert str(caught.value).replace("\N{MULTIPLICATION SIGN}", "*") == (
        "a.yaml:2,3, command line: 16 prompts * 8 generations = 128 completions per step, but "
        "2 devices * 3 * 20 = 120. "
        "Valid gradient_accumulation_steps with this micro-batch: none; "
        "set per_device_train_batch_size to 4 (16 steps) or 2 (32 steps). [MMP-C020]"
    )
    check_batch(GRPOConfig(), 3)
    check_batch(GRPOConfig(gradient_accumulation_steps=8), 2)
    check_batch(GRPOConfig(gradient_accumulation_steps=4, mini_batches=2), 2)


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (1, "1 device * 4 * 3 = 12. Valid gradient_accumulation_steps with this micro-batch: 4."),
        (3, "3 devices * 4 * 3 = 36. 16 cannot be shared among 3: make it 15 or 18."),
    ],
)
def test_batch_size_of_sft(world, message):
    sizes = {"batch_size": 16, "per_device_train_batch_size": 4}
    with pytest.raises(MmpostError) as caught:
        check_batch(SFTConfig(train=sizes | {"gradient_accumulation_steps": 3}), world)
    assert (
        str(caught.value).replace("\N{MULTIPLICATION SIGN}", "*")
        == f"batch_size is 16 rows per step, but {message} [MMP-C020]"
    )
    check_batch(SFTConfig(train=sizes | {"gradient_accumulation_steps": 4}), 1)
    check_batch(SFTConfig(train=sizes), 3)


@pytest.mark.parametrize("name", ["demo/sft", "demo/sft.yaml", "configs/demo/sft", "./configs/demo/sft.yaml"])
def test_a_shipped_recipe_is_found_from_any_folder(tmp_path, name):
    assert find_recipe(name).name == "sft.yaml"
    assert split_arguments([name]) == ([name], [])
    loaded = load(SFTConfig, [name], [])
    assert any(source.startswith("configs/demo/sft.yaml:") for source in loaded.sources.values())
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/sft.yaml").write_text("seed: 987")
    (tmp_path / "a.yaml").write_text("extends: demo/sft")
    assert sft("demo/sft").train.seed == sft("a.yaml").train.seed == 987


def test_unknown_recipe():
    with pytest.raises(MmpostError) as caught:
        find_recipe("../pyproject")
    assert caught.value.code == "MMP-C009"
    with pytest.raises(MmpostError, match="no recipe 'no/such/recipe'"):
        find_recipe("no/such/recipe")


@pytest.mark.parametrize("config_class", [SFTConfig, GRPOConfig])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_help_fits_and_names_every_option(config_class, width):
    text = render(config_class, None, width)
    assert max(map(len, text.splitlines())) <= width
    for section in ("model", "train", "data.media", "loss.kl", "data.train.N"):
        assert f"{section}: " in text
    for option in ("learning_rate=1e-05", "gradient_accumulation_steps=null", "kl=null", "peft.kind=full"):
        assert f"  {option}" in text


def test_help_of_one_section():
    text = render(GRPOConfig, "rewards")
    assert text.startswith("rewards.N: One reward function.\n")
    assert "learning_rate" not in text
    assert render(GRPOConfig, "media") == render(GRPOConfig, "data.media")
    assert render(GRPOConfig, "learning_rate").startswith("train:\n  learning_rate=1e-05 ")
    assert "data.media: " in render(GRPOConfig, "data")
    with pytest.raises(MmpostError, match=r"no section or option 'trian'; did you mean 'train'\?"):
        render(GRPOConfig, "trian")


def test_importing_the_configuration_is_light():
    code = (
        "import sys, time, mmpost.config.run, mmpost.config.help;"
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'rich', 'typer'} & set(sys.modules);"
        "print(sorted(heavy), time.process_time() < 2)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] True"
