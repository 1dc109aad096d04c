"""Videos in rows of the Qwen families: pixels, times, positions and log-probabilities of plain transformers."""

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from mmpost.adapters import layout
from mmpost.config.schema import RolloutSection
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Part, Sample, Turn
from mmpost.media import image, video
from mmpost.rollout.engine import Prompt, Setup
from mmpost.rollout.generate import Sampling, complete
from mmpost.rollout.transformers_engine import TransformersEngine
from tests.unit.clips import film

pytest.importorskip("av")


@pytest.fixture(params=["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def family(request):
    return request.param


def turn(role, *parts):
    """Text as str; pictures as a PNG's bytes, films as any other bytes."""
    made = [
        Part("text", part) if isinstance(part, str) else Part("image" if part[:4] == b"\x89PNG" else "video", ref=part)
        for part in parts
    ]
    return Turn(role, tuple(made))


def row(*turns):
    return Sample("a", turns, {}, "rows.jsonl:7")


@pytest.fixture(scope="module")
def rows(picture):
    """Text only; a film; an odd film and a picture; a film and a second one in the next exchange; a picture."""
    return [
        row(turn("user", "What colour?"), turn("assistant", "It is red.")),
        row(turn("user", film(30, 1), "How many?"), turn("assistant", "<answer>3</answer>")),
        row(
            turn("system", "You are a helpful assistant."),
            turn("user", "Compare", film(21, 2, 96, 64), "with", picture(60, 40, 3)),
            turn("assistant", "The second one is blue."),
        ),
        row(
            turn("user", film(8, 4, 48, 48), "Hi"),
            turn("assistant", "Hello."),
            turn("user", picture(56, 56, 4), film(45, 5), "And now?"),
            turn("assistant", "A green square."),
        ),
        row(turn("user", picture(90, 50, 6), "Say yes"), turn("assistant", "yes")),
    ]


def plain_inputs(processor, sample, section, *, generate=False):
    """What transformers makes of the same frames, told when each of them is shown."""
    messages = [
        {
            "role": t.role,
            "content": [{"type": "text", "text": p.text} if p.kind == "text" else {"type": p.kind} for p in t.parts],
        }
        for t in sample.turns
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    clips = [video.load(part.ref, section=section) for part in sample.media("video")]
    pictures = [image.load(part.ref) for part in sample.media("image")]
    options = {}
    if clips:
        # Numbers of frames in a file of 1,000 a second are milliseconds.
        options["videos"] = [torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in clips]
        options["do_sample_frames"] = False
        options["video_metadata"] = [
            VideoMetadata(
                total_num_frames=clip.total_frames,
                fps=1000,
                frames_indices=np.round(clip.times * 1000).astype(int),
            )
            for clip in clips
        ]
    inputs = processor(
        text=[text], images=[pictures] if pictures else None, add_special_tokens=False, return_tensors="pt", **options
    )
    if "second_per_grid_ts" in inputs:
        # The processor takes frames for evenly spread over the whole file; ours are spread over their own times.
        inputs["second_per_grid_ts"] = torch.tensor([2 / clip.sampled_fps for clip in clips])
    return inputs


def test_ids_and_pixels_are_those_of_the_processor(tiny_model, reference, rows):
    adapter, (_, processor) = tiny_model.adapter, reference
    for sample in rows:
        encoded = adapter.encode(sample)
        expected = plain_inputs(processor, sample, adapter.section)
        ids = expected["input_ids"][0].tolist()
        assert encoded.ids.tolist() == ids[: len(encoded)]
        assert set(encoded.media) == set(expected) - {"input_ids", "attention_mask", "mm_token_type_ids"}
        for name, tensor in encoded.media.items():
            assert torch.equal(tensor, expected[name]), name
        assert torch.equal(adapter.token_types(encoded.ids), expected["mm_token_type_ids"][0, : len(encoded)])


def test_positions_are_those_of_the_model(tiny_model, reference, rows, family):
    adapter, (model, processor) = tiny_model.adapter, reference
    for sample in rows:
        encoded = adapter.encode(sample)
        inputs = plain_inputs(processor, sample, adapter.section)
        times = {"second_per_grid_ts": inputs.get("second_per_grid_ts")} if family == "qwen2.5-vl" else {}
        expected, _ = model.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
            attention_mask=inputs["attention_mask"],
            **times,
        )
        assert torch.equal(encoded.positions, expected[:, 0, : len(encoded)])
        prompt = adapter.encode_prompt(sample.prompt())
        again = prompt.with_completion(encoded.ids[len(prompt) :])
        assert torch.equal(again.positions, encoded.positions)


def _expected(reference, adapter, sample, encoded, *, generate=False):
    model, processor = reference
    inputs = dict(plain_inputs(processor, sample, adapter.section, generate=generate))
    inputs["input_ids"] = encoded.ids[None]
    inputs["attention_mask"] = torch.ones(1, len(encoded), dtype=torch.long)
    inputs["mm_token_type_ids"] = adapter.token_types(encoded.ids)[None]
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    at = encoded.train.nonzero()[:, 0]
    return logits[at - 1].log_softmax(-1).gather(-1, encoded.ids[at][:, None])[:, 0]


@pytest.mark.parametrize("together", [layout.pad, layout.pack])
def test_mixed_rows_have_the_log_probabilities_of_the_plain_forward(tiny_model, reference, rows, together):
    adapter = tiny_model.adapter
    encoded = [adapter.encode(sample) for sample in rows]
    batch = together(adapter, [(one, None) for one in encoded])
    with torch.no_grad():
        logp = tiny_model.policy(batch)[0]
    for i, (one, sample) in enumerate(zip(encoded, rows, strict=True)):
        assert (logp[batch.row == i] - _expected(reference, adapter, sample, one)).abs().max() < 1e-5


def test_films_of_shared_prompts_are_there_once(tiny_model, reference, rows):
    adapter = tiny_model.adapter
    prompts = [adapter.encode_prompt(sample.prompt()) for sample in rows[:3]]
    rng = np.random.default_rng(3)
    pairs = [(prompts[k // 2], torch.tensor(rng.integers(10, 300, 3 + k))) for k in range(6)]
    batch = layout.pack(adapter, pairs)
    assert len(batch.inputs["video_grid_thw"]) == 2
    with torch.no_grad():
        logp = tiny_model.policy(batch)[0]
    for k, (prompt, tokens) in enumerate(pairs):
        expected = _expected(reference, adapter, rows[k // 2].prompt(), prompt.with_completion(tokens), generate=True)
        assert (logp[batch.row == k] - expected).abs().max() < 1e-5


def test_rollouts_name_the_log_probabilities_that_training_computes(tiny_model, rows):
    adapter = tiny_model.adapter
    prompts = [adapter.encode_prompt(sample.prompt()) for sample in rows[:3]]
    groups = complete(
        tiny_model.policy, adapter, prompts, [0, 1, 2], n=2, sampling=Sampling(max_new_tokens=4), batch_size=3
    )
    for prompt, group in zip(prompts, groups, strict=True):
        for rollout in group:
            tokens = torch.as_tensor(rollout.tokens, dtype=torch.long)
            with torch.no_grad():
                logp = tiny_model.policy(layout.pad(adapter, [(prompt, tokens)]))[0]
            assert np.abs(np.asarray(rollout.logp) - logp.numpy()).max() < 1e-4


def test_times_of_a_variable_rate_reach_the_model(tiny_model, family):
    stamps = [*range(10), *range(10, 10 + 5 * 10, 5)]  # one second at 10 per second, five seconds at 2
    sample = row(turn("user", film(20, stamps=stamps), "When?"), turn("assistant", "now"))
    adapter = tiny_model.adapter
    clip = video.load(sample.media("video")[0].ref, section=adapter.section)
    encoded = adapter.encode(sample)
    pairs = clip.padded(2).times.reshape(-1, 2)
    if family == "qwen3-vl":
        said = adapter.tokenizer.decode(encoded.ids)
        assert [f"<{mean:.1f} seconds>" in said for mean in pairs.mean(1)] == [True] * len(pairs)
    elif family == "qwen2.5-vl":
        span = clip.times[-1] - clip.times[0]
        assert float(encoded.media["second_per_grid_ts"]) == pytest.approx(2 * span / (len(clip.times) - 1))
    assert int(encoded.media["video_grid_thw"][0, 0]) == len(pairs)


def test_200_sizes_and_lengths_have_as_many_placeholders_as_features(tiny_model, reference):
    adapter, (model, _) = tiny_model.adapter, reference
    merge = model.config.vision_config.spatial_merge_size
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        count, width, height = int(rng.integers(1, 9)), *(int(side) for side in rng.integers(28, 200, 2))
        frames = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
        clip = video.Video(frames, np.arange(count) / 2, 10, count / 2, count, False, 0.001, 0, "raw", "none")
        ids, media = adapter._tokenize("<|video_pad|>", {"video": [clip]})
        features = int(media["video_grid_thw"].prod()) // merge**2
        assert int((ids == adapter.token_ids["video"]).sum()) == features
        assert sum(adapter.lengths("video", media)) == features
        assert len(media["pixel_values_videos"]) == features * merge**2
        seen.add(features)
    assert len(seen) > 8


def test_a_literal_video_token_is_named(tiny_model):
    sample = row(turn("user", film(8), "hi <|video_pad|> there"), turn("assistant", "no"))
    with pytest.raises(MmpostError, match="video placeholders but the encoder") as caught:
        tiny_model.adapter.encode(sample)
    assert caught.value.code == "MMP-D015"


def test_sounds_are_refused_by_name(tiny_model):
    sample = row(Turn("user", (Part("audio", ref=b"x"), Part("text", "hi"))), turn("assistant", "no"))
    with pytest.raises(MmpostError) as caught:
        tiny_model.adapter.encode(sample)
    assert caught.value.code == "MMP-D042"


def test_frame_budgets_hold(open_adapter):
    adapter = open_adapter(fps=5, max_frames=4)
    sample = row(turn("user", film(30), "hi"), turn("assistant", "no"))
    assert int(adapter.encode(sample).media["video_grid_thw"][0, 0]) == 2


def test_the_transformers_engine_refuses_films_whose_times_outrun_the_text(tiny_model, family):
    def engine(seconds):
        sample = row(turn("user", film(10 * seconds), "When?"))
        prompt = Prompt(tiny_model.adapter.encode_prompt(sample), 0, sample)
        made = TransformersEngine(Setup(RolloutSection(), tiny_model.policy, tiny_model.adapter, "tiny", 8))
        return made.complete([prompt], n=1, sampling=Sampling(max_new_tokens=2))

    if family == "qwen3-vl":
        assert len(engine(12)[0]) == 1  # its times stand in the text
        return
    with pytest.raises(MmpostError, match=r"rows\.jsonl:7: the transformers engine gives completions") as caught:
        engine(30)
    assert caught.value.code == "MMP-C040"
