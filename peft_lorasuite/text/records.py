"""Records of any shape as prompts and, where there is one, a reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import LoraSuiteError
from .conversations import Conversation
from .messages import read_conversation
from .record_types import Completion, Example, Record
from .shapes import ANSWERS, SHAPES, Fields, check_media, find_shape, read_text
from .values import plain


def read_record(record: Any, where: str, *, labeled: bool) -> Record:
    """Read a record of any shape.

    Args:
        record: A mapping with a key of `SHAPES`, a string (the prompt), a list of messages, or what this returns.
        where: Number of the record, for errors.
        labeled: Whether it must have a reference.

    Raises:
        LoraSuiteError: If the shape is unknown, the prompt is empty, or a reference that is needed is missing.
    """
    try:
        return _read(record, where, labeled=labeled)
    except RecursionError as error:
        raise LoraSuiteError("a record is nested too deeply", where=where) from error


def _read(record: Any, where: str, *, labeled: bool) -> Record:
    labels = ""
    if isinstance(record, (Example, Completion)):
        record = {name: value for name, value in vars(record).items() if value}
        record |= {"completion": record.pop("output")} if "prompt" in record and "output" in record else {}
    if isinstance(record, Conversation):
        found: Record = record
    elif isinstance(record, str) and not labeled:
        found = Completion(read_text(record, where))
    elif isinstance(record, (list, tuple)):
        found = read_conversation(plain(record), where, labeled=labeled)
    elif isinstance(record, Mapping):
        found, labels = _read_object(plain(record), where, labeled=labeled)
    else:
        raise LoraSuiteError(
            "a record must be an object", where=where, got=type(record).__name__, wanted=_wanted(labeled)
        )
    return _check(found, record, where, labels or "response", labeled=labeled)


def _read_object(record: Mapping[str, Any], where: str, *, labeled: bool) -> tuple[Record, str]:
    """Read an object; return also the names of the keys of the reference. The case of a key does not matter."""
    exact = {name: value for name, value in record.items() if name == name.lower()}
    given = {name: value for name, value in ({name.lower(): one for name, one in record.items()} | exact).items()
             if value is not None}  # fmt: skip
    values = {name: value for name, value in given.items() if value not in ("", [], {})}
    key = find_shape(values) or next((name for name in SHAPES if name in given), None)
    if key is None or (key == "text" and ("role" in values or "from" in values)):
        raise _unknown_shape(given, where, labeled=labeled)
    if labeled and values.get("label") is False and key in ("messages", "prompt"):
        raise LoraSuiteError("the answer is a rejected one (label false)", where=where, do="leave the record out")
    check_media(values, where)
    shape = SHAPES[key]
    fields = Fields({key: given[key], **values}, key, where, labeled, (*shape.answers, *ANSWERS))
    return shape.read(fields), shape.labels


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
    message = any({sender, text} <= set(values) for sender in ("role", "from") for text in ("content", "value", "text"))
    return LoraSuiteError(
        "unknown shape of a record", where=where, got=f"the keys {', '.join(sorted(values)) or 'none'}",
        wanted=_wanted(labeled), do="put the messages of one conversation in a list" if message else None,
    )  # fmt: skip


def _wanted(labeled: bool) -> str:
    if labeled:
        return "messages, conversations, instruction and output, prompt and completion, or question and answer"
    return "a string, or an object with messages, conversations, instruction, prompt, question, chosen or text"
