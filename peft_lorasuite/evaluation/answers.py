"""Prompts of the benchmarks, and extraction and scoring of answers.

An item is a dict with ``instruction``, ``input`` and ``answer`` (strings), as in the LLM-Adapters collection. The
extraction rules are those of the collection's evaluation scripts, which the LoRASuite paper uses. Their weaknesses are
kept (see `first_letter` and `first_option`), so that scores are comparable with the published tables.
lm-evaluation-harness calls the functions with a ``doc``; the task YAML refers to them by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from ..errors import LoraSuiteError
from ..text.templates import format_prompt

FORCED = "the correct answer is"
"""How every commonsense response of the collection begins."""
TOLERANCE = 0.001
"""Largest error of a correct number."""

_NUMBER = re.compile(r"-?\d+\.?\d*", re.ASCII)
_LETTER = re.compile(r"[A-E]")
_OPTION = re.compile(r"true|false|solution[12]|answer[1-5]|ending[1-4]|option[12]")
_FORMAT = "Answer format:"


def forced_prompt(doc: Mapping[str, str], template: str | None = None) -> str:
    """Return the prompt followed by the words before the option, for scoring by likelihood."""
    return format_prompt(doc, template) + FORCED


def normalize(text: str) -> str:
    """Replace every run of white space (line ends, tabs, no-break spaces) by one space, and strip both ends."""
    return " ".join(text.split())


def last_number(text: str) -> float | None:
    """Return the last number of a text, without thousands separators; None if there is no finite number."""
    found = _NUMBER.findall(normalize(text).replace(",", ""))
    value = float(found[-1]) if found else math.nan
    return value if math.isfinite(value) else None


def first_letter(text: str) -> str | None:
    """Return the first capital letter from A to E anywhere in a text, as the paper does: "Because ..." gives B."""
    found = _LETTER.search(normalize(text))
    return found.group() if found else None


def first_option(text: str, options: Sequence[str]) -> str | None:
    """Return the first option in a text, in lower case as trained; None if there is none.

    Any option of the benchmark's kind ("answer1" to "answer5") counts, also one that the item does not have: a model
    must not gain by answering with an impossible option first.
    """
    kind = _kind(options[0])
    return next((hit for hit in _OPTION.findall(normalize(text)) if _kind(hit) == kind), None)


def _kind(name: str) -> str:
    return "truth" if name in ("true", "false") else name.rstrip("0123456789")


def choices(doc: Mapping[str, str]) -> list[str]:
    """Return the options of an item, from its "Answer format: answer1/answer2/..."."""
    _, found, tail = doc["instruction"].rpartition(_FORMAT)
    if not found:
        raise LoraSuiteError("the item has no options", got=repr(tail[:60]), wanted=f"{_FORMAT!r} at its end")
    return [name.strip() for name in tail.strip().split("/")]


def choice_index(doc: Mapping[str, str]) -> int:
    """Return the index of the correct answer among `choices`."""
    return choices(doc).index(doc["answer"])


def _outcome(correct: bool, answer: object) -> dict[str, float]:
    return {"acc": float(correct), "answered": float(answer is not None)}


def score_number(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Score a generation by its last number, correct within `TOLERANCE`."""
    found = last_number(results[0])
    return _outcome(found is not None and abs(found - float(doc["answer"])) <= TOLERANCE, found)


def score_letter(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Score a generation by its first letter."""
    found = first_letter(results[0])
    return _outcome(found == doc["answer"], found)


def score_option(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Score a generation by its first option."""
    found = first_option(results[0], choices(doc))
    return _outcome(found == doc["answer"], found)
