"""T-GRPO: the gate, the bonuses worked out by hand, when they change nothing, and the scrambled copy of a film."""

import numpy as np
import pytest
import torch

from mmpost.algos import t_grpo
from mmpost.api.method import open_method
from mmpost.config.run import GRPOConfig
from mmpost.config.schema import GrpoSection, RewardSpec
from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Group, Rollout
from mmpost.core.sample import Part, Sample, Turn
from mmpost.core.seeding import generator
from mmpost.rewards.score import Reward
from mmpost.train.completions import Completions
from mmpost.train.contrast import NOTE
from mmpost.train.desk import SCRAMBLED_FROM
from mmpost.train.distributed import Processes
from mmpost.train.method import Scored
from mmpost.train.rows import RowStream
from mmpost_tasks.demo_video import animated_png

VARIANTS = ("paper", "released")
one_family = pytest.mark.parametrize("family", ["qwen2.5-vl"])


def rollout(accuracy, form=0.0, length=2):
    tokens = np.zeros(length, dtype=np.int64)
    parts = {"accuracy": accuracy, "form": form}
    total = None if accuracy is None else accuracy + form
    return Rollout(tokens, np.zeros(length, np.float32), "", False, parts, total)


def group(*rollouts, note=None):
    return Group(Sample("a", ()), list(rollouts), 0, {NOTE: note} if note is not None else {})


def some(right, count):
    return [rollout(float(i < right)) for i in range(count)]


@pytest.mark.parametrize(
    ("right", "scrambled", "paper", "released"),
    [((4, 8), (5, 8), False, True), ((8, 8), (4, 4), True, True), ((0, 8), (0, 4), True, True),
     ((2, 5), (4, 8), False, True), ((3, 8), (2, 4), False, False)],
)  # fmt: skip
def test_the_gate_opens_where_the_order_helps(right, scrambled, paper, released):
    for variant, opens in zip(VARIANTS, (paper, released), strict=True):
        note = t_grpo.preset(variant=variant).draw.note(some(*right), some(*scrambled))
        assert note == {"ordered": right[0] / right[1], "scrambled": scrambled[0] / scrambled[1], "opens": opens}


def test_graded_scores_are_counted_in_the_paper_and_averaged_in_the_release():
    ordered, scrambled = [rollout(0.6), rollout(0.2)], [rollout(0.4), rollout(None)]
    notes = {variant: t_grpo.preset(variant=variant).draw.note(ordered, scrambled) for variant in VARIANTS}
    assert notes["paper"] == {"ordered": 0.5, "scrambled": 0.0, "opens": True}
    assert notes["released"] == {"ordered": pytest.approx(0.4), "scrambled": 0.4, "opens": True}
    assert t_grpo.preset().draw.note(ordered, []) is None
    assert t_grpo.preset().draw.note(ordered, [rollout(None)]) is None
    assert t_grpo.preset(accuracy="form").draw.score(rollout(0.6, 0.3)) == 0.3


def test_bonuses_by_hand():
    rollouts = [rollout(1.0, 1.0), rollout(0.0, 1.0), rollout(1.0, 0.0, length=320), rollout(None), rollout(0.3)]
    for variant, expected in (
        ("paper", [2.3, 1.0, 1.5, None, 0.3]),  # 0.3 is not right
        ("released", [2.3, 1.0, 1.5, None, 0.6]),
    ):
        (shape,) = t_grpo.preset(variant=variant).shape
        assert shape(group(*rollouts, note={"opens": True})) == pytest.approx(expected)
    (shape,) = t_grpo.preset().shape
    closed = [2.0, 1.0, 1.2, None, 0.3]
    assert shape(group(*rollouts, note={"opens": False})) == pytest.approx(closed)
    assert shape(group(*rollouts)) == pytest.approx(closed)  # a prompt without a film


@pytest.mark.parametrize(("length", "paid"), [(319, 0.0), (320, 0.2), (512, 0.2), (513, 0.0)])
def test_the_bonus_of_length_has_its_borders_and_the_release_pays_it_to_no_single_answer(length, paid):
    lone = group(rollout(1.0, length=length), rollout(0.0))
    two = group(rollout(1.0, length=length), rollout(1.0))
    paper, released = (t_grpo.preset(variant=variant).shape[0] for variant in VARIANTS)
    assert paper(lone)[0] == released(two)[0] == pytest.approx(1.0 + paid)
    assert released(lone)[0] == 1.0


def advantages(method, rollouts):
    scores = method.shape[0](group(*rollouts, note={"opens": True}))
    plain = [one.score for one in rollouts]
    (with_bonus,), (without,) = (
        method.advantage([Scored(0, "a", tuple(values), (2,) * len(values), (False,) * len(values))], {})
        for values in (scores, plain)
    )
    return np.abs(with_bonus - without).max()


def test_two_values_of_the_reward_make_the_bonus_nothing_unless_the_deviation_stays():
    two = [rollout(float(i < 3), 1.0) for i in range(8)]
    assert advantages(t_grpo.preset(), two) < 1e-3
    assert advantages(t_grpo.preset(std=False), two) > 0.1
    varied = [rollout(float(i < 3), float(i % 2)) for i in range(8)]
    assert advantages(t_grpo.preset(), varied) > 0.01


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(ValueError, match="share"):
        t_grpo.preset(share=share)


def film(levels):
    """Frames of one brightness each, two a second."""
    return animated_png(np.stack([np.full((56, 56), level, np.uint8) for level in levels]), 500)


def asked(levels, number=0, words="When?"):
    parts = [Part("video", ref=film(levels))] if levels else []
    return Sample(f"r{number}", (Turn("user", (*parts, Part("text", words))),), {}, f"rows.jsonl:{number + 1}")


def brightness(adapter, encoded):
    """Order of the frames by their mean pixels."""
    pair, patch = adapter.config.vision_config.temporal_patch_size, adapter.config.vision_config.patch_size
    frames = int(encoded.media["video_grid_thw"][0, 0])
    pixels = encoded.media["pixel_values_videos"].view(frames, -1, 3, pair, patch, patch)
    return pixels.mean((1, 2, 4, 5)).flatten()


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_a_scrambled_film_has_the_same_frames_and_times_in_another_order(tiny_model, family):
    adapter, sample = tiny_model.adapter, asked([10, 50, 90, 130, 170, 210])
    plain, other = (
        adapter.encode_prompt(sample),
        adapter.encode_scrambled(sample, generator(0, "test", 1)),
    )
    assert torch.equal(plain.ids, other.ids)  # also the times that Qwen3-VL writes
    assert torch.equal(plain.positions, other.positions)
    assert set(plain.media) == set(other.media)
    assert all(torch.equal(plain.media[name], other.media[name]) for name in plain.media if "pixel" not in name)
    levels = [brightness(adapter, encoded) for encoded in (plain, other)]
    assert torch.equal(levels[0], levels[0].sort().values)
    assert not torch.equal(levels[1], levels[0])
    torch.testing.assert_close(levels[1].sort().values, levels[0])
    # Frames, not pairs of them, change places: some pair is new.
    pairs = [{tuple(sorted(pair)) for pair in one.view(-1, 2).tolist()} for one in levels]
    assert pairs[0] != pairs[1]


def test_scrambling_depends_on_its_generator_alone_and_needs_a_film(tiny_model, family):
    adapter = tiny_model.adapter
    assert adapter.encode_scrambled(asked([]), generator(0, "test", 1)) is None
    if family == "smolvlm":
        return
    sample = asked([10, 50, 90, 130, 170, 210])
    found = [adapter.encode_scrambled(sample, generator(0, "test", key)) for key in (1, 1, 2)]
    pixels = [encoded.media["pixel_values_videos"] for encoded in found]
    assert torch.equal(pixels[0], pixels[1])
    assert not torch.equal(pixels[0], pixels[2])


class Watcher:
    """An engine that sees whether frames are in order: 3 of 4 right if they are, else as it is told."""

    name, exact, version, unknown = "watcher", True, None, 0

    def __init__(self, adapter, by_chance):
        self.adapter, self.by_chance, self.asked = adapter, by_chance, []

    def complete(self, prompts, *, n, sampling, first_generation=0):
        out = []
        for prompt, first in zip(prompts, first_generation, strict=True):
            is_film = "video_grid_thw" in prompt.encoded.media
            ordered = not is_film or bool((brightness(self.adapter, prompt.encoded).diff() > 0).all())
            self.asked.append((prompt.uid, int(first), n, ordered))
            right = 3 * n // 4 if ordered else self.by_chance
            out.append([self._rollout(float(g < right)) for g in range(n)])
        return out

    def _rollout(self, right):
        return Rollout(np.array([5, 6]), np.zeros(2, np.float32), "yes" if right else "no", False)

    def sync(self, policy, version):
        self.version = version

    def close(self):
        pass


def accuracy(prompts, completions, **columns):
    return [float(completion[0]["content"] == "yes") for completion in completions]


def source(model, samples, method, engine):
    processes = Processes(bf16=False, cpu=True)
    stream = RowStream([samples], [1.0], model.adapter.encode_prompt, count=len(samples), rank=0, world=1, seed=5)
    return Completions(
        stream,
        policy=model.policy,
        adapter=model.adapter,
        rewards=[Reward("accuracy", accuracy, RewardSpec(name="accuracy"))],
        section=GrpoSection(num_generations=4, max_completion_length=8),
        method=method,
        processes=processes,
        log_probs=lambda rows: [np.zeros(row.num_trained, np.float32) for row in rows],
        seed=5,
        num_samples=0,
        engine=engine,
    )


@one_family
@pytest.mark.parametrize(("by_chance", "opens"), [(1, True), (2, False)])
def test_a_step_asks_about_scrambled_films_and_trains_on_ordered_ones(tiny_model, by_chance, opens):
    samples = [asked([10, 50, 90, 130, 170, 210], i) for i in range(3)] + [asked([], 3, "Hi")]
    engine = Watcher(tiny_model.adapter, by_chance)
    (update,) = source(tiny_model, samples, t_grpo.preset(std=False), engine).updates()
    films = [uid for uid, first, _, ordered in engine.asked if not ordered]
    assert sorted(engine.asked) == sorted(
        [(uid, 0, 4, True) for uid in range(4)] + [(uid, SCRAMBLED_FROM, 2, False) for uid in films]
    )
    assert len(set(films)) == 3
    # Scores 1, 1, 1, 0 and the bonus, minus their mean; the row without a film has none.
    with_bonus, plain = ([value / 4] * 3 + [-3 * value / 4] for value in (1.3 if opens else 1.0, 1.0))
    found = [row.advantage for row in update.rows]
    assert sorted(found) == pytest.approx(sorted(with_bonus * 3 + plain))
    assert update.row_count == 16
    expected = {"ordered": 0.75, "scrambled": by_chance / 2, "gate": float(opens), "gate_at_zero": 0.0}
    assert update.metrics["draw"] == expected
    assert update.metrics["reward"]["total"] == 0.75  # of the completions that train


@one_family
def test_rows_without_films_make_a_plain_step(tiny_model):
    engine = Watcher(tiny_model.adapter, 0)
    (update,) = source(tiny_model, [asked([], i, f"Hi {i}") for i in range(2)], t_grpo.preset(), engine).updates()
    assert len(engine.asked) == 2  # the call for scrambled films has no prompts
    assert "draw" not in update.metrics


def test_an_engine_that_reads_files_itself_is_refused():
    config = GRPOConfig.model_validate({"loss": {"preset": "t_grpo"}, "rollout": {"engine": "vllm"}})
    with pytest.raises(MmpostError, match=r"needs completions of films with shuffled frames") as caught:
        open_method(config)
    assert caught.value.code == "MMP-C036"
    assert open_method(config.model_copy(update={"rollout": GRPOConfig().rollout})).draw.share == 0.5
