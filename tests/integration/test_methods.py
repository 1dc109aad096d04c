"""Every preset learns: held-out accuracy over three seeds, from the embedded task's own starting weights."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.methods import PLANS, record
from mmpost.algos import ALGOS

SEEDS = (0, 1, 2)
STEPS = 60


def test_every_preset_has_a_plan():
    # Votes without labels and the contrast to shuffled frames are judged by demos of their own: test_demo_upt.py and
    # test_video_task.py.
    assert sorted([*PLANS, "upt", "t_grpo"]) == sorted(ALGOS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("methods")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("preset", list(PLANS))
def test_it_beats_its_start(preset, folder):
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        line = record(folder, preset, SEEDS, STEPS, pool)
    assert line["ci"][0] > 0, line
    if PLANS[preset].few is not None:
        assert line["over_sft"]["ci"][0] > 0, line
