"""Prompts that are encoded together: sounds are decoded ahead, and nothing else changes."""

import io

import pytest
import torch

from mmpost.adapters.prepared import Prepared
from mmpost.config.schema import ModelSection
from mmpost.core.errors import MmpostError
from mmpost.media import audio
from mmpost.models.load import load
from tests.unit.clips import wav
from tests.unit.test_adapters_audio import row, rows, soundfile, turn


def flac(seconds, seed):
    samples, rate = soundfile.read(io.BytesIO(wav(seconds, seed)), dtype="float32")
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format="FLAC")
    return out.getvalue()


@pytest.fixture
def adapter(tiny_folder):
    section = ModelSection(model_name_or_path=str(tiny_folder("qwen2-audio")))
    return load(section, peft=None, device=torch.device("cpu")).adapter


def prompts():
    clips = [flac(0.3 + 0.1 * number, number) for number in range(6)]
    alone = [row(turn("user", clip, "How many?"), origin=f"a.jsonl:{number}") for number, clip in enumerate(clips)]
    return [*(one.prompt() for one in rows()), *alone, row(turn("user", clips[0], "and", clips[5])), *alone[:2]]


def test_prompts_together_are_prompts_one_by_one(adapter):
    together = adapter.encode_prompts(prompts())
    adapter.prepared = Prepared()
    one_by_one = [adapter.encode_prompt(sample) for sample in prompts()]
    assert len(together) == len(one_by_one) == 13
    for ours, theirs in zip(together, one_by_one, strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.positions, theirs.positions)
        assert ours.media.keys() == theirs.media.keys()
        assert all(torch.equal(ours.media[name], theirs.media[name]) for name in ours.media)


def test_each_sound_is_decoded_once_and_none_by_the_encoding(adapter, monkeypatch):
    decoded = []
    plain_load = audio.load

    def count(ref, **options):
        decoded.append(ref)
        return plain_load(ref, **options)

    monkeypatch.setattr(audio, "load", count)
    clips = [flac(0.3, number) for number in range(8)]
    adapter.encode_prompts([row(turn("user", clip, "How many?")) for clip in clips])
    assert sorted(decoded) == sorted(clips)


def test_an_error_names_its_row_and_is_told_when_its_turn_comes(adapter):
    cut = flac(1.0, 1)[:2000]
    bad = row(turn("user", cut, "And this?"), origin="rows.jsonl:9")
    good = row(turn("user", flac(0.4, 2), "How many?"))
    for processes in (1, 3):
        adapter.section = adapter.section.model_copy(update={"decode_processes": processes})
        with pytest.raises(MmpostError, match=r"rows\.jsonl:9") as caught:
            adapter.encode_prompts([good, good, bad, good])
        with pytest.raises(MmpostError) as alone:
            adapter.encode_prompt(bad)
        assert str(caught.value) == str(alone.value)
    assert adapter.encode_prompts([good])[0].ids.numel() > 0
