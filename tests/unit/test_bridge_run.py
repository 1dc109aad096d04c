"""``mmpost tokenizer bridge-train`` and ``bridge-sample`` on a tiny VAE: folder, order, resume, samples, messages."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from mmpost.cli import run, tokenizer
from mmpost_tokenizers.bridge.running import IndexData, marginal_nats, open_bridge, train_bridge
from mmpost_tokenizers.bridge.sampling import open_model

TINY = [
    "model.width=16", "model.depth=1", "model.heads=2", "model.buffer=2", "model.head_width=16", "model.head_depth=1",
    "model.head_heads=2", "train.batch_size=8", "train.max_steps=4", "train.learning_rate=1e-3",
    "train.precision=float32", "train.logging_steps=1", "train.save_steps=2", "eval.samples=2", "eval.draws=2",
    "log.progress=none",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """Pictures of two classes, and the bridge of a random VAE with 2 channels on 4x4 positions."""
    from diffusers import AutoencoderKL

    torch.set_num_threads(1)
    folder, draw = tmp_path_factory.mktemp("bridge-run"), np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (folder / "pictures" / label).mkdir(parents=True)
        for number in range(10):
            pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / label / f"{number}.png")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2, sample_size=8,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    words = ["--data", folder / "pictures", "--levels", "8", "--max-saturation", "1", "--out", folder / "bridge"]
    assert run(["tokenizer", "bridge", *map(str, [folder / "vae", *words])]) == 0
    return folder


def call(capfd, *words):
    capfd.readouterr()
    code = run([str(word) for word in words])
    out, err = capfd.readouterr()
    return code, out, err


def train(capfd, place, out, *words):
    data = ["--data", place / "pictures", "--out", out]
    return call(capfd, "tokenizer", "bridge-train", place / "bridge", *data, *TINY, *words)


@pytest.fixture(scope="module")
def trained(place):
    out = place / "run"
    words = ["tokenizer", "bridge-train", place / "bridge", "--data", place / "pictures", "--out", out, *TINY]
    assert run([str(word) for word in words]) == 0
    return out


def test_a_run_has_everything(place, trained, capfd):
    summary = json.loads((trained / "summary.json").read_text())
    stored = json.loads((place / "bridge" / "dimension_order.json").read_text())
    assert summary["order"] == stored["order"]
    assert summary["order_from"] == str(place / "bridge" / "dimension_order.json")
    assert open_model(trained).head.order.tolist() == stored["order"]
    assert (summary["images"], summary["held_out_images"]) == (18, 2)
    assert summary["nats_per_dimension"] == pytest.approx(sum(summary["nats_by_channel"]) / 2, abs=1e-6)
    assert summary["bits_per_token"] == pytest.approx(summary["nats_per_dimension"] * 2 / math.log(2))
    assert summary["uniform_nats"] == pytest.approx(math.log(8))
    page = (trained / "report.html").read_text()
    for words in ("Nats per dimension", "By channel", "Samples", "ar head, masked model"):
        assert words in page, words
    # Asked again, it finds itself done and says the same.
    code, out, _ = train(capfd, place, trained)
    assert code == 0
    assert f"{summary['nats_per_dimension']:.5g}" in out


@pytest.mark.parametrize("words", [["--backbone", "raster"], ["--head", "independent", "--order", "none"]], ids=str)
def test_other_models_train_and_draw(words, place, tmp_path, capfd):
    code, _, err = train(capfd, place, tmp_path / "run", *words)
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    made = {"--backbone": "backbone", "--head": "head"}[words[0]]
    assert summary[made] == words[1]
    if "none" in words:
        assert (summary["order"], summary["order_from"]) == ([0, 1], "channels as they come")
    where = ["--bridge", place / "bridge", "--out", tmp_path / "png", "--per-class", "3", "--guidance", "2"]
    code, _, err = call(capfd, "tokenizer", "bridge-sample", tmp_path / "run", *where)
    assert code == 0, err
    assert sorted(file.name for file in (tmp_path / "png").glob("*.png")) == [
        f"{label}-{number}.png" for label in (0, 1) for number in range(3)
    ]


def test_samples_can_be_scored_and_are_not_called_fid(place, trained, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["--bridge", place / "bridge", "--data", place / "pictures", "--samples", "10", "--features", "random-conv"]
    code, out, err = call(capfd, "tokenizer", "bridge-sample", trained, *words, "--out", tmp_path, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["gfd"] > 0
    assert "fid" not in out.lower()
    assert json.loads((tmp_path / "results.json").read_text()) == found


def test_an_interrupted_run_goes_on_to_the_same_bits(place, trained, tmp_path, capfd, monkeypatch):
    """Ended after the checkpoint of step 2, and continued with what ``mmpost resume`` calls."""
    from mmpost_tokenizers.bridge import training

    stop, steps = training.BridgeTrainer._one_step, []

    def ending(self):
        if self.step == 3:
            raise KeyboardInterrupt
        steps.append(self.step)
        return stop(self)

    monkeypatch.setattr(training.BridgeTrainer, "_one_step", ending)
    assert train(capfd, place, tmp_path / "run")[0] == 130
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "interrupted"
    monkeypatch.undo()
    assert tokenizer.resume_run(tmp_path / "run", gpus=None, processes=None)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    one, two = (open_model(folder).state_dict() for folder in (trained, tmp_path / "run"))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    (tmp_path / "config.yaml").write_text("train: {}\n")
    assert not tokenizer.resume_run(tmp_path, gpus=None, processes=None)


def test_codes_are_taken_as_they_are(place, trained, tmp_path, capfd):
    words = ["--data", trained / "codes", "--held-out", trained / "codes", "--out", tmp_path / "run"]
    code, _, err = call(capfd, "tokenizer", "bridge-train", place / "bridge", *words, *TINY)
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["images"], summary["held_out_images"]) == (20, 20)
    assert not (tmp_path / "run" / "codes").exists()


def test_marginal_nats_by_hand():
    train_, other = torch.tensor([0, 0, 1]).view(3, 1, 1, 1), torch.tensor([0, 1]).view(2, 1, 1, 1)
    # Counts 2, 1 and 0 of three levels, each raised by one.
    assert marginal_nats(train_, other, 3) == pytest.approx(-(math.log(3 / 6) + math.log(2 / 6)) / 2)


def test_every_tenth_image_is_held_out():
    data = IndexData(torch.arange(25).view(25, 1, 1, 1), torch.zeros(25, dtype=torch.int64))
    kept, out = data.split()
    assert out.indices.flatten().tolist() == [9, 19]
    assert sorted([*kept.indices.flatten().tolist(), 9, 19]) == list(range(25))


ORDER = "Measure it for this VAE with `mmpost tokenizer bridge VAE --data IMAGES`."
MISTAKES = {
    "no bridge": (["{tmp}", "--data", "x"], "there is no bridge in '{tmp}'. Make one with `mmpost tokenizer bridge "
                  "VAE --data IMAGES --out FOLDER`. [MMP-E085]"),
    "no order": (["{place}/bridge", "--data", "{place}/pictures", "--order", "{tmp}/o.json"],
                 "there is no file '{tmp}/o.json' with a channel order. Give --order auto, none, or the "
                 "dimension_order.json of `mmpost tokenizer bridge VAE --data IMAGES`. [MMP-E082]"),
    "order of another VAE": (["{place}/bridge", "--data", "{place}/pictures", "--order", "{tmp}/three.json"],
                             "'{tmp}/three.json' orders channels [0, 2, 1], but this bridge has channels 0..1. "
                             f"{ORDER} [MMP-C094]"),
    "no order in it": (["{place}/bridge", "--data", "{place}/pictures", "--order", "{tmp}/bad.json"],
                       "'{tmp}/bad.json' holds no channel order: KeyError 'order'. It must be a list of channels, or "
                       '{{"order": [...]}}. [MMP-E082]'),
    "no data": (["{place}/bridge", "--data", "{tmp}/nowhere"], "{tmp}/nowhere"),
    "width": (["{place}/bridge", "--data", "{place}/pictures", "model.heads=3"],
              "model.width=16 is not a multiple of model.heads=3. Correct model.width or model.heads. [MMP-C090]"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_one_message_for_a_mistake(name, place, tmp_path, capfd):
    words, message = MISTAKES[name]
    (tmp_path / "three.json").write_text("[0, 2, 1]")
    (tmp_path / "bad.json").write_text('{"orders": [0, 1]}')
    names = {"tmp": tmp_path, "place": place}
    given = [word.format(**names) for word in words]
    words = [*given[:3], "--out", tmp_path / "run", *TINY, *given[3:]]
    code, _, err = call(capfd, "tokenizer", "bridge-train", *words)
    assert code in (2, 3, 4)
    assert message.format(**names) in err
    assert err.count("[MMP-") == 1


def test_another_run_in_the_folder_is_refused(place, trained):
    from mmpost.core.errors import MmpostError
    from mmpost_tokenizers.bridge.options import BridgeRunConfig

    config = BridgeRunConfig()
    codes = str(trained / "codes")
    with pytest.raises(MmpostError, match="what differs: order of the channels"):
        train_bridge(config, str(place / "bridge"), codes, None, trained, order="none", config_yaml=config.to_yaml())
    assert open_bridge(place / "bridge").groups == 2
