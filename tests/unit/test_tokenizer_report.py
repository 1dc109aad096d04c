"""The pictures of a tokenizer: what a page holds, and that grids show what they say."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mmpost_tokenizers import opening, report
from mmpost_tokenizers.base import Quantizer
from mmpost_tokenizers.options import CNNSettings


@pytest.fixture(scope="module")
def tokenizer():
    torch.set_num_threads(1)
    shape = {
        "kind": "cnn", "image_size": 16, "stem_patch": 4, "block_out_channels": [8], "layers_per_block": 1,
        "z_channels": 8, "norm_groups": 4, "lowest_attention": False, "mid_attention": False,
        "quantizer": {"kind": "vq", "codebook_size": 16, "dim": 4},
    }  # fmt: skip
    return opening.new_tokenizer(CNNSettings.model_validate(shape), seed=1).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand((10, 3, 16, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def test_grid_keeps_every_pixel(images):
    sheet = pixels(report.grid_png(images, columns=4))
    # Sixteen pixels are drawn three times as large, with two white ones between.
    assert sheet.shape == (3 * 48 + 2 * 2, 4 * 48 + 3 * 2, 3)
    second_row = sheet[50:98, 0:48]
    assert np.array_equal(second_row[::3, ::3], report.to_uint8(images[4]).permute(1, 2, 0).numpy())
    assert (sheet[48:50] == 255).all()


def test_grids_show_originals_reconstructions_and_three_strengths(tokenizer, images):
    block = report.picture_grids(tokenizer, images)
    captions = [caption for caption, _ in block.items]
    assert captions == [
        "original",
        "reconstruction",
        "perturbed: 30% of tokens, 2 neighbours",
        "perturbed: 60% of tokens, 2 neighbours",
        "perturbed: 90% of tokens, 2 neighbours",
    ]
    assert block.items[1][1] == report.grid_png(tokenizer.reconstruct(images))
    assert len({png for _, png in block.items}) == 5


@pytest.mark.parametrize("knows_neighbours", [True, False])
def test_codes_without_neighbours_show_no_perturbation(images, monkeypatch, knows_neighbours):
    settings = CNNSettings.model_validate(
        {"image_size": 16, "stem_patch": 4, "block_out_channels": [8], "z_channels": 8, "norm_groups": 4,
         "quantizer": {"kind": "lfq", "dim": 30}}
    )  # fmt: skip
    tokenizer = opening.new_tokenizer(settings, seed=0).eval()
    if not knows_neighbours:
        monkeypatch.setattr(type(tokenizer.quantizer), "lattice", lambda self: None)
        monkeypatch.setattr(type(tokenizer.quantizer), "code_vectors", Quantizer.code_vectors)
    shown = [caption for caption, _ in report.picture_grids(tokenizer, images).items]
    assert shown[:2] == ["original", "reconstruction"]
    assert (len(shown) > 2) == knows_neighbours


def test_usage_counts_every_token(tokenizer, images):
    counts = report.token_counts(tokenizer, [images[:6], images[6:]])
    assert counts.shape == (1, 16)
    assert counts.sum() == 10 * 16
    tiles = dict(report.usage_blocks(counts)[0].items)
    assert tiles["tokens counted"] == "160"
    assert tiles["dead codes"] == str(int((counts == 0).sum()))


def test_neighbours_are_the_nearest(tokenizer, images):
    counts = report.token_counts(tokenizer, [images])
    row = report.neighbour_table(tokenizer, counts, rows=1).rows[0]
    vectors = tokenizer.quantizer.code_vectors(0)
    distances = (vectors - vectors[int(row[0])]).norm(dim=1)
    distances[int(row[0])] = torch.inf
    assert row[2].startswith(f"{int(distances.argmin())} (")


def test_curve_has_a_line_per_neighbourhood():
    rows = [{"alpha": a, "delta": d, "distance": a * d} for a in (0.9, 0.5) for d in (3, 4)]
    drawing = report.perturbation_curve({"grid": rows, "curve": rows[:1]}, "pFD[x]")
    assert "3 neighbours" in drawing.svg
    assert "4 neighbours" in drawing.svg
    assert report.perturbation_curve({}, "pFD[x]") is None


def test_page_holds_everything(tokenizer, images, tmp_path):
    rows = [{"alpha": a, "delta": 3, "distance": a} for a in (0.9, 0.5)]
    metrics = [{"step": n, "loss": 1.0 / n, "codebook": {"usage": 0.5}, "wait_share": 0.0} for n in (1, 2, 3)]
    page = report.write_report(
        tmp_path / "page.html",
        title="t<1>",
        tokenizer=tokenizer,
        images=images,
        metrics=metrics,
        results={"rfd": 0.25, "grid": rows},
        score="pFD[x]",
        notes=["one note"],
    )
    text = page.read_text()
    for expected in (
        "t&lt;1&gt;", "pFD[x] by share of perturbed tokens", "one note", "Share of tokens by code",
        "Neighbours of the most used codes", "share of time waiting for data", "use of codes", "data:image/png;base64,",
    ):  # fmt: skip
        assert expected in text, expected
    assert "http://" not in text.replace("http://www.w3.org", "")
