"""Checks of the options of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import LoraSuiteError, check_integer
from ..text.templates import check_template
from .tasks import Benchmark

SCORINGS = ("generate", "likelihood")


def check_options(
    benchmarks: tuple[Benchmark, ...], scoring: str, limit: int | None, template: str | None, max_new_tokens: int | None
) -> None:
    """Check the options before anything is read."""
    if scoring not in SCORINGS:
        raise LoraSuiteError("unknown scoring", got=repr(scoring), wanted=" or ".join(SCORINGS))
    math = [b.name for b in benchmarks if b.suite == "math"]
    if scoring == "likelihood" and math:
        what = "the math benchmarks have no options whose likelihood could be compared"
        raise LoraSuiteError(what, where=", ".join(math), do="use scoring='generate'")
    for name, value in (("limit", limit), ("max_new_tokens", max_new_tokens)):
        if value is not None:
            check_integer(name, value)
    if template is not None:
        check_template(template)


def check_chat(chat: Mapping[str, Any]) -> None:
    """Check the options of chat templates."""
    if chat["fewshot_as_multiturn"] and not chat["apply_chat_template"]:
        raise LoraSuiteError(
            "few-shot examples are turns only with a chat template", where="fewshot_as_multiturn",
            do="set apply_chat_template as well",
        )  # fmt: skip
