"""Supervised steps of mmpost and of the installed TRL on rows of mixed length, each with one picture.

    python benchmarks/sft_vs_trl.py --quick
    python benchmarks/sft_vs_trl.py --trl-no-checkpointing
    python benchmarks/sft_vs_trl.py --size 0.5b --device cuda --bf16

TRL 1.16 stops with a TypeError on a batch that mixes rows with and without pictures, so every row has one.
``ratio`` is against TRL with the defaults of its ``SFTConfig`` (gradient checkpointing on); it pads, because it
refuses to pack rows with pictures.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root would not be importable

from benchmarks import lockstep, model, options, report, rows
from benchmarks.trainers import SEED, Job, run_mmpost, run_trl

BATCH = 8


@dataclass(frozen=True, slots=True)
class Case:
    """A mixture of row lengths.

    Attributes:
        edges: Sides of the pictures in pixels, drawn with equal chance.
        question: Most extra words of a question; 0 up to this many are drawn.
        answer: Most extra words of an answer.
    """

    edges: tuple[int, ...]
    question: int
    answer: int


CASES = {
    "mixed": Case((56, 112, 168, 224, 336, 448), 40, 40),
    "small-pictures": Case((56, 84, 112), 40, 40),
    "long-texts": Case((56, 112, 168, 224), 300, 300),
}
QUICK = ("small-pictures", "mixed")


def draw(case: Case, folder: Path, count: int) -> list[rows.BenchRow]:
    """Rows of one case."""
    rng = np.random.default_rng(SEED)
    edges = [int(edge) for edge in rng.choice(case.edges, size=count)]
    words = [(int(rng.integers(case.question + 1)), int(rng.integers(case.answer + 1))) for _ in range(count)]
    return rows.write(folder, edges, words=words)


def fill(drawn: Sequence[rows.BenchRow], weights: Path) -> float:
    """Share of a padded batch that is not padding, mean over batches in the order of training."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights)
    lengths = [
        (row.edge // model.TOKEN_EDGE) ** 2 + len(tokenizer(row.question + row.answer)["input_ids"])
        for row in rows.in_drawing_order(drawn, SEED)
    ]
    batches = np.array(lengths).reshape(-1, BATCH)
    return float((batches.mean(1) / batches.max(1)).mean())


def measure(name: str, args: argparse.Namespace, weights: Path, scratch: Path) -> dict[str, object]:
    """Race the trainers through one case."""
    steps = args.warmup + args.steps
    drawn = draw(CASES[name], scratch / "pictures", BATCH * steps)
    job = Job(
        folder=str(scratch / "mmpost"),
        model=str(weights),
        rows=tuple(drawn),
        steps=steps,
        micro_batch=args.micro,
        device=args.device,
        bf16=args.bf16,
        freeze_vision=args.freeze_vision,
    )
    ours = replace(job, mmpost={"tokens_per_pass": args.tokens_per_pass or None})
    racers = {"mmpost": (run_mmpost, ours), "trl": (run_trl, replace(job, folder=str(scratch / "trl")))}
    if args.trl_no_checkpointing:
        plain = replace(job, folder=str(scratch / "trl_no_ckpt"), trl={"gradient_checkpointing": False})
        racers["trl_no_ckpt"] = (run_trl, plain)
    runs = lockstep.race(racers, rounds=args.steps, warmup=args.warmup, together=not args.one_at_a_time)
    shape = {"batch": BATCH, "tokens_per_pass": args.tokens_per_pass, "fill": round(fill(drawn, weights), 3)}
    return report.record(f"{name}-frozen" if args.freeze_vision else name, runs, shape | options.facts(args))


def main() -> None:
    """Measure the chosen cases."""
    parser = options.parser(str(__doc__).splitlines()[0], "sft_vs_trl.jsonl")
    parser.add_argument(
        "--tokens-per-pass",
        type=int,
        default=768,
        help="mmpost splits its packed passes above this; its step is the same for every value; 0 never splits",
    )
    args = parser.parse_args()
    options.prepare(args)
    if args.list:
        print("\n".join(CASES))
        return
    names = options.chosen(list(CASES), QUICK, args)
    with tempfile.TemporaryDirectory() as place:
        weights = model.write(Path(place) / "model", args.size, bf16=args.bf16, device=args.device)
        for name in names:
            with tempfile.TemporaryDirectory(dir=place) as scratch:
                report.write(args.out, measure(name, args, weights, Path(scratch)))


if __name__ == "__main__":
    main()
