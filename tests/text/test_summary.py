"""What the short forms of results show."""

from __future__ import annotations

import pytest

from peft_lorasuite.text.summary import without_template

ALPACA = "Write a response.\n\n### Instruction:\n{}\n\n### Response:\n"


@pytest.mark.parametrize(
    ("prompts", "shown"),
    [
        ([ALPACA.format("one fish"), ALPACA.format("one\ndog")], ["one fish", "one\ndog"]),
        (["the red cat", "the red dog"], ["the red cat", "the red dog"]),  # words that all begin with are no template
        (["Q: a\nA:", "Q: b\nA:"], ["Q: a", "Q: b"]),
        ([ALPACA.format("one fish")], [ALPACA.format("one fish")]),
        ([ALPACA.format("a")] * 2, [ALPACA.format("a")] * 2),
        (["same\n", "same\nmore\n"], ["same\n", "same\nmore\n"]),  # one would be empty
        ([], []),
    ],
)
def test_the_lines_of_a_prompt_template_are_left_out(prompts: list[str], shown: list[str]) -> None:
    samples = [{"prompt": prompt, "old": "x"} for prompt in prompts]
    assert without_template(samples) == [{"prompt": prompt, "old": "x"} for prompt in shown]
