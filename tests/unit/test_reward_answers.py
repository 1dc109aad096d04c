"""From completions to answers: what counts as one, and what equals what."""

import pytest

from mmpost.rewards.answers import answer, choice, counting, exact, number, same
from mmpost.rewards.extract import extract, last_boxed, to_letter, to_number
from mmpost.rewards.form import answer_tags, boxed


def wide(text):
    """The text in full-width characters, as Chinese and Japanese answers have them."""
    return "".join(chr(ord(character) + 0xFEE0) for character in text)


# -- extraction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{7}", "7"),
        (r"\boxed{\left\{1 \right.} end", r"\left\{1 \right"),
        (r"\\\boxed{2}", "2"),
        ("The  answer\nis\n\n 5.\nDone", "5"),
        ("The answer is", None),
        ("the answer isomer", None),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and an open \boxed{2", "1"),
        (r"\boxed{{a} \boxed{b}", "b"),
        (r"<answer>3</answer> but \boxed{4}", "4"),
        (r"\boxed{4} but <answer>3</answer>", "4"),
        ("<answer>a</answer> <answer>b</answer>", "b"),
        ("<ANSWER>a</ANSWER>", "a"),
        ("<answer>\n two \n lines </answer>", "two lines"),
        ("I put it in <answer> tags: <answer>5</answer>", "5"),
        ("<answer>a", None),
        ("The answer is 12.", "12"),
        ("The answer is: B", "B"),
        ("the answer is 3.5. It is not 4.", "3.5"),
        ("The answer is 1. No, the answer is 2!", "2"),
        ("The answer is red\nand the rest", "red"),
        ("12", None),
        ("", None),
        (r"\boxed{}", None),
        ("<answer> </answer>", None),
        (r"\boxed{$5$}", "5"),
        (r"\boxed{\text{red}}", "red"),
        (r"\boxed{ red . }", "red"),
        (f"\\boxed{{{wide('123')}}}", "123"),
        (f"\\boxed{{{wide('A')}}}", "A"),
    ],
)
def test_extraction(text, found):
    assert extract(text) == found


def test_an_unparsed_answer_equals_nothing_not_even_another_one():
    for function in (answer, exact, number, choice):
        for gold in ("None", "none", "", "7"):
            assert function([[]], ["no answer here"], solution=[gold]) == [0.0]
        assert function([[]], ["no answer here"], solution=[None]) == [None]
        assert function([[]], [r"\boxed{None}"], solution=[None]) == [None]


def test_last_boxed_keeps_spaces_and_inner_braces():
    assert last_boxed(r"x \boxed{ {a} {b} } y") == " {a} {b} "
    assert last_boxed("nothing") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5.0), ("-5", -5.0), ("+5", 5.0), ("0.5", 0.5), (".5", 0.5), ("1e3", 1000.0), ("1.5E-2", 0.015),
        ("1,234", 1234.0), ("1,234,567.5", 1234567.5), ("50%", 50.0), ("50 %", 50.0), (" 7 ", 7.0),
        ("12,34", None), ("1,2345", None), (",123", None), ("5 cm", 5.0), ("5cm", 5.0), ("5 apples", None),
        ("1/2", 0.5), ("-1/2", -0.5), (r"\frac12", 0.5), (r"-\frac{1}{2}", -0.5), (r"\dfrac{1}{4}", 0.25),
        ("1/0", None), (r"5 m^2", 5.0), ("5m²", 5.0), ("€5", 5.0), ("90^\\circ", 90.0), ("1,000 pixels", 1000.0),
        ("9" * 400, None), ("2 1/2", None), ("10²", None), ("1/2/3", None), ("3 of 4", None),
        ("five", None), ("", None), ("-", None), (".", None), ("%", None), (None, None),
        ("e5", None), ("E10", None), ("1e", None), ("1.2.3", None), ("nan", None), ("inf", None), ("--5", None),
    ],
)  # fmt: skip
def test_numbers(text, value):
    assert to_number(text) == value


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("(B", "B"), ("B.", "B"), ("B. bag", "B"), ("B) bag", "B"),
        ("B: bag", "B"), ("(B) bag", "B"), (" B ", "B"), ("Bag", None), ("bag", None), ("BC", None), ("5", None),
        ("", None), (None, None), ("[B]", None), ("A dog", None), ("I think", None),
    ],
)  # fmt: skip
def test_letters(text, letter):
    assert to_letter(text) == letter


# -- what equals what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "said", "gold", "right"),
    [
        (number, "7", "7", 1), (number, "7.0", "7", 1), (number, "7", 7, 1), (number, "7", 7.0, 1),
        (number, "1,234", "1234", 1), (number, "1234", "1,234", 1), (number, "50%", "0.5", 0),
        (number, "50%", "50", 1), (number, "½", "0.5", 1), (number, "10²", "102", 0),
        (number, wide("12"), "12", 1), (number, "12", wide("12"), 1),
        (number, "$12$", "12", 1),
        (number, "12.", "12", 1), (number, "12", "12.", 1), (number, "5 cm", "5", 1), (number, "5 cm", "5 m", 0),
        (number, "5 apples", "5", 0), (number, "5 centimeters", "5 cm", 1), (number, "5 cm", "5 cm^2", 0),
        (number, "five", "5", 0),
        (number, "8", "7", 0), (number, "-7", "7", 0), (number, "7", "red", 0), (number, "e5", "5", 0),
        (number, "1000000.5", "1000000", 1), (number, "1000002", "1000000", 0), (number, "0.0000001", "0", 1),
        (choice, "B", "B", 1), (choice, "b", "B", 1), (choice, "(B)", "B", 1), (choice, "B. bag", "B", 1),
        (choice, "B", "(B)", 1), (choice, "B", "b", 1), (choice, "B", "B. bag", 1), (choice, "A", "B", 0),
        (choice, "bag", "B", 0), (choice, wide("B"), "B", 1), (choice, "red", "red", 0),
        (exact, "Red", "red", 1), (exact, " red  bag ", "red bag", 1), (exact, "red.", "red", 1),
        (exact, "red", "Red.", 1), (exact, "redd", "red", 0), (exact, "the red", "red", 0), (exact, "7.0", "7", 0),
        (exact, r"\text{red}", "red", 1), (exact, wide("RED"), "red", 1), (exact, "STRASSE", "straße", 1),
        (answer, "7.0", "7", 1), (answer, "(B)", "B", 1), (answer, "b", "B", 1), (answer, "B. bag", "B", 1),
        (answer, "RED", "red", 1), (answer, "1,234", "1234", 1), (answer, "50%", "0.5", 0), (answer, "7", "B", 0),
        (answer, "5 cm", "5", 1), (answer, "7", 7, 1), (answer, "yes", "Yes", 1), (answer, "no", "yes", 0),
        (answer, "5", "5.", 1), (answer, "five", "5", 0), (answer, "B", "B. bag", 1),
        (answer, "C. albicans", "C. elegans", 0), (answer, r"\frac{1}{2}", "0.5", 1), (answer, "2", ["1", "2"], 1),
        (answer, "3", ["1", "2"], 0), (exact, "sofa", ["couch", "Sofa"], 1), (counting, "3", "3", 1),
        (counting, "3.0", 3, 1), (counting, "2.5", "2.5", 0), (counting, "4", "3", 0), (counting, "three", "3", 0),
    ],
)  # fmt: skip
def test_truth_table(function, said, gold, right):
    for text in (rf"so \boxed{{{said}}}", f"<answer>{said}</answer>"):
        assert function([[]], [[{"role": "assistant", "content": text}]], solution=[gold]) == [float(right)]


def test_tolerance_is_relative():
    def close(said, gold, tolerance):
        return number([[]], [rf"\boxed{{{said}}}"], solution=[gold], tolerance=tolerance)[0]

    assert close(101, 100, 0.02) == 1
    assert close(103, 100, 0.02) == 0
    assert close(10_100, 10_000, 0.02) == 1


def test_columns_stay_in_order():
    said = [r"\boxed{1}", r"\boxed{2}", "nothing", r"\boxed{4}"]
    assert answer([[]] * 4, said, solution=["1", "3", "5", None]) == [1.0, 0.0, 0.0, None]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<answer>3</answer>", 1), ("I think.\n<answer>3</answer>\n", 1), ("<answer>3</answer> yes", 0),
        ("<answer></answer>", 0), ("<answer> </answer>", 0), ("<answer>1</answer><answer>2</answer>", 0),
        ("<answer><answer>2</answer>", 0), ("<answer></answer></answer>", 0), ("<answer>3", 0), ("3", 0), ("", 0),
        ("<answer>\n3\n</answer>", 1),
    ],
)  # fmt: skip
def test_form_of_answer_tags(text, right):
    assert answer_tags([[]], [text]) == [float(right)]


@pytest.mark.parametrize(
    ("text", "right"), [(r"\boxed{3}", 1), (r"\boxed{}", 0), (r"\boxed{ }", 0), (r"\boxed{3", 0), ("3", 0)]
)
def test_form_of_boxes(text, right):
    assert boxed([[]], [text]) == [float(right)]


def test_completions_may_be_lists_of_parts():
    said = [[{"role": "assistant", "content": [{"type": "text", "text": r"\boxed"}, {"type": "text", "text": "{3}"}]}]]
    assert number([[]], said, solution=["3"]) == [1.0]


# -- the contract that votes and evaluation share --------------------------------------------------------------------


def classes(answers, **options):
    """Numbers of the class of each answer; None for no answer, which is in no class."""
    found = [extract(rf"\boxed{{{answer}}}") if answer is not None else None for answer in answers]
    numbers, firsts = [], []
    for one in found:
        hits = [k for k, first in enumerate(firsts) if same(one, first, **options)]
        if one is not None and not hits:
            firsts.append(one)
            hits = [len(firsts) - 1]
        numbers.append(hits[0] if hits else None)
    return numbers


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["7", "7", "8"], [0, 0, 1]),
        ([None, None, "7", None], [None, None, 0, None]),
        (["1/2", r"\frac12", "0.5", "3"], [0, 0, 0, 1]),
        (["3", "1/2", "0.5", "3"], [0, 1, 1, 0]),
        (["1", "2", "3"], [0, 1, 2]),
        (["B", "b", "(B)"], [0, 0, 0]),
        (["50%", "0.5"], [0, 1]),
        (["5 cm", "5"], [0, 0]),
    ],
)
def test_hand_table_of_equivalent_answers(answers, expected):
    assert classes(answers) == expected
    assert classes(answers[::-1]).count(None) == expected.count(None)


def test_percent_is_a_fraction_where_the_task_says_so():
    assert classes(["50%", "0.5"], percent=True) == [0, 0]
    assert answer([[]], [r"\boxed{50%}"], solution=["0.5"], percent=True) == [1.0]
    assert number([[]], [r"\boxed{50\%}"], solution=["50"], percent=True) == [0.0]


def test_absolute_tolerance_stands_beside_the_relative_one():
    said = [r"\boxed{0.52}"]
    assert number([[]], said, solution=["0.5"], absolute=0.03) == [1.0]
    assert number([[]], said, solution=["0.5"], absolute=0.01) == [0.0]


def test_partial_credit_of_a_count_falls_with_the_error():
    said = [rf"\boxed{{{n}}}" for n in (4, 3, 6, 9, 0)] + ["none"]
    assert counting([[]] * 6, said, solution=[4] * 6, partial=True) == [1.0, 0.75, 0.5, 0.0, 0.0, 0.0]
    assert counting([[]], [r"\boxed{1}"], solution=[0], partial=True) == [0.0]


def test_the_text_of_an_option_counts_as_its_letter():
    options = ["a red bag", "A blue bag", "a cat", "a cat"]

    def chosen(said, gold, options):
        return choice([[]], [f"<answer>{said}</answer>"], solution=[gold], options=[options])[0]

    assert chosen("A blue bag.", "B", options) == 1
    assert chosen("b", "a blue bag", options) == 1
    assert chosen("a red bag", "B", options) == 0
    assert chosen("a cat", "C", options) == 0  # stands for two letters
    assert chosen("a red bag", "(C)", {"C": "a red bag", "D": None}) == 1
    assert chosen("B", "B", None) == 1


def test_aliases_are_right_too():
    said = ["<answer>NYC</answer>"] * 3
    aliases = [["NYC", "Big Apple"], None, ["Boston"]]
    assert exact([[]] * 3, said, solution=["New York"] * 3, aliases=aliases) == [1.0, 0.0, 0.0]
