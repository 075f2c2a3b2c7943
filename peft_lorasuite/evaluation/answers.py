"""What the benchmarks ask and what counts as an answer: prompt, extraction, score. Text in, values out.

An item is a dict with ``instruction``, ``input`` and ``answer`` (all strings), as in the LLM-Adapters collection.
The extraction rules are those of that collection's evaluation scripts, which the LoRASuite paper uses: they are kept as
they are, weaknesses included (see `letter` and `option`), because a stricter rule would not be comparable with the
published tables. The functions that take ``doc`` are named in the task YAML and are called by lm-evaluation-harness.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from ..errors import LoraSuiteError
from ..text.templates import prompt

FORCED = "the correct answer is"  # how every commonsense response of the collection begins
TOLERANCE = 0.001

_NUMBER = re.compile(r"-?\d+\.?\d*", re.ASCII)
_LETTER = re.compile(r"[A-E]")
_OPTION = re.compile(r"true|false|solution[12]|answer[1-5]|ending[1-4]|option[12]")
_FORMAT = "Answer format:"


def forced_prompt(doc: Mapping[str, str], template: str | None = None) -> str:
    """The prompt followed by the words before the option, for scoring by likelihood."""
    return prompt(doc, template) + FORCED


def normalize(text: str) -> str:
    """Turn every run of white space (line ends, tabs, no-break spaces) into one space; none at the ends."""
    return " ".join(text.split())


def number(text: str) -> float | None:
    """The last number of a chain of thought; commas are thousands separators. None if there is no finite number."""
    found = _NUMBER.findall(normalize(text).replace(",", ""))
    value = float(found[-1]) if found else math.nan
    return value if math.isfinite(value) else None


def letter(text: str) -> str | None:
    """The first capital A to E, wherever it stands: the paper's rule, to which "Because ..." also answers B."""
    found = _LETTER.search(normalize(text))
    return found.group() if found else None


def option(text: str, options: Sequence[str]) -> str | None:
    """The first name of an option of this benchmark's kind, in lower case as trained; None if there is none.

    The kind is that of ``options`` ("answer1" ... "answer5"); a name that the item does not offer still counts as the
    response, so a model cannot gain by naming an impossible option first.
    """
    kind = _kind(options[0])
    return next((hit for hit in _OPTION.findall(normalize(text)) if _kind(hit) == kind), None)


def _kind(name: str) -> str:
    return "truth" if name in ("true", "false") else name.rstrip("0123456789")


def choices(doc: Mapping[str, str]) -> list[str]:
    """The options that an item offers, read from its "Answer format: answer1/answer2/..."."""
    _, found, tail = doc["instruction"].rpartition(_FORMAT)
    if not found:
        raise LoraSuiteError("the item names no options", got=repr(tail[:60]), wanted=f"{_FORMAT!r} at its end")
    return [name.strip() for name in tail.strip().split("/")]


def choice_index(doc: Mapping[str, str]) -> int:
    """The place of the right answer among `choices`, from 0."""
    return choices(doc).index(doc["answer"])


def _scored(right: bool, answer: object) -> dict[str, float]:
    return {"acc": float(right), "answered": float(answer is not None)}


def score_number(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Score a generation by its last number, right within 0.001."""
    found = number(results[0])
    return _scored(found is not None and abs(found - float(doc["answer"])) <= TOLERANCE, found)


def score_letter(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Score a generation by its first letter."""
    found = letter(results[0])
    return _scored(found == doc["answer"], found)


def score_option(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Score a generation by the first option it names."""
    found = option(results[0], choices(doc))
    return _scored(found == doc["answer"], found)
