"""Whole GRPO steps of mmpost and of the installed TRL on the same small Qwen2.5-VL.

    python benchmarks/grpo_vs_trl.py --quick
    python benchmarks/grpo_vs_trl.py --cases 'i256-*' --trl-no-checkpointing
    python benchmarks/grpo_vs_trl.py --check
    python benchmarks/grpo_vs_trl.py --size 0.5b --device cuda --bf16 --cases 'i1024-g8-*'

``ratio`` is against TRL with the defaults of its ``GRPOConfig`` (gradient checkpointing on).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root would not be importable

from benchmarks import lockstep, model, options, report, rows
from benchmarks.trainers import Job, run_mmpost, run_trl

PROMPTS = 2


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of a step.

    Attributes:
        image_tokens: Tokens of the one picture of each prompt.
        generations: Completions per prompt.
        completion: Tokens per completion.
    """

    image_tokens: int
    generations: int
    completion: int

    @property
    def name(self) -> str:
        """For example ``i256-g8-c32``."""
        return f"i{self.image_tokens}-g{self.generations}-c{self.completion}"


CASES = {case.name: case for case in (Case(i, g, c) for i in (64, 256, 1024) for g in (8, 16) for c in (32, 128, 256))}
QUICK = ("i64-g8-c32", "i256-g8-c32")


def measure(case: Case, args: argparse.Namespace, weights: Path, scratch: Path) -> dict[str, object]:
    """Race the trainers through one case."""
    steps = args.warmup + args.steps
    edges = [model.image_edge(case.image_tokens)] * (PROMPTS * steps)
    job = Job(
        folder=str(scratch / "mmpost"),
        model=str(weights),
        rows=tuple(rows.write(scratch / "pictures", edges)),
        steps=steps,
        micro_batch=args.micro,
        generations=case.generations,
        completion=case.completion,
        device=args.device,
        bf16=args.bf16,
        freeze_vision=args.freeze_vision,
    )
    racers = {"mmpost": (run_mmpost, job), "trl": (run_trl, replace(job, folder=str(scratch / "trl")))}
    if args.trl_no_checkpointing:
        plain = replace(job, folder=str(scratch / "trl_no_ckpt"), trl={"gradient_checkpointing": False})
        racers["trl_no_ckpt"] = (run_trl, plain)
    runs = lockstep.race(racers, rounds=args.steps, warmup=args.warmup, together=not args.one_at_a_time)
    name = f"{case.name}-frozen" if args.freeze_vision else case.name
    shape = {
        "image_tokens": case.image_tokens,
        "generations": case.generations,
        "completion": case.completion,
        "prompts": PROMPTS,
    }
    return report.record(name, runs, shape | options.facts(args))


def check(folder: Path, weights: Path, device: str) -> None:
    """Print how far losses and gradients of both trainers are apart on the same rollouts."""
    from benchmarks import agreement

    for loss_type, aggregate in agreement.PAIRS.items():
        result = agreement.compare(folder / loss_type, weights, loss_type, aggregate, device=device)
        print(result.line(), flush=True)


def main() -> None:
    """Measure the chosen cases, or check that both trainers compute the same gradient."""
    parser = options.parser(str(__doc__).splitlines()[0], "grpo_vs_trl.jsonl")
    parser.add_argument("--check", action="store_true", help="no timing: losses and gradients on the same rollouts")
    args = parser.parse_args()
    options.prepare(args)
    if args.list:
        print("\n".join(CASES))
        return
    names = options.chosen(list(CASES), QUICK, args)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        weights = model.write(folder / "model", args.size, bf16=args.bf16 and not args.check, device=args.device)
        if args.check:
            check(folder, weights, args.device)
            return
        for name in names:
            with tempfile.TemporaryDirectory(dir=place) as scratch:
                report.write(args.out, measure(CASES[name], args, weights, Path(scratch)))


if __name__ == "__main__":
    main()
