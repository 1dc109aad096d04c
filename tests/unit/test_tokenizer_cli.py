"""The tokenizer commands from end to end on a dozen tiny pictures, and one message for each mistake."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mmpost.cli import run

TINY = [
    "tokenizer.image_size=16", "tokenizer.block_out_channels=[8]", "tokenizer.z_channels=8", "tokenizer.norm_groups=4",
    "tokenizer.quantizer.codebook_size=16", "tokenizer.quantizer.dim=4", "train.batch_size=4", "train.logging_steps=1",
    "data.on_bad_image=error", "log.progress=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with two classes of six pictures each."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (folder / label).mkdir()
        for number in range(6):
            pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


def call(capfd, *words):
    capfd.readouterr()
    code = run([str(word) for word in words])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A run of four steps."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "tokenizer"
    words = ["tokenizer", "train", "tokenizers/demo", f"data.train={pictures}", f"data.eval={pictures}", *TINY]
    assert run([*words, "train.max_steps=4", "train.save_steps=2", "eval.features=random-conv",
                f"train.output_dir={out}"]) == 0  # fmt: skip
    return out


def test_a_run_folder_has_everything(trained, capfd):
    results = json.loads((trained / "eval" / "tokenizer.json").read_text())
    assert {"rfd", "pfd", "usage", "psnr", "ssim", "noise_floor"} <= results.keys()
    assert not [name for name in results if "fid" in name]
    assert results["extractor"]["name"] == "random-conv64-seed0"
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert all(0 <= row["wait_share"] <= 1 for row in rows if "loss" in row)
    assert "perturbed: 90% of tokens" in (trained / "report.html").read_text()
    assert json.loads((trained / "status.json").read_text())["status"] == "finished"
    # Asked again, it finds itself done.
    code, _, err = call(capfd, "resume", trained)
    assert (code, err.split(":")[0]) == (0, "this run was already finished")


def test_eval_and_inspect(trained, pictures, tmp_path, capfd):
    words = ["--data", pictures, "--features", "random-conv", "--json"]
    code, out, _ = call(capfd, "tokenizer", "eval", trained, *words, "--curves", "perturb", "--out", tmp_path / "e")
    assert code == 0
    found = json.loads(out)
    stored = json.loads((trained / "eval" / "tokenizer.json").read_text())
    assert found["rfd"] == pytest.approx(stored["rfd"], rel=1e-6)
    assert len(found["grid"]) == 15
    assert json.loads((tmp_path / "e" / "results.json").read_text()) == found
    code, out, _ = call(
        capfd, "tokenizer", "inspect", trained, "--data", pictures, "--out", tmp_path / "i.html", "--json"
    )
    assert code == 0
    facts = json.loads(out)
    assert facts["codebook_size"] == 16
    assert len(facts["neighbours"]) == 5
    assert "Neighbours of the most used codes" in (tmp_path / "i.html").read_text()


def test_inspect_finds_its_images(trained, pictures, tmp_path, capfd):
    """Those of the run for its final weights and its checkpoints; for a lone folder those that ship."""
    import shutil

    page = ["--out", tmp_path / "i.html", "--json"]
    given = call(capfd, "tokenizer", "inspect", trained, "--data", pictures, *page)
    for place in (trained / "final", trained / "checkpoints" / "step-000002"):
        code, out, err = call(capfd, "tokenizer", "inspect", place, *page)
        assert code == 0, err
        assert f"images: {pictures}, data.eval of the checkpoint's run" in err
        assert (out == given[1]) == (place.name == "final")
    shutil.copytree(trained / "final", tmp_path / "lone")
    code, out, err = call(capfd, "tokenizer", "inspect", tmp_path / "lone", "--limit", "20", *page)
    assert code == 0, err
    assert "images: task:digits, which ships with mmpost; no run folder is around the checkpoint" in err
    assert json.loads(out)["codebook_size"] == 16


def test_reference_features_are_kept_between_commands(trained, pictures, tmp_path, capfd, monkeypatch):
    from mmpost_tokenizers import statistics

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    extracted = []
    extract = statistics.extract
    monkeypatch.setattr(statistics, "extract", lambda *words: extracted.append(1) or extract(*words))
    words = ["tokenizer", "eval", trained, "--data", pictures, "--json", "--features", "random-conv"]
    first = call(capfd, *words)
    assert (first[0], len(extracted)) == (0, 1)
    assert call(capfd, *words)[1] == first[1]
    assert len(extracted) == 1
    # Fewer images are another set.
    assert call(capfd, *words, "--limit", "8")[0] == 0
    assert len(extracted) == 2
    assert len(list((tmp_path / "cache" / "mmpost" / "reference").glob("*.safetensors"))) == 2


def test_a_perceptual_distance_says_what_it_is(trained, pictures, tmp_path, capfd):
    words = ["tokenizer", "eval", trained, "--data", pictures, "--features", "random-conv", "--json"]
    found = json.loads(call(capfd, *words)[1])
    assert found["dfd[random-conv64-seed0]"] > 0
    assert "lpips" not in found
    assert not [name for name in json.loads(call(capfd, *words, "--perceptual", "none")[1]) if name.startswith("dfd")]
    code, _, err = call(capfd, *words, "--perceptual", tmp_path / "nothing.pth")
    assert code == 2
    assert err == (
        f"--perceptual {tmp_path / 'nothing.pth'}: there is no such file. "
        "Give the file vgg16-397923af.pth, features or none. [MMP-C112]\n"
    )


FOLDER = "Give a folder written by save_pretrained, or a hub id of one (needs network or the local cache). [MMP-E070]\n"


@pytest.mark.parametrize("command", ["inspect", "eval", "encode", "pretokenize"])
def test_a_checkpoint_that_is_not_there(command, pictures, tmp_path, capfd):
    words = ["--data", pictures, *(["--out", tmp_path / "o.npz"] if command in ("encode", "pretokenize") else [])]
    # Not asked of the hub: it can only be a path.
    code, _, err = call(capfd, "tokenizer", command, tmp_path / "nowhere", *words)
    assert (code, err) == (4, f"no tokenizer '{tmp_path / 'nowhere'}': there is no such folder. {FOLDER}")


def test_a_vae_and_data_that_are_not_there(trained, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "vae.bin").write_text("")
    fix = "Give the folder or hub id of a diffusers.AutoencoderKL. [MMP-E080]\n"
    for vae, why in (("models/vae", "there is no such folder"), ("vae.bin", "it is a file, not a folder")):
        code, _, err = call(capfd, "tokenizer", "bridge", vae, "--out", tmp_path / "out")
        assert (code, err) == (4, f"cannot open the VAE '{vae}': {why}. {fix}")
    code, _, err = call(capfd, "tokenizer", "eval", trained, "--data", tmp_path / "pictures")
    assert code in (3, 4)
    assert str(tmp_path / "pictures") in err
    assert err.count("[MMP-") == err.count("\n") == 1


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_encode_and_decode_give_the_reconstruction(trained, pictures, tmp_path, capfd, ending):
    from mmpost_tokenizers.images import images_from, to_uint8
    from mmpost_tokenizers.session import open_tokenizer

    codes = tmp_path / f"codes.{ending}"
    assert call(capfd, "tokenizer", "encode", trained, "--data", pictures, "--out", codes)[0] == 0
    assert call(capfd, "tokenizer", "decode", trained, codes, "--out", tmp_path / "png")[0] == 0
    files = sorted((tmp_path / "png").glob("*.png"))
    assert len(files) == 12
    images = images_from(pictures, size=16)
    shown = np.asarray(Image.open(tmp_path / "png" / (images.keys[0].replace("/", "_") + ".png")))
    expected = to_uint8(open_tokenizer(trained).reconstruct(images[0][0][None]))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(shown, expected)


def test_generator_and_post_training(trained, pictures, tmp_path, capfd):
    codes, generator = tmp_path / "codes", tmp_path / "generator"
    assert call(capfd, "tokenizer", "pretokenize", trained, "--data", pictures, "--out", codes)[0] == 0
    words = ["model.size=test", "train.max_steps=2", "train.batch_size=4", "log.progress=none"]
    code, out, _ = call(capfd, "generator", "train", codes, "--out", generator, "--held-out", codes, *words)
    assert code == 0
    assert float(re.search(r"held_out_nll +(\S+)", out)[1]) > 0
    made = tmp_path / "made"
    words = ["--tokenizer", trained, "--per-class", "2", "--out", made]
    assert call(capfd, "generator", "sample", generator, *words)[0] == 0
    assert len(list(made.glob("*-*.png"))) == 4
    words = ["--tokenizer", trained, "--data", pictures, "--samples", "8", "--features", "random-conv", "--json"]
    code, out, _ = call(capfd, "generator", "eval", generator, *words)
    assert code == 0
    assert "gfd" in json.loads(out)
    words = [f"data.train={pictures}", f"data.eval={pictures}", "losses.perceptual=none", "log.progress=none"]
    words += ["posttrain.max_steps=2", "posttrain.eval_steps=1", "posttrain.batch_size=4", "posttrain.pair_mode=direct"]
    post = tmp_path / "post"
    code, out, err = call(capfd, "tokenizer", "posttrain", trained, "--generator", generator, "--out", post, *words)
    assert code == 0, err
    summary = json.loads((post / "summary.json").read_text())
    assert summary["pair_loss_after"] <= summary["pair_loss_before"]
    code, _, err = call(
        capfd, "tokenizer", "posttrain", trained, "--generator", generator, "--out", tmp_path / "p2", *words,
        "posttrain.sigma=1.5",
    )  # fmt: skip
    assert code == 2
    assert err == (
        "sigma=1.5 is outside (0, 1]: it is the share of real codes that a pair keeps. "
        "Choose 0.7 to 0.9; at 0 the codes have nothing to do with the image [MMP-C104]\n"
    )


MISTAKES = {
    "no images": (["tokenizer", "train", "tokenizers/demo", "data.train=[]", "train.output_dir={tmp}/a"],
                  2, "no images: data.train is empty. Set data.train=FOLDER. [MMP-C111]\n"),
    "unknown task": (["tokenizer", "inspect", "{trained}", "--data", "task:birds"],
                     2, "unknown name 'birds' among image tasks. Known: digits, fashion [MMP-C006]\n"),
    "unknown curve": (["tokenizer", "eval", "{trained}", "--data", "{pictures}", "--curves", "tokens"],
                      2, "--curves tokens is not known. Known: perturb. [MMP-C117]\n"),
    "ending": (["tokenizer", "encode", "{trained}", "--data", "{pictures}", "--out", "{tmp}/codes.csv"],
               2, "--out {tmp}/codes.csv ends in neither .npz nor .safetensors. Choose one of them. [MMP-C117]\n"),
    "mode without data": (["tokenizer", "bridge", "{tmp}/vae", "--mode", "chanel"],
                          2, "--mode chanel is not known. Known: paper, channel. [MMP-C117]\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_one_message_for_a_mistake(name, trained, pictures, tmp_path, capfd):
    words, code, message = MISTAKES[name]
    places = {"tmp": tmp_path, "trained": trained, "pictures": pictures}
    got, _, err = call(capfd, *(word.format(**places) for word in words))
    assert (got, err) == (code, message.format(**places))


def test_a_missing_key_is_named(trained, pictures, tmp_path, capfd):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(trained / "final", broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["quant_conv.bias"]
    save_file(tensors, broken / "model.safetensors")
    code, _, err = call(capfd, "tokenizer", "inspect", broken, "--data", pictures)
    assert code == 4
    assert "quant_conv.bias" in err
    assert err.endswith("[MMP-E071]\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("fault", ["truncated.jpg", "tiny.png", "text.png"])
def test_a_bad_picture_stops_unless_it_is_quarantined(trained, pictures, tmp_path, capfd, fault):
    import shutil

    folder = tmp_path / "mixed"
    shutil.copytree(pictures, folder)
    if fault == "truncated.jpg":
        Image.new("RGB", (64, 64), "red").save(folder / "cats" / fault)
        whole = (folder / "cats" / fault).read_bytes()
        (folder / "cats" / fault).write_bytes(whole[: len(whole) // 2])
    elif fault == "tiny.png":
        Image.new("RGB", (1, 1)).save(folder / "cats" / fault)
    else:
        (folder / "cats" / fault).write_text("no picture")
    words = ["tokenizer", "encode", trained, "--data", folder, "--out", tmp_path / "c.npz"]
    code, _, err = call(capfd, *words)
    assert code == 3
    assert fault in err
    assert err.count("[MMP-") == 1
    assert "or set --quarantine to go on with the other 12" in err
    code, _, err = call(capfd, *words, "--quarantine")
    assert code == 0
    assert len(np.load(tmp_path / "c.npz")["codes"]) == 12
    assert "left out" in err


def test_bridge_of_a_vae_opens_as_a_tokenizer(pictures, tmp_path, capfd):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2, sample_size=16,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    capfd.readouterr()
    words = ["tokenizer", "bridge", tmp_path / "vae", "--data", pictures, "--out", tmp_path / "bridge", "--json"]
    code, out, err = call(capfd, *words, "--levels", "16", "--max-saturation", "0.2")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["levels"], facts["channels"], facts["token_grid"]) == (16, 2, [8, 8])
    assert sorted(facts["order"]) == [0, 1]
    assert 0 < facts["error"] < 0.1
    stored = json.loads((tmp_path / "bridge" / "dimension_order.json").read_text())
    assert stored["order"] == facts["order"]
    words = ["tokenizer", "encode", tmp_path / "bridge", "--data", pictures, "--out", tmp_path / "b.npz"]
    assert call(capfd, *words)[0] == 0
    codes = np.load(tmp_path / "b.npz")["codes"]
    assert codes.shape == (12, 8, 8, 2)
    assert codes.max() < 16
    assert 0 <= facts["cut_off"] <= facts["saturation"] < 0.2
    low, high = facts["measured_range"]
    assert low < 0 < high
    # A range that the latents leave is refused, with one message that says what to raise.
    words = ["tokenizer", "bridge", tmp_path / "vae", "--data", pictures, "--range", "0.5", "--out", tmp_path / "no"]
    code, _, err = call(capfd, *words)
    assert code == 4
    found = re.fullmatch(
        r"the range cuts off (\S+)% of the latents: measured from (\S+) to (\S+) in units of the scale, 99\.0% within "
        r"(\S+), but 64 levels with range 0\.5 reach 0\.44; 1\.0% may be cut off\. Raise --range to (\S+), or measure "
        r"shift and scale of each channel with --mode channel, or accept it with --max-saturation 1\. \[MMP-E081\]\n",
        err,
    )
    assert found, err
    words[words.index("0.5")] = found[5]
    assert call(capfd, *words)[0] == 0
    words[words.index(found[5])] = "0.5"
    assert call(capfd, *words, "--max-saturation", "1")[0] == 0
    # Without images nothing is measured, and that is said.
    code, out, _ = call(capfd, "tokenizer", "bridge", tmp_path / "vae", "--out", tmp_path / "blind", "--json")
    assert code == 0
    assert json.loads(out)["notes"] == [
        "without --data the scale is that of the VAE's configuration and no latent was measured"
    ]
