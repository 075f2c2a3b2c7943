"""The shapes of records in public datasets: which key has the prompt, the reference, and what belongs to them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import LoraSuiteError
from .conversations import ASSISTANT, USER, Conversation
from .messages import as_messages, is_message, read_conversation, read_messages
from .prompt_text import asks, split_answer
from .record_types import Completion, Example, Record
from .templates import check_text
from .values import describe, json_or_none

CONTEXTS = ("input", "context")
"""Keys of what is asked about, beside the question."""
ANSWERS = (
    "output", "completion", "response", "chosen", "solution", "generated_solution", "answer", "answers", "targets",
    "target", "generation", "code", "canonical_solution", "assistant",
)  # fmt: skip
"""Keys of the reference."""
SYSTEMS = ("system", "system_prompt", "system_message")
"""Keys of a system prompt beside a conversation or a question."""
TOOLS = ("tools", "functions", "available_tools")
"""Keys of the tools of a conversation."""
HISTORY = "history"
"""Key of the turns before a question."""
CHOICES = ("choices", "options")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
PYTHON_TEXT = re.compile(r"\[\{'(?:role|from|content|value)'")
"""Start of messages as Python prints them, which CSV files of some libraries have."""


class Fields(NamedTuple):
    """The values of a record, and how to read them.

    Attributes:
        values: Value of every key that is neither None nor empty; the keys are in lower case.
        key: The key that decides the shape.
        where: The record, for errors.
        labeled: Whether the reference is used; an unusable one is no error otherwise.
        answers: Keys of the reference, the usual ones of the shape first.
    """

    values: Mapping[str, Any]
    key: str
    where: str
    labeled: bool
    answers: Sequence[str] = ANSWERS

    @property
    def value(self) -> Any:
        """Value of the key that decides."""
        return self.values[self.key]

    def name(self, names: Iterable[str]) -> str | None:
        """Return the first of some other keys that the record has."""
        return next((name for name in names if name in self.values and name != self.key), None)

    def first(self, names: Iterable[str]) -> Any:
        """Return the value of that key, None if there is none."""
        return self.values.get(self.name(names) or "")

    @property
    def tools(self) -> Any:
        """The tools; OpenAI's older functions as tools."""
        found = self.first(TOOLS)
        if self.name(TOOLS) != "functions" or not isinstance(functions := json_or_none(found) or found, list):
            return found
        return [one if is_schema(one) else {"type": "function", "function": one} for one in functions]

    def conversation(self, messages: Any, reference: Any = None) -> Conversation:
        """Read messages, with the system prompt and the tools beside them."""
        return read_conversation(
            messages, self.where, reference=reference, tools=self.tools, system=self.first(SYSTEMS),
            labeled=self.labeled,
        )  # fmt: skip

    def asked(self, text: str, reference: Any) -> Conversation | None:
        """Return a question as a user turn if there are a system prompt, earlier turns or tools; None otherwise."""
        tools = json_or_none(self.tools) or self.tools
        has_tools = isinstance(tools, list) and all(isinstance(one, Mapping) or json_or_none(one) for one in tools)
        if not (has_tools or self.name(SYSTEMS) or HISTORY in self.values):
            return None
        history = json_or_none(self.values.get(HISTORY)) or self.values.get(HISTORY, [])
        if not isinstance(history, list):
            raise LoraSuiteError("history must be a list of turns", where=self.where, got=describe(history))
        fields = self if has_tools else self._replace(values={**self.values, **dict.fromkeys(TOOLS)})
        return fields.conversation([*history, {"role": USER, "content": text}], reference or None)

    def reference(self, name: str | None) -> str:
        """Return the text of a reference, the first one of several."""
        answer = self.values.get(name or "")
        if isinstance(answer, Mapping):
            answer = answer.get("text")
        if isinstance(answer, list) and all(isinstance(one, str) for one in answer):
            answer = next(iter(answer), None)
        if not self.labeled and (isinstance(answer, bool) or not isinstance(answer, (str, int, float))):
            return ""
        return read_text("" if answer is None else answer, f"{self.where}, {name}")

    def check_choices(self, text: str) -> None:
        """Raise `LoraSuiteError` if the record has choices that the text of the prompt lacks."""
        name = self.name(CHOICES)
        choices = self.values.get(name or "")
        choices = choices.get("text") if isinstance(choices, Mapping) else choices
        if isinstance(choices, list) and any(isinstance(one, str) and one not in text for one in choices):
            raise LoraSuiteError(
                f"the {name} are apart from the question", where=self.where, do="write them into the question"
            )


class Shape(NamedTuple):
    """A shape of records.

    Attributes:
        read: Reads the prompt and, if there is one, the reference.
        labels: Names of the keys of the reference, for messages.
        answers: Keys of the reference that come before others.
    """

    read: Callable[[Fields], Record]
    labels: str
    answers: tuple[str, ...] = ()


def _read_messages(fields: Fields) -> Record:
    found = fields.value
    messages = json_or_none(found) if isinstance(found, str) else found
    messages = found if messages is None else messages
    if fields.key != "messages" and isinstance(messages, list) and all(isinstance(one, str) for one in messages):
        parsed = [json_or_none(one) for one in messages]
        turns = [{"role": (USER, ASSISTANT)[number % 2], "content": one} for number, one in enumerate(messages)]
        messages = parsed if all(map(is_message, parsed)) else turns
    read = fields.conversation(messages)
    if read.reference or (chosen := as_messages(fields.values.get("chosen"))) is None:
        return read
    return fields.conversation(messages, chosen)  # of which the messages are the start


def _read_prompt(fields: Fields) -> Record:
    prompt, name = fields.value, fields.name(fields.answers)
    turns = as_messages(fields.values.get(name or ""), answer=True)
    if isinstance(prompt, list) or as_messages(prompt):
        return fields.conversation(as_messages(prompt) or prompt, turns or fields.reference(name) or None)
    text = read_text(prompt, fields.where, "a prompt")
    fields.check_choices(text)
    if turns:  # the answer alone, or the whole conversation
        read = read_messages(turns, fields.where)
        asked = any(turn["role"] == USER for turn in read)
        return fields.conversation(read if asked else [{"role": USER, "content": text}, *read])
    output = fields.reference(name)
    if asks(text):  # formatted, and the chosen text of a preference may have it in it
        return Completion(text, output.removeprefix(text))
    return fields.asked(text, output) or Completion(text, output)


def _read_question(fields: Fields) -> Record:
    name = fields.name(fields.answers)
    if as_messages(fields.value) or as_messages(fields.values.get(name or ""), answer=True):
        return _read_prompt(fields)
    question = read_text(fields.value, f"{fields.where}, {fields.key}")
    calls = _called_tools(fields.values.get(name or "")) if fields.tools else None
    found = Example(question, "" if calls else fields.reference(name), _read_context(fields), _scored(fields, name))
    fields.check_choices(found.whole)
    return fields.asked(found.whole, calls or found.output) or found


def _scored(fields: Fields, name: str | None) -> str:
    """Return the part of the response that is scored, beside the whole."""
    apart = "answer" in fields.values and (name != "answer" or fields.key == "instruction")
    return fields.reference("answer") if apart else ""


def _read_context(fields: Fields) -> str:
    name = fields.name(CONTEXTS)
    context = fields.values.get(name or "", "")
    if isinstance(context, list) and all(isinstance(one, str) for one in context):
        context = "\n".join(context)
    if name == "context" and fields.key == "instruction" and not isinstance(context, str):
        return ""  # what the instruction was made of
    return read_text(context, f"{fields.where}, {name}")


def _called_tools(answer: Any) -> dict[str, Any] | None:
    """Return an answer that is a list of calls of tools, or JSON text of one, as a message."""
    calls = json_or_none(answer) if isinstance(answer, str) else answer
    if not isinstance(calls, list) or not calls:
        return None
    are_calls = all(isinstance(one, Mapping) and {"name", "arguments"} <= set(one) for one in calls)
    return {"role": ASSISTANT, "tool_calls": calls} if are_calls else None


def _read_chosen(fields: Fields) -> Record:
    if not isinstance(fields.value, str) or as_messages(fields.value):
        return fields.conversation(fields.value)
    prompt, answer = split_answer(read_text(fields.value, fields.where, "a chosen text"))
    if not answer:
        raise LoraSuiteError("a chosen text has no prompt in it", where=fields.where, wanted="prompt beside chosen")
    return Completion(prompt, answer)


def _read_formatted(fields: Fields) -> Record:
    return Completion(*split_answer(read_text(fields.value, fields.where, "a text")))


def is_schema(tool: Any) -> bool:
    """Return whether a tool has the form of OpenAI's tools."""
    return isinstance(tool, Mapping) and "function" in tool


def read_text(value: Any, where: str, what: str | None = None) -> str:
    """Return a value as text; numbers too, unless it is named.

    Raises:
        LoraSuiteError: If it is something else, or Python's text of messages.
    """
    if isinstance(value, bool) or not isinstance(value, (str,) if what else (str, int, float)):
        raise LoraSuiteError(f"{what or ''} must be a string".strip(), where=where, got=type(value).__name__)
    if isinstance(value, int) and value.bit_length() > 1000:
        raise LoraSuiteError("the number is too long", where=where)
    text = str(value)
    check_text(text, where)
    if PYTHON_TEXT.match(text):
        raise LoraSuiteError(
            "messages as Python prints them", where=where, got=repr(text[:40]), do="export the data as JSON or Parquet"
        )
    return text


_TURN = "assistant turn at the end"
_QUESTION = Shape(_read_question, "answer", ("solution", "generated_solution", "answer"))
_INPUT = Shape(_read_question, "output")
SHAPES: dict[str, Shape] = {
    "messages": Shape(_read_messages, _TURN),
    "conversations": Shape(_read_messages, _TURN),
    "instruction": _INPUT,
    "prompt": Shape(_read_prompt, "completion", ("completion", "chosen")),
    "question": _QUESTION,
    "query": _QUESTION,
    "problem": _QUESTION,
    "conversation": Shape(_read_messages, _TURN),
    "dialog": Shape(_read_messages, _TURN),
    "dialogue": Shape(_read_messages, _TURN),
    "inputs": _INPUT,
    "input": _INPUT,
    "user": Shape(_read_question, "assistant", ("assistant",)),
    "chosen": Shape(_read_chosen, _TURN),
    "context": _INPUT,
    "text": Shape(_read_formatted, "response apart from the text"),
}
"""Key -> shape of the records that have it; the first key that a record has decides (see `find_shape`)."""
WEAK = ("question", "query", "problem", "inputs", "input", "user", "context")
"""Keys that decide only where there is an answer, or no text: other data have them beside a text."""


def find_shape(values: Mapping[str, Any]) -> str | None:
    """Return the key that decides the shape of a record, None if there is none."""
    return next((name for name in SHAPES if name in values and _decides(name, values)), None)


def _decides(name: str, values: Mapping[str, Any]) -> bool:
    if name in ("conversation", "dialog", "dialogue"):  # others have a text under these keys
        return isinstance(json_or_none(values[name]) or values[name], (list, Mapping))
    if name == "user":
        return "assistant" in values
    return name not in WEAK or "text" not in values or any(answer in values for answer in ANSWERS)


def check_media(values: Mapping[str, Any], where: str) -> None:
    """Raise `LoraSuiteError` if a record has images, audio or video, which would be lost."""
    if media := next((name for name in MEDIA if isinstance(values.get(name), (list, Mapping))), None):
        raise LoraSuiteError(f"{media} beside the text: not supported", where=where, wanted="text", do="leave it out")
