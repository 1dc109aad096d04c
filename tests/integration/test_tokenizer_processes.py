"""Two processes train a tokenizer as one does: every loss, the discriminator, and the use of codes."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LIMIT_S = 400
GUIDE = "vit_small_patch14_dinov2.lvd142m"
# Everything in which processes could differ is on, but what draws by process: perturbation and stochastic depth.
OPTIONS = [
    "tokenizer.image_size=16", "tokenizer.block_out_channels=[8]", "tokenizer.z_channels=8", "tokenizer.norm_groups=4",
    "tokenizer.quantizer.codebook_size=16", "tokenizer.quantizer.dim=4", "tokenizer.perturb.beta=0",
    "data.train=task:digits", "data.eval=[]", "train.batch_size=8", "train.max_steps=3", "train.logging_steps=1",
    "train.bf16=false", "train.warmup_steps=0", "train.learning_rate=1e-3", "log.progress=none",
    "losses.perceptual=features", "losses.semantic=0.5", f"losses.semantic_model={GUIDE}",
    "losses.adversarial=0.5", "losses.adversarial_start=0", "losses.lecam=0.01", "losses.adaptive=true",
    "losses.discriminator={kind: patchgan, ndf: 4, layers: 2, norm: group}",
]  # fmt: skip


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """Random weights of the semantic guide, as a file."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(GUIDE, pretrained=False, num_classes=0, img_size=16, patch_size=16)
    place = tmp_path_factory.mktemp("guide") / "guide.pth"
    torch.save(model.state_dict(), place)
    return place


def train(out, guide, processes, *more):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    words = ["tokenizer", "train", "tokenizers/demo", *OPTIONS, f"losses.semantic_weights={guide}", *more]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "mmpost", *words, f"train.output_dir={out}"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_have_the_losses_of_one(tmp_path, guide):
    one, two = (train(tmp_path / str(count), guide, count) for count in (1, 2))
    assert [row["step"] for row in one] == [row["step"] for row in two] == [1, 2, 3]
    names = {"loss", "rec", "features", "vq", "commit", "semantic", "adversarial", "adaptive", "discriminator", "lecam"}
    for here, there in zip(one, two, strict=True):
        assert names <= here.keys()
        for name in names | {"grad_norm"}:
            assert there[name] == pytest.approx(here[name], rel=1e-5, abs=1e-6), (here["step"], name)
        assert there["codebook"] == here["codebook"]
    # The losses move: equal lines would say nothing otherwise.
    assert len({row["semantic"] for row in one}) == 3


def test_two_processes_share_what_they_perturb(tmp_path, guide):
    """Draws belong to a process, so losses differ from those of one; the share of changed tokens does not."""
    perturb = ["tokenizer.perturb.beta=1", "tokenizer.perturb.delta=4", "tokenizer.perturb.end_ratio=1"]
    rows = train(tmp_path / "run", guide, 2, *perturb, "train.batch_size=64")
    for row in rows:
        # 64 images of 16 tokens.
        assert row["changed"] == pytest.approx(3 / 4, abs=4 * (3 / 16 / 1024) ** 0.5)
