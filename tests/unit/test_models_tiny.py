"""Tiny models: what the real classes promise, and the laws that the rest of the toolkit relies on."""

import hashlib
import importlib.util
import random
import unicodedata

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mmpost.core.errors import MmpostError
from mmpost.models import tiny, tiny_tokenizer

CLASSES = {
    "qwen2-vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLProcessor"),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor"),
    "qwen3-vl": ("Qwen3VLForConditionalGeneration", "Qwen3VLProcessor"),
    "smolvlm": ("SmolVLMForConditionalGeneration", "SmolVLMProcessor"),
}
FAMILIES = [
    pytest.param(
        family,
        marks=pytest.mark.skipif(
            family == "smolvlm" and importlib.util.find_spec("num2words") is None,
            reason="the SmolVLM processor needs num2words",
        ),
    )
    for family in CLASSES
]
SIZES = [(28, 28), (84, 28), (112, 112), (37, 100), (300, 200)]
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it red?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "<answer>yes</answer>"}]}


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads only get in each other's way on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    built = {}

    def get(family, size="test"):
        if (family, size) not in built:
            built[family, size] = tiny.build(family, tmp_path_factory.mktemp("tiny") / family, size=size)
        return built[family, size]

    return get


@pytest.fixture(scope="module")
def opened(folders):
    """Model and processor as plain transformers opens them."""
    held = {}

    def get(family, size="test"):
        if (family, size) not in held:
            folder = folders(family, size)
            model = AutoModelForImageTextToText.from_pretrained(folder).eval()
            held[family, size] = model, AutoProcessor.from_pretrained(folder)
        return held[family, size]

    return get


def encode(processor, images, turns=(QUESTION, ANSWER)):
    text = processor.apply_chat_template(list(turns))
    return processor(text=[text] * len(images), images=[[image] for image in images], return_tensors="pt", padding=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_opens_the_real_classes(opened, family):
    model, processor = opened(family)
    assert (type(model).__name__, type(processor).__name__) == CLASSES[family]
    assert 0.2e6 <= model.num_parameters() <= 0.4e6
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_the_demo_size_is_between_one_and_one_and_a_half_million(opened):
    model, _ = opened("qwen2.5-vl", "demo")
    assert 1.0e6 <= model.num_parameters() <= 1.5e6


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_receives_a_finite_gradient(opened, family):
    model, processor = opened(family)
    inputs = encode(processor, [picture(56, 56, seed) for seed in range(2)])
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    assert torch.isfinite(loss)
    # An untrained model guesses: the loss lies near that of a uniform choice.
    assert abs(loss.item() - np.log(model.config.get_text_config().vocab_size)) < 1.0
    assert all(grad is not None and torch.isfinite(grad).all() for grad in gradients.values())


@pytest.mark.parametrize("size", ["test", "demo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_image_has_as_many_placeholders_as_features(opened, family, size):
    model, processor = opened(family, size)
    for height, width in SIZES:
        inputs = encode(processor, [picture(height, width)])
        placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
        media = {name: inputs[name] for name in inputs if name.startswith(("pixel", "image_grid"))}
        with torch.no_grad():
            features = model.model.get_image_features(**media).pooler_output
        features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features
        rows = features.reshape(-1, features.shape[-1]).shape[0]
        assert placeholders == rows > 0, (height, width)


@pytest.mark.parametrize(("height", "width"), [(28, 28), (28, 56), (28, 84), (28, 112), (56, 56)])
def test_tiles_of_28_pixels_are_not_resized_in_the_demo_size(opened, height, width):
    model, processor = opened("qwen2.5-vl", "demo")
    patch = model.config.vision_config.patch_size
    grid = encode(processor, [picture(height, width)])["image_grid_thw"]
    assert grid.tolist() == [[1, height // patch, width // patch]]


def test_the_model_sees_the_image(opened):
    for family in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl"):
        model, processor = opened(family)
        inputs = encode(processor, [picture(56, 56, seed) for seed in range(2)])
        with torch.no_grad():
            first, second = model(**inputs).logits[:, -1]
        assert (first - second).abs().max() > 1e-4, family


def test_qwen3_has_deepstack_layers(opened):
    model, _ = opened("qwen3-vl")
    assert len(model.model.visual.deepstack_merger_list) == 2
    assert len(model.config.vision_config.deepstack_visual_indexes) == 2


def test_qwen2_5_has_windowed_and_full_attention(opened):
    vision = opened("qwen2.5-vl")[0].config.vision_config
    assert 0 < len(vision.fullatt_block_indexes) < vision.depth
    assert vision.window_size < 112


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_opening_again_keeps_the_logits(opened, tmp_path, family):
    model, processor = opened(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor_again = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    image = picture(60, 90)
    with torch.no_grad():
        before = model(**encode(processor, [image])).logits
        after = again.eval()(**encode(processor_again, [image])).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides_every_byte_and_leaves_the_callers_stream_alone(folders, tmp_path, family):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    same = tiny.build(family, tmp_path / "same")
    other = tiny.build(family, tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    first = folders(family)
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"):
        assert (first / name).read_bytes() == (same / name).read_bytes(), name
    digests = {hashlib.sha256((path / "model.safetensors").read_bytes()).digest() for path in (first, other)}
    assert len(digests) == 2
    assert (first / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_stops_where_the_family_stops(opened, family):
    model, processor = opened(family)
    inputs = processor(
        text=[processor.apply_chat_template([QUESTION], add_generation_prompt=True)] * 2,
        images=[[picture(56, 56, seed)] for seed in range(2)],
        return_tensors="pt",
        padding=True,
    )
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert out.shape[0] == 2
    assert inputs["input_ids"].shape[1] < out.shape[1] <= inputs["input_ids"].shape[1] + 4
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_a_video_goes_through_the_model(opened, family):
    model, processor = opened(family)
    turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]}
    frames = np.random.default_rng(0).integers(0, 256, (4, 3, 56, 56), dtype=np.uint8)
    metadata = transformers.video_utils.VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=[0, 1, 2, 3])
    inputs = processor(
        text=[processor.apply_chat_template([turn])],
        videos=[frames],
        video_metadata=[[metadata]],
        do_sample_frames=False,
        return_tensors="pt",
    )
    placeholders = int((inputs["input_ids"] == model.config.video_token_id).sum())
    assert placeholders == int(inputs["video_grid_thw"].prod()) // 4 > 0
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


# Templates


@pytest.mark.parametrize("family", FAMILIES)
def test_a_generation_prompt_is_a_prefix_of_the_whole_conversation(opened, family):
    _, processor = opened(family)
    follow_up = {"role": "user", "content": "And 12?"}
    result = {"role": "tool", "content": "the tool says 3"}
    turns = [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER, follow_up, ANSWER, result, ANSWER]
    whole = processor.apply_chat_template(turns)
    tokenizer = processor.tokenizer
    whole_ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    for end in (i for i, turn in enumerate(turns) if turn["role"] == "assistant"):
        prompt = processor.apply_chat_template(turns[:end], add_generation_prompt=True)
        assert whole.startswith(prompt)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert whole_ids[: len(ids)] == ids
        closed = processor.apply_chat_template(turns[: end + 1])
        assert whole.startswith(closed)
        assert tokenizer(closed)["input_ids"].count(tokenizer.eos_token_id) == end + 1
    for text in ("Be brief.", "And 12?", "the tool says 3"):
        assert whole.count(text) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_string_renders_like_one_text_part(opened, family):
    _, processor = opened(family)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]
    assert processor.apply_chat_template(parts) == processor.apply_chat_template([{"role": "user", "content": "Hi."}])


def test_the_rendered_text_is_that_of_the_family(opened):
    turns = [QUESTION, ANSWER, {"role": "tool", "content": "3"}]
    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    for family in ("qwen2-vl", "qwen2.5-vl"):
        assert opened(family)[1].apply_chat_template(turns, add_generation_prompt=True) == (
            f"<|im_start|>user\n{vision}Is it red?<|im_end|>\n<|im_start|>assistant\n<answer>yes</answer><|im_end|>\n"
            "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
        )
    assert opened("qwen3-vl")[1].apply_chat_template(turns) == (
        f"<|im_start|>user\n{vision}Is it red?<|im_end|>\n<|im_start|>assistant\n<answer>yes</answer><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
    )


def test_smolvlm_renders_as_released():
    tokenizer = tiny_tokenizer.train(tiny_tokenizer.SMOLVLM)
    assert tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>User:<image>Is it red?<end_of_utterance>\n"
        "Assistant: <answer>yes</answer><end_of_utterance>\nAssistant:"
    )


def test_a_part_that_the_model_cannot_read_is_refused():
    tokenizer = tiny_tokenizer.train(tiny_tokenizer.QWEN2)
    turn = {"role": "user", "content": [{"type": "audio"}]}
    with pytest.raises(Exception, match="this model has no part of type audio"):
        tokenizer.apply_chat_template([turn], tokenize=False)


# Tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_any_text_survives_a_round_trip(folders, family):
    tokenizer = AutoTokenizer.from_pretrained(folders(family))
    rng = random.Random(0)
    texts = ["", "  two  spaces , and\r\n\ttabs .", "don't  ", "e\u0301 is not \u00e9", "½ 五 ७ ①", "</ answer>"]
    for _ in range(300):
        codes = (
            rng.choice([rng.randrange(128), rng.randrange(0x300, 0x3000), rng.randrange(0x110000)]) for _ in range(20)
        )
        texts.append("".join(chr(code) for code in codes if unicodedata.category(chr(code)) != "Cs"))
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_tokenizer_is_the_trained_one(folders, family):
    tokenizer = AutoTokenizer.from_pretrained(folders(family))
    style = {"qwen3-vl": tiny_tokenizer.QWEN3, "smolvlm": tiny_tokenizer.SMOLVLM}.get(family, tiny_tokenizer.QWEN2)
    trained = tiny_tokenizer.train(style)
    assert tokenizer.get_vocab() == trained.get_vocab()
    assert len(tokenizer) == tiny_tokenizer.VOCAB_SIZE == 600
    text = "What is the sum of 12 and 307? <answer>319</answer> \\boxed{é} (B)"
    assert tokenizer(text)["input_ids"] == trained(text)["input_ids"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == (style.eos, style.pad)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    for token in style.special:
        assert tokenizer.encode(token, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(token)]
        assert tokenizer.decode(tokenizer.encode(token), skip_special_tokens=True) == ""


@pytest.mark.parametrize("style", [tiny_tokenizer.QWEN2, tiny_tokenizer.SMOLVLM])
def test_answers_are_short_and_digits_stand_alone(style):
    tokenizer = tiny_tokenizer.train(style)
    assert tokenizer.tokenize("<answer>207</answer>") == ["<answer>", "2", "0", "7", "</answer>"]
    assert len(tokenizer.tokenize("<answer>sneaker</answer>")) == 3
    assert len(tokenizer.tokenize("<answer>no</answer>")) == 3
    ids = tokenizer.encode("<answer>7</answer>" + style.eos)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<answer>7</answer>"
    assert not any(
        any(c.isdigit() for c in token) and len(token) > 1 for token in set(tokenizer.get_vocab()) - set(style.special)
    )


def test_a_corpus_teaches_its_words(tmp_path):
    plain = tiny_tokenizer.train(tiny_tokenizer.QWEN2)
    taught = tiny_tokenizer.train(tiny_tokenizer.QWEN2, ["a zeppelin over the harbour"] * 200)
    assert len(taught.tokenize(" zeppelin")) == 1 < len(plain.tokenize(" zeppelin"))
    assert len(taught) == 600
    folder = tiny.build("qwen2-vl", tmp_path, corpus=(text for text in ["a zeppelin over the harbour"] * 200))
    assert len(AutoTokenizer.from_pretrained(folder).tokenize(" zeppelin")) == 1


# Names


def test_names_say_family_and_size():
    assert tiny.tiny_name("tiny-vlm") == ("qwen2.5-vl", "demo")
    for family in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "smolvlm"):
        assert tiny.tiny_name(f"tiny-{family}") == (family, "test")


def test_unknown_names_are_answered_with_the_known_ones(tmp_path):
    with pytest.raises(MmpostError) as error:
        tiny.tiny_name("tiny-qwen2.5")
    assert str(error.value) == (
        "unknown name 'tiny-qwen2.5' among tiny models. Did you mean 'tiny-qwen2.5-vl'? Known: tiny-vlm, "
        "tiny-qwen2-vl, tiny-qwen2.5-vl, tiny-qwen3-vl, tiny-smolvlm, tiny-qwen2-audio, "
        "tiny-qwen2.5-omni, tiny-audio-flamingo-3 [MMP-C006]"
    )
    with pytest.raises(MmpostError) as error:
        tiny.build("llama", tmp_path / "x")
    assert error.value.code == "MMP-C006"
    with pytest.raises(MmpostError, match="unknown name 'huge' among sizes of tiny models"):
        tiny.build("qwen2-vl", tmp_path / "x", size="huge")
    assert not (tmp_path / "x").exists()
