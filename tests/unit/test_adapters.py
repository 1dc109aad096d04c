"""Rows to ids, spans and media, compared with each family's own processor and model."""

import itertools

import numpy as np
import pytest
import torch

from mmpost.config.schema import MediaSection
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Sample

WORDS = (
    *("red", "green", "circle", "The number is 7", "<answer>12</answer>", "\\boxed{3}", "yes,", "no", "(B)"),
    *("\u00fcn\u00efcode", "\u2603", "\u4e09"),
)

# The template of the released SmolVLM: it reads lists of parts and prints nothing for a plain string.
RELEASED_SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
STRINGS_ONLY = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _text(rng):
    return " ".join(rng.choice(WORDS, rng.integers(1, 8)))


def _random_sample(rng, picture, turn, *, max_images=2):
    """One to three exchanges; each question holds nought to two pictures of any size, between or around the words."""
    turns = [turn("system", _text(rng))] if rng.random() < 0.3 else []
    for _ in range(rng.integers(1, 4)):
        parts = [_text(rng)]
        for _ in range(rng.integers(0, max_images + 1)):
            width, height = (int(side) for side in rng.integers(8, 160, 2))
            if max(width, height) > 150 * min(width, height):
                continue
            parts.insert(int(rng.integers(0, len(parts) + 1)), picture(width, height, int(rng.integers(1 << 30))))
        turns += [turn("user", *parts), turn("assistant", _text(rng))]
    return Sample("r", tuple(turns), {}, "rows.jsonl:4")


def _samples(picture, turn, count, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [_random_sample(rng, picture, turn, **options) for _ in range(count)]


def _runs(flags):
    return [len(list(group)) for value, group in itertools.groupby(flags) if value]


def test_ids_are_those_of_the_processor_for_the_whole_conversation(
    tiny_model, reference, plain_inputs, picture, turn, family
):
    adapter, (_, processor) = tiny_model.adapter, reference
    for sample in _samples(picture, turn, 15):
        encoded = adapter.encode(sample)
        expected = plain_inputs(processor, sample)
        ids = expected["input_ids"][0].tolist()
        assert encoded.ids.tolist() == ids[: len(encoded)]
        # Only the line break behind the last end-of-turn token is missing: nothing comes after it.
        assert processor.tokenizer.decode(ids[len(encoded) :]) == "\n"
        assert ("pixel_values" in expected) == bool(encoded.media)
        for name, tensor in encoded.media.items():
            ours = tensor if family != "smolvlm" else tensor[tensor.flatten(2).ne(0).any(2)]
            theirs = expected[name] if family != "smolvlm" else expected[name][0]
            if family == "smolvlm":
                theirs = theirs[theirs.flatten(1).ne(0).any(1)]
            assert torch.equal(ours, theirs)


def test_each_picture_has_as_many_placeholders_as_features(tiny_model, reference, picture, turn, family):
    adapter, (model, processor) = tiny_model.adapter, reference
    checked = 0
    for sample in _samples(picture, turn, 15, seed=1):
        encoded = adapter.encode(sample)
        runs = _runs((encoded.ids == adapter.image_token_id).tolist())
        assert runs == (adapter.lengths("image", encoded.media) if encoded.media else [])
        if not encoded.media:
            continue
        with torch.no_grad():
            features = model.model.get_image_features(**encoded.media, return_dict=True).pooler_output
        counted = [len(item) for item in features]
        if family == "smolvlm":
            # The model joins the tiles of a row; each tile is a stretch of its own in the ids.
            assert sum(runs) == sum(counted)
            assert set(runs) == {processor.image_seq_len}
        else:
            assert runs == counted
            assert len(runs) == len(sample.media("image"))
        checked += len(runs)
    assert checked > 15


@pytest.mark.parametrize("images", [0, 1, 2])
def test_row_with_no_one_or_two_pictures(tiny_model, picture, turn, images):
    adapter = tiny_model.adapter
    question = turn("user", *(picture(50 + 30 * i, 80, i) for i in range(images)), "and?")
    encoded = adapter.encode(Sample("a", (question, turn("assistant", "ok"))))
    assert bool(encoded.media) == (images > 0)
    assert (int((encoded.ids == adapter.image_token_id).sum()) > 0) == (images > 0)


@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant"])
def test_exactly_the_answers_train(tiny_model, picture, turn, family, loss_on):
    adapter = tiny_model.adapter
    end = "<end_of_utterance>" if family == "smolvlm" else "<|im_end|>"
    lead = " " if family == "smolvlm" else ""  # the prompt stops at "Assistant:", so the answer starts with the space
    rng = np.random.default_rng(5)
    for sample in _samples(picture, turn, 15, seed=2):
        turns = tuple(turn(t.role, *(p.ref or p.text for p in t.parts), train=rng.random() < 0.7) for t in sample.turns)
        answers = [(i, t) for i, t in enumerate(turns) if t.role == "assistant"]
        chosen = [t for i, t in answers if t.train and (loss_on == "assistant" or i == answers[-1][0])]
        encoded = adapter.encode(Sample("a", turns), loss_on=loss_on)
        trained = adapter.tokenizer.decode(encoded.ids[encoded.train], clean_up_tokenization_spaces=False)
        assert trained == "".join(lead + t.text + end for t in chosen)
        assert len(_runs(encoded.train.tolist())) == len(chosen)
        assert not (encoded.train & torch.isin(encoded.ids, torch.tensor(adapter.media_token_ids))).any()
        assert not encoded.train[0]


def test_a_prompt_is_what_stands_before_the_trained_answer(tiny_model, picture, turn):
    adapter = tiny_model.adapter
    for sample in _samples(picture, turn, 10, seed=3):
        prompt = adapter.encode_prompt(sample.prompt())
        whole = adapter.encode(sample, loss_on="last_assistant")
        start = len(prompt)
        assert torch.equal(whole.ids[:start], prompt.ids)
        assert whole.train[start:].all()
        assert not whole.train[:start].any()
        assert not prompt.train.any()
        again = prompt.with_completion(whole.ids[start:])
        assert torch.equal(again.ids, whole.ids)
        assert torch.equal(again.train, whole.train)
        assert torch.equal(again.positions, whole.positions)


def test_completions_decode_to_their_text(tiny_model, picture, turn):
    adapter = tiny_model.adapter
    for sample in _samples(picture, turn, 10, seed=4):
        encoded = adapter.encode(sample, loss_on="last_assistant")
        assert adapter.decode(encoded.ids[encoded.train].tolist()).lstrip() == sample.turns[-1].text


def test_positions_are_those_of_the_model(tiny_model, reference, plain_inputs, picture, turn, family):
    adapter, (model, processor) = tiny_model.adapter, reference
    for sample in _samples(picture, turn, 15, seed=6, max_images=3):
        encoded = adapter.encode(sample)
        if family == "smolvlm":
            expected = torch.arange(len(encoded))[None]
        else:
            inputs = plain_inputs(processor, sample)
            expected, delta = model.model.get_rope_index(
                inputs["input_ids"],
                inputs["mm_token_type_ids"],
                image_grid_thw=inputs.get("image_grid_thw"),
                attention_mask=inputs["attention_mask"],
            )
            expected = expected[:, 0, : len(encoded)]
            # A generated token goes on where the model itself would go on.
            assert int(encoded.positions.max()) + 1 == len(encoded) + int(delta)
        assert torch.equal(encoded.positions, expected)


@pytest.mark.parametrize("left", [False, True])
def test_batches_pad_one_side_and_list_what_trains(tiny_model, mixed_rows, left):
    adapter = tiny_model.adapter
    rows = [adapter.encode(sample) for sample in mixed_rows]
    batch = adapter.collate(rows, left=left)
    ids, attend = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert batch.num_rows == len(rows)
    assert attend.sum(1).tolist() == [len(row) for row in rows]
    edge = attend[:, 0] if left else attend[:, -1]
    assert int(edge.sum()) == sum(len(row) == ids.shape[1] for row in rows)
    assert (ids[attend == 0] == adapter.pad_token_id).all()
    for i, row in enumerate(rows):
        assert torch.equal(ids[i][attend[i] == 1], row.ids)
        assert torch.equal(
            batch.inputs["position_ids"][..., i, :][..., attend[i] == 1].view_as(row.positions), row.positions
        )
        mine = batch.row == i
        assert torch.equal(ids.flatten()[batch.at[mine] + 1], row.ids[row.train])
        assert torch.equal(batch.target[mine], row.ids[row.train])
    assert (batch.row.diff() >= 0).all()


def test_too_long_rows_are_named_with_their_parts(open_adapter, tiny_model, picture, turn):
    sample = Sample("a", (turn("user", picture(90, 60), "hi"), turn("assistant", "no")), {}, "rows.jsonl:7")
    fits = tiny_model.adapter.encode(sample)
    total, images = len(fits), int((fits.ids == tiny_model.adapter.image_token_id).sum())
    assert len(open_adapter(max_length=total).encode(sample)) == total
    with pytest.raises(MmpostError) as caught:
        open_adapter(max_length=total - 1).encode(sample)
    assert str(caught.value) == (
        f"rows.jsonl:7: {total} tokens (text {total - images}, image {images}, video 0, audio 0) exceed "
        f"data.max_length {total - 1}. Media spans are never cut. Options: data.max_length={-(-total // 64) * 64}, "
        "data.media.max_pixels, or data.on_long=drop [MMP-D014]"
    )


def _mismatch(model, placeholders, features):
    return (
        f"rows.jsonl:7: processor produced {placeholders} image placeholders but the encoder {features} features "
        f"(model {model.adapter.config.model_type}); this row would fail in forward. Remove literal image tokens from "
        "the text, or check that processor and weights belong together. [MMP-D015]"
    )


@pytest.mark.parametrize("where", ["text row", "question", "answer"])
def test_a_literal_image_token_in_the_text_is_named(tiny_model, picture, turn, where):
    model = tiny_model
    token = model.adapter.processor.image_token
    shown = [] if where == "text row" else [picture(90, 60)]
    question = "hi " if where == "answer" else f"hi {token} there"
    answer = f"no {token}" if where == "answer" else "no"
    sample = Sample("a", (turn("user", *shown, question), turn("assistant", answer)), {}, "rows.jsonl:7")
    clean = Sample("a", (turn("user", *shown, "hi"), turn("assistant", "no")))
    encoded = model.adapter.encode(clean)
    features = int((encoded.ids == model.adapter.image_token_id).sum())
    with pytest.raises(MmpostError) as caught:
        model.adapter.encode(sample)
    assert str(caught.value) == _mismatch(model, features + 1, features)


def test_two_wrong_pictures_do_not_cancel(tiny_model, picture, turn, family):
    model = tiny_model
    sample = Sample("a", (turn("user", picture(120, 60), picture(30, 30), "hi"), turn("assistant", "no")))
    sample = Sample(sample.id, sample.turns, {}, "rows.jsonl:7")
    encoded = model.adapter.encode(sample)
    places = (encoded.ids == model.adapter.image_token_id).nonzero()[:, 0]
    runs = _runs((encoded.ids == model.adapter.image_token_id).tolist())
    # One placeholder moves from the first picture to the last; the total stays.
    ids = encoded.ids.clone()
    last = int(places[-1])
    ids[int(places[runs[0] - 1])], ids[last + 1] = ids[last + 1], model.adapter.image_token_id
    with pytest.raises(MmpostError) as caught:
        model.adapter._check(sample, ids, encoded.media)
    assert str(caught.value) == _mismatch(model, runs[0] - 1, runs[0])


@pytest.mark.parametrize("budget", [28 * 28, 3000, 80 * 80])
def test_pixel_budget_holds(open_adapter, tiny_model, picture, turn, family, budget):
    adapter = open_adapter(max_pixels=budget)
    for width, height in [(30, 30), (200, 90), (56, 112), (97, 301)]:
        sample = Sample("a", (turn("user", picture(width, height), "hi"), turn("assistant", "no")))
        media = adapter.encode(sample).media
        if family == "smolvlm":
            tiles, side = media["pixel_values"].shape[1], media["pixel_values"].shape[-1]
            # The picture as a whole comes on top of its tiles; one tile is the least that the tower takes.
            pixels = side**2 * max(1, tiles - 1)
            assert pixels <= max(budget, side**2)
        else:
            patch = adapter.config.vision_config.patch_size
            _, rows, columns = (int(count) for count in media["image_grid_thw"][0])
            # A side is never shorter than one token, however long the other.
            assert rows * columns * patch**2 <= budget or min(rows, columns) == 2
        assert len(adapter.encode(sample)) <= len(tiny_model.adapter.encode(sample))


def test_smallest_size_holds(open_adapter, picture, turn, family):
    if family == "smolvlm":
        pytest.skip("SmolVLM always enlarges to whole tiles")
    adapter = open_adapter(min_pixels=80 * 80)
    sample = Sample("a", (turn("user", picture(20, 20), "hi"), turn("assistant", "no")))
    patch = adapter.config.vision_config.patch_size
    assert int(adapter.encode(sample).media["image_grid_thw"].prod()) * patch**2 >= 80 * 80


@pytest.mark.parametrize("template", ["released", "strings"])
def test_text_only_rows_survive_templates_that_read_one_form_of_content(open_adapter, turn, family, template):
    adapter = open_adapter()
    if (family == "smolvlm") != (template == "released"):
        pytest.skip("the template belongs to the other families")
    adapter.processor.chat_template = RELEASED_SMOLVLM if template == "released" else STRINGS_ONLY
    sample = Sample("a", (turn("user", "What is ", "it?"), turn("assistant", "A star.")))
    encoded = adapter.encode(sample)
    whole = adapter.tokenizer.decode(encoded.ids)
    assert "What is it?" in whole
    assert adapter.decode(encoded.ids[encoded.train].tolist()).strip() == "A star."


def test_a_template_that_rewrites_earlier_turns_is_refused(open_adapter, turn, family):
    adapter = open_adapter()
    sample = Sample(
        "a",
        (turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")),
        {},
        "rows.jsonl:2",
    )
    adapter.processor.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]"
        "{% if m['role'] != 'assistant' or loop.last %}"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(MmpostError) as caught:
        adapter.encode(sample)
    assert str(caught.value) == (
        "rows.jsonl:2: the chat template rewrites turn 2 when the conversation goes on. Set "
        "train.loss_on=last_assistant, or use a template that keeps earlier turns as they are. [MMP-D031]"
    )
    assert adapter.encode(sample, loss_on="last_assistant").num_trained > 0


def test_a_damaged_picture_is_named_by_its_row(tiny_model, turn):
    sample = Sample("a", (turn("user", b"not a picture", "hi"), turn("assistant", "no")), {}, "rows.jsonl:9")
    with pytest.raises(MmpostError, match=r"^rows.jsonl:9: .*\[MMP-D008\]$"):
        tiny_model.adapter.encode(sample)


def test_saved_adapters_open_again(tiny_model, tmp_path, picture, turn):
    from transformers import AutoProcessor

    model = tiny_model
    model.adapter.save(tmp_path)
    sample = Sample("a", (turn("user", picture(90, 60), "hi"), turn("assistant", "no")))
    again = type(model.adapter)(AutoProcessor.from_pretrained(tmp_path), model.adapter.config, media=MediaSection())
    first, second = model.adapter.encode(sample), again.encode(sample)
    assert torch.equal(first.ids, second.ids)
    assert all(torch.equal(first.media[name], second.media[name]) for name in first.media)
