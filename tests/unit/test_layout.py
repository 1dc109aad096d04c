"""Where things are, what may import what, and that lists agree with the tree."""

import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mmpost.core.catalog import Catalog
from mmpost.core.errors import EXIT_BY_CODE, EXIT_BY_FAMILY, MmpostError

ROOT = Path(__file__).resolve().parents[2]
OUTER = {"mmpost_tokenizers": "tokenizers", "mmpost_tasks": "tasks", "mmpost_envs": "envs"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [ROOT / "mmpost", *(ROOT / folder / name for name, folder in OUTER.items())]
# Tensors live in batch; the chain of the demo is imported when that command runs.
HEAVY_EXCEPTIONS = {"core.batch", "cli.demo"}
HEAVY = ("torch", "transformers", "sklearn", "datasets", "accelerate", "peft", "gradio")


def packages():
    """Every folder with ``__init__.py``, by import name."""
    found = {}
    for source in SOURCES:
        for init in source.rglob("__init__.py"):
            found[".".join(init.parent.relative_to(source.parent).parts)] = init.parent
    return found


def from_root(code, *arguments):
    """Run code in a new process whose first path entry is the root of the repository."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("folder", ["tokenizers", "tasks", "envs", "configs"])
def test_outer_folders_are_no_packages(folder):
    assert (ROOT / folder).is_dir()
    assert list((ROOT / folder).glob("*.py")) == []


def test_hugging_face_tokenizers_is_not_hidden_from_the_root():
    code = """
import importlib.util
print(importlib.util.find_spec("tokenizers").origin)
import transformers
print(transformers.PreTrainedTokenizerFast.__module__)
"""
    origin, module = from_root(code).splitlines()
    # The library may well lie under the root, in .venv, but in no folder of ours.
    assert Path(origin).parent.parent.name in ("site-packages", "dist-packages")
    assert module.startswith("transformers.")


def test_listed_packages_are_those_of_the_tree():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    # configs/ holds recipes and no code; it is shipped as data under this name.
    assert listed - {"mmpost.recipes"} == set(packages())
    folders = PROJECT["tool"]["setuptools"]["package-dir"]
    assert {name: f"{folder}/{name}" for name, folder in OUTER.items()} | {"mmpost.recipes": "configs"} == folders
    for folder in ["mmpost", *OUTER.values()]:
        stray = [file for file in (ROOT / folder).rglob("*.py") if not (file.parent / "__init__.py").is_file()]
        assert stray == []


def wanted(extra):
    """Requirements of an extra, those of the extras it names included."""
    from packaging.requirements import Requirement

    found = []
    for line in PROJECT["project"]["optional-dependencies"][extra]:
        one = Requirement(line)
        found += (
            [deep for name in sorted(one.extras) for deep in wanted(name)] if one.name == "mmpost-toolkit" else [one]
        )
    return found


@pytest.mark.parametrize("requirement", wanted("dev"), ids=str)
def test_what_tests_need_is_installed(requirement):
    # Tests of optional parts are skipped where a part is absent; where tests are run as documented, none may be.
    version = importlib.metadata.version(requirement.name)
    assert requirement.specifier.contains(version, prereleases=True), version


def test_light_modules_import_no_heavy_library():
    light = list(packages())
    for package in ("core", "config", "runs", "cli"):
        names = sorted(file.stem for file in (ROOT / "mmpost" / package).glob("*.py") if file.stem != "__init__")
        light += [f"mmpost.{package}.{name}" for name in names if f"{package}.{name}" not in HEAVY_EXCEPTIONS]
    code = f"""
import importlib, json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise AssertionError(name + " is imported")

sys.meta_path.insert(0, Refuse())
bad = {{}}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except AssertionError as error:
        bad[name] = str(error)
print(json.dumps(bad))
"""
    assert json.loads(from_root(code, json.dumps(light))) == {}


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("adapters", "mmpost.adapters:ADAPTERS"),
        ("rewards", "mmpost.rewards:REWARDS"),
        ("algos", "mmpost.algos:ALGOS"),
        ("tasks", "mmpost_tasks:TASKS"),
        ("readers", "mmpost.data:READERS"),
        ("containers", "mmpost.data:CONTAINERS"),
    ],
)
def test_every_name_in_a_table_resolves(kind, place):
    module, name = place.split(":")
    table = getattr(importlib.import_module(module), name)
    assert table
    catalog = Catalog(kind, table)
    for entry in table:
        assert catalog.get(entry) is not None
    near = next(iter(table)) + "x"
    with pytest.raises(MmpostError, match=re.escape(f"unknown name '{near}'")) as caught:
        catalog.get(near)
    assert caught.value.code == "MMP-C006"


def test_imports_point_down():
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def codes_in_source():
    text = "".join(file.read_text() for source in SOURCES for file in source.rglob("*.py"))
    return set(re.findall(r"MMP-[A-Z]\d{3}", text))


def documented():
    """Codes in docs/errors.md with the heading of their section, one row per code."""
    rows, section = [], ""
    for line in (ROOT / "docs" / "errors.md").read_text().splitlines():
        if line.startswith("## "):
            section = line[3]
        if found := re.match(r"\| `(MMP-[A-Z]\d{3})` \| (.+) \| (.+) \|$", line):
            rows.append((found[1], section))
    return rows


def test_every_error_code_is_documented_once():
    rows = documented()
    codes = [code for code, _ in rows]
    assert codes == sorted(codes, key=lambda code: ("CDERTV".index(code[4]), code))
    assert len(codes) == len(set(codes))
    assert set(codes) == codes_in_source()
    assert all(code[4] == section for code, section in rows)


def test_documented_exit_codes_are_the_real_ones():
    text = (ROOT / "docs" / "errors.md").read_text()
    families = dict(re.findall(r"^\| `MMP-([A-Z])…` \| .* \| (\d+)", text, re.MULTILINE))
    assert families == {family: str(EXIT_BY_FAMILY[family]) for family in "CDERTV"}
    assert {code[4] for code in codes_in_source()} == set(families)
    for code, exit_code in EXIT_BY_CODE.items():
        assert f"`{code}`: {exit_code}" in text


def test_changelog_names_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert PROJECT["project"]["version"] in re.search(r"^## (.*)$", text, re.MULTILINE)[1]
    assert PROJECT["project"]["version"] == importlib.import_module("mmpost").__version__
