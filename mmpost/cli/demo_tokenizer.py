"""``make demo-tokenizer``: two tokenizers that differ only in perturbation, a generator, post-training and TokenBridge.

Every stage is an ordinary command with a shipped config, finds itself done when it is, and goes on when it was killed.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mmpost.runs.page import Section

CONFIGS = "configs/tokenizers"
# Figures of an evaluation that the summary keeps, by kind.
SCORES = ("rfd", "pfd", "usage", "psnr", "ssim", "pmse", "perplexity")
GENERATED = 600
# Of the shipped configurations; a trial takes a share of them.
STEPS, GENERATOR_STEPS, POSTTRAIN_STEPS = 700, 120, 150
NOTES = (
    "rfd, pfd and gfd are Fréchet distances between features of a small classifier of the training images. They order "
    "these images only, are no FID, and cannot be compared with published figures.",
    "At this size perturbation is stronger than in the paper (beta 0.5 instead of 0.1), because 0.1 cannot be told "
    "from chance here. That a lower pfd makes a better generator is the paper's claim and is not shown by this demo.",
)


def run_demo(out: Path, seeds: list[int], *, steps: int | None = None) -> dict[str, Any]:
    """Run all stages for every seed and write ``summary.json`` and ``report.html``.

    Args:
        out: Folder; the stages of the first seed lie in it, those of others in ``seed-N``.
        seeds: At least one.
        steps: Of each tokenizer instead of the shipped number, and in proportion of everything else; for a trial.

    Returns:
        The summary; figures are means over seeds, ``by_seed`` has each.
    """
    clock = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    bases = [out if index == 0 else out / f"seed-{seed}" for index, seed in enumerate(seeds)]
    chains = [_chain(base, seed, (steps or STEPS) / STEPS) for base, seed in zip(bases, seeds, strict=True)]
    summary = {**_means(chains), "seeds": seeds, "by_seed": chains, "notes": list(NOTES)}
    summary["seconds"] = round(time.perf_counter() - clock, 1)
    (out / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    report = _page(out, summary)
    _print(summary)
    sys.stdout.write(f"{summary['seconds']:.0f} s in all. Summary: {out / 'summary.json'}  report: {report}\n")
    return summary


def _chain(base: Path, seed: int, share: float) -> dict[str, Any]:
    """All stages of one seed, at a share of the shipped steps."""
    base.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "baseline": _tokenizer(base / "baseline", seed, share, beta=0.0),
        "perturbed": _tokenizer(base / "perturbed", seed, share, beta=0.5),
    }
    found["changed"] = _changed(base / "perturbed", seed)
    found["generator"] = _generator(base, seed, share)
    found["posttrain"] = _posttrain(base, seed, share)
    found["bridge"] = _bridge(base, seed, share)
    return found


def _tokenizer(folder: Path, seed: int, share: float, *, beta: float) -> dict[str, Any]:
    from mmpost.cli.tokenizer import run_training
    from mmpost.config.load import load, resolved_yaml
    from mmpost_tokenizers.options import TokenizerConfig

    words = [f"train.output_dir={folder}", f"train.seed={seed}", f"tokenizer.perturb.beta={beta}"]
    words += _steps("train", STEPS, share)
    _say(f"mmpost tokenizer train {CONFIGS}/demo.yaml {' '.join(words)}")
    loaded = load(TokenizerConfig, [f"{CONFIGS}/demo.yaml"], words)
    command = ["mmpost", "tokenizer", "train", f"{CONFIGS}/demo.yaml", *words]
    run_training(loaded.config, command, resolved_yaml(loaded))
    results = json.loads((folder / "eval" / "tokenizer.json").read_text())
    kept = {name: results[name] for name in SCORES if name in results}
    return {
        **kept,
        "noise_floor": results["noise_floor"],
        "extractor": results["extractor"],
        "images": results["images"],
    }


def _changed(folder: Path, seed: int) -> dict[str, float]:
    """Share of tokens that the perturbation of the finished tokenizer changes, against what it should be."""
    import torch

    from mmpost.core import seeding
    from mmpost_tokenizers.perturbation import LatentPerturbation, scaled_delta
    from mmpost_tokenizers.session import open_tokenizer

    tokenizer = open_tokenizer(folder)
    alpha, beta, delta, count = 1.0, 0.5, scaled_delta(tokenizer.codebook_size), 4000
    draw = torch.Generator().manual_seed(int(seeding.generator(seed, "demo.changed").integers(2**62)))
    indices = torch.randint(tokenizer.codebook_size, (count, *tokenizer.index_shape), generator=draw)
    device = next(tokenizer.parameters()).device
    moved = LatentPerturbation(alpha, beta, delta)(tokenizer, indices.to(device), generator=draw)
    tokens = math.prod(tokenizer.index_shape)
    stay = 1 - 1 / delta
    # Tokens of an image share its draw: the variance of the image's choice, and of each token's own draw.
    variance = (alpha * stay) ** 2 * beta * (1 - beta) / count + beta * alpha * stay * (1 - alpha * stay) / (
        count * tokens
    )
    return {
        "share": float(moved.changed.float().mean()),
        "expected": alpha * beta * stay,
        "half_width_99": 2.5758 * math.sqrt(variance),
    }


def _generator(base: Path, seed: int, share: float) -> dict[str, Any]:
    from mmpost.cli.generator import run_training
    from mmpost.cli.image_data import open_data
    from mmpost.config.load import load, resolved_yaml
    from mmpost_tokenizers.generating import evaluate_samples
    from mmpost_tokenizers.generator.pretokenize import pretokenize
    from mmpost_tokenizers.generator.sample import Guidance, Sampling
    from mmpost_tokenizers.options import GeneratorRunConfig
    from mmpost_tokenizers.session import open_tokenizer

    done = base / "generator" / "scores.json"
    if not done.is_file():
        _say("mmpost tokenizer pretokenize, mmpost generator train, mmpost generator eval")
        tokenizer = open_tokenizer(base / "perturbed")
        images = {split: _images(open_data, split) for split in ("train", "heldout")}
        for split, found in images.items():
            pretokenize(found, tokenizer, base / f"codes-{split}", crops=1)
        words = [f"train.seed={seed}", *_steps("train", GENERATOR_STEPS, share)]
        loaded = load(GeneratorRunConfig, [f"{CONFIGS}/generator_demo.yaml"], words)
        codes, held_out = str(base / "codes-train"), str(base / "codes-heldout")
        summary = run_training(
            loaded.config, codes, held_out, base / "generator", resolved_yaml(loaded), tokenizer=str(base / "perturbed")
        )
        scores = evaluate_samples(
            str(base / "generator"),
            str(base / "perturbed"),
            images["heldout"],
            samples=GENERATED,
            features="auto",
            sampling=Sampling(Guidance(2.0), seed=seed),
        )
        kept = ("gfd", "precision", "recall", "class_accuracy", "noise_floor")
        summary |= {name: scores[name] for name in kept if name in scores}
        done.write_text(json.dumps(summary, indent=1) + "\n")
    read: dict[str, Any] = json.loads(done.read_text())
    return read


def _posttrain(base: Path, seed: int, share: float) -> dict[str, Any]:
    from mmpost.cli.tokenizer import run_posttraining
    from mmpost.config.load import load, resolved_yaml
    from mmpost_tokenizers.options import PosttrainConfig

    words = [f"posttrain.seed={seed}", *_steps("posttrain", POSTTRAIN_STEPS, share)]
    tokenizer, generator = str(base / "perturbed"), str(base / "generator")
    _say(f"mmpost tokenizer posttrain {tokenizer} --generator {generator} {CONFIGS}/posttrain_demo.yaml {words[0]}")
    loaded = load(PosttrainConfig, [f"{CONFIGS}/posttrain_demo.yaml"], words)
    return run_posttraining(loaded.config, tokenizer, generator, base / "posttrain", resolved_yaml(loaded))


def _bridge(base: Path, seed: int, share: float) -> dict[str, Any]:
    from mmpost.cli.demo_bridge import bridge_stage
    from mmpost.cli.image_data import open_data
    from mmpost_tokenizers.images import from_uint8

    _say("a small KL-VAE, and mmpost tokenizer bridge with 4 to 64 levels")
    (train, labels), (held_out, others) = (_images(open_data, split).stacked() for split in ("train", "heldout"))
    return bridge_stage(base, from_uint8(train), from_uint8(held_out), (labels, others), seed, share)


def _steps(section: str, steps: int, share: float) -> list[str]:
    return [f"{section}.max_steps={max(1, round(share * steps))}"] if share != 1 else []


def _images(open_data: Any, split: str) -> Any:
    return open_data("task:digits", image_size=16, split=split, limit=None, crop="center", bad=False)


def _means(chains: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary's figures: means over seeds of those that are numbers."""
    kept = {
        "baseline": SCORES,
        "perturbed": SCORES,
        "changed": ("share", "expected", "half_width_99"),
        "generator": ("held_out_nll", "unigram_nll", "uniform_nll", "gfd", "class_accuracy", "precision", "recall"),
        "posttrain": ("pair_loss_before", "pair_loss_after", "pair_loss_last", "sigma", "drift"),
        "bridge": ("levels", "error"),
    }
    means: dict[str, Any] = {
        stage: {
            name: sum(chain[stage][name] for chain in chains) / len(chains)
            for name in names
            if name in chains[0][stage]
        }
        for stage, names in kept.items()
    }
    means["bridge"]["levels"] = chains[0]["bridge"]["levels"]
    means["bridge"]["heads"] = {
        name: sum(chain["bridge"]["heads"][name] for chain in chains) / len(chains)
        for name in chains[0]["bridge"]["heads"]
    }
    means["pfd_gain"] = 1 - means["perturbed"]["pfd"] / means["baseline"]["pfd"]
    return means


def _print(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"scanned digits at 16 pixels, 16 tokens of 256 codes, seeds {summary['seeds']}")
    for column in ("", "without perturbation", "with perturbation"):
        table.add_column(column, justify="left" if not column else "right")
    for name in SCORES:
        if name in summary["baseline"]:
            table.add_row(name, *(f"{summary[kind][name]:.4g}" for kind in ("baseline", "perturbed")))
    console = Console()
    console.print(table)
    pair, bridge = summary["posttrain"], summary["bridge"]
    console.print(f"held-out pair loss: {pair['pair_loss_before']:.5f} to {pair['pair_loss_after']:.5f}")
    console.print(f"bridge: {bridge['levels']} levels, squared error {bridge['error']:.2e} of the latents' variance")


def _page(out: Path, summary: dict[str, Any]) -> Path:
    from mmpost.runs.page import Paragraph, Section, Table, Tiles, write_page

    base, other = summary["baseline"], summary["perturbed"]
    rows = [[name, f"{base[name]:.4g}", f"{other[name]:.4g}"] for name in SCORES if name in base]
    tiles = [
        ("pfd with perturbation", f"{-summary['pfd_gain']:+.0%}"),
        ("rfd", f"{other['rfd']:.3g}"),
        ("codes used", f"{other['usage']:.0%}"),
        ("generator, nats per code", f"{summary['generator']['held_out_nll']:.3f}"),
        ("pair loss after post-training", f"{summary['posttrain']['pair_loss_after']:.4f}"),
    ]
    scores = Table(["held-out score", "without perturbation", "with"], rows)
    first = Section("Result", [Tiles(tiles), scores, *(Paragraph(text, note=True) for text in NOTES)])
    sections = [first, *_seeds(summary), *_pictures(out), _bridge_section(summary)]
    return write_page(out / "report.html", title="mmpost: image tokenizers", sections=sections)


def _seeds(summary: dict[str, Any]) -> list[Section]:
    from mmpost.runs.page import Section, Table

    rows = []
    for seed, chain in zip(summary["seeds"], summary["by_seed"], strict=True):
        pair = chain["posttrain"]
        cells = [
            chain["baseline"]["rfd"],
            chain["perturbed"]["rfd"],
            chain["baseline"]["pfd"],
            chain["perturbed"]["pfd"],
        ]
        cells += [pair["pair_loss_before"], pair["pair_loss_after"]]
        rows.append([str(seed), *(f"{cell:.4g}" for cell in cells)])
    heads = ["seed", "rfd without", "rfd with", "pfd without", "pfd with", "pair loss before", "after"]
    return [Section("By seed", [Table(heads, rows)])]


def _pictures(out: Path) -> list[Section]:
    """Reconstructions of both tokenizers, curves, generated images."""
    from mmpost.cli.image_data import open_data
    from mmpost.runs.page import Block, Section
    from mmpost.runs.records import read_jsonl
    from mmpost_tokenizers import report
    from mmpost_tokenizers.features import title_for
    from mmpost_tokenizers.generating import open_generator, samples_block
    from mmpost_tokenizers.generator.sample import Guidance, Sampling, generate
    from mmpost_tokenizers.images import from_uint8
    from mmpost_tokenizers.opening import pick
    from mmpost_tokenizers.session import open_tokenizer
    from mmpost_tokenizers.using import scoring_features

    images = _images(open_data, "heldout")
    shown: Tensor = from_uint8(pick(images, 16).stacked()[0])
    counted = [from_uint8(part) for part in images.stacked()[0].split(64)]
    sections = []
    for name in ("baseline", "perturbed"):
        tokenizer = open_tokenizer(out / name)
        results = json.loads((out / name / "eval" / "tokenizer.json").read_text())
        score = title_for("p", scoring_features(str(out / name), "auto"))
        curve = report.perturbation_curve(results, score)
        blocks: list[Block] = [report.picture_grids(tokenizer, shown), *([curve] if curve else [])]
        blocks += report.usage_blocks(report.token_counts(tokenizer, counted))
        metrics, _ = read_jsonl(out / name / "metrics.jsonl")
        title = "Without perturbation" if name == "baseline" else "With perturbation"
        sections += [Section(title, blocks), Section(f"{title}: training", report.training_blocks(metrics))]
    import torch

    tokenizer = open_tokenizer(out / "perturbed")
    model = open_generator(str(out / "generator"), tokenizer)
    codes = generate(model, torch.arange(10).repeat_interleave(8), sampling=Sampling(Guidance(2.0)))
    made = [samples_block(tokenizer, codes, "main decoder, a class per row", 8)]
    made.append(samples_block(open_tokenizer(out / "posttrain"), codes, "post-trained decoder, the same codes", 8))
    return [*sections, Section("Generated", made)]


def _bridge_section(summary: dict[str, Any]) -> Section:
    from mmpost.runs.page import Section, Table

    by_levels = summary["by_seed"][0]["bridge"]["by_levels"]
    rows = [
        [levels, *(f"{values[name]:.3g}" for name in ("error", "image_error", "saturation"))]
        for levels, values in by_levels.items()
    ]
    heads = [[name, f"{value:.4f}"] for name, value in summary["bridge"]["heads"].items()]
    return Section(
        "TokenBridge",
        [
            Table(["levels", "latent error", "image error", "saturated"], rows, title="Held-out error by levels"),
            Table(["head", "held-out nats per dimension"], heads, title="Heads"),
        ],
    )


def _say(text: str) -> None:
    sys.stderr.write(f"\n== {text}\n")
    sys.stderr.flush()
