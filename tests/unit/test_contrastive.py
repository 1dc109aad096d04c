"""TeminAL: the loss against plain loops, scenes and their captions, chance levels of ZSTE, and what toys learn."""

import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from mmpost.contrastive import teminal
from mmpost.contrastive.loss import Embedded, True_, Weights, temporal_nce
from mmpost.contrastive.scenes import RELATIONS, Scene, draw, heard, matches
from mmpost.contrastive.zste import zste
from mmpost.core.errors import MmpostError

NAMES = ["bell", "dog", "rain", "saw"]


def embedded(count, seed, dim=5):
    rng = torch.Generator().manual_seed(seed)
    return Embedded(
        *(
            nn.functional.normalize(torch.randn(count, dim, generator=rng, dtype=torch.float64), dim=-1)
            for _ in range(2)
        )
    )


def nothing_else(count):
    return True_(torch.eye(count, dtype=torch.bool), torch.zeros(count, count, dtype=torch.bool))


def test_without_reverses_it_is_the_symmetric_info_nce_of_clap():
    batch = embedded(6, 0)
    cosines, target = batch.audio @ batch.text.T, torch.arange(6)
    halves = [nn.functional.cross_entropy(logits, target) for logits in (7.0 * cosines, 3.0 * cosines.T)]
    expected = sum(halves) / 2
    found = temporal_nce(batch, None, (7.0, 3.0), nothing_else(6), Weights(0, 0, 0))
    assert abs(float(found - expected)) < 1e-12


def by_hand(forward, reverse, true, weights):
    """The equation as it is written, with loops."""
    count, total = len(forward.audio), 0.0
    for side, scale in (("audio", 4.0), ("text", 2.5)):
        mine, theirs = getattr(forward, side), getattr(forward, "text" if side == "audio" else "audio")
        turned = getattr(reverse, "text" if side == "audio" else "audio")
        plain, crossed = (t if side == "audio" else t.T for t in (true.plain, true.crossed))
        for i in range(count):
            above = math.exp(scale * float(mine[i] @ theirs[i]))
            below = above
            for j in range(count):
                if j != i and not plain[i, j]:
                    below += math.exp(scale * float(mine[i] @ theirs[j]))
                if not crossed[i, j]:
                    alpha = weights.alpha_same if i == j else weights.alpha_cross
                    below += alpha * math.exp(scale * float(mine[i] @ turned[j]))
            total -= math.log(above / below) / (2 * count)
    return total


@pytest.mark.parametrize(
    "weights", [Weights(), Weights(10, 0, 0), Weights(0, 0.5, 0), Weights(0, 0, 2), Weights(3, 2, 1)]
)
@pytest.mark.parametrize("same", [False, True])
def test_the_loss_is_its_equation(weights, same):
    scenes = draw(NAMES, 7, "B", random=np.random.default_rng(1))
    turned = [scene.reversed() for scene in scenes]
    true = nothing_else(7)
    if same:
        true = True_(torch.from_numpy(matches(scenes, scenes)), torch.from_numpy(matches(scenes, turned)))
        assert true.plain.sum() > 7  # the same scene twice
        assert true.crossed.diagonal().any()  # a scene without order
    forward, reverse = embedded(7, 1), embedded(7, 2)
    expected = by_hand(forward, reverse, true, weights)
    expected += weights.beta * by_hand(reverse, forward, true, weights)
    assert float(temporal_nce(forward, reverse, (4.0, 2.5), true, weights)) == pytest.approx(expected, abs=1e-10)


def test_two_scenes_worked_out_on_paper():
    # Scene 1 and 2 at right angles, each reverse opposite to its scene; scale ln 2, all weights 1, no beta:
    # own 2; the other 1; own reverse 1/2; the other's reverse 1. L = log(4.5 / 2) both ways.
    axes = torch.eye(2, dtype=torch.float64)
    forward, reverse = Embedded(axes, axes), Embedded(-axes, -axes)
    found = temporal_nce(forward, reverse, (math.log(2),) * 2, nothing_else(2), Weights(1, 1, 0))
    assert float(found) == pytest.approx(math.log(4.5 / 2), abs=1e-12)
    with_beta = temporal_nce(forward, reverse, (math.log(2),) * 2, nothing_else(2), Weights(1, 1, 1))
    assert float(with_beta) == pytest.approx(2 * math.log(4.5 / 2), abs=1e-12)


def test_captions_and_what_they_mean():
    before, after = Scene("rain", "before", "bell"), Scene("bell", "after", "rain")
    assert [before.caption, after.caption, Scene("rain").caption] == ["rain before bell", "bell after rain", "rain"]
    assert before.meaning == after.meaning
    assert before.order == after.order == ("rain", "bell")
    assert before.reversed() == Scene("bell", "before", "rain")
    assert after.reversed().order == ("bell", "rain")
    assert Scene("rain", "while", "bell").meaning == Scene("bell", "while", "rain").meaning
    assert Scene("rain", "while", "bell").reversed() == Scene("rain", "while", "bell")
    for one, two in itertools.combinations(
        [before, before.reversed(), Scene("rain"), Scene("rain", "while", "bell")], 2
    ):
        assert one.meaning != two.meaning


def test_reversing_twice_is_nothing_and_once_is_something_for_an_order():
    for scene in draw(NAMES, 60, "A", random=np.random.default_rng(0)):
        assert scene.reversed().reversed() == scene
        assert (scene.reversed().meaning != scene.meaning) == (scene.relation in ("before", "after"))


def test_sounds_are_equally_loud_and_do_not_clip():
    rng = np.random.default_rng(0)
    sounds = {"a": (0.01 * rng.normal(size=400)).astype(np.float32), "b": rng.normal(size=300).astype(np.float32)}
    played = heard(Scene("a", "before", "b"), sounds)
    loudness = [np.sqrt(np.mean(played[part] ** 2)) for part in (slice(0, 400), slice(400, 700))]
    assert loudness[0] == pytest.approx(loudness[1], rel=1e-4)
    assert np.array_equal(played, heard(Scene("b", "after", "a"), sounds))
    both = heard(Scene("a", "while", "b"), sounds)
    assert len(both) == 300
    assert np.allclose(both, heard(Scene("b", "while", "a"), sounds), atol=1e-6)
    for some in (played, both, heard(Scene("a"), sounds)):
        assert np.abs(some).max() == pytest.approx(0.9)
    assert np.array_equal(heard(Scene("a"), {"a": np.zeros(5, np.float32)}), np.zeros(5))


def scenes_of(count, seed=0, names=NAMES):
    return draw(names, count, "A", random=np.random.default_rng(seed))


def test_random_scores_are_at_chance():
    rng = np.random.default_rng(0)
    found = zste(lambda sounds, captions: rng.normal(size=(len(sounds), len(captions))), scenes_of(4000), NAMES)
    assert list(found) == ["1", "2A", "2B", "2C", "2D", "3", "4", "5"]
    chances = {"1": 1 / 4, "2A": 1 / 6, "2B": 1 / 4, "2C": 1 / 4, "2D": 1 / 2, "3": 1 / 3, "4": 1 / 2, "5": 1 / 4}
    for name, chance in chances.items():
        assert found[name]["chance"] == pytest.approx(chance)
        assert abs(found[name]["accuracy"] - chance) < 4 * math.sqrt(chance * (1 - chance) / found[name]["n"]), name


def test_a_model_that_knows_is_right_and_one_that_is_blind_to_order_is_not():
    def words(text):
        return set(text.split()) - {"before", "after", "while"}

    def knows(sounds, captions):
        named = np.array(
            [[len(words(c) & set(s.order)) - len(words(c) - set(s.order)) for c in captions] for s in sounds]
        )
        true = np.array([[s.meaning in meanings(c) for c in captions] for s in sounds])
        return named + 10.0 * true

    def meanings(caption):
        parts = caption.split()
        return [Scene(*parts).meaning] if len(parts) == 3 else [Scene(caption).meaning]

    def blind(sounds, captions):
        return np.array([[float(len(words(c) & set(s.order))) for c in captions] for s in sounds])

    known, unknown = (zste(model, scenes_of(300), NAMES) for model in (knows, blind))
    assert [known[name]["accuracy"] for name in ("1", "2A", "2D", "3", "4", "5")] == [1.0] * 6
    assert unknown["4"]["accuracy"] == unknown["5"]["accuracy"] == 0.0
    assert unknown["2A"]["accuracy"] == 1.0


def test_too_few_classes_are_refused():
    with pytest.raises(ValueError, match="3 classes"):
        zste(lambda sounds, captions: np.zeros((1, 1)), scenes_of(4), NAMES[:3])


class Halves(nn.Module):
    """Towers that hear the two halves of a sound, or their sum, and read three words."""

    def __init__(self, names, *, blind=False, dim=64):
        super().__init__()
        self.names, self.blind = [*names, *RELATIONS, ""], blind
        self.words = nn.Embedding(len(self.names), 16)
        self.listen = nn.Sequential(nn.Linear(32, dim), nn.ReLU(), nn.Linear(dim, 32))
        self.read = nn.Sequential(nn.Linear(48, dim), nn.ReLU(), nn.Linear(dim, 32))

    def audio(self, waveforms):
        halves = torch.tensor(np.stack(waveforms)).view(-1, 2, 16)
        halves = halves.sum(1, keepdim=True).expand(-1, 2, -1) if self.blind else halves
        return nn.functional.normalize(self.listen(halves.flatten(1)), dim=-1)

    def text(self, captions):
        ids = [[self.names.index(word) for word in [*caption.split(), "", ""][:3]] for caption in captions]
        return nn.functional.normalize(self.read(self.words(torch.tensor(ids)).flatten(1)), dim=-1)

    def scales(self):
        return 14.0, 14.0

    def groups(self):
        return [*self.listen.parameters(), *self.read.parameters()], [*self.words.parameters()]


def prototypes(count, seed):
    rng = np.random.default_rng(seed)
    return {f"s{i}": [rng.normal(size=16).astype(np.float32)] for i in range(count)}


def order_accuracy(towers, sounds, seed=99):
    # Scenes in order alone: overlaid and single sounds of these toys have one half.
    scenes = [
        Scene(first, relation, second)
        for (first, second), relation in zip(
            (np.random.default_rng(seed + i).permuted(sorted(sounds))[:2] for i in range(300)),
            itertools.cycle(("before", "after")),
            strict=False,
        )
    ]

    return zste(teminal.similarity(towers, sounds), scenes, sorted(sounds))["4"]["accuracy"]


def fit(alpha, seed, *, steps=100, blind=False):
    torch.manual_seed(seed)
    sounds = prototypes(50, seed)
    towers = Halves(sounds, blind=blind)
    stage = teminal.Stage("B", steps, 64, 3e-3, 3e-3, Weights(alpha, alpha, 0.0))
    teminal.train(towers, sounds, stage, seed=seed)
    return order_accuracy(towers, sounds)


@pytest.fixture
def in_order(monkeypatch):
    """Stage B without overlaid sounds, whose toys have one half."""
    plain = teminal.draw

    def ordered(names, count, stage, **options):
        scenes = plain(names, count, stage, **options)
        return [Scene(s.first, "before" if s.relation == "while" else s.relation, s.second) for s in scenes]

    monkeypatch.setattr(teminal, "draw", ordered)


@pytest.mark.slow
def test_reversed_negatives_teach_the_order_sooner(in_order):
    plain, strong = (np.mean([fit(alpha, seed) for seed in range(3)]) for alpha in (0.0, 10.0))
    sys.stdout.write(f"order accuracy after 100 steps: plain {plain:.3f}, alpha 10 {strong:.3f}\n")
    assert strong >= plain + 0.03


@pytest.mark.slow
def test_towers_that_add_the_halves_never_know_the_order(in_order):
    assert fit(10.0, 0, blind=True) < 0.56


@pytest.fixture
def clap():
    """A tiny ``ClapModel`` with its real feature extractor, and tones of six pitches."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor, PreTrainedTokenizerFast

    names = [*NAMES, "owl", "horn"]
    words = {word: i for i, word in enumerate(["[UNK]", "[PAD]", *names, *RELATIONS])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")
    extractor = ClapFeatureExtractor(
        feature_size=16, sampling_rate=4000, hop_length=64, max_length_s=1, fft_window_size=256, padding="pad",
        truncation="rand_trunc",
        frequency_min=50, frequency_max=2000,
    )  # fmt: skip
    small = {"hidden_size": 32, "hidden_dropout_prob": 0.0}
    text = {
        "vocab_size": len(words), "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 16, "pad_token_id": 1, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    audio = {
        "spec_size": 64, "num_mel_bins": 16, "patch_size": 4, "patch_stride": [4, 4], "patch_embeds_hidden_size": 16,
        "depths": [1, 1], "num_attention_heads": [2, 2], "window_size": 8, "num_classes": 4, "enable_fusion": False,
        "aff_block_r": 2, "drop_path_rate": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = ClapModel(ClapConfig(text_config=text | small, audio_config=audio | small, projection_dim=32))
    times = np.arange(1600) / 4000
    pitches = zip(names, (150, 300, 500, 800, 1200, 1700), strict=True)
    sounds = {
        name: [np.sin(2 * np.pi * pitch * times + phase).astype(np.float32) for phase in range(3)]
        for name, pitch in pitches
    }
    return teminal.Clap(model, ClapProcessor(extractor, tokenizer)), sounds


def test_without_reverses_the_loss_is_that_of_the_logits_of_transformers(clap):
    towers, sounds = clap
    towers.model.eval()
    scenes = [
        Scene("bell"),
        Scene("dog", "before", "rain"),
        Scene("saw", "while", "owl"),
        Scene("rain", "after", "horn"),
    ]
    random = np.random.default_rng(0)
    with torch.no_grad():
        ours = teminal.batch_loss(towers, scenes, sounds, Weights(0, 0, 0), random)
        random = np.random.default_rng(0)
        played = [heard(s, {name: sounds[name][int(random.integers(3))] for name in s.order}) for s in scenes]
        inputs = towers.extractor(played, sampling_rate=4000, return_tensors="pt")
        tokens = towers.tokenizer([s.caption for s in scenes], padding=True, return_tensors="pt")
        theirs = towers.model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], return_loss=True, **inputs
        )
    target = torch.arange(len(scenes))
    audio, text = (nn.functional.cross_entropy(x, target) for x in (theirs.logits_per_audio, theirs.logits_per_text))
    assert float(ours) == pytest.approx(float(audio + text) / 2, abs=1e-5)
    # Why its own loss is not used: it asks from captions to sounds twice.
    assert float(theirs.loss) == pytest.approx(float(text), abs=1e-5)


def test_a_clap_model_trains_in_both_stages(clap):
    towers, sounds = clap
    towers.model.train()
    before = {name: p.detach().clone() for name, p in towers.model.named_parameters()}
    losses = teminal.train(towers, sounds, teminal.Stage("A", 10, 12, 2e-3, 2e-3), seed=0)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    losses = teminal.train(towers, sounds, teminal.Stage("B", 2, 8, 1e-3, 1e-3), seed=0)
    assert all(math.isfinite(loss) for loss in losses)
    moved = {name for name, p in towers.model.named_parameters() if not torch.equal(p, before[name])}
    assert {
        "logit_scale_a",
        "logit_scale_t",
        "audio_projection.linear1.weight",
        "text_projection.linear1.weight",
    } <= moved
    assert any(name.startswith("audio_model.") for name in moved)
    assert any(name.startswith("text_model.") for name in moved)
    low, high = towers.groups()
    assert {id(p) for p in low} | {id(p) for p in high} == {id(p) for p in towers.model.parameters()}
    assert not {id(p) for p in low} & {id(p) for p in high}
    towers.model.eval()
    found = zste(teminal.similarity(towers, sounds), scenes_of(30, names=sorted(sounds)), sorted(sounds))
    assert list(found) == ["1", "2A", "2B", "2C", "2D", "3", "4", "5"]
    assert found == zste(teminal.similarity(towers, sounds), scenes_of(30, names=sorted(sounds)), sorted(sounds))


@pytest.fixture
def clap_folders(clap, tmp_path):
    """The tiny model and its sounds as files."""
    soundfile = pytest.importorskip("soundfile")
    towers, sounds = clap
    towers.model.save_pretrained(tmp_path / "clap")
    towers.processor.save_pretrained(tmp_path / "clap")
    for name, recordings in sounds.items():
        (tmp_path / "sounds" / name).mkdir(parents=True)
        for number, samples in enumerate(recordings):
            soundfile.write(tmp_path / "sounds" / name / f"{number}.wav", 0.5 * samples, 4000)
    return tmp_path / "clap", tmp_path / "sounds"


def test_the_command_writes_a_model_that_transformers_opens_and_scores_before_and_after(clap_folders, capsys):
    from transformers import ClapModel

    from mmpost.cli import run

    model, sounds = map(str, clap_folders)
    out = clap_folders[0].parent / "out"
    words = ["--steps-a", "3", "--steps-b", "1", "--batch-size", "6", "--scenes", "30", "--learning-rate", "1e-3"]
    assert run(["clap-temporal", "train", model, sounds, "--out", str(out), *words]) == 0
    result = json.loads((out / "zste.json").read_text())
    assert [stage["name"] for stage in result["stages"]] == ["A", "B"]
    assert set(result["before"]) == set(result["after"]) == {"1", "2A", "2B", "2C", "2D", "3", "4", "5"}
    weights = [ClapModel.from_pretrained(folder).state_dict() for folder in (model, out / "final")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    capsys.readouterr()
    assert run(["clap-temporal", "eval", str(out / "final"), sounds, "--scenes", "30", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result["after"]


def test_test_recordings_are_never_trained_on_and_belong_to_their_names(clap_folders):
    from mmpost.contrastive.run import read_sounds

    training, tests = read_sounds(clap_folders[1], 4000, max_seconds=0.25)
    assert {name: len(found) for name, found in training.items()} == dict.fromkeys(sorted([*NAMES, "owl", "horn"]), 2)
    for name, (kept,) in tests.items():
        assert len(kept) == 1000
        assert not any(np.array_equal(kept, other) for other in training[name])
    again = read_sounds(clap_folders[1], 4000, max_seconds=0.25)[1]
    assert all(np.array_equal(again[name][0], tests[name][0]) for name in tests)


def test_folders_of_another_form_are_named(clap_folders, tmp_path):
    from mmpost.contrastive.run import open_clap, read_sounds

    for file in list((clap_folders[1] / "bell").iterdir())[1:]:
        file.unlink()
    with pytest.raises(MmpostError, match=r"bell' has 1 sound files; at least 2 are needed") as caught:
        read_sounds(clap_folders[1], 4000, max_seconds=1.0)
    assert caught.value.code == "MMP-D095"
    with pytest.raises(MmpostError, match="has 0 class folders; at least 4 are needed"):
        read_sounds(tmp_path / "none", 4000, max_seconds=1.0)
    with pytest.raises(MmpostError, match="as a CLAP model") as caught:
        open_clap(str(tmp_path / "none"))
    assert caught.value.code == "MMP-E030"
