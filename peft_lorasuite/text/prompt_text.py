"""Prompts as a model reads them, and their token ids."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import Any

ANSWER_STARTS = re.compile(
    r"### (?:Response|Assistant|Answer):\n*|\[/INST\]|<\|im_start\|>assistant\n|<start_of_turn>model\n"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n*|<\|assistant\|>\n*|\n\nAssistant:|(?<=\s)ASSISTANT:"
)
"""What formats and chat templates write before an answer."""
QUESTION_STARTS = re.compile(
    r"### (?:Instruction|Human|Question|User|Input):|\[INST\]|<\|im_start\|>user|<start_of_turn>user"
    r"|<\|start_header_id\|>user|<\|user\|>|(?:^|\n\n)Human:|(?:^|\s)USER:"
)
"""What they write before a question."""


class PromptText(str):
    """The text of a prompt; a plain string otherwise.

    Attributes:
        number: Number of its record in the data, starting at 1; None where it is not known.
        rendered: Whether a chat template wrote it: the text then has all special tokens, and the tokenizer adds none.
        answers: Characters, from start to end, of the assistant turns in it.
        answer: What follows it in the data, if that is the answer to it in one text.
    """

    __slots__ = ("answer", "answers", "number", "rendered")

    def __new__(
        cls, text: str, number: int | None = None, *, rendered: bool = False, answers: Sequence[tuple[int, int]] = (),
        answer: str = "",
    ) -> PromptText:  # fmt: skip
        """Mark a text."""
        marked = super().__new__(cls, text)
        marked.number, marked.rendered, marked.answers = number, rendered, tuple(answers)
        marked.answer = answer
        return marked


def split_answer(text: str) -> tuple[str, str]:
    """Split a formatted text after the start of its last answer; the second part is empty if there is none.

    There must be a question before it and none after it; other texts are not formatted.
    """
    last = deque(ANSWER_STARTS.finditer(text), maxlen=1)
    end = last[0].end() if last else len(text)
    asked, answer = text[:end], text[end:]
    is_answer = answer.strip() and QUESTION_STARTS.search(asked) and not QUESTION_STARTS.search(answer)
    return (asked, answer) if is_answer else (text, "")


def asks(text: str) -> bool:
    """Return whether a text is a formatted prompt: it ends where its answer starts."""
    return split_answer(f"{text}-") == (text, "-")


def has_special_tokens(tokenizer: Any, text: str) -> bool:
    """Return whether a prompt has its special tokens already: a chat template wrote it, or it starts with BOS."""
    bos = tokenizer.bos_token
    return (isinstance(text, PromptText) and text.rendered) or bool(bos and text.startswith(bos))


def encode_prompt(tokenizer: Any, prompt: str, response: str = "", **options: Any) -> Any:
    """Tokenize a prompt, or a prompt and a response as one text, with special tokens once.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The prompt.
        response: Text that follows it.
        **options: Further keyword arguments of the tokenizer.

    Returns:
        What the tokenizer returns.
    """
    return tokenizer(prompt + response, add_special_tokens=not has_special_tokens(tokenizer, prompt), **options)
