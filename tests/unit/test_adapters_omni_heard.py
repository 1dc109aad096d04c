"""Videos with their sound tracks in Qwen2.5-Omni: ids, positions and log-probabilities of plain transformers."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from mmpost.adapters import layout
from mmpost.adapters.qwen_omni import QwenOmniAdapter, _chunks
from mmpost.config.schema import MediaSection, ModelSection
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Part, Sample, Turn
from mmpost.media import audio, image, video
from mmpost.models.load import load
from mmpost.rollout.generate import Sampling, complete
from tests.unit.clips import RATE, film, wav

KINDS = {b"\x89PNG": "image", b"RIFF": "audio", b"\x1aE\xdf\xa3": "video"}


# The tiny encoder's window of two seconds is one chunk of the family; here a chunk is 12 positions, half a second.
CHUNKS = {"position_id_per_seconds": 12, "seconds_per_chunk": 1}


def row(*parts, answer="It is red."):
    """A question of texts and encoded files, and its answer."""
    asked = tuple(Part("text", p) if isinstance(p, str) else Part(KINDS[p[:4]], ref=p) for p in parts)
    return Sample("a", (Turn("user", asked), Turn("assistant", (Part("text", answer),))), {}, "rows.jsonl:7")


@pytest.fixture(scope="module")
def rows(picture):
    return [
        row(film(20, 1, sound=2.0), "What is said?"),
        row(film(40, 2, sound=1.4), "Sound ends first."),
        row(film(6, 3, sound=1.9), "Pictures end first."),
        row("A", wav(0.7, 4), film(15, 5, sound=1.5), "with", picture(60, 40, 6), film(15, 7, 96, 64, sound=0.8), "?"),
    ]


@pytest.fixture(scope="module")
def model(tiny_folder):
    section = ModelSection(model_name_or_path=str(tiny_folder("qwen2.5-omni")))
    opened = load(section, peft=None, device=torch.device("cpu"))
    old = opened.adapter
    for name, value in CHUNKS.items():
        setattr(old.config, name, value)
    opened.adapter = QwenOmniAdapter(old.processor, old.config, media=MediaSection(use_audio_in_video=True))
    return opened


@pytest.fixture(scope="module")
def plain(tiny_folder):
    folder = tiny_folder("qwen2.5-omni")
    theirs = AutoModelForMultimodalLM.from_pretrained(folder, **CHUNKS).eval()
    processor = AutoProcessor.from_pretrained(folder)
    for name, value in CHUNKS.items():
        setattr(processor, name, float(value))
    return theirs, processor


def shown(sample, adapter):
    """Decoded films, the sounds in reading order, and which film each of them belongs to (None: a file of its own)."""
    films, sounds, owners = [], [], []
    for part in sample.media():
        if part.kind == "video":
            films.append(video.load(part.ref, section=adapter.section, with_audio=True))
            sounds.append(films[-1].audio.samples)
            owners.append(len(films) - 1)
        elif part.kind == "audio":
            sounds.append(audio.load(part.ref).samples)
            owners.append(None)
    return films, sounds, owners


def plain_inputs(processor, sample, adapter, *, generate=False):
    films, sounds, owners = shown(sample, adapter)
    messages = [
        {
            "role": t.role,
            "content": [{"type": "text", "text": p.text} if p.kind == "text" else {"type": p.kind} for p in t.parts],
        }
        for t in sample.turns
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    pictures = [image.load(part.ref) for part in sample.media("image")]
    rates = {one.sampled_fps for one in films}
    assert len(rates) == 1
    inputs = processor(
        text=[text],
        images=pictures or None,
        videos=[torch.from_numpy(one.frames).permute(0, 3, 1, 2) for one in films],
        audio=sounds,
        audio_from_video_indices=owners,
        load_audio_from_video=True,
        sampling_rate=RATE,
        do_sample_frames=False,
        videos_kwargs={"size": dict(adapter.processor.video_processor.size), "fps": rates.pop()},
        add_special_tokens=False,
        return_tensors="pt",
    )
    return {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}


def test_ids_and_media_are_those_of_the_processor(model, plain, rows):
    if not hasattr(plain[1], "load_audio_from_video"):
        pytest.skip("this transformers takes no decoded sound tracks")
    for sample in rows:
        encoded = model.adapter.encode(sample)
        inputs = plain_inputs(plain[1], sample, model.adapter)
        assert encoded.ids.tolist() == inputs["input_ids"][0].tolist()[: len(encoded)]
        assert set(encoded.media) == set(inputs) - {"input_ids", "attention_mask"}
        for name, tensor in encoded.media.items():
            assert torch.equal(tensor, torch.as_tensor(inputs[name], dtype=tensor.dtype)), name


def test_positions_are_those_of_the_model(model, plain, rows):
    for sample in rows:
        encoded = model.adapter.encode(sample)
        media = encoded.media
        wanted, delta = plain[0].model.get_rope_index(
            encoded.ids[None],
            media.get("image_grid_thw"),
            media["video_grid_thw"],
            torch.ones(1, len(encoded), dtype=torch.long),
            True,
            media["feature_attention_mask"].sum(-1),
            media["video_second_per_grid"],
        )
        assert torch.equal(encoded.positions, wanted[:, 0])
        assert int(encoded.positions[:, -1].max()) + 1 == len(encoded) + int(delta)


def test_log_probabilities_are_those_of_the_plain_forward(model, plain, rows):
    encoded = [model.adapter.encode(sample) for sample in rows]
    batch = layout.pack(model.adapter, [(one, None) for one in encoded])
    with torch.no_grad():
        logp = model.policy(batch)[0]
    for i, one in enumerate(encoded):
        inputs = {"input_ids": one.ids[None], "attention_mask": torch.ones(1, len(one), dtype=torch.long)}
        with torch.no_grad():
            logits = plain[0](**inputs, **one.media, use_audio_in_video=True).logits[0]
        at = one.train.nonzero()[:, 0]
        wanted = logits[at - 1].log_softmax(-1).gather(-1, one.ids[at][:, None])[:, 0]
        assert (logp[batch.row == i] - wanted).abs().max() < 1e-5


def test_turns_are_those_of_the_processor_for_200_lengths(model, plain):
    chunked = plain[1].get_chunked_index if hasattr(plain[1], "get_chunked_index") else None
    random = np.random.default_rng(0)
    for _ in range(200):
        times = np.cumsum(random.integers(0, 130, random.integers(1, 12))).tolist()
        times = [time - times[0] for time in times for _ in range(int(random.integers(1, 7)))]
        sizes = _chunks(times, 50)
        assert sum(sizes) == len(times)
        if chunked:
            assert sizes == [end - start for start, end in chunked(np.array(times), 50)]


def test_silent_films_stay_silent_beside_heard_ones(model, rows):
    heard, silent = film(20, 8, sound=1.5), film(20, 9)
    both = model.adapter.encode(row("A", silent, "B", heard, "C", silent, "D"))
    alone = {name: model.adapter.encode_prompt(row(data).prompt()) for name, data in (("h", heard), ("s", silent))}
    config = model.adapter.config

    def block(encoded):
        marks = [config.vision_start_token_id, config.vision_end_token_id]
        ids = encoded.ids.tolist()
        return encoded.positions[:, ids.index(marks[0]) : ids.index(marks[1]) + 1]

    assert len(both.media["input_features"]) == 1
    starts = (both.ids == config.vision_start_token_id).nonzero()[:, 0].tolist()
    ends = (both.ids == config.vision_end_token_id).nonzero()[:, 0].tolist()
    # A film has the same positions wherever it stands, but for where it starts; what follows goes on behind its end.
    for (start, end), name in zip(zip(starts, ends, strict=True), "shs", strict=True):
        found, wanted = both.positions[:, start : end + 1], block(alone[name])
        assert torch.equal(found - found[:, :1], wanted - wanted[:, :1])
        assert torch.equal(both.positions[:, end + 1], both.positions[:, end] + 1)
        assert int(both.positions[0, start]) == int(both.positions[0, start - 1]) + 1


def test_rollouts_name_the_log_probabilities_that_training_computes(model, rows):
    prompts = [model.adapter.encode_prompt(sample.prompt()) for sample in rows]
    sampling = Sampling(max_new_tokens=3)
    groups = complete(model.policy, model.adapter, prompts, range(4), n=2, sampling=sampling, batch_size=4)
    for prompt, group in zip(prompts, groups, strict=True):
        for rollout in group:
            tokens = torch.as_tensor(rollout.tokens, dtype=torch.long)
            with torch.no_grad():
                logp = model.policy(layout.pad(model.adapter, [(prompt, tokens)]))[0]
            assert np.abs(np.asarray(rollout.logp) - logp.numpy()).max() < 1e-4


def test_models_that_hear_no_videos_say_so(open_tiny_vl):
    adapter = open_tiny_vl
    with pytest.raises(MmpostError) as caught:
        adapter.encode(row(film(10, 1, sound=1.0), "?"))
    assert str(caught.value) == (
        "data.media.use_audio_in_video=true, but the model (qwen2_vl) does not hear videos. "
        "Take Qwen2.5-Omni, or set it to false. [MMP-C068]"
    )


@pytest.fixture
def open_tiny_vl(tiny_folder):
    section = ModelSection(model_name_or_path=str(tiny_folder("qwen2-vl")))
    old = load(section, peft=None, device=torch.device("cpu")).adapter
    return type(old)(old.processor, old.config, media=MediaSection(use_audio_in_video=True))
