"""Sounds in rows: ids, features, batches and errors of Qwen2-Audio, compared with plain transformers."""

import io
import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from mmpost.adapters import layout
from mmpost.config.schema import FullSettings, MediaSection, ModelSection
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Part, Sample, Turn
from mmpost.media import audio
from mmpost.models.load import load
from mmpost.rollout.generate import Sampling, complete
from mmpost.rollout.vllm_wire import processor_options
from mmpost.train.shard import tower_features
from tests.unit.clips import RATE, wav

soundfile = pytest.importorskip("soundfile")


def turn(role, *parts):
    return Turn(role, tuple(Part("text", p) if isinstance(p, str) else Part("audio", ref=p) for p in parts))


def row(*turns, origin="rows.jsonl:7"):
    return Sample("a", turns, {}, origin)


def rows():
    """Text only, one sound, two sounds of unequal length, a sound in the second exchange."""
    return [
        row(turn("user", "What colour is it?"), turn("assistant", "It is red.")),
        row(turn("user", wav(0.5, 1), "How many circles?"), turn("assistant", "<answer>3</answer>")),
        row(
            turn("system", "You are a helpful assistant."),
            turn("user", "Compare", wav(1.7, 2), "with", wav(0.3, 3)),
            turn("assistant", "The second one is blue."),
        ),
        row(
            turn("user", "Hi"),
            turn("assistant", "Hello."),
            turn("user", wav(2.0, 4), "And now?"),
            turn("assistant", "A green square."),
        ),
    ]


@pytest.fixture(scope="module")
def model(tiny_folder):
    section = ModelSection(model_name_or_path=str(tiny_folder("qwen2-audio")))
    opened = load(section, peft=None, device=torch.device("cpu"))
    opened.policy.double()
    return opened


@pytest.fixture(scope="module")
def plain(tiny_folder):
    folder = tiny_folder("qwen2-audio")
    return AutoModelForMultimodalLM.from_pretrained(folder).eval().double(), AutoProcessor.from_pretrained(folder)


def plain_inputs(processor, sample, *, generate=False):
    messages = [
        {
            "role": t.role,
            "content": [
                {"type": "text", "text": part.text} if part.kind == "text" else {"type": "audio"} for part in t.parts
            ],
        }
        for t in sample.turns
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    clips = [audio.load(part.ref).samples for part in sample.media("audio")]
    options = {"audio": clips, "sampling_rate": RATE} if clips else {}
    return processor(text=[text], add_special_tokens=False, return_tensors="pt", **options)


def plain_logps(plain, encoded, inputs):
    """Log-probabilities of the trained ids of one row by the model's own forward."""
    inputs = dict(inputs) | {"input_ids": encoded.ids[None], "attention_mask": torch.ones(1, len(encoded))}
    with torch.no_grad():
        logits = plain[0](**inputs).logits[0]
    at = encoded.train.nonzero()[:, 0]
    return logits[at - 1].log_softmax(-1).gather(-1, encoded.ids[at][:, None])[:, 0]


def test_200_durations_have_as_many_placeholders_as_features(model, plain):
    adapter, (reference, processor) = model.adapter, plain
    rng = np.random.default_rng(0)
    counts = [1120, 1121, 1280, 31999, 32000, *(int(n) for n in rng.integers(1120, 32001, 195))]
    seen = set()
    for i, count in enumerate(counts):
        encoded = adapter.encode(row(turn("user", wav(0, i, samples=count), "hi"), turn("assistant", "no")))
        placeholders = int((encoded.ids == adapter.token_ids["audio"]).sum())
        clip = np.zeros(count, np.float32)
        own = processor(text=["<|AUDIO|>"], audio=[clip], sampling_rate=RATE, return_tensors="pt")["input_ids"]
        frames = encoded.media["feature_attention_mask"].sum(-1)
        features = int(reference.model.audio_tower._get_feat_extract_output_lengths(frames)[1])
        assert placeholders == adapter.tokens_for(count) == own.numel() == features
        seen.add(placeholders)
    assert len(seen) > 20


@pytest.mark.parametrize("samples", [0, 100, 800, 8000, 16000, 31999, 32000, 48000])
def test_the_formula_is_the_processors(model, plain, samples):
    if samples == 0:
        assert model.adapter.tokens_for(0) == 0
        return
    clip = np.zeros(samples, np.float32)
    own = plain[1](text=["<|AUDIO|>x"], audio=[clip], sampling_rate=RATE, return_tensors="pt")["input_ids"]
    assert model.adapter.tokens_for(samples) == int((own == model.adapter.token_ids["audio"]).sum())


def test_ids_and_features_are_those_of_the_processor(model, plain):
    for sample in rows():
        encoded = model.adapter.encode(sample)
        expected = plain_inputs(plain[1], sample)
        ids = expected["input_ids"][0].tolist()
        assert encoded.ids.tolist() == ids[: len(encoded)]
        assert plain[1].tokenizer.decode(ids[len(encoded) :]) == "\n"
        assert set(encoded.media) == set(expected) - {"input_ids", "attention_mask"}
        for name, tensor in encoded.media.items():
            assert torch.equal(tensor, expected[name])
        trained = model.adapter.tokenizer.decode(encoded.ids[encoded.train])
        assert trained == "".join(t.text + "<|im_end|>" for t in sample.turns if t.role == "assistant")


@pytest.mark.parametrize("together", [layout.pad, layout.pack])
def test_mixed_rows_have_the_log_probabilities_of_the_plain_forward(model, plain, together):
    encoded = [model.adapter.encode(sample) for sample in rows()]
    assert model.policy.packs
    batch = together(model.adapter, [(one, None) for one in encoded])
    with torch.no_grad():
        logp = model.policy(batch)[0]
    for i, (one, sample) in enumerate(zip(encoded, rows(), strict=True)):
        expected = plain_logps(plain, one, plain_inputs(plain[1], sample))
        assert (logp[batch.row == i] - expected).abs().max() < 1e-9


def test_the_loss_is_that_of_the_plain_model_in_single_precision(tiny_folder, model):
    folder = tiny_folder("qwen2-audio")
    reference, processor = (
        AutoModelForMultimodalLM.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    policy = load(ModelSection(model_name_or_path=str(folder)), peft=None, device=torch.device("cpu")).policy
    for sample in rows():
        encoded = model.adapter.encode(sample)
        inputs = dict(plain_inputs(processor, sample))
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, -100)
        labels[0, : len(encoded)][encoded.train] = encoded.ids[encoded.train]
        with torch.no_grad():
            loss = reference(**inputs, labels=labels).loss
            ours = -policy(model.adapter.collate([encoded]))[0].mean()
        assert abs(float(loss - ours)) < 1e-5


@pytest.mark.parametrize("together", [layout.pad, layout.pack])
def test_shared_prompts_with_sounds_give_each_completion_its_own_log_probabilities(model, plain, together):
    """Rows of unequal length, prompts with no, one and two sounds, three generations each."""
    prompts = [model.adapter.encode_prompt(sample.prompt()) for sample in rows()]
    rng = np.random.default_rng(3)
    letters = [torch.tensor(rng.integers(10, 300, 3 + g + i)) for i, g in itertools.product(range(4), range(3))]
    pairs = [(prompts[k // 3], tokens) for k, tokens in enumerate(letters)]
    batch = together(model.adapter, pairs)
    if together is layout.pack:
        assert len(batch.inputs["input_features"]) == 4  # once per prompt, not per generation
    with torch.no_grad():
        logp = model.policy(batch)[0]
    for k, (prompt, tokens) in enumerate(pairs):
        inputs = plain_inputs(plain[1], rows()[k // 3].prompt(), generate=True)
        assert inputs["input_ids"][0].tolist() == prompt.ids.tolist()
        expected = plain_logps(plain, prompt.with_completion(tokens), inputs)
        assert (logp[batch.row == k] - expected).abs().max() < 1e-9


def test_rollouts_name_the_log_probabilities_that_training_computes(model):
    prompts = [model.adapter.encode_prompt(sample.prompt()) for sample in rows()]
    sampling = Sampling(max_new_tokens=5, temperature=1.0, seed=4)
    groups = complete(model.policy, model.adapter, prompts, [0, 1, 2, 3], n=2, sampling=sampling, batch_size=4)
    for prompt, group in zip(prompts, groups, strict=True):
        for rollout in group:
            tokens = torch.as_tensor(rollout.tokens, dtype=torch.long)
            with torch.no_grad():
                logp = model.policy(layout.pad(model.adapter, [(prompt, tokens)]))[0]
            assert np.abs(np.asarray(rollout.logp) - logp.numpy()).max() < 1e-5


def test_the_tower_runs_on_a_small_sound_where_a_process_has_none(model):
    features = tower_features(model.policy.inner.base_model, model.adapter.dummy_media())
    assert features.shape[-1] == model.policy.inner.config.text_config.hidden_size
    assert features.isfinite().all()


def test_the_vllm_engine_refuses_a_model_of_sounds(model):
    with pytest.raises(MmpostError) as caught:
        processor_options(model.adapter)
    assert str(caught.value) == (
        "the vllm engine takes text and images, not audio. Set rollout.engine=native. [MMP-C040]"
    )


def test_another_sound_gives_other_probabilities(model):
    with torch.no_grad():
        one, other = (
            model.policy(
                model.adapter.collate([model.adapter.encode(row(turn("user", wav(1, i), "?"), turn("assistant", "a")))])
            )[0]
            for i in (1, 2)
        )
    assert (one - other).abs().max() > 1e-6


def test_the_tower_trains_unless_frozen_and_sinusoids_never(tiny_folder):
    section = ModelSection(model_name_or_path=str(tiny_folder("qwen2-audio")), freeze=[])
    weights = dict(load(section, peft=FullSettings(), device=torch.device("cpu")).policy.model.named_parameters())
    assert {name for name, weight in weights.items() if not weight.requires_grad} == {
        "model.audio_tower.embed_positions.weight"
    }
    section = ModelSection(model_name_or_path=str(tiny_folder("qwen2-audio")))
    weights = dict(load(section, peft=FullSettings(), device=torch.device("cpu")).policy.model.named_parameters())
    assert all(("audio_tower" in name) != weight.requires_grad for name, weight in weights.items())


@pytest.mark.parametrize(
    ("seconds", "code", "what"),
    [(0.04, "MMP-D081", ""), (0.069, "MMP-D081", ""), (2.2, "MMP-D011", "the adapter uses 2 s per clip")],
)
def test_clips_outside_the_window_are_refused(model, seconds, code, what):
    with pytest.raises(MmpostError) as caught:
        model.adapter.encode(row(turn("user", wav(seconds), "hi"), turn("assistant", "no")))
    assert caught.value.code == code
    assert "rows.jsonl:7" in str(caught.value)
    assert what in str(caught.value)


def test_budgets_of_the_user_hold(model, plain):
    adapter = type(model.adapter)(plain[1], model.adapter.config, media=MediaSection(max_audio_seconds=0.5))
    with pytest.raises(MmpostError, match=r"the adapter uses 0\.5 s per clip"):
        adapter.encode(row(turn("user", wav(0.6), "hi"), turn("assistant", "no")))


def test_stereo_of_another_rate_is_mixed_and_resampled(model):
    noise = np.random.default_rng(0).normal(0, 0.1, (44100, 2)).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, 44100, format="FLAC")
    encoded = model.adapter.encode(row(turn("user", buffer.getvalue(), "hi"), turn("assistant", "no")))
    assert encoded.media["input_features"].shape[0] == 1
    assert int((encoded.ids == model.adapter.token_ids["audio"]).sum()) == 25


def test_pictures_are_refused_by_name(model):
    sample = row(Turn("user", (Part("image", ref=b"x"), Part("text", "hi"))), turn("assistant", "no"))
    with pytest.raises(MmpostError) as caught:
        model.adapter.encode(sample)
    assert str(caught.value) == (
        "rows.jsonl:7: the row has a part of kind image, but the model (qwen2_audio) takes text and audio. "
        "Choose a model that takes it, or remove the part. [MMP-D042]"
    )


@pytest.mark.parametrize("where", ["text row", "question"])
def test_a_literal_audio_token_in_the_text_is_named(model, where):
    shown = [] if where == "text row" else [wav(1.0)]
    with pytest.raises(MmpostError) as caught:
        model.adapter.encode(row(turn("user", *shown, "hi <|AUDIO|> there"), turn("assistant", "no")))
    features = 25 if shown else 0
    assert str(caught.value) == (
        f"rows.jsonl:7: processor produced {features + 1} audio placeholders but the encoder {features} features "
        "(model qwen2_audio); this row would fail in forward. Remove literal audio tokens from the text, or check that "
        "processor and weights belong together. [MMP-D015]"
    )


def test_too_long_rows_count_sounds(model, plain):
    adapter = type(model.adapter)(plain[1], model.adapter.config, media=MediaSection(), max_length=20)
    with pytest.raises(MmpostError, match=r"image 0, video 0, audio 25\) exceed data.max_length 20"):
        adapter.encode(row(turn("user", wav(1.0), "hi"), turn("assistant", "no")))
