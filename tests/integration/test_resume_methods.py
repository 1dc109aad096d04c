"""Methods that remember something between steps go on from a checkpoint as if nothing had happened."""

import json

import pytest

WORDS = [
    *("grpo", "grpo.yaml", "model_name_or_path=tiny-qwen2.5-vl", "logging_steps=1", "save_steps=2", "max_steps=5"),
    *("prompts_per_step=4", "num_generations=4", "max_completion_length=6", "rewards=[judge.py:vowels]"),
    "loss.aggregate=token",
]


def _lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("time", "phase_s")} for row in rows]


@pytest.mark.parametrize(
    "method",
    [["loss.preset=riskpo", "loss.args={bundle: 2, credit: uniform}"], ["loss.preset=dapo", "loss.args={carry: true}"]],
    ids=["riskpo", "dapo"],
)
def test_state_of_a_method_survives_a_stop(mmpost, project, judge, method):
    # Some groups have spread and some do not, so that dynamic sampling has something to drop and something to carry.
    judge('float(sum(letter in "aeiou" for letter in text) > 4)')
    assert mmpost(*WORDS, *method, "output_dir=runs/whole").code == 0
    whole = _lines(project / "runs" / "whole")
    calls = sum(int(row.get("draw", {}).get("rounds", 1)) for row in whole[:4])
    # The first call of the fifth step fails: steps 1 to 4 are in the checkpoint.
    (project / "trip").write_text(str(calls + 1))
    run = project / "runs" / "parts"
    assert mmpost(*WORDS, *method, "output_dir=runs/parts").code == 6
    state = run / "checkpoints" / "step-000004" / "trainer_state" / "state.json"
    saved = json.loads(state.read_text())["source"]
    assert saved["method"] or saved["surplus"]
    again = mmpost(*WORDS, *method, "output_dir=runs/parts")
    assert again.code == 0
    assert "continuing from step-000004" in again.err
    assert _lines(run) == whole
    for file in (project / "runs" / "whole" / "final").glob("*.safetensors"):
        assert (run / "final" / file.name).read_bytes() == file.read_bytes()
