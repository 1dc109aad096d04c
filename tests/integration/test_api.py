"""The Python interface: the blocks of the documentation as they are written, and what is easy to get wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import mmpost
from mmpost import GRPOConfig, GRPOTrainer, MmpostError, SFTConfig, SFTTrainer, evaluate, load_data, load_model

SFT_BLOCK = """\
from mmpost import SFTConfig, SFTTrainer, load_data, load_model
model = load_model("tiny-vlm", peft="lora")                       # adapter + processor + weights; hub id or folder
train = load_data("train.jsonl", media_root="images")             # any format of section 7
args = SFTConfig(output_dir="runs/first", max_steps=20, learning_rate=1e-4)
trainer = SFTTrainer(model=model, args=args, train_dataset=train)
print(trainer.estimate())                                          # tokens, memory, batch equation
trainer.train()
trainer.save_model("out/first")
"""
# As in the documentation, with short completions so that the test is short.
GRPO_BLOCK = """\
from mmpost import GRPOConfig, GRPOTrainer, load_data, load_model
def short_and_right(prompts, completions, solution, **kw):
    texts = [c[-1]["content"] for c in completions]
    return [float(s.lower() in t.lower()) - 0.001 * len(t) for t, s in zip(texts, solution)]
trainer = GRPOTrainer(
    model=load_model("out/first"), reward_funcs=[short_and_right, "format"],
    args=GRPOConfig(output_dir="runs/rl", num_generations=4, prompts_per_step=2, max_steps=5, max_completion_length=8),
    train_dataset=load_data("rl.jsonl"))
trainer.train()
"""


@pytest.fixture
def small():
    def load(**options):
        return load_model("tiny-qwen2.5-vl", **options)

    return load


def test_blocks_of_the_documentation_run_as_written(project, rows_of, capsys):
    rows = rows_of(project / "sft.jsonl")
    for row in rows:
        row["images"] = [image.removeprefix("images/") for image in row["images"]]
    (project / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(project / "grpo.jsonl", project / "rl.jsonl")
    names = {}
    exec(compile(SFT_BLOCK, "sft_block", "exec"), names)
    estimate = names["trainer"].estimate()
    assert str(estimate) in capsys.readouterr().out
    assert (estimate["rows"], estimate["steps"]) == (20, 20)
    assert estimate["trainable_params"] < estimate["params"]
    saved = load_file(project / "out/first/adapter_model.safetensors")
    final = load_file(project / "runs/first/final/adapter_model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in final.items())
    assert any(weight.abs().sum() > 0 for name, weight in saved.items() if "lora_B" in name)

    exec(compile(GRPO_BLOCK, "grpo_block", "exec"), names)
    records = rows_of(project / "runs/rl/metrics.jsonl")
    assert records[-1]["step"] == 5
    assert set(records[-1]["reward"]["by_name"]) == {"short_and_right", "format"}
    assert records[-1]["reward"]["by_name"]["short_and_right"] < 0.5
    # The LoRA weights of the first stage go on training; no second adapter is put on top.
    after = load_file(project / "runs/rl/final/adapter_model.safetensors")
    assert after.keys() == saved.keys()
    assert any(not torch.equal(after[name], weight) for name, weight in saved.items())
    AutoModelForImageTextToText.from_pretrained(project / "runs/rl/final")


def test_rows_may_be_python_objects(project, small, rows_of):
    rows = rows_of(project / "sft.jsonl")
    folder = SFTTrainer(small(), SFTConfig(output_dir="runs/a", max_steps=2), rows).train()
    assert (folder / "final" / "model.safetensors").is_file()
    assert len(load_data(rows)) == len(load_data("sft.jsonl")) == 20


def test_training_again_in_a_finished_folder_gives_its_weights(project, small):
    def trainer():
        args = SFTConfig(output_dir="runs/once", max_steps=2, learning_rate=0.01)
        return SFTTrainer(small(), args, load_data("sft.jsonl"))

    first = trainer()
    first.train()
    again = trainer()
    again.train()
    again.save_model("out")
    final = load_file(project / "runs/once/final/model.safetensors")
    saved = load_file(project / "out/model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in final.items())


def test_trained_model_answers_without_being_saved(project, small):
    trainer = SFTTrainer(small(), SFTConfig(output_dir="runs/x", max_steps=1), load_data("sft.jsonl"))
    trainer.train()
    here = evaluate(trainer.model, ["demo_vqa"], limit=4, max_new_tokens=3)
    there = evaluate(str(trainer.save_model("out")), ["demo_vqa"], limit=4, max_new_tokens=3)
    assert [row["resps"] for row in here.samples["demo_vqa"]] == [row["resps"] for row in there.samples["demo_vqa"]]
    assert here.save(project / "eval.json").is_file()
    assert "demo_vqa" in here.table()


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda model: SFTTrainer(model, SFTConfig()), "MMP-C031"),
        (lambda model: SFTConfig(max_stepz=3), "MMP-C001"),
        (lambda model: SFTConfig(max_steps="ten"), "MMP-C004"),
        (lambda model: load_data("nowhere.jsonl"), "MMP-D030"),
        (lambda model: load_model("./nowhere"), "MMP-E030"),
        (lambda model: load_model("tiny-vln"), "MMP-C006"),
        (lambda model: evaluate(model, ["demo_vqq"]), "MMP-C006"),
        (lambda model: GRPOTrainer(model, [], GRPOConfig(), load_data("grpo.jsonl")).train(), "MMP-C032"),
        (lambda model: GRPOTrainer(model, ["format", "format"], GRPOConfig(), "grpo.jsonl").train(), "MMP-C030"),
    ],
)
def test_mistakes_raise_one_error_type_with_a_code(project, small, make, code):
    with pytest.raises(MmpostError) as caught:
        make(small())
    assert caught.value.code == code


def test_public_names_are_listed_and_lazy():
    assert set(mmpost.__all__) <= set(dir(mmpost))
    assert all(getattr(mmpost, name) is not None for name in mmpost.__all__)
    with pytest.raises(AttributeError, match="no attribute 'SFTTrainr'"):
        mmpost.SFTTrainr  # noqa: B018
