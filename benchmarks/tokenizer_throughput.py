"""Training and pFD evaluation of a tokenizer here and in the most direct plain loop, alternating in one run.

    python -m benchmarks.tokenizer_throughput --rounds 5 --out benchmarks/out/tokenizer.jsonl

Both sides have the same weights, batches and losses. The plain training loop has no running means, no health, no log
and no checkpoints; the plain evaluation encodes and decodes every image anew for each of the fifteen settings.

Times are wall clock: time of the process alone would hide waiting for data. The two sides take turns in short pieces,
and their order changes with every piece, so that a machine that others use slows both alike. A round's ratio is that of
its sums; the last line has the median over rounds and the smallest and largest.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mmpost.config.load import load
from mmpost.train.distributed import Processes
from mmpost_tokenizers import opening
from mmpost_tokenizers.batches import ImageBatches
from mmpost_tokenizers.features import FeatureExtractor
from mmpost_tokenizers.frechet import Moments, frechet_distance
from mmpost_tokenizers.images import Cutting, ImageSet, from_uint8, images_from_arrays, to_uint8
from mmpost_tokenizers.options import TokenizerConfig
from mmpost_tokenizers.perturbation import LatentPerturbation, scaled_delta
from mmpost_tokenizers.pfid import ALPHAS, deltas_for, pfid
from mmpost_tokenizers.toy_features import RandomConvFeatures
from mmpost_tokenizers.training import TokenizerTrainer


def pictures(count: int, size: int) -> ImageSet:
    """Smooth random pictures: what they show does not matter for time."""
    small = np.random.default_rng(0).integers(0, 256, (count, size // 4, size // 4), dtype=np.uint8)
    large = small.repeat(4, 1).repeat(4, 2)
    return images_from_arrays(large, [n % 10 for n in range(count)], cutting=Cutting(size))


def ours(config: TokenizerConfig, images: ImageSet) -> tuple[Callable[[int], None], TokenizerTrainer]:
    """Function that trains so many steps, and its trainer."""
    fed = images if config.data.workers else opening.resident(images)
    batches = ImageBatches(fed, batch_size=config.train.batch_size, seed=0, workers=config.data.workers)
    tokenizer = opening.new_tokenizer(config.tokenizer, seed=0)
    trainer = TokenizerTrainer(
        tokenizer, batches, config, processes=Processes(strategy="ddp"), output=Path(tempfile.mkdtemp())
    )

    def train(steps: int) -> None:
        trainer.total = trainer.state.step + steps
        trainer.run()

    return train, trainer


def plain(config: TokenizerConfig, images: ImageSet) -> Callable[[int], None]:
    """The same training, written in the most direct way."""
    tokenizer = opening.new_tokenizer(config.tokenizer, seed=0).to(opening.device()).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=config.train.learning_rate, weight_decay=0.0)
    pixels, _ = images.stacked()
    draw = torch.Generator().manual_seed(0)
    section = config.tokenizer.perturb
    perturb = LatentPerturbation(section.alpha, section.beta, scaled_delta(tokenizer.codebook_size))

    def train(steps: int) -> None:
        for _ in range(steps):
            rows = torch.randint(len(pixels), (config.train.batch_size,), generator=draw)
            batch = from_uint8(pixels[rows]).to(opening.device())
            z = tokenizer.encode(batch)
            clean = tokenizer.quantize(z)
            moved = perturb(tokenizer, clean.indices, z=z, generator=draw)
            output = tokenizer.decode(tokenizer.quantizer.straight_through(clean, moved.indices))
            loss = functional.mse_loss(output, batch) + sum(clean.losses.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train


@torch.no_grad()
def plain_pfd(tokenizer: Any, images: ImageSet, extractor: FeatureExtractor) -> float:
    """Fifteen independent evaluations, each of which encodes all images again."""
    pixels, _ = images.stacked()
    real = Moments.empty(extractor.dim)
    for part in pixels.split(64):
        real.update(extractor(part))
    values = []
    for delta in deltas_for(tokenizer.codebook_size):
        for alpha in ALPHAS:
            made, draw = Moments.empty(extractor.dim), torch.Generator().manual_seed(0)
            for part in pixels.split(64):
                output = tokenizer.reconstruct(from_uint8(part), LatentPerturbation(alpha, 1.0, delta), draw)
                made.update(extractor(to_uint8(output)))
            values.append(frechet_distance(made, real))
    return float(np.mean(values))


def timed(work: Callable[[], Any]) -> float:
    """Seconds of wall clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    clock = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - clock


def alternating(ours: Callable[[], Any], plain: Callable[[], Any], pieces: int) -> dict[str, float]:
    """Seconds of both sides, a piece of one after a piece of the other; the side that begins changes."""
    seconds = {"ours": 0.0, "plain": 0.0}
    sides = [("ours", ours), ("plain", plain)]
    for piece in range(pieces):
        for name, work in sides if piece % 2 == 0 else sides[::-1]:
            seconds[name] += timed(work)
    return seconds


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median, smallest and largest over rounds of the ratios and of the share of waiting."""
    found: dict[str, Any] = {"rounds": len(rows)}
    for name in ("train_ratio", "pfd_ratio", "wait_share"):
        values = [row[name] for row in rows]
        found[name] = {"median": float(np.median(values)), "min": min(values), "max": max(values)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tokenizers/demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of a piece")
    parser.add_argument("--pieces", type=int, default=6, help="of each side in a round")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/tokenizer_throughput.jsonl"))
    parser.add_argument("overrides", nargs="*", help="key=value")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    config = load(TokenizerConfig, [words.config], words.overrides).config
    images = pictures(words.images, config.tokenizer.image_size)
    train, trainer = ours(config, images)
    direct = plain(config, images)
    extractor = RandomConvFeatures()
    train(2)
    direct(2)
    words.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with words.out.open("a", encoding="utf-8") as file:
        for number in range(words.rounds):
            before = copy.copy(trainer.state)
            seconds = alternating(
                functools.partial(train, words.steps), functools.partial(direct, words.steps), words.pieces
            )
            waited, spent = trainer.state.waited - before.waited, trainer.state.seconds - before.seconds
            seen = words.steps * words.pieces * config.train.batch_size
            tokenizer = trainer.mean.model
            # One evaluation is a piece of its own; which side begins changes with the round.
            sides = {
                "ours": functools.partial(pfid, tokenizer, images, extractor),
                "plain": functools.partial(plain_pfd, tokenizer, images, extractor),
            }
            scores = {name: timed(sides[name]) for name in (sorted(sides) if number % 2 == 0 else sorted(sides)[::-1])}
            record = {
                "round": number,
                "config": words.config,
                "overrides": words.overrides,
                "device": str(opening.device()),
                "threads": words.threads,
                "train_images_per_s": {name: seen / value for name, value in seconds.items()},
                "train_ratio": seconds["plain"] / seconds["ours"],
                "wait_share": waited / max(spent, 1e-9),
                "pfd_s": scores,
                "pfd_ratio": scores["plain"] / scores["ours"],
                "images": len(images),
            }
            file.write(json.dumps(record) + "\n")
            rows.append(record)
            print(json.dumps(record))
    print(json.dumps(summary(rows)))


if __name__ == "__main__":
    main()
