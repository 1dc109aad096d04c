"""Designs: what each scheme holds, that weights are exact, and the file."""

import itertools
import math

import numpy as np
import pytest
import yaml

from mmpost.core.errors import MmpostError
from mmpost.mixture.designs import Design, design, dirichlet, lattice, lattice_size, read_design, write_design
from mmpost.mixture.records import MixtureRecord, check_simplex, read_records, rounded, run_name, write_records

ABC = ("a", "b", "c")


@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_seeds_are_singles_leave_one_out_and_uniform(m):
    names = [f"s{i}" for i in range(m)]
    made = design(names, "seeds")
    # With two sources leaving one out is the other one alone.
    assert len(made.mixtures) == (2 * m + 1 if m > 2 else 3)
    sizes = [sum(weight > 0 for weight in row) for row in made.mixtures]
    assert sizes.count(1) == m
    assert sizes.count(m) == 1
    for row in made.mixtures:
        used = [weight for weight in row if weight > 0]
        assert max(used) - min(used) <= 1e-6 + 1e-12


@pytest.mark.parametrize(("m", "d"), [(2, 5), (3, 4), (3, 6), (4, 3), (5, 3)])
def test_lattice_is_every_composition_once(m, d):
    points = {tuple(np.round(row * d).astype(int)) for row in lattice(m, d)}
    assert points == {row for row in itertools.product(range(d + 1), repeat=m) if sum(row) == d}
    assert len(lattice(m, d)) == len(points) == lattice_size(m, d) == math.comb(d + m - 1, m - 1)


def test_a_small_simplex_design_is_spread_and_starts_with_corners():
    made = design(ABC, "simplex", 6)
    assert made.mixtures == ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)) or set(
        made.mixtures
    ) == set(design(ABC, "simplex", denominator=2).mixtures)
    five = design(ABC, "seeds,simplex", 12).mixtures
    assert len(set(five)) == 12
    assert set(design(ABC, "seeds").mixtures) < set(five)


def test_seeds_are_on_the_lattice_of_sixths_so_that_nothing_is_run_twice():
    grid = {run_name(row, 0) for row in design(ABC, "simplex", denominator=6).named()}
    assert {run_name(row, 0) for row in design(ABC, "seeds").named()} < grid


def test_dirichlet_depends_on_the_seed_and_a_prefix_on_nothing_else():
    assert design(ABC, "dirichlet", 9, seed=3) == design(ABC, "dirichlet", 9, seed=3)
    assert design(ABC, "dirichlet", 9, seed=3).mixtures[:5] == design(ABC, "dirichlet", 5, seed=3).mixtures
    assert design(ABC, "dirichlet", 5, seed=3) != design(ABC, "dirichlet", 5, seed=4)
    np.testing.assert_allclose(dirichlet(4, 3000, seed=0).mean(0), 0.25, atol=0.02)


@pytest.mark.parametrize("seed", range(20))
def test_rounded_weights_are_exact_and_within_one_unit(seed):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(int(rng.integers(1, 9)), 0.4))
    found = rounded(weights)
    assert sum(round(w * 1e6) for w in found) == 1_000_000
    assert np.abs(np.array(found) - weights).max() < 1e-6 + 1e-9
    assert rounded(found) == found


def test_a_design_file_says_the_same_again(tmp_path):
    made = design(["name: odd", "b", "c #1"], "seeds,dirichlet", 11, seed=2)
    write_design(tmp_path / "design.yaml", made)
    assert read_design(tmp_path / "design.yaml") == made
    content = yaml.safe_load((tmp_path / "design.yaml").read_text())
    assert content["sources"] == ["name: odd", "b", "c #1"]
    assert "# uniform" in (tmp_path / "design.yaml").read_text()


@pytest.mark.parametrize(
    ("sources", "scheme", "n", "words"),
    [
        (["a"], "seeds", None, "a mixture needs two or more different sources; got a."),
        (["a", "a"], "seeds", None, "a mixture needs two or more different sources; got a, a."),
        (ABC, "seed", None, "unknown name 'seed' among schemes. Known: singles, leave-one-out"),
        (ABC, "dirichlet", None, "scheme dirichlet needs a number of mixtures. Add --n 12."),
        (ABC, "simplex", None, "scheme simplex needs a size."),
        (ABC, "seeds", 12, "scheme 'seeds' has 7 mixtures of 3 sources, but --n is 12. Add dirichlet to the scheme"),
        (ABC, "heuristics", None, "heuristic mixtures need the scores of all leave-one-out runs"),
    ],
)
def test_what_cannot_be_designed_is_told(sources, scheme, n, words):
    with pytest.raises(MmpostError) as caught:
        design(sources, scheme, n)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "a: [", "sources: [a]\nschema: 1", "schema: 1\nsources: [a, b]\nmixtures: [[1]]"])
def test_a_file_that_is_no_design_is_refused(tmp_path, text):
    (tmp_path / "design.yaml").write_text(text)
    with pytest.raises(MmpostError, match="MMP-V023"):
        read_design(tmp_path / "design.yaml")


@pytest.mark.parametrize("weights", [[0.5, 0.4], [1.2, -0.2], [math.nan, 1.0], []])
def test_what_is_no_mixture_is_refused(weights):
    with pytest.raises(MmpostError, match=r"weights must be ≥ 0 and add up to 1. Divide them by their sum. .MMP-V021"):
        check_simplex(weights, list("abcd")[: len(weights)])
    with pytest.raises(MmpostError, match="MMP-V021"):
        Design(("a", "b"), ((0.5, 0.6),))


def test_records_are_kept_in_an_order_of_their_own(tmp_path):
    made = [
        MixtureRecord(row, {"t": {"value": 0.1 * k, "n": 10}}, seed=k % 2)
        for k, row in enumerate(design(ABC, "seeds").named())
    ]
    write_records(tmp_path / "one.jsonl", made)
    write_records(tmp_path / "two.jsonl", reversed(made))
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert sorted(read_records(tmp_path / "one.jsonl"), key=str) == sorted(made, key=str)


@pytest.mark.parametrize("text", ["", "{}\n", "x\n", '{"schema": 1, "weights": {"a": 0.5}, "scores": {}}\n'])
def test_damaged_results_are_refused(tmp_path, text):
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(MmpostError, match=r"MMP-V02[12]"):
        read_records(tmp_path)
    with pytest.raises(MmpostError, match=r"holds no results.jsonl.*MMP-V022"):
        read_records(tmp_path / "nowhere")
