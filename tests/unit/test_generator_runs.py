"""Run folders of generator training and decoder post-training: what belongs to a run, going on, pages, class names."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mmpost.cli import run
from mmpost.cli import tokenizer as command
from mmpost.core.errors import MmpostError
from mmpost.runs.folder import RunFolder
from mmpost.train.loop import Interrupted
from mmpost_tokenizers import generating, posttraining
from mmpost_tokenizers.cnn import CNNConfig, CNNTokenizer
from mmpost_tokenizers.generator.pretokenize import Codes, pretokenize
from mmpost_tokenizers.generator.sample import Sampling
from mmpost_tokenizers.images import images_from
from mmpost_tokenizers.inputs import forget_after, read_inputs
from mmpost_tokenizers.options import GeneratorRunConfig, PosttrainConfig
from mmpost_tokenizers.quantizers.configs import VQConfig

NAMES = ("ant", "bee", "cow")


def save_pictures(folder, seed, names=NAMES):
    draw = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(4):
            pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures of three classes, a tokenizer with random weights, codes, and a generator of two steps."""
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("made")
    config = CNNConfig(
        image_size=8, quantizer=VQConfig(codebook_size=16, dim=4), block_out_channels=(8,), layers_per_block=1,
        z_channels=8, stem_patch=4, norm_groups=4, lowest_attention=False, mid_attention=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = CNNTokenizer(config).eval()
    tokenizer.save_pretrained(base / "tokenizer")
    for name, seed in (("train", 0), ("eval", 1)):
        pictures = images_from(save_pictures(base / name, seed), size=8)
        pretokenize(pictures, tokenizer, base / f"codes-{name}")
    train(base, base / "generator", tokenizer=True, config=generator_config(eval_steps=1))
    return base


def generator_config(**train_options):
    options = {"max_steps": 2, "batch_size": 4, "save_steps": 1, "logging_steps": 1} | train_options
    return GeneratorRunConfig(model={"size": "test"}, train=options, log={"progress": "none"})


def train(base, out, *, codes="codes-train", held_out="codes-eval", tokenizer=False, config=None):
    config = config or generator_config()
    return generating.train_generator(
        config,
        str(base / codes),
        None if held_out is None else str(base / held_out),
        out,
        config_yaml=config.to_yaml(),
        tokenizer=str(base / "tokenizer") if tokenizer else None,
    )


def posttrain_config(base, **options):
    chosen = {"max_steps": 2, "eval_steps": 1, "batch_size": 4, "pair_mode": "direct", "save_steps": 1} | options
    data = {"train": [{"path": str(base / "train")}], "eval": [{"path": str(base / "eval")}]}
    return PosttrainConfig(data=data, posttrain=chosen, losses={"perceptual": "none"}, log={"progress": "none"})


def posttrain(base, out, *, tokenizer="tokenizer", generator="generator", config=None):
    config = config or posttrain_config(base)
    return posttraining.run_posttrain(
        config, str(base / tokenizer), str(base / generator), out, config_yaml=config.to_yaml()
    )


def pictures_of_page(page):
    return re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page.read_text())


# -- training of a generator -------------------------------------------------------------------------------------------


def test_a_second_start_returns_the_result_only_for_the_same_codes(made, tmp_path):
    out = tmp_path / "run"
    first = train(made, out)
    before = sorted((file, file.stat().st_mtime_ns) for file in out.rglob("*") if file.is_file())
    assert train(made, out) == first
    assert sorted((file, file.stat().st_mtime_ns) for file in out.rglob("*") if file.is_file()) == before
    words = f"'{out}' holds a run that was made of something else; what differs: "
    fix = ". Choose another --out, or give what that run was given. [MMP-T070]"
    for changes, differs in (
        ({"codes": "codes-eval"}, "codes of the training codes"),
        ({"held_out": "codes-train"}, "codes of the held-out codes"),
        (
            {"held_out": None},
            "; ".join(
                f"{name} of the held-out codes"
                for name in ("tokenizer", "number of images", "crops", "names of images", "classes of images", "codes")
            ),
        ),
    ):
        with pytest.raises(MmpostError) as caught:
            train(made, out, **changes)
        assert str(caught.value) == words + differs + fix
    with pytest.raises(MmpostError, match=r"train\.max_steps \(was 2, now 3\).*Choose another --out\. \[MMP-E021\]"):
        train(made, out, config=generator_config(max_steps=3))
    with pytest.raises(MmpostError, match=r"holds a run of mmpost generator train\. Choose another --out\."):
        posttrain(made, out)


def test_a_finished_run_that_does_not_say_of_what_is_refused(made, tmp_path):
    out = tmp_path / "run"
    train(made, out)
    (out / "inputs.json").unlink()
    with pytest.raises(MmpostError, match="holds a finished run that does not say what it was made of"):
        train(made, out)


def test_the_page_of_a_generator_shows_curves_and_samples(made, tmp_path):
    page = made / "generator" / "report.html"
    for expected in ("a row per class: ant, bee, cow; guidance 2", "held-out codes", "<svg"):
        assert expected in page.read_text(), expected
    assert len(pictures_of_page(page)) == 1
    train(made, tmp_path / "run")
    bare = tmp_path / "run" / "report.html"
    assert pictures_of_page(bare) == []
    assert "With --tokenizer samples stand here." in bare.read_text()


def test_names_of_classes_go_from_folders_to_samples(made, tmp_path):
    assert Codes.open(made / "codes-train").classes == NAMES
    assert json.loads((made / "generator" / "final" / "generator.json").read_text())["class_names"] == list(NAMES)
    paths = (str(made / "generator"), str(made / "tokenizer"), tmp_path / "sheet")
    count = generating.sample_images(*paths, classes="cow,0", per_class=2, sampling=Sampling())
    assert count == 4
    drawn = Codes.open(tmp_path / "sheet" / "codes.safetensors")
    assert (drawn.labels.tolist(), drawn.classes) == ([2, 2, 0, 0], NAMES)
    with pytest.raises(MmpostError, match=r"--classes dog is no class\. Known: ant, bee, cow \[MMP-C117\]"):
        generating.sample_images(*paths, classes="dog", per_class=2, sampling=Sampling())


def test_the_command_takes_a_name(made, tmp_path, capfd):
    words = ["--tokenizer", str(made / "tokenizer"), "--per-class", "1", "--out", str(tmp_path / "sheet")]
    assert run(["generator", "sample", str(made / "generator"), *words, "--class", "bee"]) == 0
    assert [file.name for file in (tmp_path / "sheet").glob("0*.png")] == ["000000-1.png"]
    words = ["--tokenizer", str(made / "tokenizer"), "--data", str(made / "eval"), "--check", "deep"]
    assert run(["generator", "eval", str(made / "generator"), *words]) == 2
    assert capfd.readouterr().err.endswith("--check deep is not known. Known: auto, decode, header. [MMP-C117]\n")


def test_samples_need_the_tokenizer_of_the_codes(made, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        CNNTokenizer(posttraining.open_tokenizer(made / "tokenizer").config).save_pretrained(tmp_path / "tokenizer")
    config = generator_config()
    with pytest.raises(MmpostError, match=r"the tokenizer and the training codes do not belong together.*MMP-C102"):
        generating.train_generator(
            config, str(made / "codes-train"), None, tmp_path / "run", config_yaml=config.to_yaml(),
            tokenizer=str(tmp_path / "tokenizer"),
        )  # fmt: skip


def test_other_class_names_are_refused_everywhere(made, tmp_path):
    other = images_from(save_pictures(tmp_path / "other", 1, ("ant", "bug", "cow")), size=8)
    words = r"have other classes: 3 against 3, class 1 is 'bee' against 'bug'\..*MMP-C119"
    with pytest.raises(MmpostError, match=f"the generator and the images {words}"):
        generating.evaluate_samples(
            str(made / "generator"), str(made / "tokenizer"), other, samples=4, features="random-conv",
            sampling=Sampling(),
        )  # fmt: skip
    config = posttrain_config(made)
    config.data.eval[0].path = str(tmp_path / "other")
    with pytest.raises(MmpostError, match=f"the generator and the images of data.eval {words}"):
        posttrain(made, tmp_path / "run", config=config)
    assert not (tmp_path / "run").exists()
    tokenizer = posttraining.open_tokenizer(made / "tokenizer")
    pretokenize(other, tokenizer, tmp_path / "codes")
    config = generator_config()
    with pytest.raises(MmpostError, match=f"the generator and the held-out codes {words}"):
        generating.train_generator(
            config, str(made / "codes-train"), str(tmp_path / "codes"), tmp_path / "run", config_yaml=config.to_yaml()
        )


# -- post-training -----------------------------------------------------------------------------------------------------


def test_post_training_is_returned_only_for_the_same_weights_and_images(made, tmp_path):
    out = tmp_path / "run"
    first = posttrain(made, out)
    assert posttrain(made, out) == first
    train(made, tmp_path / "other", config=generator_config(seed=9))
    with pytest.raises(MmpostError) as caught:
        posttrain(made, out, generator=tmp_path / "other")
    assert str(caught.value) == (
        f"'{out}' holds a run that was made of something else; what differs: weights of the generator. "
        "Choose another --out, or give what that run was given. [MMP-T070]"
    )
    # The post-trained tokenizer has the same encoder and codes, but another decoder.
    with pytest.raises(MmpostError, match=r"what differs: weights of the tokenizer\."):
        posttrain(made, out, tokenizer=out)


def test_post_training_writes_figures_of_both_halves_and_a_page(made, tmp_path):
    out = tmp_path / "run"
    summary = posttrain(made, out)
    assert (summary["held_out_select"], summary["held_out_report"]) == (6, 6)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row for row in rows if "pair_loss" in row}
    assert sorted(measured) == [0, 1, 2]
    best = min(measured, key=lambda step: measured[step]["pair_loss_select"])
    assert summary["best_step"] == best
    for name, step in (("before", 0), ("after", best), ("last", 2)):
        assert summary[f"pair_loss_{name}"] == measured[step]["pair_loss"]
    text = (out / "report.html").read_text()
    for expected in ("original", "generated-looking codes, main decoder", "the same codes, post-trained decoder",
                     "half that chooses", "chose the step"):  # fmt: skip
        assert expected in text, expected
    assert len(set(pictures_of_page(out / "report.html"))) == 3
    assert sorted(file.name for file in (out / "cache").iterdir()) == [
        "pairs-held-out.safetensors", "pairs-train.safetensors",
    ]  # fmt: skip


def test_faulty_images_are_told_and_listed_when_they_are_left_out(made, tmp_path):
    folder = save_pictures(tmp_path / "eval", 1)
    (folder / "ant" / "0.png").write_bytes((folder / "ant" / "0.png").read_bytes()[:60])
    config = posttrain_config(made)
    config.data.eval[0].path = str(folder)
    with pytest.raises(MmpostError, match="1 of 12 images cannot be used"):
        posttrain(made, tmp_path / "run", config=config)
    config.data.on_bad_image = "quarantine"
    summary = posttrain(made, tmp_path / "run", config=config)
    assert summary["held_out_select"] + summary["held_out_report"] == 11
    assert json.loads((tmp_path / "run" / "bad_eval_rows.jsonl").read_text())["file"] == "ant/0.png"
    events = [json.loads(line)["text"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert any(text.startswith("1 images are left out, listed in bad_eval_rows.jsonl") for text in events)


# -- mmpost resume -----------------------------------------------------------------------------------------------------


class StopAfter:
    """In the place of ``StopRequest``: asks to stop after some steps."""

    def __init__(self, steps):
        self.left = steps

    def __call__(self, _progress=None):
        return self

    def __enter__(self):
        return self.ask

    def __exit__(self, *_):
        pass

    def ask(self):
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize(("module", "start"), [(generating, train), (posttraining, posttrain)])
def test_a_run_that_was_ended_is_resumed_from_its_folder_alone(module, start, made, tmp_path, monkeypatch):
    whole = start(made, tmp_path / "whole")
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(module, "StopRequest", StopAfter(1))
        with pytest.raises(Interrupted):
            start(made, out)
    assert json.loads((out / "status.json").read_text()) | {"time": 0} == {
        "status": "interrupted", "step": 1, "time": 0,
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert command.resume_run(out, gpus=None, processes=None)
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(whole))
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 2
    assert json.loads((out / "status.json").read_text())["status"] == "finished"


def test_other_folders_are_not_resumed_here(made, tmp_path):
    (tmp_path / "config.yaml").write_text("train: {}\n")
    assert not command.resume_run(tmp_path, gpus=None, processes=None)
    assert read_inputs(tmp_path) is None
    with pytest.raises(MmpostError) as caught:
        command.resume_run(made / "generator", gpus=2, processes=None)
    assert str(caught.value) == (
        "mmpost generator train runs in one process. Leave --gpus and --processes out. [MMP-C117]"
    )


def test_steps_behind_a_checkpoint_are_forgotten(tmp_path):
    folder = RunFolder.open(tmp_path / "run", command=["x"], config_yaml="{}\n", overwrite=False)
    for step in range(5):
        folder.log({"step": step})
    file = tmp_path / "run" / "metrics.jsonl"
    with file.open("a") as torn:
        torn.write('{"step": 1')
    forget_after(folder, 3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2, 3]
    forget_after(folder, -1)
    assert file.read_text() == ""
