"""Models that the policy is compared with: the starting weights under LoRA or copied, and a teacher."""

import copy

import pytest
import torch

from mmpost.algos import asft, dft
from mmpost.api.method import open_method, open_reference, open_teacher
from mmpost.config.run import GRPOConfig, SFTConfig
from mmpost.config.schema import FullSettings, LoraSettings
from mmpost.core.errors import MmpostError
from mmpost.train.distributed import Processes
from mmpost.train.learner import Learner
from mmpost.train.rows import Row, Update

one_family = pytest.mark.parametrize("family", ["qwen2.5-vl"])


def _step(model, method, rows, others):
    processes = Processes(bf16=False, cpu=True)
    weights = [p for p in model.policy.parameters() if p.requires_grad]
    learner = Learner(
        model.policy,
        model.adapter,
        torch.optim.SGD(weights, lr=0.0),
        processes,
        method,
        micro_batch=2,
        max_grad_norm=0.0,
        others=others,
    )
    count = sum(row.num_trained for row in rows)
    learner.update(Update(rows, 0, 0, rows[0], count, len(rows)), 0.0)
    return torch.cat([p.grad.flatten() for p in weights])


def _moved(model):
    """Weights that train are no longer where they started."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.policy.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape, generator=random, dtype=torch.float64).to(weight))


def _dense(model, start, rows, weight):
    """The divergence from whole logits of plain calls, row by row, differentiated by autograd."""
    total = torch.zeros((), dtype=torch.float64)
    count = sum(row.num_trained for row in rows)
    weights = [p for p in model.policy.parameters() if p.requires_grad]
    for row in rows:
        batch = model.adapter.collate([row.encoded])
        p = model.policy.inner(**batch.inputs).logits[0][batch.at].log_softmax(-1)
        with torch.no_grad():
            q = start.inner(**batch.inputs).logits[0][batch.at].log_softmax(-1)
        total = total + weight * (q.exp() * (q - p)).sum() / count
    grads = torch.autograd.grad(total, weights, allow_unused=True)
    found = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]
    return torch.cat([g.flatten() for g in found])


@one_family
@pytest.mark.parametrize("peft", [LoraSettings(r=4), FullSettings()])
def test_the_divergence_from_the_start_is_that_of_whole_logits(open_tiny, mixed_rows, peft, record_property):
    model = open_tiny(peft=peft, double=True)
    rows = [Row(model.adapter.encode(sample), demo=True) for sample in mixed_rows]
    start = open_tiny(peft=None, double=True).policy if model.fresh_lora else copy.deepcopy(model.policy)
    method = asft.preset(weight=2.0)
    reference = open_reference(model, method, lambda: model.policy)
    others = {"reference": reference}
    at_start = _step(model, method, rows, others)
    plain = _step(model, dft.preset(), rows, {})
    assert float((at_start - plain).abs().max()) < 1e-12
    _moved(model)
    model.policy.train()
    found = _step(model, method, rows, others) - _step(model, dft.preset(), rows, {})
    expected = _dense(model, start, rows, 2.0)
    record_property("max_gradient_difference", float((found - expected).abs().max()))
    # Rotary angles are float32 in the model itself, whatever its weights are.
    assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    assert float(expected.abs().max()) > 1e-2


@one_family
def test_no_second_model_is_made_unless_one_is_asked_for(open_tiny):
    model = open_tiny(peft=FullSettings())
    method = open_method(GRPOConfig(rewards="format"))
    assert open_reference(model, method, lambda: model.policy) is None
    assert open_teacher(GRPOConfig(rewards="format"), model, method) is None
    method = open_method(GRPOConfig(rewards="format", beta=0.1))
    assert open_reference(model, method, lambda: model.policy) is not None


@one_family
def test_log_probabilities_under_lora_are_those_of_the_start(open_tiny, mixed_rows):
    model = open_tiny(peft=LoraSettings(r=4), double=True)
    rows = [Row(model.adapter.encode(sample), demo=True) for sample in mixed_rows]
    processes = Processes(bf16=False, cpu=True)
    learner = Learner(
        model.policy, model.adapter, torch.optim.SGD([torch.zeros(1)]), processes, dft.preset(), micro_batch=2
    )
    before = learner.log_probs(rows)
    _moved(model)
    reference = open_reference(model, open_method(GRPOConfig(rewards="format", beta=0.1)), lambda: model.policy)
    for first, second, now in zip(before, reference(learner, rows), learner.log_probs(rows), strict=True):
        assert abs(first - second).max() < 1e-6
        assert abs(first - now).max() > 1e-4


@one_family
def test_a_teacher_must_read_what_the_student_writes(open_tiny, tiny_folder):
    model = open_tiny(peft=FullSettings())
    config = GRPOConfig(preset="kdrl", teacher=str(tiny_folder("qwen2.5-vl")), rewards="format")
    method = open_method(config)
    assert open_teacher(config, model, method) is not None
    other = GRPOConfig(preset="kdrl", teacher=str(tiny_folder("qwen3-vl")), rewards="format")
    with pytest.raises(MmpostError) as error:
        open_teacher(other, model, method)
    assert str(error.value) == (
        f"the teacher {tiny_folder('qwen3-vl')} cannot judge this student: its model type is qwen3_vl, not qwen2_5_vl. "
        "Take a teacher of the same model family and tokenizer. [MMP-C037]"
    )


def test_a_method_must_fit_the_command():
    for config, text in (
        (
            SFTConfig(advantage="group"),
            "loss.advantage is 'group', but demonstrations have no rewards. "
            "Use mmpost grpo, or loss.advantage=ones. [MMP-C033]",
        ),
        (
            SFTConfig(preset="grpo"),
            "loss.preset is 'grpo', which trains on completions; mmpost sft makes none. Use mmpost grpo. [MMP-C033]",
        ),
        (
            GRPOConfig(preset="dft", rewards="format"),
            "loss.preset is 'dft', which trains on demonstrations alone. Use mmpost sft. [MMP-C033]",
        ),
    ):
        with pytest.raises(MmpostError) as error:
            open_method(config)
        assert str(error.value) == text
