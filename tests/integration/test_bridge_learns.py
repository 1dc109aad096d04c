"""TokenBridge on real scans: a small VAE, its tokens at several numbers of levels, both heads on the tokens."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from sklearn.datasets import load_digits
from torch import nn

from mmpost_tokenizers.bridge.head import DimensionHead, HeadConfig, ParallelHead
from mmpost_tokenizers.bridge.levels import PostTrainingConfig, PostTrainingQuantizer
from mmpost_tokenizers.bridge.model import IndexModel
from mmpost_tokenizers.bridge.options import BridgeTrainSection
from mmpost_tokenizers.bridge.order import dimension_order, low_frequency_share
from mmpost_tokenizers.bridge.training import BridgeTrainer
from mmpost_tokenizers.bridge.vae import QuantizedVAETokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TRAIN, CHANNELS, GRID, LEVELS = 1200, 8, 4, 16


@pytest.fixture(scope="module")
def digits():
    """Images ``[1797, 3, 16, 16]`` in [-1, 1] and labels; the first 1200 are for training."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(small, size=16, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1).contiguous()
    return images, torch.tensor(data.target)


@pytest.fixture(scope="module")
def vae_folder(digits, tmp_path_factory):
    """A KL-VAE with 8 channels on 4x4 positions, trained for 250 steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=CHANNELS,
        sample_size=16,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=250)
    draw = torch.Generator().manual_seed(0)
    for _ in range(250):
        batch = digits[0][torch.randint(0, TRAIN, (32,), generator=draw)]
        posterior = vae.encode(batch).latent_dist
        image = vae.decode(posterior.sample(generator=draw)).sample
        loss = F.mse_loss(image, batch) + 2e-3 * posterior.kl().mean() / (CHANNELS * GRID**2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


def bridge(vae_folder, digits, **options):
    tokenizer = QuantizedVAETokenizer.from_vae(vae_folder, max_saturation=None)
    return tokenizer.fit([digits[0][:TRAIN]], **options)


@torch.no_grad()
def test_round_trip_gets_better_with_every_doubling_of_the_levels(vae_folder, digits):
    held_out = digits[0][TRAIN:]
    tokenizer = bridge(vae_folder, digits)
    z, fit_on = tokenizer.encode(held_out), tokenizer.encode(digits[0][:TRAIN])
    plain = tokenizer.decode(z)
    per_pixel_mean = digits[0][:TRAIN].mean(0)
    vae_error = F.mse_loss(plain, held_out)
    assert vae_error < 0.2 * F.mse_loss(per_pixel_mean.expand_as(held_out), held_out)
    for value_range in (2.0, 3.0, 4.0, 5.0):
        latent, image = [], []
        for levels in (4, 8, 16, 32, 64):
            quantizer = PostTrainingQuantizer.fit(fit_on, levels=levels, value_range=value_range, max_saturation=None)
            back = quantizer(z).latents
            latent.append(float(F.mse_loss(back, z)))
            image.append(float(F.mse_loss(tokenizer.decode(back), plain)))
        for errors in (latent, image):
            assert all(finer < coarser for coarser, finer in itertools.pairwise(errors))
    # 64 levels at range 5 cost next to nothing.
    assert image[-1] < 0.02 * float(vae_error)


@torch.no_grad()
def test_fitting_each_channel_loses_less_than_one_scale(vae_folder, digits):
    tokenizer = bridge(vae_folder, digits)
    z, fit_on = tokenizer.encode(digits[0][TRAIN:]), tokenizer.encode(digits[0][:TRAIN])
    fitted = [PostTrainingQuantizer.fit(fit_on, levels=LEVELS, mode=mode) for mode in ("paper", "channel")]
    errors = [float(F.mse_loss(quantizer(z).latents, z)) for quantizer in fitted]
    assert errors[1] < errors[0]


class NeighbourModel(IndexModel):
    """Predicts a position from class, place, and the values to the left, above, and left above."""

    def __init__(self, head, quantizer):
        super().__init__()
        self.head, self.quantizer = head, quantizer
        width = head.config.z_dim
        self.label, self.place = nn.Embedding(10, width), nn.Parameter(torch.zeros(GRID**2, width))
        self.mix = nn.Sequential(nn.Linear(3 * CHANNELS, width), nn.SiLU(), nn.Linear(width, width))

    def features(self, indices, labels):
        padded = F.pad(self.quantizer.dequantize(indices), (0, 0, 1, 0, 1, 0))
        around = torch.cat([padded[:, 1:, :-1], padded[:, :-1, 1:], padded[:, :-1, :-1]], -1).flatten(1, 2)
        return (self.mix(around) + self.place + self.label(labels)[:, None]).flatten(0, 1)

    def nats(self, indices, labels, generator):
        z, targets = self.features(indices, labels), indices.flatten(0, 2)
        if self.training:
            some = torch.randperm(len(z), generator=generator)[:128]
            z, targets = z[some], targets[some]
        return -self.head.log_probs(z, targets)


def trained(kind, quantizer, order, indices, labels, seed):
    # The parallel head has no tables of indices; wider feed-forward layers make it at least as large.
    ratio = 4.0 if kind is DimensionHead else 5.0
    torch.manual_seed(seed)
    sizes = HeadConfig(
        channels=CHANNELS, levels=LEVELS, z_dim=48, width=48, depth=2, heads=4, mlp_ratio=ratio, dropout=0.0
    )
    model = NeighbourModel(kind(sizes, order), quantizer)
    epochs = 200 * 64 / TRAIN  # about 200 steps
    options = BridgeTrainSection(
        batch_size=64,
        epochs=epochs,
        warmup_epochs=1,
        learning_rate=3e-3,
        ema=0.95,
        precision="float32",
        weight_decay=0.02,
        seed=seed,
    )
    trainer = BridgeTrainer(model, indices[:TRAIN], labels[:TRAIN], options)
    trainer.run()
    return trainer


def test_autoregressive_head_beats_the_independent_one(vae_folder, digits):
    torch.set_num_threads(1)
    images, labels = digits
    tokenizer = bridge(vae_folder, digits, levels=LEVELS)
    indices = tokenizer.tokenize(images)
    latents = tokenizer.lookup(indices)
    share = low_frequency_share(latents[:TRAIN])
    assert bool(((share > 0) & (share <= 1)).all())
    order = dimension_order(latents[:TRAIN])
    quantizer = PostTrainingQuantizer(PostTrainingConfig(dim=CHANNELS, levels=LEVELS))
    true = torch.corrcoef(tokenizer.lookup(indices[TRAIN:]).flatten(0, 2).T)
    for seed in (0, 1):
        nats, distance, size = {}, {}, {}
        for kind in (DimensionHead, ParallelHead):
            trainer = trained(kind, quantizer, order, indices, labels, seed)
            nats[kind] = trainer.evaluate(indices[TRAIN:], labels[TRAIN:])
            size[kind] = sum(weight.numel() for weight in trainer.model.parameters())
            # Every token drawn anew given its true surroundings.
            with torch.no_grad():
                z = trainer.mean.features(indices[TRAIN:], labels[TRAIN:])
                drawn = trainer.mean.head.sample(z, generator=torch.Generator().manual_seed(seed))
            distance[kind] = float((torch.corrcoef(tokenizer.lookup(drawn).T) - true).abs().mean())
        assert size[ParallelHead] >= size[DimensionHead]
        assert nats[DimensionHead] < nats[ParallelHead] - 0.01
        assert distance[DimensionHead] < 0.7 * distance[ParallelHead]
