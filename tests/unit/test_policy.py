"""Log-probabilities of mixed batches against plain transformers on each row alone."""

import functools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmpost.config.schema import FullSettings, LoraSettings, ModelSection
from mmpost.core.errors import MmpostError
from mmpost.models import policy as policy_module
from mmpost.models.load import _checkpoint_language_model, load, part_of
from mmpost.models.policy import Other, token_logprob

# For what has nothing to do with the family.
one_family = pytest.mark.parametrize("family", ["qwen2.5-vl"])


def _plain_logits(model, inputs, length):
    with torch.no_grad():
        return model(**inputs).logits[0, :length]


def _per_row(adapter, reference, plain_inputs, samples, temperature):
    """Log-probabilities and entropies of the trained positions, row by row, with transformers alone."""
    model, processor = reference
    logps, entropies = [], []
    for sample in samples:
        encoded = adapter.encode(sample)
        logits = _plain_logits(model, plain_inputs(processor, sample), len(encoded)) / temperature
        logp = logits.log_softmax(-1)
        trained = encoded.train.nonzero()[:, 0]
        logps.append(logp[trained - 1, encoded.ids[trained]])
        entropies.append(torch.distributions.Categorical(logits=logits[trained - 1]).entropy())
    return torch.cat(logps), torch.cat(entropies)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_mixed_batch_equals_each_row_alone(
    tiny_model, reference, plain_inputs, mixed_rows, temperature, record_property
):
    adapter = tiny_model.adapter
    batch = adapter.collate([adapter.encode(sample) for sample in mixed_rows])
    with torch.no_grad():
        logp, entropy = tiny_model.policy(batch, temperature)
    expected, spread = _per_row(adapter, reference, plain_inputs, mixed_rows, temperature)
    record_property("max_logp_difference", float((logp - expected).abs().max()))
    assert (logp - expected).abs().max() < 1e-5
    assert (entropy - spread).abs().max() < 1e-5
    assert logp.std() > 1e-3  # a constant answer would pass everything above


def test_mixed_batch_equals_each_row_alone_in_float64(open_tiny, plain, plain_inputs, mixed_rows, record_property):
    model, reference = open_tiny(double=True), plain(double=True)
    batch = model.adapter.collate([model.adapter.encode(sample) for sample in mixed_rows])
    with torch.no_grad():
        logp, _ = model.policy(batch)
    assert logp.dtype == torch.float64
    expected, _ = _per_row(model.adapter, reference, plain_inputs, mixed_rows, 1.0)
    record_property("max_logp_difference", float((logp - expected).abs().max()))
    assert (logp - expected).abs().max() < 1e-10


def test_padding_on_the_left_and_row_order_change_nothing(tiny_model, mixed_rows):
    adapter = tiny_model.adapter
    rows = [adapter.encode(sample) for sample in mixed_rows]
    with torch.no_grad():
        right, _ = tiny_model.policy(adapter.collate(rows))
        left, _ = tiny_model.policy(adapter.collate(rows, left=True))
        back, _ = tiny_model.policy(adapter.collate(rows[::-1]))
    sizes = [row.num_trained for row in rows]
    assert (left - right).abs().max() < 1e-5
    assert (torch.cat(back.split(sizes[::-1])[::-1]) - right).abs().max() < 1e-5


def test_nothing_is_left_over_from_an_earlier_call(tiny_model, mixed_rows):
    adapter = tiny_model.adapter
    rows = [adapter.encode(sample) for sample in mixed_rows]
    alone = adapter.collate(rows[:1])
    with torch.no_grad():
        before, _ = tiny_model.policy(alone)
        tiny_model.policy(adapter.collate(rows[1:]))
        after, _ = tiny_model.policy(alone)
    assert torch.equal(before, after)


@one_family
def test_the_head_in_chunks_gives_the_same_numbers_and_gradients(open_tiny, mixed_rows, monkeypatch):
    model = open_tiny(peft=FullSettings())
    batch = model.adapter.collate([model.adapter.encode(sample) for sample in mixed_rows[:2]])
    whole, entropy = model.policy(batch)
    whole.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.policy.named_parameters()}
    assert len(whole) > 7
    for chunk in (1, 7):
        model.policy.zero_grad()
        monkeypatch.setattr(policy_module, "HEAD_BYTES", chunk * 4 * model.policy.head.out_features)
        parts, entropy_parts = model.policy(batch)
        parts.sum().backward()
        assert torch.allclose(parts, whole, atol=1e-6)
        assert torch.allclose(entropy_parts, entropy, atol=1e-6)
        for name, parameter in model.policy.named_parameters():
            assert torch.allclose(parameter.grad, gradients[name], atol=1e-5), name


def test_golden_divergences():
    p = torch.tensor([[0.25, 0.5, 0.25]]).double().log().requires_grad_()
    q = torch.tensor([[0.5, 0.25, 0.25]]).double().log()
    others = [Other(q, nn.Identity(), "forward_kl"), Other(q, nn.Identity(), "reverse_kl")]
    _, entropy, forward, reverse = token_logprob(p, nn.Identity(), torch.tensor([1]), 1.0, others, True)
    for value, size, gradient in (
        (forward, 0.1733, (-0.25, 0.25, 0)),
        (reverse, 0.1733, (-0.2166, 0.2599, -0.0433)),
        (entropy, 1.0397, (0.0866, -0.1733, 0.0866)),
    ):
        assert float(value.detach()) == pytest.approx(size, abs=1e-4)
        found = torch.autograd.grad(value.sum(), p, retain_graph=True)[0]
        assert found[0].tolist() == pytest.approx(gradient, abs=1e-4)
    grad_free = token_logprob(p, nn.Identity(), torch.tensor([1]), 1.0)[1]
    assert not grad_free.requires_grad


class _Largest(TorchDispatchMode):
    """Most elements of any tensor that holds at least one row of the vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return out


@one_family
def test_logits_of_all_positions_never_exist_together(open_tiny, mixed_rows, monkeypatch):
    model = open_tiny(peft=FullSettings())
    batch = model.adapter.collate([model.adapter.encode(sample) for sample in mixed_rows * 3])
    vocabulary, width = model.policy.head.weight.shape
    assert len(batch.target) > 2 * width
    seen = {}
    for chunk in (width, 10 * len(batch.target)):
        monkeypatch.setattr(policy_module, "HEAD_BYTES", chunk * 4 * vocabulary)
        with _Largest(vocabulary) as largest:
            model.policy(batch)[0].sum().backward()
        seen[chunk] = largest.rows
    # The gradient of the head's weights has as many rows as hidden states are wide.
    assert seen == {width: width, 10 * len(batch.target): len(batch.target)}


@one_family
def test_a_batch_without_trained_positions_is_empty_not_an_error(tiny_model, mixed_rows):
    adapter = tiny_model.adapter
    logp, entropy = tiny_model.policy(adapter.collate([adapter.encode_prompt(mixed_rows[1].prompt())]))
    assert logp.shape == entropy.shape == (0,)


@pytest.mark.parametrize("freeze", [[], ["vision_tower"], ["projector", "language_model"]])
def test_frozen_parts_get_no_gradient_and_the_others_do(open_tiny, mixed_rows, freeze):
    model = open_tiny(peft=FullSettings(), freeze=freeze)
    batch = model.adapter.collate([model.adapter.encode(sample) for sample in mixed_rows[1:3]])
    model.policy(batch)[0].sum().backward()
    seen = {"vision_tower": 0, "projector": 0, "language_model": 0}
    for name, parameter in model.policy.model.named_parameters():
        part = part_of(name)
        seen[part] += 1
        assert parameter.requires_grad == (part not in freeze), name
        assert (parameter.grad is not None) == (part not in freeze), name
    assert all(seen.values())


def choose(tiny_folder, peft, words):
    folder = str(tiny_folder("qwen2.5-vl"))
    section = ModelSection(model_name_or_path=folder, freeze=["projector"], trainable=words)
    return load(section, peft=peft, device=torch.device("cpu"))


def test_only_weights_that_are_named_train(tiny_folder):
    model = choose(tiny_folder, FullSettings(), ["layernorm", "merger", "language_model.nor"])
    for name, parameter in model.policy.model.named_parameters():
        assert parameter.requires_grad == ("layernorm" in name or "language_model.norm" in name), name
    assert 0 < model.policy.num_parameters(trainable=True) < model.policy.num_parameters() / 100


@pytest.mark.parametrize(
    ("peft", "word", "code", "part"),
    [
        (FullSettings(), "language_model.nrom", "MMP-C042", "model.language_model.norm"),
        (LoraSettings(), "norm", "MMP-C041", "peft.modules_to_save"),
    ],
)
def test_a_choice_of_weights_that_cannot_be_is_refused(tiny_folder, peft, word, code, part):
    with pytest.raises(MmpostError, match=part) as caught:
        choose(tiny_folder, peft, [word])
    assert caught.value.code == code


def test_lora_sits_on_the_language_model_alone(open_tiny):
    model = open_tiny(peft=LoraSettings(r=4))
    names = [name for name, parameter in model.policy.model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    assert not any(word in name for name in names for word in ("visual", "vision", "connector", "lm_head", "merger"))
    per_layer = 2 * 7  # A and B of q, k, v, o, gate, up, down
    assert len(names) == per_layer * model.policy.inner.config.get_text_config().num_hidden_layers


def test_fresh_lora_changes_nothing_and_its_removal_is_the_base(open_tiny, tiny_model, mixed_rows):
    model = open_tiny(peft=LoraSettings(r=4))
    batch = model.adapter.collate([model.adapter.encode(sample) for sample in mixed_rows])
    with torch.no_grad():
        base, _ = tiny_model.policy(batch)
        fresh, _ = model.policy(batch)
        for name, parameter in model.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
        moved, _ = model.policy(batch)
        with model.policy.model.disable_adapter():
            without, _ = model.policy(batch)
    assert torch.allclose(fresh, base, atol=1e-6)
    assert torch.allclose(without, base, atol=1e-6)
    assert (moved - base).abs().max() > 1e-4


@pytest.mark.parametrize("peft", [FullSettings(), LoraSettings(r=4)])
def test_gradient_checkpointing_recomputes_the_language_model_alone_and_changes_no_gradient(
    open_tiny, mixed_rows, peft
):
    gradients = []
    for checkpointing in (False, True):
        model = open_tiny(peft=peft)
        if checkpointing:
            _checkpoint_language_model(model.policy.model)
        modules = dict(model.policy.inner.named_modules())
        blocks = [name for name in modules if name.endswith((".0.attn", ".0.self_attn"))]
        calls = dict.fromkeys(blocks, 0)
        assert len(blocks) == 2  # the first of the tower and the first of the language model

        def count(module, args, out, *, name, calls=calls):
            calls[name] += 1

        for name in blocks:
            modules[name].register_forward_hook(functools.partial(count, name=name))
        model.policy.train()
        batch = model.adapter.collate([model.adapter.encode(sample) for sample in mixed_rows[:3]])
        model.policy(batch)[0].sum().backward()
        for name, times in calls.items():
            assert times == (1 if part_of(name) == "vision_tower" else 1 + checkpointing), name
        gradients.append({n: p.grad for n, p in model.policy.named_parameters() if p.requires_grad})
    first, second = gradients
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-6), name


@one_family
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_language_models_train_their_adapters(tiny_folder, mixed_rows, family, kind):
    pytest.importorskip("bitsandbytes")
    section = ModelSection(model_name_or_path=str(tiny_folder(family)), quantization=kind)
    model = load(section, peft=LoraSettings(r=4), device=torch.device("cpu"))
    layer = model.policy.inner.model.language_model.layers[0].mlp.up_proj.base_layer.weight
    assert layer.dtype in {torch.uint8, torch.int8}
    assert model.policy.inner.model.visual.blocks[0].mlp.up_proj.weight.dtype == torch.float32
    logp, _ = model.policy(model.adapter.collate([model.adapter.encode(sample) for sample in mixed_rows[:2]]))
    logp.sum().backward()
    trained = [p for p in model.policy.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@one_family
def test_quantized_weights_cannot_train_in_full(tiny_folder, family):
    section = ModelSection(model_name_or_path=str(tiny_folder(family)), quantization="nf4")
    with pytest.raises(MmpostError, match="MMP-C039"):
        load(section, peft=FullSettings(), device=torch.device("cpu"))


@one_family
def test_fused_kernels_need_a_gpu(tiny_folder, family):
    section = ModelSection(model_name_or_path=str(tiny_folder(family)), use_liger_kernel=True)
    with pytest.raises(MmpostError, match="needs a CUDA device"):
        load(section, peft=FullSettings(), device=torch.device("cpu"))
