import io

import pytest
from rich.console import Console

from mmpost.core.errors import MmpostError
from mmpost.runs.browse import compare, compare_tables, list_runs, runs_table, show
from mmpost.runs.folder import RunFolder


def make(path, *, kind="sft", rate=0.1, loss=1.0):
    config = f"train:\n  learning_rate: {rate}\n  output_dir: {path}\n"
    run = RunFolder.open(path, command=["mmpost", kind, "a.yaml"], config_yaml=config, overwrite=False)
    run.log({"step": 5, "loss": loss + 1, "reward": {"total": 0.25}})
    run.log({"step": 10, "loss": loss})
    run.log({"step": 10, "eval": {"digits": {"accuracy": 0.5, "ci": [0.4, 0.6], "n": 100}}})
    run.event("R101", "nothing to learn", step=10)
    run.write_eval(
        "digits",
        {"n": 100, "metrics": {"accuracy": {"value": 0.5, "ci": [0.4, 0.6], "n": 100, "unparsed": 2}}},
        [],
    )
    return run


def printed(*things) -> str:
    console = Console(file=io.StringIO(), width=80)
    for thing in things:
        console.print(thing)
    return console.file.getvalue()


def test_list_finds_nested_runs_with_their_last_values(tmp_path):
    make(tmp_path / "chain" / "sft").finish("finished")
    make(tmp_path / "chain" / "grpo", kind="grpo", loss=0.5)
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.yaml").write_text("mine: 1")
    runs = {run["name"]: run for run in list_runs(tmp_path)}
    assert set(runs) == {"chain/sft", "chain/grpo"}
    assert (runs["chain/sft"]["status"], runs["chain/grpo"]["status"]) == ("finished", "unfinished")
    grpo = runs["chain/grpo"]
    assert (grpo["command"], grpo["step"]) == ("grpo", 10)
    assert {k: grpo["metrics"][k] for k in ("loss", "reward.total", "accuracy")} == {
        "loss": 0.5,
        "reward.total": 0.25,
        "accuracy": 0.5,
    }
    assert grpo["started"] > 1.7e9


def test_list_of_a_missing_folder_is_empty(tmp_path):
    assert list_runs(tmp_path / "nowhere") == []


def test_table_shows_brackets_in_names_as_they_are(tmp_path):
    make(tmp_path / "a[red]b")
    text = printed(runs_table(list_runs(tmp_path)))
    assert "a[red]b" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_show_says_command_values_evaluations_and_events(tmp_path):
    text = show(make(tmp_path / "a").path)
    for words in (
        "unfinished at step 10",
        "command: mmpost sft a.yaml",
        "digits: accuracy 0.5 [0.4, 0.6], n 100, unparsed 2",
        "R101: nothing to learn",
    ):
        assert words in text


def test_show_counts_what_it_could_not_read(tmp_path):
    run = make(tmp_path / "a")
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step"')
    assert "1 unreadable lines in the logs were left out" in show(run.path)


def test_compare_gives_differences_and_values_side_by_side(tmp_path):
    first, second = make(tmp_path / "a"), make(tmp_path / "b", rate=0.2, loss=0.25)
    result = compare(first.path, second.path)
    changed = {key: (one, two) for key, one, two in result["config"]}
    assert changed["train.learning_rate"] == (0.1, 0.2)
    assert set(changed) == {"train.learning_rate", "train.output_dir"}
    values = {key: (one, two) for key, one, two in result["metrics"]}
    assert values["loss"] == (1.0, 0.25)
    assert "-0.75" in printed(*compare_tables(result))


def test_comparing_a_run_with_itself_finds_no_difference(tmp_path):
    run = make(tmp_path / "a")
    result = compare(run.path, run.path)
    assert result["config"] == []
    assert all(one == two for _, one, two in result["metrics"])


@pytest.mark.parametrize("ask", [show, lambda path: compare(path, path)])
def test_a_folder_that_is_no_run_is_named(tmp_path, ask):
    with pytest.raises(MmpostError) as caught:
        ask(tmp_path)
    assert str(caught.value) == (
        f"'{tmp_path}' is not a run folder (no config.yaml and command.txt). See: mmpost runs list. [MMP-E023]"
    )
