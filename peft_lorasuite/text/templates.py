"""The prompt templates of the LLM-Adapters datasets, and checks of templates and texts."""

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
    """Format a record as a prompt.

    Args:
        doc: The record, with the keys ``instruction`` and ``input``.
        template: Text with ``{instruction}`` and optionally ``{input}``. The defaults are the two LLM-Adapters
            templates, without the sixteen spaces that the original has at the start of each line.
    """
    if template is None:
        template = TEMPLATE_WITH_INPUT if doc["input"] else TEMPLATE
    # not str.format: an instruction may contain braces
    parts = re.split(r"(\{instruction\}|\{input\})", template)
    return "".join(doc[part[1:-1]] if part in ("{instruction}", "{input}") else part for part in parts)


def check_template(template: str) -> None:
    """Raise `LoraSuiteError` if a template has no ``{instruction}`` or cannot be encoded."""
    if "{instruction}" not in template:
        raise LoraSuiteError("the prompt template has no {instruction}", where="template", got=repr(template))
    check_text(template, "template")


def check_text(text: str, where: object) -> None:
    """Raise `LoraSuiteError` for lone surrogates (from bytes that are not UTF-8), which tokenizers reject."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = repr(text[max(error.start - 10, 0) : error.end])
        raise LoraSuiteError("the text has a lone surrogate", where=where, got=got, wanted="text in UTF-8") from error
