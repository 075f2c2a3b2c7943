"""Extraction on good and bad generations, the prompt, and what an item offers."""

from __future__ import annotations

import pytest

from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.evaluation import answers
from peft_lorasuite.text import templates

NUMBERS = [
    ("16 - 3 = 13 crayons are left. The answer is 13.", 13.0),
    ("The answer is 9.80", 9.8),
    ("so 1,234 + 1 = 1,235", 1235.0),
    ("It is -4 degrees.", -4.0),
    ("A: 7\n\n\tThe answer is\u00a012 .", 12.0),
    ("Half of 3 is 3/2", 2.0),  # fractions are not understood: the rule takes what stands last
    ("The answer is 5. I checked it 2 times", 2.0),  # nor is prose after the answer
    ("12 apples, i.e. a dozen", 12.0),
    ("There are no apples.", None),
    ("", None),
    ("9" * 400, None),  # overflows
    ("-", None),
]


@pytest.mark.parametrize(("text", "found"), NUMBERS)
def test_the_last_number_is_the_answer_to_a_math_problem(text: str, found: float | None) -> None:
    assert answers.last_number(text) == found


LETTERS = [
    ("60 times 5 is 300. the answer is (C).", "C"),
    ("E", "E"),
    ("(B) or rather (D)", "B"),
    ("Because 2 > 1, the answer is (D).", "B"),  # the published rule takes any capital from A to E
    ("\nA: 900 + 60 = 960. The answer is (E).", "A"),
    ("the answer is (c)", None),
    ("F G H", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "found"), LETTERS)
def test_the_first_capital_from_a_to_e_is_the_answer_to_aqua(text: str, found: str | None) -> None:
    assert answers.first_letter(text) == found


TRUTH, SOLUTION, ENDING, CHOICE = ("true", "false"), ("solution1", "solution2"), ("ending1",), ("option1", "option2")
ANSWER = ("answer1", "answer2", "answer3", "answer4")
OPTIONS = [
    ("the correct answer is true", TRUTH, "true"),
    ("the correct answer is\n\n false</s>", TRUTH, "false"),
    ("it is untrue", TRUTH, "true"),  # the published rule looks inside words
    ("True", TRUTH, None),  # and heeds case: models are trained on lower case
    ("yes", TRUTH, None),
    ("the correct answer is solution2", SOLUTION, "solution2"),
    ("solution3", SOLUTION, None),
    ("the correct answer is answer3, not answer1", ANSWER, "answer3"),
    ("Answer2: breathing mask", ANSWER, None),  # an echo of the question is no answer
    ("the correct answer is answer 2", ANSWER, None),
    ("answer5", ANSWER, "answer5"),  # not offered by this item, so it is an answer and a wrong one
    ("answer9", ANSWER, None),
    ("option1 is the answer1", ANSWER, "answer1"),  # other benchmarks' words do not count
    ("ending4 ending1", ENDING, "ending4"),
    ("ending5", ENDING, None),
    ("fill in option2.", CHOICE, "option2"),
    ("", CHOICE, None),
]


@pytest.mark.parametrize(("text", "options", "found"), OPTIONS)
def test_the_first_option_named_is_the_answer_to_commonsense(text: str, options: tuple, found: str | None) -> None:
    assert answers.first_option(text, options) == found


def item(answer: str, instruction: str = "Which?\n\nAnswer format: answer1/answer2", context: str = "") -> dict:
    return {"instruction": instruction, "input": context, "answer": answer}


@pytest.mark.parametrize(
    ("text", "truth", "score", "answered"),
    [("it is 2.0009", "2", 1, 1), ("it is 2.0011", "2", 0, 1), ("none", "0", 0, 0), ("3", "3.0", 1, 1)],
)
def test_a_number_counts_within_a_thousandth(text: str, truth: str, score: float, answered: float) -> None:
    assert answers.score_number(item(truth), [text]) == {"acc": score, "answered": answered}


def test_letters_and_options_count_when_equal() -> None:
    assert answers.score_letter(item("C"), ["so (C)"]) == {"acc": 1, "answered": 1}
    assert answers.score_letter(item("C"), ["so (D)"]) == {"acc": 0, "answered": 1}
    assert answers.score_option(item("answer2"), ["the correct answer is answer2"]) == {"acc": 1, "answered": 1}
    assert answers.score_option(item("answer2"), ["true"]) == {"acc": 0, "answered": 0}


def test_white_space_is_made_uniform() -> None:
    assert answers.normalize(" a\tb\r\n\n c\u00a0d\u2003 ") == "a b c d"


def test_the_prompt_is_that_of_llm_adapters() -> None:
    text = templates.format_prompt(item("answer1", "Count {to} 3."))
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nCount {to} 3.\n\n### Response:\n"
    )
    assert "### Input:\nSome text.\n\n### Response:\n" in templates.format_prompt(item("answer1", context="Some text."))
    assert answers.forced_prompt(item("answer1")).endswith("### Response:\nthe correct answer is")


def test_a_template_of_ones_own_needs_a_place_for_the_instruction() -> None:
    assert templates.format_prompt(item("answer1", "Q {input}"), "{instruction}|{input}|A:") == "Q {input}||A:"
    with pytest.raises(LoraSuiteError, match=r"no \{instruction\}"):
        templates.check_template("Question: {question}")


def test_options_are_read_from_the_item() -> None:
    assert answers.choices(item("answer2")) == ["answer1", "answer2"]
    assert answers.choice_index(item("answer2")) == 1
    with pytest.raises(LoraSuiteError, match="has no options"):
        answers.choices(item("answer2", "Which?"))
