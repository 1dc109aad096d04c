"""Tiny models of the real classes, built once per session, and the small things that rows are made of.

Torch and transformers are imported inside the fixtures, so that tests of light modules start at once.
"""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

FAMILIES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "smolvlm")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Function from a family's name to the folder of its tiny model."""
    import torch
    from transformers.utils import logging

    from mmpost.models import tiny

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    built = {}

    def folder(family):
        if family not in built:
            built[family] = tiny.build(family, tmp_path_factory.mktemp("tiny") / family, seed=1)
        return built[family]

    return folder


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def _kept():
    return {}


@pytest.fixture
def open_tiny(tiny_folder, family, _kept):
    """Function that opens the family's tiny model through ``mmpost.models.load``; float64 on request.

    Weights are copies of the first opening with the same options; the adapter is shared, so it is not to be changed.
    """
    import copy
    import dataclasses

    import torch

    from mmpost.config.schema import ModelSection
    from mmpost.models.load import load

    def open_model(*, peft=None, freeze=(), double=False):
        key = (family, repr(peft), tuple(freeze))
        if key not in _kept:
            section = ModelSection(model_name_or_path=str(tiny_folder(family)), freeze=list(freeze))
            _kept[key] = load(section, peft=peft, seed=3, device=torch.device("cpu"))
        model = dataclasses.replace(_kept[key], policy=copy.deepcopy(_kept[key].policy))
        if double:
            model.policy.double()
        return model

    return open_model


@pytest.fixture
def plain(tiny_folder, family):
    """Function that opens the same folder with transformers alone: (model, processor)."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    def open_plain(*, double=False):
        model = AutoModelForImageTextToText.from_pretrained(tiny_folder(family)).eval()
        processor = AutoProcessor.from_pretrained(tiny_folder(family))
        return model.to(torch.float64 if double else torch.float32), processor

    return open_plain


@pytest.fixture
def tiny_model(open_tiny, family, _kept):
    """The family's tiny model, opened once; not to be changed."""
    if ("tiny", family) not in _kept:
        _kept["tiny", family] = open_tiny()
    return _kept["tiny", family]


@pytest.fixture
def open_adapter(tiny_folder, tiny_model, family):
    """Function that opens the family's processor with an adapter of its own, which a test may change."""
    from transformers import AutoProcessor

    from mmpost.config.schema import MediaSection

    def open_one(*, max_length=1 << 30, **media):
        processor = AutoProcessor.from_pretrained(tiny_folder(family))
        kind, config = type(tiny_model.adapter), tiny_model.adapter.config
        return kind(processor, config, media=MediaSection(**media), max_length=max_length)

    return open_one


@pytest.fixture
def reference(plain, family, _kept):
    """The same folder opened once with transformers alone: (model, processor); not to be changed."""
    if ("plain", family) not in _kept:
        _kept["plain", family] = plain()
    return _kept["plain", family]


@pytest.fixture(scope="session")
def picture():
    """Function from width, height and seed to the bytes of a PNG of noise."""
    import numpy as np
    from PIL import Image

    from mmpost.media.image import encode

    def make(width, height, seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return encode(Image.fromarray(pixels))

    return make


@pytest.fixture(scope="session")
def turn():
    """Function from a role and its parts (text as str, pictures as bytes) to a turn."""
    from mmpost.core.sample import Part, Turn

    def make(role, *parts, train=True):
        said = [Part("text", part) if isinstance(part, str) else Part("image", ref=part) for part in parts]
        return Turn(role, tuple(said), train)

    return make


@pytest.fixture(scope="session")
def plain_inputs():
    """Function from (processor, sample) to what plain transformers makes of the whole row: its model inputs."""
    from mmpost.media import image

    def make(processor, sample, *, generate=False):
        messages = [
            {
                "role": turn.role,
                "content": [
                    {"type": "text", "text": part.text} if part.kind == "text" else {"type": "image"}
                    for part in turn.parts
                ],
            }
            for turn in sample.turns
        ]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        pictures = [image.load(part.ref) for part in sample.media("image")]
        return processor(
            text=[text], images=[pictures] if pictures else None, add_special_tokens=False, return_tensors="pt"
        )

    return make


@pytest.fixture
def mixed_rows(picture, turn):
    """Conversations of unequal length: text only, one picture, two pictures, two turns, a picture in the second."""
    from mmpost.core.sample import Sample

    layouts = [
        [turn("user", "What colour is it?"), turn("assistant", "It is red.")],
        [
            turn("user", picture(60, 40, 1), "How many circles are there in this picture?"),
            turn("assistant", "<answer>3</answer>"),
        ],
        [
            turn("system", "You are a helpful assistant."),
            turn("user", "Compare", picture(120, 50, 2), "with", picture(30, 90, 3)),
            turn("assistant", "The second one is blue."),
        ],
        [
            turn("user", "Hi"),
            turn("assistant", "Hello."),
            turn("user", picture(56, 56, 4), "And now?"),
            turn("assistant", "A green square, I think, and a star next to it."),
        ],
        [turn("user", "Say yes"), turn("assistant", "yes")],
    ]
    return [Sample(f"row{i}", tuple(turns), {}, f"rows.jsonl:{i + 1}") for i, turns in enumerate(layouts)]
