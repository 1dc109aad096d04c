"""Sounds, pictures and videos side by side in rows of Qwen2.5-Omni's thinker, compared with plain transformers."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM, AutoProcessor, Qwen2_5OmniConfig

from mmpost.adapters import layout
from mmpost.config.schema import ModelSection
from mmpost.core.sample import Part, Sample, Turn
from mmpost.media import audio, image, video
from mmpost.models.load import load, part_of
from mmpost.rollout.generate import Sampling, complete
from tests.unit.clips import RATE, film, wav

pytest.importorskip("av")
pytest.importorskip("soundfile")


def _kind(data):
    return "image" if data[:4] == b"\x89PNG" else "audio" if data[:4] == b"RIFF" else "video"


def turn(role, *parts):
    return Turn(role, tuple(Part("text", p) if isinstance(p, str) else Part(_kind(p), ref=p) for p in parts))


@pytest.fixture(scope="module")
def rows(picture):
    """Text; each kind alone; all kinds in one row, over two exchanges."""
    asked = [
        ["What colour?"],
        [wav(0.8, 1), "High or low?"],
        [picture(60, 40, 2), "How many?"],
        [film(30, 3), "When?"],
        ["Compare", film(21, 4, 96, 64), wav(1.3, 5), "with", picture(80, 50, 6), wav(0.4, 7)],
    ]
    made = [(turn("user", *parts), turn("assistant", "It is red.")) for parts in asked]
    made[-1] += (turn("user", wav(2.0, 8), film(8, 9), "And now?"), turn("assistant", "no"))
    return [Sample("a", turns, {}, "rows.jsonl:7") for turns in made]


@pytest.fixture(scope="module")
def model(tiny_folder):
    section = ModelSection(model_name_or_path=str(tiny_folder("qwen2.5-omni")))
    return load(section, peft=None, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def plain(tiny_folder):
    folder = tiny_folder("qwen2.5-omni")
    return AutoModelForMultimodalLM.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def plain_inputs(processor, sample, adapter, *, generate=False):
    messages = [
        {
            "role": t.role,
            "content": [{"type": "text", "text": p.text} if p.kind == "text" else {"type": p.kind} for p in t.parts],
        }
        for t in sample.turns
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    films = [video.load(part.ref, section=adapter.section) for part in sample.media("video")]
    options = {
        "images": [image.load(part.ref) for part in sample.media("image")],
        "audio": [audio.load(part.ref).samples for part in sample.media("audio")],
        "videos": [torch.from_numpy(one.frames).permute(0, 3, 1, 2) for one in films],
    }
    if films:
        options["do_sample_frames"] = False
        # The processor has sizes of its own for videos, whatever the checkpoint's video processor says.
        options["videos_kwargs"] = {"size": dict(adapter.processor.video_processor.size)}
    options |= {"sampling_rate": RATE} if options["audio"] else {}
    given = {name: value for name, value in options.items() if value != []}
    inputs = processor(text=[text], add_special_tokens=False, return_tensors="pt", **given)
    if films:
        # The processor takes every video for one of two frames a second.
        inputs["video_second_per_grid"] = torch.tensor([2 / one.sampled_fps for one in films])
    return dict(inputs)


def expected(plain, adapter, sample, encoded, *, generate=False):
    inputs = plain_inputs(plain[1], sample, adapter, generate=generate)
    inputs |= {"input_ids": encoded.ids[None], "attention_mask": torch.ones(1, len(encoded), dtype=torch.long)}
    inputs.pop("mm_token_type_ids", None)
    with torch.no_grad():
        logits = plain[0](**inputs).logits[0]
    at = encoded.train.nonzero()[:, 0]
    return logits[at - 1].log_softmax(-1).gather(-1, encoded.ids[at][:, None])[:, 0]


def test_ids_and_media_are_those_of_the_processor(model, plain, rows):
    for sample in rows:
        encoded = model.adapter.encode(sample)
        inputs = plain_inputs(plain[1], sample, model.adapter)
        ids = inputs["input_ids"][0].tolist()
        assert encoded.ids.tolist() == ids[: len(encoded)]
        assert set(encoded.media) == set(inputs) - {"input_ids", "attention_mask", "mm_token_type_ids"}
        for name, tensor in encoded.media.items():
            assert torch.equal(tensor, inputs[name]), name


def test_positions_are_those_of_the_model(model, plain, rows):
    for sample in rows:
        encoded = model.adapter.encode(sample)
        inputs = plain_inputs(plain[1], sample, model.adapter)
        mask = inputs.get("feature_attention_mask")
        wanted, delta = plain[0].model.get_rope_index(
            encoded.ids[None],
            inputs.get("image_grid_thw"),
            inputs.get("video_grid_thw"),
            torch.ones(1, len(encoded), dtype=torch.long),
            False,
            None if mask is None else mask.sum(-1),
            inputs.get("video_second_per_grid"),
        )
        assert torch.equal(encoded.positions, wanted[:, 0])
        assert int(encoded.positions[:, -1].max()) + 1 == len(encoded) + int(delta)


@pytest.mark.parametrize("together", [layout.pad, layout.pack])
def test_mixed_rows_have_the_log_probabilities_of_the_plain_forward(model, plain, rows, together):
    encoded = [model.adapter.encode(sample) for sample in rows]
    assert model.policy.packs
    batch = together(model.adapter, [(one, None) for one in encoded])
    with torch.no_grad():
        logp = model.policy(batch)[0]
    for i, (one, sample) in enumerate(zip(encoded, rows, strict=True)):
        assert (logp[batch.row == i] - expected(plain, model.adapter, sample, one)).abs().max() < 1e-5


def test_shared_prompts_hold_their_media_once(model, plain, rows):
    prompts = [model.adapter.encode_prompt(sample.prompt()) for sample in rows]
    pairs = [(prompts[k // 2], torch.arange(20, 23 + k)) for k in range(10)]
    batch = layout.pack(model.adapter, pairs)
    assert len(batch.inputs["input_features"]) == 4
    assert len(batch.inputs["video_grid_thw"]) == 3
    with torch.no_grad():
        logp = model.policy(batch)[0]
    for k, (prompt, tokens) in enumerate(pairs):
        sample, whole = rows[k // 2].prompt(), prompt.with_completion(tokens)
        wanted = expected(plain, model.adapter, sample, whole, generate=True)
        assert (logp[batch.row == k] - wanted).abs().max() < 1e-5


def test_rollouts_name_the_log_probabilities_that_training_computes(model, rows):
    prompts = [model.adapter.encode_prompt(sample.prompt()) for sample in rows]
    sampling = Sampling(max_new_tokens=4)
    groups = complete(model.policy, model.adapter, prompts, range(5), n=2, sampling=sampling, batch_size=5)
    for prompt, group in zip(prompts, groups, strict=True):
        for rollout in group:
            tokens = torch.as_tensor(rollout.tokens, dtype=torch.long)
            with torch.no_grad():
                logp = model.policy(layout.pad(model.adapter, [(prompt, tokens)]))[0]
            assert np.abs(np.asarray(rollout.logp) - logp.numpy()).max() < 1e-4


def test_the_thinker_is_taken_out_of_a_whole_checkpoint(tiny_folder, model, tmp_path, rows):
    """As released: the weights are named ``thinker.*`` and the configuration holds the thinker's."""
    folder = tiny_folder("qwen2.5-omni")
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = {f"thinker.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["talker.model.norm.weight"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    whole = Qwen2_5OmniConfig(thinker_config=json.loads((folder / "config.json").read_text()))
    whole.save_pretrained(tmp_path)
    opened = load(ModelSection(model_name_or_path=str(tmp_path)), peft=None, device=torch.device("cpu"))
    theirs = dict(model.policy.model.named_parameters())
    assert all(torch.equal(weight, theirs[name]) for name, weight in opened.policy.model.named_parameters())
    assert torch.equal(opened.adapter.encode(rows[4]).ids, model.adapter.encode(rows[4]).ids)


def test_every_weight_belongs_to_a_part(model):
    parts = {name: part_of(name) for name, _ in model.policy.model.named_parameters()}
    assert set(parts.values()) == {"vision_tower", "audio_tower", "projector", "language_model"}
    assert all(
        ("language_model" in name or name == "lm_head.weight") == (part == "language_model")
        for name, part in parts.items()
    )
