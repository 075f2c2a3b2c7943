"""Prompt templates of the LLM-Adapters collection."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import LoraSuiteError

TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
TEMPLATE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def format_prompt(doc: Mapping[str, str], template: str | None = None) -> str:
    """Put an item into the prompt.

    Args:
        doc: The item.
        template: Text with ``{instruction}`` and, if items have one, ``{input}``; by default the two LLM-Adapters
            templates, without the sixteen spaces that the original puts before each line.
    """
    if template is None:
        template = TEMPLATE_WITH_INPUT if doc["input"] else TEMPLATE
    # plain replacement: an instruction may itself contain braces
    parts = re.split(r"(\{instruction\}|\{input\})", template)
    return "".join(doc[part[1:-1]] if part in ("{instruction}", "{input}") else part for part in parts)


def check_template(template: str) -> None:
    """Raise `LoraSuiteError` when a template has no place for the instruction."""
    if "{instruction}" not in template:
        raise LoraSuiteError("the prompt template has no {instruction}", where="template", got=repr(template))
    check_text(template, "template")


def check_text(text: str, where: object) -> None:
    """Raise `LoraSuiteError` for half a character, as of bytes that are no UTF-8: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = repr(text[max(error.start - 10, 0) : error.end])
        raise LoraSuiteError("a text holds a lone surrogate", where=where, got=got, wanted="text in UTF-8") from error
