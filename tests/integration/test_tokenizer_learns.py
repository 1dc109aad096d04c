"""What a small tokenizer learns on scanned digits: error below a bound, use of codes, more codes, perturbed scores."""

import itertools

import numpy as np
import pytest
import torch

from mmpost.cli.image_data import open_data
from mmpost.train.distributed import Processes
from mmpost_tokenizers import opening
from mmpost_tokenizers.batches import ImageBatches
from mmpost_tokenizers.evaluate import evaluate_tokenizer
from mmpost_tokenizers.options import TokenizerConfig
from mmpost_tokenizers.pfid import ALPHAS
from mmpost_tokenizers.training import TokenizerTrainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SEEDS = (0, 1, 2)
WHOLE, SHORT = 700, 250


def images(split):
    return open_data("task:digits", image_size=16, split=split, limit=None, crop="center", bad=False)


@pytest.fixture(scope="module")
def sets():
    torch.set_num_threads(1)
    return opening.resident(images("train")), images("heldout")


@pytest.fixture(scope="module")
def extractor(sets):
    return opening.choose_extractor("classifier", images("train"), seed=0, source="digits")


def trained(sets, out, *, codes, steps, seed):
    """The tokenizer of ``configs/tokenizers/demo.yaml`` without perturbation."""
    words = [
        f"tokenizer.quantizer.codebook_size={codes}", "tokenizer.perturb.beta=0", f"train.max_steps={steps}",
        f"train.seed={seed}", "train.save_steps=100000",
    ]  # fmt: skip
    config = TokenizerConfig.from_yaml("configs/tokenizers/demo.yaml", *words)
    tokenizer = opening.new_tokenizer(config.tokenizer, seed=seed)
    batches = ImageBatches(sets[0], batch_size=config.train.batch_size, seed=seed)
    return TokenizerTrainer(tokenizer, batches, config, processes=Processes(strategy="ddp"), output=out).run()


def held_out_mse(tokenizer, pictures):
    batch = torch.stack([pictures[place][0] for place in range(len(pictures))])
    return float((tokenizer.reconstruct(batch) - batch).square().mean())


@pytest.fixture(scope="module")
def result(sets, extractor, tmp_path_factory):
    """Scores of a fully trained tokenizer of 256 codes on held-out digits."""
    tokenizer = trained(sets, tmp_path_factory.mktemp("whole"), codes=256, steps=WHOLE, seed=0)
    return evaluate_tokenizer(tokenizer, sets[1], extractor)


def test_error_and_use_of_codes_after_700_steps(result, sets):
    train = torch.stack([sets[0][place][0] for place in range(len(sets[0]))])
    other = torch.stack([sets[1][place][0] for place in range(len(sets[1]))])
    # The mean image, in the same units, is what has to be beaten by far.
    assert float((train.mean(0) - other).square().mean()) > 0.15
    assert result["mse"] < 0.01
    assert result["usage"] > 0.8
    assert result["perplexity"] > 100


def test_perturbed_scores_are_ordered(result):
    """The distance falls with alpha at a fixed delta and rises with delta at a fixed alpha, but for one neighbour."""
    grid = {(row["alpha"], row["delta"]): row["distance"] for row in result["grid"]}
    for delta in result["deltas"]:
        row = [grid[alpha, delta] for alpha in ALPHAS]
        assert sum(later > before for before, later in itertools.pairwise(row)) <= 1, (delta, row)
        assert row[0] > row[-1]
    for alpha in ALPHAS:
        column = [grid[alpha, delta] for delta in result["deltas"]]
        assert sum(later < before for before, later in itertools.pairwise(column)) <= 1, (alpha, column)
    assert min(grid.values()) > result["rfd"]


def test_error_falls_with_the_number_of_codes(sets, tmp_path):
    means = []
    for codes in (16, 64, 256):
        errors = [
            held_out_mse(trained(sets, tmp_path / f"{codes}-{seed}", codes=codes, steps=SHORT, seed=seed), sets[1])
            for seed in SEEDS
        ]
        means.append(float(np.mean(errors)))
    assert means[0] > 1.1 * means[1] > 1.1 * 1.1 * means[2], means
