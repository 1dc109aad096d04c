"""The commands of docs/tokenizers.md and of the recipes' heads can be typed as they stand."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from mmpost.cli import generator, launch, tokenizer
from mmpost.config.load import load, split_arguments
from mmpost_tokenizers.bridge.options import BridgeRunConfig
from mmpost_tokenizers.options import GeneratorRunConfig, PosttrainConfig, TokenizerConfig

ROOT = Path(__file__).resolve().parents[2]
APPS = {"tokenizer": tokenizer.app, "generator": generator.app}
CONFIGS = {
    "tokenizer train": TokenizerConfig, "tokenizer posttrain": PosttrainConfig, "generator train": GeneratorRunConfig,
    "tokenizer bridge-train": BridgeRunConfig,
}  # fmt: skip


def commands():
    table = [line for line in (ROOT / "docs" / "tokenizers.md").read_text().splitlines() if line.startswith("| ")]
    yield from (word for line in table[12:] for word in re.findall(r"`(mmpost [^`]+)`", line.rsplit(" | ", 1)[1]))
    for file in sorted((ROOT / "configs" / "tokenizers").glob("*_imagenet256.yaml")):
        text = file.read_text().replace(" \\\n#    ", " ")
        yield from re.findall(r"^# +(mmpost (?:tokenizer|generator) .+)$", text, re.MULTILINE)


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_a_documented_command_is_whole(line):
    words = shlex.split(line)[1:]
    group, name, args = words[0], words[1], words[2:]
    command = typer.main.get_command(APPS[group]).commands[name]
    if name == "train" and group == "tokenizer":
        _, rest = launch.split(args)
    else:
        # Raises for an option that does not exist, or one that is missing.
        context = command.make_context(name, list(args))
        rest = context.args
        assert not [word for word in rest if word.startswith("--")], rest
    config = CONFIGS.get(f"{group} {name}")
    assert config is not None or not rest
    if config is not None:
        files, overrides = split_arguments(rest)
        assert files
        assert all((ROOT / file).is_file() for file in files)
        load(config, [str(ROOT / file) for file in files], overrides)


def test_every_gpu_row_of_the_table_has_a_command_or_needs_none():
    text = (ROOT / "docs" / "tokenizers.md").read_text()
    rows = text.split("| --- | --- | --- |\n")[1].split("\n\n")[0].splitlines()
    assert len(rows) == 14
    for row in rows:
        last = row.rsplit(" | ", 1)[1]
        assert "`mmpost " in last or last == "none needed |", row
        assert "..." not in last
