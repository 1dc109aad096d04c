"""Filtering by rollouts and new questions: rules, text filters, and files that do not depend on interruptions."""

import itertools
import json
import math

import numpy as np
import pytest

from mmpost.api.data import Data
from mmpost.api.filtering import Rule, facts, filter_rows
from mmpost.api.questions import Wanted, edit_similarity, question_in, synthesize
from mmpost.api.rollouts import journal_of, write_rows
from mmpost.cli.questions import open_sources
from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Group, Rollout
from mmpost.core.sample import Part, Sample, Turn
from mmpost.rollout.generate import Sampling
from mmpost.runs.journal import Journal


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_rows_are_kept_as_often_as_the_binomial_says(p):
    k, rows = 8, 2000
    correct = np.random.default_rng(0).binomial(k, p, rows)
    exact = {"any_correct": 1 - (1 - p) ** k, "mixed": 1 - (1 - p) ** k - p**k}
    chosen = (math.comb(k, c) * p**c * (1 - p) ** (k - c) for c in range(k + 1) if 0.25 <= c / k <= 0.75)
    exact["band"] = math.fsum(chosen)
    for keep, share in exact.items():
        kept = np.mean([Rule(keep, 0.25, 0.75)(int(c), k) for c in correct])
        assert abs(kept - share) <= 3 * math.sqrt(share * (1 - share) / rows) + 1e-12, keep


def test_rules_by_enumeration():
    for k in range(9):
        for correct in range(k + 1):
            assert Rule("any_correct")(correct, k) == (correct >= 1)
            assert Rule("mixed")(correct, k) == (0 < correct < k)
            assert Rule("band", 0.5, 1.0)(correct, k) == (k > 0 and 2 * correct >= k)


@pytest.mark.parametrize("words", [("any", 0.0, 1.0), ("band", 0.9, 0.1), ("band", -1.0, 1.0)])
def test_a_rule_that_means_nothing_is_refused(words):
    with pytest.raises(MmpostError, match=r"means nothing.*MMP-R229") as caught:
        Rule(*words)
    assert caught.value.exit_code == 6


def test_facts_of_a_row():
    tokens = [np.arange(n) for n in (2, 4, 6)]
    scores = (1.0, None, 0.4)
    rollouts = [Rollout(t, np.zeros(len(t)), "", False, {}, s) for t, s in zip(tokens, scores, strict=True)]
    found = facts(Group(Sample("a", ()), rollouts, 0))
    assert found == {"k": 3, "scored": 2, "correct": 1, "mean_len": 4.0}


def test_edit_similarity_is_levenshteins():
    def distance(one, two):
        table = {(i, 0): i for i in range(len(one) + 1)} | {(0, j): j for j in range(len(two) + 1)}
        for i, j in itertools.product(range(1, len(one) + 1), range(1, len(two) + 1)):
            same = one[i - 1] == two[j - 1]
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (not same))
        return table[len(one), len(two)]

    rng = np.random.default_rng(0)
    for _ in range(200):
        one, two = ("".join(rng.choice(list("abc"), rng.integers(0, 9))) for _ in range(2))
        longest = max(len(one), len(two))
        assert edit_similarity(one, two) == pytest.approx(1 - distance(one, two) / longest if longest else 1.0)
        assert edit_similarity(one, two) == edit_similarity(two, one)
    assert edit_similarity("How  many SHOES?", "how many shoes?") == 1.0


@pytest.mark.parametrize(
    ("reply", "question"),
    [
        ("<question>How many\n shoes?</question>", "How many shoes?"),
        ("One: <question>a?</question> two: <question>b?</question>", "b?"),
        ("Sure! \\boxed{Which one is \\text{red}?}", "Which one is \\text{red}?"),
        ("  What is this? ", "What is this?"),
        ("<question> </question>", ""),
    ],
)
def test_the_question_of_a_reply(reply, question):
    assert question_in(reply) == question


def test_a_journal_goes_on_behind_its_last_whole_line(tmp_path):
    file, done = tmp_path / "j.jsonl", []

    def work(number):
        done.append(number)
        return {"n": number, "half": number / 3}

    Journal(file, {"a": 1}).complete(5, work)
    whole = file.read_bytes()
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        done.clear()
        again = Journal(file, {"a": 1})
        again.complete(5, work)
        assert file.read_bytes() == whole
        assert done == list(range(5 - len(done), 5))
        assert [piece["n"] for piece in again.pieces] == list(range(5))


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [(b"[1]", b"[1", 3), (b"[2]", b"\xff", 4), (b"{", b"", 1), (b'{"a": 1}', b"7", 1)],
)
def test_a_damaged_line_of_a_journal_is_named(tmp_path, old, new, line):
    file = tmp_path / "j.jsonl"
    Journal(file, {"a": 1}).complete(3, lambda number: [number])
    file.write_bytes(file.read_bytes().replace(old, new))
    with pytest.raises(MmpostError, match=rf"line {line}: damaged, expected a line of JSON.*MMP-R233"):
        Journal(file, {"a": 1})


def test_a_journal_of_other_work_is_refused(tmp_path):
    Journal(tmp_path / "j.jsonl", {"k": 8, "seed": 0})
    with pytest.raises(MmpostError) as caught:
        Journal(tmp_path / "j.jsonl", {"k": 4, "seed": 0})
    assert str(caught.value) == (
        f"'{tmp_path / 'j.jsonl'}' holds work with other options: k. "
        "Repeat the earlier command, delete that file, or choose another output. [MMP-R226]"
    )


@pytest.fixture
def family():
    return "qwen2.5-vl"


@pytest.fixture
def rows(picture):
    """40 questions, the last one without a picture."""
    pictures = [picture(32, 32, seed) for seed in range(4)]
    out = []
    for i in range(40):
        parts = (Part("image", ref=pictures[i % 4]), Part("text", f"What is number {i}?"))
        answer = Turn("assistant", (Part("text", "seven"),))
        out.append(Sample(f"row/{i}", (Turn("user", parts[i == 39 :]), answer), {"solution": "a"}, f"f:{i}"))
    return [Data("some", out)]


def vowels(prompts, completions, **columns):
    return [float(sum(letter in "aeiou" for letter in c[-1]["content"]) > 4) for c in completions]


SAMPLING = Sampling(6, 1.0, seed=1)


def test_filtered_rows_are_an_ordinary_file_and_the_same_after_any_stop(rows, tiny_model, tmp_path):
    (tmp_path / "judge.py").write_text(
        "def vowels(prompts, completions, **columns):\n"
        "    texts = [c[-1]['content'] for c in completions]\n"
        "    return [float(sum(letter in 'aeiou' for letter in text) > 4) for text in texts]\n"
    )
    options = {"rule": Rule("mixed"), "k": 3, "reward": f"{tmp_path / 'judge.py'}:vowels", "sampling": SAMPLING}
    table = filter_rows(rows, tiny_model, tmp_path / "whole" / "kept.jsonl", **options)
    kept = [json.loads(line) for line in (tmp_path / "whole" / "kept.jsonl").read_text().splitlines()]
    assert table["some"] == {"rows": 40, "kept": len(kept), "unscored": 0}
    assert 0 < len(kept) < 40
    assert all(row["rif"]["k"] == 3 and 0 < row["rif"]["correct"] < 3 for row in kept)
    assert all([turn["role"] for turn in row["messages"]] == ["user"] for row in kept)
    assert all((tmp_path / "whole" / image).is_file() for row in kept for image in row["images"])
    # Stopped behind the first piece, in the middle of the second line, and before the file was written.
    journal = journal_of(tmp_path / "whole" / "kept.jsonl").read_bytes()
    parts = tmp_path / "parts" / "kept.jsonl"
    parts.parent.mkdir()
    journal_of(parts).write_bytes(journal[: journal.rfind(b"\n", 0, -1) + 20])
    filter_rows(rows, tiny_model, parts, **options)
    assert parts.read_bytes() == (tmp_path / "whole" / "kept.jsonl").read_bytes()
    assert journal_of(parts).read_bytes() == journal
    # Another rule needs no new rollouts.
    every = filter_rows(rows, tiny_model, parts, **{**options, "rule": Rule("band")})
    assert every["some"]["kept"] == 40
    assert journal_of(parts).read_bytes() == journal


def test_new_questions_are_counted_filtered_and_the_same_after_any_stop(rows, tiny_model, tmp_path):
    options = {"mode": "direct", "sampling": SAMPLING, "wanted": Wanted(1, 0.0, 1.0)}
    # A random model hardly ever ends a reply by itself; what was cut is unreadable.
    counts = synthesize(rows, tiny_model, tmp_path / "whole" / "new.jsonl", **options)
    assert sum(counts.values()) == 40
    assert counts["no picture"] == 1
    journal = journal_of(tmp_path / "whole" / "new.jsonl").read_bytes()
    parts = tmp_path / "parts" / "new.jsonl"
    parts.parent.mkdir()
    journal_of(parts).write_bytes(journal[: len(journal) // 2])
    assert synthesize(rows, tiny_model, parts, **options) == counts
    assert journal_of(parts).read_bytes() == journal
    assert parts.read_bytes() == (tmp_path / "whole" / "new.jsonl").read_bytes()


def test_files_of_one_stem_and_ids_that_look_alike_stay_apart(tmp_path, picture):
    for folder, text in (("one", "How many?"), ("two", "Which one?")):
        (tmp_path / folder).mkdir()
        line = json.dumps({"messages": [{"role": "user", "content": text}], "solution": "1"})
        (tmp_path / folder / "rows.jsonl").write_text(line + "\n")
    paths = [str(tmp_path / folder / "rows.jsonl") for folder in ("one", "two", "one")]
    assert [data.name for data in open_sources(paths, None, None, None)] == ["rows", "rows-2", "rows-3"]

    parts = [(Part("image", ref=picture(28, 28, seed)), Part("text", "?")) for seed in range(4)]
    ids = ("a b", "a_b", "a_b-2", "a:b")
    rows = [Sample(name, (Turn("user", part, False),), {}, "") for name, part in zip(ids, parts, strict=True)]
    write_rows(rows, tmp_path / "out" / "rows.jsonl")
    written = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    found = [(tmp_path / "out" / row["images"][0]).read_bytes() for row in written]
    assert found == [part[0].ref for part in parts]
