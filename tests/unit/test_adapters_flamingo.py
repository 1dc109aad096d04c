"""Audio Flamingo 3: clips of several windows, compared with plain transformers."""

import numpy as np
import pytest
import torch
from transformers import AudioFlamingo3ForConditionalGeneration, AutoProcessor

from mmpost.adapters import layout
from mmpost.config.schema import ModelSection
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Part, Sample, Turn
from mmpost.media.audio import Audio
from mmpost.models.load import load
from tests.unit.clips import RATE, wav

pytest.importorskip("soundfile")
SECONDS = [0.5, 2.0, 3.1, 4.0, 5.9]


def row(*parts, answer="It is red."):
    said = [Part("text", p) if isinstance(p, str) else Part("audio", ref=p) for p in parts]
    turns = (Turn("user", tuple(said)), Turn("assistant", (Part("text", answer),)))
    return Sample("a", turns, {}, "rows.jsonl:7")


@pytest.fixture(scope="module")
def model(tiny_folder):
    section = ModelSection(model_name_or_path=str(tiny_folder("audio-flamingo-3")))
    opened = load(section, peft=None, device=torch.device("cpu"))
    opened.policy.double()
    return opened


@pytest.fixture(scope="module")
def plain(tiny_folder):
    folder = tiny_folder("audio-flamingo-3")
    return AudioFlamingo3ForConditionalGeneration.from_pretrained(folder).eval().double(), (
        AutoProcessor.from_pretrained(folder)
    )


def plain_logps(reference, encoded):
    media = {name: x.double() if x.is_floating_point() else x for name, x in encoded.media.items()}
    with torch.no_grad():
        logits = reference(input_ids=encoded.ids[None], attention_mask=torch.ones(1, len(encoded)), **media).logits[0]
    at = encoded.train.nonzero()[:, 0]
    return logits[at - 1].log_softmax(-1).gather(-1, encoded.ids[at][:, None])[:, 0]


def test_200_durations_have_as_many_placeholders_as_features_and_as_the_processor(model, plain):
    adapter, (reference, processor) = model.adapter, plain
    rng = np.random.default_rng(0)
    for count in [32000, 32001, 64000, 96000, *(int(n) for n in rng.integers(1120, 96001, 196))]:
        samples = np.zeros(count, np.float32)
        clip = Audio(samples, RATE, count / RATE, RATE, 1, "")
        ids, media = adapter._tokenize("<sound>", {"audio": [clip]})
        own = processor(text="<sound>", audio=samples, sampling_rate=RATE)
        assert torch.equal(ids, own["input_ids"][0])
        assert torch.equal(media["input_features_mask"], own["input_features_mask"])
        assert torch.equal(media["input_features"], own["input_features"])
        frames = media["input_features_mask"].sum(-1)
        features = int(reference.model.audio_tower._get_feat_extract_output_lengths(frames)[1].sum())
        assert len(ids) == adapter.tokens_for(count) == features


@pytest.mark.parametrize("together", [layout.pad, layout.pack])
def test_mixed_rows_have_the_log_probabilities_of_the_plain_forward(model, plain, together):
    rows = [row("Say yes"), *(row(wav(s, i), "High?") for i, s in enumerate(SECONDS)), row(wav(3, 8), "or", wav(1, 9))]
    encoded = [model.adapter.encode(sample) for sample in rows]
    assert model.policy.packs
    batch = together(model.adapter, [(one, None) for one in encoded])
    with torch.no_grad():
        logp = model.policy(batch)[0]
    for i, one in enumerate(encoded):
        assert (logp[batch.row == i] - plain_logps(plain[0], one)).abs().max() < 1e-9


def test_shared_prompts_hold_their_sounds_once(model, plain):
    prompts = [model.adapter.encode_prompt(row(wav(s, i), "High?").prompt()) for i, s in enumerate((3.0, 0.5))]
    pairs = [(prompts[k // 3], torch.arange(20, 23 + k)) for k in range(6)]
    batch = layout.pack(model.adapter, pairs)
    assert len(batch.inputs["input_features"]) == 3
    with torch.no_grad():
        logp = model.policy(batch)[0]
    for k, (prompt, tokens) in enumerate(pairs):
        wanted = plain_logps(plain[0], prompt.with_completion(tokens))
        assert (logp[batch.row == k] - wanted).abs().max() < 1e-9


@pytest.mark.parametrize(("seconds", "code"), [(6.2, "MMP-D011"), (0.05, "MMP-D081")])
def test_clips_that_the_processor_would_cut_are_refused(model, seconds, code):
    with pytest.raises(MmpostError) as caught:
        model.adapter.encode(row(wav(seconds), "hi"))
    assert caught.value.code == code


def test_a_literal_placeholder_is_named(model):
    with pytest.raises(MmpostError, match="26 audio placeholders but the encoder 25") as caught:
        model.adapter.encode(row(wav(1.0), "hi", answer="a <sound> of"))
    assert caught.value.code == "MMP-D015"
