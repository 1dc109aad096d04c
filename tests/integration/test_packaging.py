"""The wheel: what is in it, and that it works without the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"mmpost", "mmpost_tasks", "mmpost_envs", "mmpost_tokenizers"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the tree, so that nothing old can slip in and nothing is left behind."""
    pytest.importorskip(
        "setuptools", minversion="77", reason="pyproject.toml asks for it, and nothing is isolated here"
    )
    copy = tmp_path_factory.mktemp("tree") / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("mmpost", "tokenizers", "tasks", "envs", "configs", "tests", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy.parent / "dist")]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = (copy.parent / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return target


def test_wheel_holds_the_packages_and_their_data_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    assert len(tops) == len(PACKAGES) + 1
    recipes = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {name.removeprefix("mmpost/recipes/") for name in names if name.startswith("mmpost/recipes/")} == recipes
    assert "mmpost/py.typed" in names
    assert {name for name in names if name.endswith(".j2")} == {"mmpost/runs/report.html.j2"}
    assert "mmpost/runs/report.css" in names
    data = ROOT / "tasks" / "mmpost_tasks" / "data"
    pictures = {f"mmpost_tasks/data/{path.relative_to(data).as_posix()}" for path in data.rglob("*.png")}
    assert pictures
    assert pictures | {"mmpost_tasks/data/fashion.json"} <= set(names)
    modules = {
        path.relative_to(source.parent).as_posix()
        for source in (ROOT / "mmpost", *ROOT.glob("*/mmpost_*"))
        for path in source.rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    text = archive.read(metadata).decode()
    assert "\nName: mmpost-toolkit\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    (entries,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "mmpost = mmpost.cli:main" in archive.read(entries).decode()


def test_installed_wheel_works_in_another_folder(installed, tmp_path):
    # The root of the repository must not be what answers, so the target comes first and site hooks are off.
    path = os.pathsep.join([str(installed), *(entry for entry in sys.path if entry.endswith("site-packages"))])
    environment = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}

    def mmpost(*words):
        command = [sys.executable, "-S", "-m", "mmpost", *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import mmpost, mmpost_tasks; print(mmpost.__file__); print(mmpost_tasks.__file__)"
    command = [sys.executable, "-S", "-c", where]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert all(Path(line).is_relative_to(installed) for line in shown.splitlines())
    mmpost("init", "first", "--kind", "sft")
    small = ["model_name_or_path=tiny-qwen2.5-vl", "max_steps=2", "train.batch_size=2", "eval.limit=3"]
    mmpost("sft", "demo/sft", *small, "data.train.0.limit=20", "eval.max_new_tokens=2", "output_dir=run")
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "eval" / "demo_vqa.json").is_file()
