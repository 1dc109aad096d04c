"""Parts of a filtered data set: disjoint, as many rows as they should have, and the same for the same seed."""

import json

import pytest

from mmpost.api.recipe import RECIPES, TwoStages, run_recipe, write_parts
from mmpost.core.errors import MmpostError

SIZES = {"weak": 30, "strong": 50, "other": 7}


@pytest.fixture
def filtered(tmp_path):
    folder = tmp_path / "filtered"
    folder.mkdir()
    for name, size in SIZES.items():
        lines = [
            json.dumps({"id": f"{name}{number}", "text": "one\u2028row"}, ensure_ascii=False) for number in range(size)
        ]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def ids(path):
    return [json.loads(line)["id"] for line in path.read_text().split("\n")[:-1]]


@pytest.mark.parametrize("name", list(RECIPES))
def test_parts_do_not_overlap_and_both_first_stages_are_equally_large(filtered, tmp_path, name):
    parts = write_parts(filtered, tmp_path / "rows", RECIPES[name], 3)
    first, second = (ids(parts[part]) for part in RECIPES[name])
    assert len(first) == len(set(first)) == SIZES["weak"]
    assert not set(first) & set(second)
    kinds = {one.rstrip("0123456789") for one in second}
    if name == "weak-to-strong":
        assert (set(first), kinds) == ({f"weak{n}" for n in range(30)}, {"strong"})
        assert len(second) == SIZES["strong"]
    elif name == "mixed-to-strong":
        assert kinds == {"strong"}
        assert len(second) == 50 - sum(one.startswith("strong") for one in first)
    else:
        assert len(first) + len(second) == sum(SIZES.values())
        assert kinds == set(SIZES)


def test_the_mix_is_drawn_evenly_and_by_seed(filtered, tmp_path):
    counts = dict.fromkeys(SIZES, 0)
    for seed in range(200):
        for one in ids(write_parts(filtered, tmp_path / "rows", ["mix"], seed)["mix"]):
            counts[one.rstrip("0123456789")] += 1
    for name, size in SIZES.items():
        # Binomial with 200 x 30 draws; 5 standard deviations.
        share = size / 87
        assert abs(counts[name] / 6000 - share) < 5 * (share * (1 - share) / 6000) ** 0.5
    once = ids(write_parts(filtered, tmp_path / "a", ["mix"], 1)["mix"])
    assert once == ids(write_parts(filtered, tmp_path / "b", ["mix"], 1)["mix"])
    assert once != ids(write_parts(filtered, tmp_path / "b", ["mix"], 2)["mix"])


def test_messages(filtered, tmp_path):
    with pytest.raises(
        MmpostError, match=r"unknown name 'strong' among recipes. Known: weak-to-strong, .*\[MMP-C006\]"
    ):
        run_recipe("strong", filtered, tmp_path, TwoStages("audiomcq"))
    (filtered / "strong.jsonl").write_text("")
    with pytest.raises(MmpostError) as caught:
        write_parts(filtered, tmp_path, ["weak", "strong"], 0)
    assert str(caught.value) == (
        f"the part 'strong' of '{filtered}' has no rows (30 weak, 0 strong, 7 other). Filter more rows. [MMP-D062]"
    )
    with pytest.raises(MmpostError, match=r"holds no weak.jsonl"):
        write_parts(tmp_path / "nothing", tmp_path, ["weak"], 0)
