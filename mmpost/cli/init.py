"""``mmpost init``: a folder that trains as it is, and that a user edits into their own."""

from __future__ import annotations

from pathlib import Path

from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost_tasks import TASKS
from mmpost_tasks.export import write_jsonl

KINDS = ("sft", "grpo", "eval", "all")
ROWS = 200

SFT_YAML = """\
# mmpost sft sft.yaml
model:
  model_name_or_path: tiny-vlm   # any Qwen2-VL, Qwen2.5-VL, Qwen3-VL or SmolVLM: hub id or folder
  freeze: []                     # [vision_tower] when you start from a trained model
# peft: {kind: lora, r: 16}      # instead of training all weights
data:
  train:
    - path: sft.jsonl            # your rows: messages with an <image> mark, and a list of pictures
train:
  output_dir: runs/sft
  max_steps: 30
  batch_size: 16
  learning_rate: 2.0e-3          # 1e-5 for a trained model, 1e-4 with LoRA
  logging_steps: 5
"""
GRPO_YAML = """\
# mmpost grpo grpo.yaml
model:
  model_name_or_path: runs/sft/final   # the model that sft.yaml trains, or any other
  freeze: []
data:
  train:
    - path: grpo.jsonl                 # prompts; further columns reach the rewards by name
train:
  output_dir: runs/grpo
  max_steps: 10
  per_device_train_batch_size: 32
  learning_rate: 5.0e-4                # 1e-6 for a trained model, 1e-5 with LoRA
  logging_steps: 1
grpo:
  num_generations: 4
  prompts_per_step: 8
  max_completion_length: 16
rewards:
  - answer                             # right answer: compares with the column "solution"
  - {name: format, weight: 0.1}        # one <answer>...</answer> at the end
  - {name: "reward.py:brevity", weight: 0.05}
"""
REWARD_PY = '''\
"""A reward of your own: the signature is TRL's."""


def brevity(prompts, completions, **columns):
    """1 for an empty text, falling by 0.01 per character."""
    return [max(0.0, 1.0 - 0.01 * len(completion[-1]["content"])) for completion in completions]
'''


def write_project(folder: Path, kind: str) -> list[str]:
    """Write example rows, pictures, configs and a README.

    Args:
        folder: New or empty.
        kind: One of ``KINDS``.

    Returns:
        Lines that say what to do next.

    Raises:
        MmpostError: MMP-C006 for an unknown kind, MMP-E024 when the folder holds files.
    """
    if kind not in KINDS:
        raise MmpostError("MMP-C006", f"unknown name '{kind}' among kinds.", f"Known: {', '.join(KINDS)}")
    try:
        if folder.exists() and any(folder.iterdir()):
            raise MmpostError("MMP-E024", f"'{folder}' is not empty.", "Name a new folder.")
        folder.mkdir(parents=True, exist_ok=True)
        commands = _write(folder, kind)
    except OSError as error:
        raise MmpostError(
            "MMP-E024", f"cannot write to '{folder}': {error.strerror}.", "Name another folder."
        ) from error
    return [f"wrote {folder}", f"cd {folder}", *commands]


def _write(folder: Path, kind: str) -> list[str]:
    samples = Catalog("tasks", TASKS).get("demo_vqa").load("train", limit=ROWS)
    commands = []
    if kind in ("sft", "all"):
        write_jsonl(samples, folder, name="sft")
        (folder / "sft.yaml").write_text(SFT_YAML)
        commands += ["mmpost data check sft.jsonl", "mmpost sft sft.yaml"]
    if kind in ("grpo", "all"):
        write_jsonl(samples, folder, name="grpo", answers=False)
        (folder / "grpo.yaml").write_text(
            GRPO_YAML if kind == "all" else GRPO_YAML.replace("runs/sft/final  ", "tiny-vlm        ")
        )
        (folder / "reward.py").write_text(REWARD_PY)
        commands.append("mmpost grpo grpo.yaml")
    model = {"sft": "runs/sft/final", "grpo": "runs/grpo/final", "all": "runs/grpo/final"}.get(kind, "tiny-vlm")
    commands.append(f"mmpost eval demo_vqa --model {model} --limit 100")
    (folder / "README.md").write_text(_readme(commands, kind))
    return commands


def _readme(commands: list[str], kind: str) -> str:
    lines = ["# An mmpost project", "", "```", *commands, "```", ""]
    if kind in ("sft", "all"):
        lines += [
            "`sft.jsonl` holds one row per line; put your own in its place, or change `path` in `sft.yaml`:",
            "",
            "```json",
            '{"messages": [{"role": "user", "content": "<image>What is this?"}, '
            '{"role": "assistant", "content": "A cat."}], "images": ["cat.jpg"]}',
            "```",
            "",
            "Picture paths are relative to the file, or to `media_root` of the source.",
            "",
        ]
    if kind in ("grpo", "all"):
        lines += [
            "`grpo.jsonl` holds prompts with a `solution`; `reward.py` shows a reward of your own.",
            "",
        ]
    lines += ["Every run leaves a folder under `runs/` with `report.html`, `metrics.jsonl` and `final/`.", ""]
    return "\n".join(lines)
