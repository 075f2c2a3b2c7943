"""The shapes of records: what of a record is the prompt, and what is the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import LoraSuiteError
from .conversations import Conversation, read_conversation
from .templates import check_text

FIELDS = ("instruction", "input", "output", "answer")


@dataclass(frozen=True)
class Example:
    """A record with the fields of the LLM-Adapters datasets.

    Attributes:
        instruction: The question or task.
        output: The expected response.
        input: Context of the instruction, if it is separate from it.
        answer: The part of the response that is scored, if the dataset has it.
    """

    instruction: str
    output: str = ""
    input: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Completion:
    """A prompt that is formatted already, and what follows it.

    Attributes:
        prompt: The prompt.
        output: The expected response.
    """

    prompt: str
    output: str = ""


Record = Example | Completion | Conversation


class Shape(NamedTuple):
    """A shape of records.

    Attributes:
        read: Reads the prompt and, if there is one, the reference.
        labels: Names of the keys of the reference, for messages.
    """

    read: Callable[[Mapping[str, Any], str], Record]
    labels: str


def _read_messages(record: Mapping[str, Any], where: str) -> Record:
    return read_conversation(record["messages"], where, tools=record.get("tools"), system=record.get("system"))


def _read_sharegpt(record: Mapping[str, Any], where: str) -> Record:
    return read_conversation(record["conversations"], where, tools=record.get("tools"), system=record.get("system"))


def _read_chosen(record: Mapping[str, Any], where: str) -> Record:
    return read_conversation(record["chosen"], where, tools=record.get("tools"))


def _read_prompt(record: Mapping[str, Any], where: str) -> Record:
    prompt, answer = record["prompt"], record.get("completion", record.get("chosen"))
    if _is_list(prompt):
        return read_conversation(prompt, where, reference=answer, tools=record.get("tools"))
    if _is_list(answer):  # the whole conversation, beside the text of its first turn
        return read_conversation(answer, where, tools=record.get("tools"))
    return Completion(_read_text(prompt, where, "a prompt"), _read_text(answer or "", where, "a completion"))


def _read_example(record: Mapping[str, Any], where: str) -> Record:
    values = {name: record[name] for name in FIELDS if record.get(name) is not None}
    return Example(**{name: _read_text(value, f"{where}, {name}") for name, value in values.items()})


def _read_question(record: Mapping[str, Any], where: str) -> Record:
    question, answer = (_read_text(record.get(name, ""), f"{where}, {name}") for name in ("question", "answer"))
    return Example(question, answer)


def _read_plain(record: Mapping[str, Any], where: str) -> Record:
    return Completion(_read_text(record["text"], where, "a text"))


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or hasattr(value, "tolist")


def _read_text(value: Any, where: str, what: str | None = None) -> str:
    if isinstance(value, bool) or not isinstance(value, (str,) if what else (str, int, float)):
        raise LoraSuiteError(f"{what or ''} must be a string".strip(), where=where, got=type(value).__name__)
    check_text(str(value), where)
    return str(value)


SHAPES: dict[str, Shape] = {
    "messages": Shape(_read_messages, "assistant turn at the end"),
    "conversations": Shape(_read_sharegpt, "assistant turn at the end"),
    "instruction": Shape(_read_example, "output"),
    "prompt": Shape(_read_prompt, "completion"),
    "chosen": Shape(_read_chosen, "assistant turn at the end"),
    "question": Shape(_read_question, "answer"),
    "text": Shape(_read_plain, "response apart from the text"),
}
"""Key -> shape of the records that have it; the first key that a record has decides."""


def read_record(record: Any, where: str, *, labeled: bool) -> Record:
    """Read a record of any shape.

    Args:
        record: A mapping with a key of `SHAPES`, a string (the prompt), a list of messages, or what this returns.
        where: Number of the record, for errors.
        labeled: Whether it must have a reference.

    Raises:
        LoraSuiteError: If the shape is unknown, the prompt is empty, or a reference that is needed is missing.
    """
    labels = ""
    if isinstance(record, (Example, Completion)):
        record = {name: value for name, value in vars(record).items() if value}
        record |= {"completion": record.pop("output")} if "prompt" in record and "output" in record else {}
    if isinstance(record, Conversation):
        found: Record = record
    elif isinstance(record, str) and not labeled:
        found = Completion(_read_text(record, where))
    elif isinstance(record, (list, tuple)):
        found = read_conversation(record, where)
    elif isinstance(record, Mapping):
        values = {str(name): value for name, value in record.items() if value is not None}
        key = next((name for name in SHAPES if name in values), None)
        if key is None:
            raise _unknown_shape(values, where, labeled=labeled)
        labels = SHAPES[key].labels
        found = SHAPES[key].read(values, where)
    else:
        raise LoraSuiteError(
            "a record must be an object", where=where, got=type(record).__name__, wanted=_wanted(labeled)
        )
    return _check(found, record, where, labels or "response", labeled=labeled)


def _check(found: Record, record: Any, where: str, labels: str, *, labeled: bool) -> Record:
    if isinstance(found, Conversation):
        missing = [] if found.reference or not labeled else [labels]
    else:
        prompt, name = (found.instruction, "instruction") if isinstance(found, Example) else (found.prompt, "prompt")
        if isinstance(found, Completion) and not prompt.strip():
            raise LoraSuiteError("a prompt is empty", where=where)
        missing = [] if prompt.strip() else [name]
        missing += [labels] if labeled and not found.output.strip() else []
    if missing:
        keys = ", ".join(map(str, record)) if isinstance(record, Mapping) else ""
        raise LoraSuiteError(
            f"a record has no {' and no '.join(missing)}", where=where, got=f"the keys {keys}" if keys else None,
            wanted=_wanted(labeled),
        )  # fmt: skip
    return found


def _unknown_shape(values: Mapping[str, Any], where: str, *, labeled: bool) -> LoraSuiteError:
    do = None
    if {"role", "content"} <= set(values) or {"from", "value"} <= set(values):
        do = "put the messages of one conversation in a list"
    keys = ", ".join(sorted(values)) or "none"
    return LoraSuiteError(
        "unknown shape of a record", where=where, got=f"the keys {keys}", wanted=_wanted(labeled), do=do
    )


def _wanted(labeled: bool) -> str:
    if labeled:
        return "messages, conversations, instruction and output, prompt and completion, or question and answer"
    return f"a string, or an object with {', '.join(list(SHAPES)[:-1])} or {list(SHAPES)[-1]}"
