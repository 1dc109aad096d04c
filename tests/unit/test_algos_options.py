"""Presets by name: their constants, what the user may replace, and what is refused."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from mmpost.algos import ALGOS, asft, dft, grpo
from mmpost.config.schema import LossSection
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost.train.choose import choose
from mmpost.train.method import Method
from mmpost.train.mismatch import Mismatch
from mmpost.train.soft import Soft
from mmpost.train.stabilisers import Clip


@pytest.mark.parametrize(
    ("name", "section", "text"),
    [
        (
            "cispo",
            {"args": {"capp": 3}},
            "loss.args: 'cispo' has no constant 'capp'. Constants of 'cispo': cap=5.0, low=None. [MMP-C035]",
        ),
        (
            "cispo",
            {"args": {"cap": "three"}},
            "loss.args: 'cap' of 'cispo' is 'three', but must be float. "
            "Constants of 'cispo': cap=5.0, low=None. [MMP-C035]",
        ),
        (
            "cispo",
            {"args": {"cap": True}},
            "loss.args: 'cap' of 'cispo' is True, but must be float. "
            "Constants of 'cispo': cap=5.0, low=None. [MMP-C035]",
        ),
        ("sft", {"args": {"x": 1}}, "loss.args: 'sft' has no constant 'x'. 'sft' has no constants. [MMP-C035]"),
        (
            "asft",
            {"args": {"direction": "up"}},
            "loss.args: 'direction' of 'asft' is 'up', but must be Literal['forward', 'reverse']. "
            "Constants of 'asft': weight=0.1, direction='forward'. [MMP-C035]",
        ),
        (
            "sapo",
            {"epsilon": 0.1},
            "loss.epsilon is 0.1, but 'sapo' does not clip with it. Leave it out, or set loss.stabilise=[clip]. "
            "Constants of 'sapo': positive=1.0, negative=1.05. [MMP-C035]",
        ),
        (
            "gspo",
            {"aggregate": "token"},
            "loss.aggregate is 'token', but the ratio 'seq' belongs to whole rows: long rows would count more than "
            "short ones. Use loss.aggregate=seq_mean, or seq_sum. [MMP-C036]",
        ),
        (
            "grpo",
            {"kl": {"kl": "k1", "beta": 0.1}},
            "loss.kl.kl is 'k1', whose gradient in the loss is 0 on average: it would hold nothing. "
            "Use loss.kl.kl=k2, or k1_reward to take it off the reward. [MMP-C036]",
        ),
        ("kdrl", {}, "'kdrl' needs a teacher. Set loss.teacher=FOLDER. [MMP-C036]"),
        (
            "grpo",
            {"teacher": "folder"},
            "loss.teacher is set, but 'grpo' has no term with a teacher. Leave it out, use loss.preset=kdrl, or set "
            "loss.kl.to=teacher and loss.kl.beta. [MMP-C036]",
        ),
    ],
)
def test_wrong_options_are_named_with_those_that_are_there(name, section, text):
    with pytest.raises(MmpostError) as error:
        choose(name, Catalog("algos", ALGOS).get(name), LossSection(**section))
    assert str(error.value) == text


def _chosen(name, **section):
    return choose(name, Catalog("algos", ALGOS).get(name), LossSection(preset=name, **section))


def test_what_the_user_sets_replaces_the_presets_part():
    assert _chosen("dapo", epsilon=0.1).rollout.stabilise == (Clip(0.1, 0.28),)
    assert _chosen("grpo", epsilon=0.1).rollout.stabilise[0].high == 0.1
    assert _chosen("grpo", aggregate="const", advantage="group_nostd").advantage == _chosen("dr_grpo").advantage
    assert replace(_chosen("grpo").rollout, aggregate="const") == _chosen("dr_grpo").rollout
    kept = _chosen("gspo", stabilise=["clip", "offseq"]).rollout.stabilise
    assert kept[0] == Clip(3e-4, 4e-4)
    assert len(kept) == 2
    assert _chosen("reinforce", stabilise=["clip"], denominator="old", epsilon=0.3).rollout.stabilise == (Clip(0.3),)
    assert _chosen("hpt", entropy_beta=0.0).soft == ()
    assert _chosen("grpo", entropy_beta=0.01).soft == (Soft("entropy", 0.01, rows="rollout"),)
    kl = _chosen("kdrl", teacher="t", kl={"beta": 0.1}).rollout.kl
    assert (kl.at(0.0), kl.at(1.0), kl.to, kl.rows is None) == (0.1, 0.1, "teacher", False)
    assert not _chosen("grpo", kl={"kl": "k3"}).asks("reference")
    assert _chosen("grpo", kl={"beta": 0.1}).asks("reference")


def test_an_engine_of_its_own_is_corrected_for_unless_told_otherwise():
    preset = grpo.preset
    assert choose("grpo", preset, LossSection()).rollout.mismatch.mode == "off"
    assert choose("grpo", preset, LossSection(), own_engine=False).rollout.mismatch == Mismatch("token_tis")
    section = LossSection(mismatch={"correction": "seq_mask", "cap": 4.0})
    assert choose("grpo", preset, section, own_engine=False).rollout.mismatch.limits() == (4.0, 0.0)
    off = LossSection(mismatch={"correction": "off"})
    assert choose("grpo", preset, off, own_engine=False).rollout.mismatch.mode == "off"


@pytest.mark.parametrize("name", ALGOS)
def test_every_method_names_its_source_and_what_differs(name):
    module = importlib.import_module(f"mmpost.algos.{name}")
    assert "Source:" in module.__doc__
    assert name == "reinforce" or "arXiv" in module.__doc__
    assert name == "sft" or "Differs:" in module.__doc__
    assert isinstance(module.preset(), Method)


def test_methods_are_found_by_their_files():
    folder = Path(importlib.import_module("mmpost.algos").__file__).parent
    assert set(ALGOS) == {file.stem for file in folder.glob("*.py")} - {"__init__"}
    assert {"sft", "dft", "asft", "grpo", "dr_grpo", "gspo", "cispo", "sapo", "vespo", "rloo", "kdrl"} <= set(ALGOS)
    assert not any(name.startswith("_") for name in ALGOS)


def test_asft_is_dft_and_a_term_over_the_vocabulary():
    method = asft.preset(weight=0.25, direction="reverse")
    assert method.demo == dft.preset().demo
    assert [(soft.kind, soft.weight, soft.to) for soft in method.soft] == [("reverse_kl", 0.25, "reference")]
    assert asft.preset().soft[0].kind == "forward_kl"
    assert method.compares("reference")
    assert not asft.preset(weight=0.0).compares("reference")
