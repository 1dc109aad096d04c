"""Demonstrations: where they come from, and which of their positions train."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmpost.core.errors import MmpostError
from mmpost.core.sample import Part, Sample, Turn
from mmpost.train import demos
from mmpost.train.distributed import Processes
from mmpost.train.method import Method
from mmpost.train.parts import Parts
from mmpost.train.rows import Row, RowStream
from mmpost.train.sources import Demonstrations

one_family = pytest.mark.parametrize("family", ["qwen2.5-vl"])


def test_a_demonstration_is_the_answer_that_fine_tuning_trains(tiny_model, mixed_rows):
    adapter = tiny_model.adapter
    for sample in mixed_rows:
        whole = adapter.encode(sample, loss_on="last_assistant")
        prompt = demos.set_aside(sample)
        assert prompt.turns == sample.prompt().turns
        answer = demos.demonstration(adapter, prompt)
        assert answer.text == sample.turns[-1].text
        assert answer.tokens.tolist() == whole.ids[whole.train].tolist()
        joined = adapter.encode_prompt(prompt).with_completion(torch.from_numpy(answer.tokens))
        length = len(joined)
        assert joined.ids.tolist() == whole.ids[:length].tolist()
        assert torch.equal(joined.positions, whole.positions[:, :length])


def test_where_demonstrations_come_from():
    user, said = Turn("user", (Part("text", "?"),)), Turn("assistant", (Part("text", "an answer"),))
    assert demos.text_of(demos.set_aside(Sample("a", (user, said)))) == "an answer"
    assert demos.text_of(Sample("a", (user,), {"solution_text": "long"})) == "long"
    assert demos.text_of(demos.set_aside(Sample("a", (user, said), {"demonstration": "other"}))) == "other"
    assert demos.text_of(Sample("a", (user,), {"demonstration": " "})) is None
    assert demos.text_of(demos.set_aside(Sample("a", (user,)))) is None
    with pytest.raises(MmpostError) as error:
        demos.check_some([Sample("a", (user,))], "hpt")
    assert str(error.value) == (
        "preset 'hpt' trains on demonstrations, but none of 1 rows has one. "
        "End rows with the assistant's answer, or give them a column demonstration. [MMP-D041]"
    )


# -- demonstrations of a file ----------------------------------------------------------------------------------------


@one_family
def test_pruned_positions_leave_the_loss_and_its_counts(tiny_model, mixed_rows):
    stream = RowStream([mixed_rows], [1.0], tiny_model.adapter.encode, count=5, rank=0, world=1, seed=1)

    def keep(table):
        # Every second position; nothing of the first row.
        masks = [np.arange(len(logp)) % 2 == 0 for logp in table["logp"]]
        masks[0][:] = False
        return masks

    seen = []

    def measure(rows):
        seen.append([row.num_trained for row in rows])
        return [(np.zeros(row.num_trained), np.zeros(row.num_trained)) for row in rows]

    method = Method(demo=Parts(), keep=keep)
    source = Demonstrations(
        stream, num_samples=0, method=method, processes=Processes(bf16=False, cpu=True), measure=measure
    )
    (update,) = source.updates()
    sizes = seen[0][1:]
    assert [row.num_trained for row in update.rows] == [(size + 1) // 2 for size in sizes]
    assert update.demo_row_count == 4
    assert update.demo_positions == sum((size + 1) // 2 for size in sizes)
    assert update.metrics["kept_rows"] == pytest.approx(0.8)
    for row in update.rows:
        assert row.encoded.ids[row.encoded.train].tolist()


@one_family
def test_rows_can_be_changed_before_they_train(tiny_model, mixed_rows):
    stream = RowStream([mixed_rows], [1.0], tiny_model.adapter.encode, count=2, rank=0, world=1, seed=1)
    numbers = []

    def encode(row, adapter, number):
        assert adapter is tiny_model.adapter
        numbers.append(number)
        return replace(row, train=torch.zeros_like(row.train)) if number == 0 else row

    source = Demonstrations(
        stream, num_samples=0, method=Method(demo=Parts(), encode=encode), adapter=tiny_model.adapter
    )
    (update,) = source.updates()
    assert numbers == [0, 1]
    assert len(update.rows) == update.demo_row_count == 1
    assert all(isinstance(row, Row) and row.demo for row in update.rows)
