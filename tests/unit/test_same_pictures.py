"""A picture in several prompts of a batch is prepared once and encoded once, with the numbers of doing it each time."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmpost.adapters import layout
from mmpost.adapters.layout import first_equal, pack
from mmpost.adapters.prepared import Prepared, content_key
from mmpost.config.schema import FullSettings
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Part, Sample, Turn
from mmpost.models import towers
from mmpost.models.policy import Policy
from mmpost.rollout.generate import Sampling, complete

one_family = pytest.mark.parametrize("family", ["qwen2.5-vl"])


def _ask(*parts):
    said = tuple(Part("text", part) if isinstance(part, str) else Part("image", ref=part) for part in parts)
    return Sample("", (Turn("user", said),), {}, "rows.jsonl:1")


@pytest.fixture
def samples(picture):
    """Five prompts with six pictures, of which three are distinct; two have the same size."""
    one, two, three = picture(60, 40, 1), picture(60, 40, 2), picture(100, 30, 3)
    return [
        _ask(one, "How many circles?"),
        _ask("And here:", one),
        _ask(two, "or", one, "?"),
        _ask("No picture"),
        _ask(three, two, "Compare"),
    ]


def _rows(adapter, samples):
    draw = np.random.default_rng(5)
    prompts = [adapter.encode_prompt(sample) for sample in samples]
    lengths = (4, 1, 7)
    return [(prompt, torch.from_numpy(draw.integers(20, 200, n))) for prompt in prompts for n in lengths]


def _tower(model, family):
    inner = model.policy.inner.model
    return inner.vision_model if family == "smolvlm" else inner.visual


def _watch(tower, family):
    """List that gets the number of patches (tiles) of each call of the tower."""
    seen = []

    def saw(module, args, kwargs):
        seen.append(len(kwargs["pixel_values"] if family == "smolvlm" else args[0]))

    tower.register_forward_pre_hook(saw, with_kwargs=True)
    return seen


def _units(adapter, encoded, family):
    """Patches (tiles) of a row's pictures."""
    return len(encoded.media["pixel_values"][0] if family == "smolvlm" else encoded.media["pixel_values"])


def _gradients(model, batch):
    model.policy.zero_grad(set_to_none=True)
    logp, _ = model.policy(batch)
    (logp * torch.arange(1, len(logp) + 1, dtype=logp.dtype) / len(logp)).sum().backward()
    return logp.detach(), {n: p.grad.clone() for n, p in model.policy.named_parameters() if p.grad is not None}


def _plain(batch):
    """The batch without a word about equal pictures, so that each is encoded."""
    inputs = {name: tensor for name, tensor in batch.inputs.items() if not name.startswith("same_")}
    return type(batch)(inputs, batch.row, batch.at, batch.target, batch.num_rows, batch.segments)


def test_the_tower_sees_each_distinct_picture_once(open_tiny, samples, picture, family):
    model = open_tiny()
    adapter = model.adapter
    seen = _watch(_tower(model, family), family)
    alone = [adapter.encode_prompt(_ask(picture(*size))) for size in ((60, 40, 1), (60, 40, 2), (100, 30, 3))]
    distinct = sum(_units(adapter, encoded, family) for encoded in alone)
    batch = pack(adapter, _rows(adapter, samples))
    model.policy(batch)
    assert seen == [distinct]
    model.policy(_plain(batch))
    prompts = [adapter.encode_prompt(sample) for sample in samples]
    assert seen[1] == sum(_units(adapter, prompt, family) for prompt in prompts if prompt.media) > distinct
    seen.clear()
    complete(model.policy, adapter, prompts, list(range(len(prompts))), n=3, sampling=Sampling(3), batch_size=64)
    assert seen == [distinct]


@pytest.mark.parametrize(("double", "limit"), [(False, 1e-5), (True, 1e-6)])
def test_log_probs_and_gradients_are_those_of_encoding_every_picture(open_tiny, samples, family, double, limit):
    # In float64, too, norms and rotary positions of the families compute in float32, which rounds now one way and now
    # the other; the hooks themselves are compared to 1e-12 below.
    model = open_tiny(peft=FullSettings(), double=double)
    batch = pack(model.adapter, _rows(model.adapter, samples))
    if double:
        inputs = {n: t.double() if t.is_floating_point() else t for n, t in batch.inputs.items()}
        batch = type(batch)(inputs, batch.row, batch.at, batch.target, batch.num_rows, batch.segments)
    shared, plain = _gradients(model, batch), _gradients(model, _plain(batch))
    assert (shared[0] - plain[0]).abs().max() <= limit * plain[0].abs().max()
    assert shared[1].keys() == plain[1].keys()
    tower = [name for name in plain[1] if "visual" in name or "vision_model" in name or "connector" in name]
    assert tower
    assert any(plain[1][name].abs().max() > 0 for name in tower)
    norm = torch.sqrt(sum((g**2).sum() for g in plain[1].values()))
    difference = torch.sqrt(sum(((g - shared[1][name]) ** 2).sum() for name, g in plain[1].items()))
    assert difference <= limit * norm


def test_rollouts_are_those_of_encoding_every_picture(open_tiny, samples, family, monkeypatch):
    model = open_tiny()
    prompts = [model.adapter.encode_prompt(sample) for sample in samples]
    uids = list(range(len(prompts)))
    options = {"n": 2, "sampling": Sampling(6, seed=3), "batch_size": 64}
    shared = complete(model.policy, model.adapter, prompts, uids, **options)
    monkeypatch.setattr(layout, "_same", lambda adapter, rows: {})
    plain = complete(model.policy, model.adapter, prompts, uids, **options)
    for one, two in zip([r for g in shared for r in g], [r for g in plain for r in g], strict=True):
        assert one.tokens.tolist() == two.tokens.tolist()
        assert np.abs(one.logp - two.logp).max() <= 1e-5


@one_family
def test_the_model_is_as_it_was_outside_of_the_call_and_for_a_second_policy(open_tiny, samples, family):
    model = open_tiny()
    batch = pack(model.adapter, _rows(model.adapter, samples))
    expected, _ = model.policy(batch)
    hooks = len(_tower(model, family)._forward_pre_hooks)
    again = Policy(model.policy.model)
    assert len(_tower(model, family)._forward_pre_hooks) == hooks == 1
    assert torch.equal(again(batch)[0], expected)
    assert torch.equal(copy.deepcopy(model.policy)(batch)[0], expected)
    # Nothing is left of an interrupted call.
    broken = {**batch.inputs, "pixel_values": batch.inputs["pixel_values"][:4]}
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        model.policy.hidden(broken)
    assert torch.equal(model.policy(_plain(batch))[0], model.policy(_plain(batch))[0])
    assert torch.equal(model.policy(batch)[0], expected)


class _Tower(torch.nn.Module):
    """A tower like Qwen-VL's that computes in float64: two patches make a feature of the picture they belong to."""

    spatial_merge_size = 1

    def __init__(self):
        super().__init__()
        self.first, self.deep = (torch.nn.Linear(5, 4, dtype=torch.float64) for _ in range(2))

    def forward(self, pixels, grid_thw):
        sizes = grid_thw.prod(-1).tolist()
        whole = torch.cat([part + part.mean(0) for part in pixels.split(sizes)])
        return SimpleNamespace(pooler_output=self.first(whole).tanh(), deepstack_features=[self.deep(whole).sin()])


class _Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = _Tower()

    @property
    def base_model(self):
        return self

    def forward(self, pixel_values, grid, pixel_values_videos, video_grid):
        outs = [self.visual(pixel_values, grid_thw=grid), self.visual(pixel_values_videos, grid_thw=video_grid)]
        return torch.cat([torch.cat([out.pooler_output, *out.deepstack_features], 1) for out in outs])


def test_hooks_give_the_numbers_and_gradients_of_encoding_everything_in_float64():
    torch.manual_seed(0)
    model = _Model()
    towers.install(model)
    sizes = [(1, 2, 3), (1, 2, 2), (1, 2, 3), (1, 1, 7), (1, 2, 2)]
    one, two, three = (torch.randn(n, 5, dtype=torch.float64) for n in (6, 4, 7))
    clips = torch.randn(8, 5, dtype=torch.float64)
    inputs = {"pixel_values": torch.cat([one, two, one, three, two]), "grid": torch.tensor(sizes)}
    inputs |= {"pixel_values_videos": clips.repeat(2, 1), "video_grid": torch.tensor([[2, 2, 2]] * 2)}
    seen = []
    model.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    weights = torch.randn(27 + 16, 8, dtype=torch.float64)
    found = []
    for said in ({}, {"same_image": torch.tensor([0, 1, 0, 3, 1])}, {"same_video": torch.tensor([0, 0])}):
        model.zero_grad()
        with towers.sharing({**inputs, **said}) as plain:
            out = model(**plain)
        (out * weights).sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    assert seen == [27, 16, 17, 16, 27, 8]
    for other in found[1:]:
        assert all((a - b).abs().max() <= 1e-12 * a.abs().max() for a, b in zip(found[0], other, strict=True))


@one_family
def test_rows_without_repeated_pictures_say_nothing(tiny_model, samples, picture, family):
    adapter = tiny_model.adapter
    rows = _rows(adapter, [samples[0], samples[3], _ask(picture(60, 40, 9), "x")])
    assert not [name for name in pack(adapter, rows).inputs if name.startswith("same_")]


# -- preparing -------------------------------------------------------------------------------------------------------


def test_the_processor_sees_each_distinct_picture_once(open_adapter, samples, family, monkeypatch):
    adapter = open_adapter()
    fresh = open_adapter()
    kind = type(adapter.processor.image_processor)
    seen = []
    call = kind.preprocess

    def counted(self, images, *args, **kwargs):
        flat = images if not isinstance(images[0], list) else [one for row in images for one in row]
        if self is adapter.processor.image_processor:
            seen.append(len(flat))
        return call(self, images, *args, **kwargs)

    monkeypatch.setattr(kind, "preprocess", counted)
    encoded = [adapter.encode_prompt(sample) for sample in samples]
    assert sum(seen) == 3
    for row, sample in zip(encoded, samples, strict=True):
        monkeypatch.setattr(fresh, "prepared", Prepared())
        alone = fresh.encode_prompt(sample)
        assert torch.equal(row.ids, alone.ids)
        assert torch.equal(row.positions, alone.positions)
        assert row.media.keys() == alone.media.keys()
        assert all(torch.equal(row.media[name], alone.media[name]) for name in row.media)


def test_keys_are_those_of_the_content(tmp_path, picture):
    first, second = picture(8, 8, 1), picture(8, 8, 2)
    (tmp_path / "a.png").write_bytes(first)
    (tmp_path / "b.png").write_bytes(first)
    (tmp_path / "c.png").write_bytes(second)
    key = content_key("image", first)
    assert content_key("image", str(tmp_path / "a.png")) == content_key("image", f"file://{tmp_path}/b.png") == key
    assert content_key("image", str(tmp_path / "c.png")) != key
    assert content_key("audio", first) != key
    sounds = [content_key("audio", str(tmp_path / name)) for name in ("a.png", "b.png", "a.png")]
    assert sounds[0] == sounds[2] != sounds[1]
    (tmp_path / "a.png").write_bytes(second + b"longer")
    assert content_key("audio", str(tmp_path / "a.png")) != sounds[0]
    assert content_key("image", "data:image/png;base64,AAAA") != content_key("image", "data:image/png;base64,AAAB")


class _Item:
    size = (10, 10)


def test_the_oldest_media_leave_first_and_bytes_are_counted():
    kept = Prepared(limit=2000)
    items = {name: kept.item((name,), _Item) for name in "ab"}
    assert kept.item(("a",), _Item) is items["a"]
    made = []

    def make():
        made.append(1)
        return {"x": torch.zeros(300, dtype=torch.float32)}

    assert kept.tensors(items["a"], make) is kept.tensors(items["a"], make)
    assert len(made) == 1
    # 600 bytes of items and 1200 of a's tensors; c pushes out b, which was not asked for last.
    kept.item(("c",), _Item)
    assert kept.item(("a",), _Item) is items["a"]
    assert kept.item(("b",), _Item) is not items["b"]
    # What is no longer known is made each time.
    stranger = _Item()
    assert kept.tensors(stranger, make) is not kept.tensors(stranger, make)


def test_a_medium_that_cannot_be_loaded_leaves_nothing_behind():
    kept = Prepared()

    def fail():
        raise MmpostError("MMP-D008", "damaged", "mend it")

    for _ in range(2):
        with pytest.raises(MmpostError):
            kept.item(("x",), fail)
    assert isinstance(kept.item(("x",), _Item), _Item)


def test_equal_tensors_are_found_by_all_of_their_values():
    base = torch.zeros(1000)
    other = base.clone()
    other[501] = 1e-30
    shaped = base.view(10, 100)
    assert first_equal([base, other, base.clone(), shaped, other, torch.ones(1000)]) == [0, 1, 0, 3, 1, 5]
    assert first_equal([]) == []
