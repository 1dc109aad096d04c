"""The laws of the CPU suite on a CUDA device: same numbers as on the CPU, in float32 and in bfloat16.

    python -m pytest -m gpu

Nothing is mocked and no time is asserted; the figures of a GPU are measured in ``benchmarks/``.
"""

import json

import numpy as np
import pytest
import torch

from mmpost import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, load_model
from mmpost.adapters.layout import pack, pad
from mmpost.config.schema import FullSettings, ModelSection
from mmpost.models.load import load
from mmpost.models.policy import HEAD_BYTES, token_logprob
from mmpost.rollout.generate import Sampling, complete
from mmpost.rollout.static import StaticDecoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")


@pytest.fixture
def on_device(tiny_folder, family):
    def open_model(dtype="float32"):
        section = ModelSection(model_name_or_path=str(tiny_folder(family)), freeze=[], dtype=dtype)
        return load(section, peft=FullSettings(), seed=3, device=DEVICE)

    return open_model


def _trajectories(adapter, rows):
    """Each prompt with completions of several lengths, and one whole conversation."""
    draw = np.random.default_rng(5)
    out = [(adapter.encode(rows[2]), None)]
    for sample in rows:
        prompt = adapter.encode_prompt(sample.prompt())
        out.extend((prompt, torch.from_numpy(draw.integers(20, 200, length))) for length in (1, 7, 12))
    return out


def _gradients(model, batch):
    model.policy.zero_grad(set_to_none=True)
    logp, _ = model.policy(batch.to(DEVICE))
    logp.sum().backward()
    return logp.detach(), {n: p.grad.clone() for n, p in model.policy.named_parameters() if p.grad is not None}


def test_packed_rows_have_the_numbers_of_padded_ones(on_device, mixed_rows, family):
    model = on_device()
    rows = _trajectories(model.adapter, mixed_rows)
    padded, packed = (_gradients(model, layout(model.adapter, rows)) for layout in (pad, pack))
    assert (padded[0] - packed[0]).abs().max() <= 1e-4 * padded[0].abs().max()
    norm = torch.sqrt(sum((g**2).sum() for g in padded[1].values()))
    difference = torch.sqrt(sum(((g - packed[1][name]) ** 2).sum() for name, g in padded[1].items()))
    assert difference <= 1e-4 * norm


def test_log_probs_are_those_of_the_cpu(on_device, open_tiny, mixed_rows, family):
    here, there = on_device(), open_tiny(peft=FullSettings())
    rows = _trajectories(there.adapter, mixed_rows)
    with torch.no_grad():
        device, _ = here.policy(pack(here.adapter, rows).to(DEVICE))
        cpu, _ = there.policy(pack(there.adapter, rows))
    assert (device.cpu() - cpu).abs().max() <= 1e-4 * cpu.abs().max()


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_rollouts_carry_the_log_probs_of_training(on_device, mixed_rows, family, dtype, limit):
    model = on_device(dtype)
    model.policy.eval()
    prompts = [model.adapter.encode_prompt(sample.prompt()) for sample in mixed_rows]
    uids = list(range(len(prompts)))
    groups = complete(model.policy, model.adapter, prompts, uids, n=4, sampling=Sampling(12), batch_size=64)
    rows = [
        (prompt, torch.from_numpy(rollout.tokens))
        for prompt, group in zip(prompts, groups, strict=True)
        for rollout in group
    ]
    with torch.no_grad():
        logp, _ = model.policy(pack(model.adapter, rows).to(DEVICE))
    sampled = torch.cat([torch.as_tensor(rollout.logp) for group in groups for rollout in group])
    gap = (logp.float().cpu() - sampled.float()).abs()
    assert gap.mean() <= limit / 2
    assert gap.max() <= limit * 10


@pytest.mark.parametrize("compiled", [False, True])
def test_static_decoding_and_cuda_graphs_give_the_same_completions(on_device, mixed_rows, family, compiled):
    model = on_device()
    prompts = [model.adapter.encode_prompt(sample.prompt()) for sample in mixed_rows]
    options = {"n": 3, "sampling": Sampling(140, seed=4), "batch_size": 6}
    uids = list(range(len(prompts)))
    static = StaticDecoder(model.policy, model.adapter, compiled)
    for scale in (1.0, 1.1):
        # Weights that are updated in place are those of the next replay.
        with torch.no_grad():
            next(p for name, p in model.policy.named_parameters() if name.endswith("up_proj.weight")).mul_(scale)
        usual = complete(model.policy, model.adapter, prompts, uids, **options)
        found = complete(model.policy, model.adapter, prompts, uids, static=static, **options)
        assert static.compiled == compiled
        pairs = list(zip([r for g in usual for r in g], [r for g in found for r in g], strict=True))
        for one, two in pairs:
            # Kernels round differently; a draw at an edge may fall to the other side, behind which all differs.
            agree = [a == b for a, b in zip(one.tokens, two.tokens, strict=False)]
            same = agree.index(False) if False in agree else len(agree)
            assert np.abs(one.logp[:same] - two.logp[:same]).max(initial=0) <= 1e-4
        assert sum(a.tokens.tolist() == b.tokens.tolist() for a, b in pairs) >= 0.8 * len(pairs)


def test_the_head_never_holds_all_logits():
    vocabulary, tokens, width = 150_000, 8192, 64
    head = torch.nn.Linear(width, vocabulary, bias=False, device=DEVICE, dtype=torch.bfloat16)
    hidden = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)
    target = torch.randint(vocabulary, (tokens,), device=DEVICE)
    chunk = HEAD_BYTES // (4 * vocabulary)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        for start in range(0, tokens, chunk):
            token_logprob(hidden[start : start + chunk], head, target[start : start + chunk], 1.0)
    assert torch.cuda.max_memory_allocated() - before < 4 * HEAD_BYTES < 4 * tokens * vocabulary


def test_both_commands_train_and_save(tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": f"Say {i % 3}"}], "solution": str(i % 3)} for i in range(24)]
    told = [{**row, "messages": [*row["messages"], {"role": "assistant", "content": row["solution"]}]} for row in rows]
    for name, content in (("rl", rows), ("sft", told)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    first = tmp_path / "sft"
    args = SFTConfig(output_dir=str(first), max_steps=20, batch_size=8, learning_rate=2e-3)
    SFTTrainer(model="tiny-qwen2.5-vl", args=args, train_dataset=str(tmp_path / "sft.jsonl")).train()
    losses = [json.loads(line)["loss"] for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    grpo = GRPOConfig(
        output_dir=str(tmp_path / "rl"), num_generations=4, prompts_per_step=4, max_steps=3, max_completion_length=8
    )
    GRPOTrainer(
        model=load_model(str(first / "final")),
        reward_funcs=["answer"],
        args=grpo,
        train_dataset=str(tmp_path / "rl.jsonl"),
    ).train()
    assert json.loads((tmp_path / "rl/status.json").read_text())["status"] == "finished"
