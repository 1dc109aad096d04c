"""Methods that change which tokens of a row train, or how they are written."""

import numpy as np
import pytest
import torch

from mmpost.algos import cings, stochastok
from mmpost.core.sample import Part, Sample, Turn
from mmpost.core.seeding import generator
from mmpost.data.readers.row import Row as DataRow
from mmpost.data.readers.turns import OWN_ROLES, read_turns

one_family = pytest.mark.parametrize("family", ["qwen2.5-vl"])

# -- StochasTok ------------------------------------------------------------------------------------------------------


@one_family
def test_splitting_never_changes_a_text(tiny_model):
    adapter = tiny_model.adapter
    table = stochastok.SplitTable(adapter.tokenizer, adapter.media_token_ids)
    random = generator(0, "texts")
    words = [
        "the",
        "answer",
        "circles",
        "green",
        "how",
        "many",
        "Ünïcode",
        "日本",
        "😀",
        "x+1",
        "\n",
        "  ",
        "7",
        "picture",
    ]
    split = 0
    for _ in range(10_000):
        text = " ".join(words[i] for i in random.integers(0, len(words), random.integers(1, 5)))
        ids = adapter.tokenizer(text, add_special_tokens=False)["input_ids"]
        place = int(random.integers(len(ids)))
        for pair in table.pairs(ids[place])[:2]:
            split += 1
            again = [*ids[:place], *pair, *ids[place + 1 :]]
            assert adapter.tokenizer.decode(again) == adapter.tokenizer.decode(ids)
    assert split > 1000


def test_rows_get_longer_by_less_than_the_share_and_targets_follow(tiny_model, mixed_rows):
    adapter = tiny_model.adapter
    split = stochastok.Split(0.5, seed=3)
    grown = []
    for number, sample in enumerate(mixed_rows * 4):
        row = adapter.encode(sample)
        new = split(row, adapter, number)
        decode = adapter.tokenizer.decode
        assert decode(new.ids.tolist()) == decode(row.ids.tolist())
        assert decode(new.ids[new.train].tolist()) == decode(row.ids[row.train].tolist())
        assert torch.equal(new.positions, adapter.positions(new.ids, new.media))
        assert new.positions.shape == (adapter.position_axes, len(new))
        spared = torch.tensor([*adapter.tokenizer.all_special_ids, *adapter.media_token_ids])
        assert new.ids[torch.isin(new.ids, spared)].tolist() == row.ids[torch.isin(row.ids, spared)].tolist()
        grown.append((len(new) - len(row)) / len(row))
        assert torch.equal(split(row, adapter, number).ids, new.ids)
    assert 0 < np.mean(grown) < 0.5
    assert any(not torch.equal(split(adapter.encode(mixed_rows[3]), adapter, n).ids, new.ids) for n in (1, 2))


def test_a_share_of_nought_changes_nothing(tiny_model, mixed_rows):
    row = tiny_model.adapter.encode(mixed_rows[2])
    new = stochastok.Split(0.0)(row, tiny_model.adapter, 0)
    assert torch.equal(new.ids, row.ids)
    assert torch.equal(new.train, row.train)


@one_family
def test_marks_of_answers_stay_as_they_are(tiny_model):
    tokenizer = tiny_model.adapter.tokenizer
    table = stochastok.SplitTable(tokenizer, ())
    ids = tokenizer("so it is <answer>circles</answer> or \\boxed{circles}", add_special_tokens=False)["input_ids"]
    may = table.may_split(ids)
    kept = tokenizer.decode([token for token, flag in zip(ids, may, strict=True) if not flag])
    free = tokenizer.decode([token for token, flag in zip(ids, may, strict=True) if flag])
    for mark in ("<answer>", "</answer>", "\\boxed{"):
        assert mark in kept
    assert "circles" in free
    assert "answer" not in free


# -- CINGS -----------------------------------------------------------------------------------------------------------


def _grounded(context, *, marked=True):
    parts = (Part("text", context, train=not marked), Part("text", "So it is red."))
    return Sample("row", (Turn("user", (Part("text", "What colour is it?"),)), Turn("assistant", parts)))


def _trained(adapter, sample):
    row = adapter.encode(sample)
    return adapter.tokenizer.decode(row.ids[row.train].tolist(), skip_special_tokens=True).strip(), row


def test_only_the_response_trains_under_every_chat_template(tiny_model):
    adapter = tiny_model.adapter
    context = "The picture shows a red square. "
    said, row = _trained(adapter, _grounded(context))
    assert said == "So it is red."
    assert int(row.ids[row.train][-1]) in adapter.stop_token_ids or row.ids[row.train].numel() > 4
    assert context.strip() in adapter.tokenizer.decode(row.ids.tolist())
    # The context may be any other: no position of it is a target.
    other, changed = _trained(adapter, _grounded("Nothing is known of it, but people say that it is red. "))
    assert other == said
    assert changed.ids[changed.train].tolist() == row.ids[row.train].tolist()
    assert changed.ids.tolist() != row.ids.tolist()
    # Without the mark the context trains, too.
    both, _ = _trained(adapter, _grounded(context, marked=False))
    assert both.startswith("The picture shows")
    assert cings.preset().demo is not None


def test_a_message_part_is_marked_in_the_data():
    content = [
        {"type": "text", "text": "A fact. ", "train": False},
        {"type": "text", "text": "An "},
        {"type": "text", "text": "answer."},
    ]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
    row = DataRow({"messages": messages}, "rows.jsonl:1", 1)
    turns = read_turns(row, messages, column="messages")
    assert turns[1].parts == (Part("text", "A fact. ", train=False), Part("text", "An answer."))
    assert OWN_ROLES["assistant"] == turns[1].role
