"""The shapes of records in public datasets: which key has the prompt, the reference, and what belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ..errors import LoraSuiteError
from .conversations import ASSISTANT, USER, Conversation
from .messages import is_message, is_messages, read_conversation, read_messages
from .prompt_text import split_answer
from .record_types import Completion, Example, Record
from .templates import check_text
from .values import json_or_none

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


class Fields(NamedTuple):
    """The values of a record, and how to read them.

    Attributes:
        values: Value of every key that is not None; the keys are in lower case.
        key: The key that decides the shape.
        where: The record, for errors.
        labeled: Whether the reference is used; an unusable one is no error otherwise.
    """

    values: Mapping[str, Any]
    key: str
    where: str
    labeled: bool

    def first(self, names: Iterable[str]) -> Any:
        """Return the first value that there is."""
        return next((self.values[name] for name in names if name in self.values and name != self.key), None)

    def conversation(self, messages: Any, reference: Any = None) -> Conversation:
        """Read messages, with the system prompt and the tools beside them."""
        tools = self.first(TOOLS)
        if isinstance(tools, list) and "functions" in self.values and "tools" not in self.values:
            tools = [{"type": "function", "function": one} for one in tools]  # as OpenAI's API had them at first
        return read_conversation(
            messages, self.where, reference=reference, tools=tools, system=self.first(SYSTEMS), labeled=self.labeled
        )

    def asked(self, text: str, reference: Any) -> Conversation | None:
        """Return a question as a user turn if there are a system prompt, earlier turns or tools; None otherwise."""
        if not self.first(TOOLS) and not any(name in self.values for name in (*SYSTEMS, HISTORY)):
            return None
        history = self.values.get(HISTORY)
        turns = [*(history if isinstance(history, list) else []), {"role": USER, "content": text}]
        return self.conversation(turns, reference or None)

    def reference(self, name: str, answer: Any, what: str | None = None) -> str:
        """Return the text of a reference, the first one of several."""
        if isinstance(answer, Mapping):
            answer = answer.get("text")
        if isinstance(answer, list) and all(isinstance(one, str) for one in answer):
            answer = next(iter(answer), None)
        usable = (str,) if what else (str, int, float)
        if not self.labeled and (isinstance(answer, bool) or not isinstance(answer, usable)):
            return ""
        return read_text("" if answer is None else answer, self.where if what else f"{self.where}, {name}", what)


class Shape(NamedTuple):
    """A shape of records.

    Attributes:
        read: Reads the prompt and, if there is one, the reference.
        labels: Names of the keys of the reference, for messages.
    """

    read: Callable[[Fields], Record]
    labels: str


def _read_messages(fields: Fields) -> Record:
    messages = fields.values[fields.key]
    if fields.key != "messages" and isinstance(messages, list) and all(isinstance(one, str) for one in messages):
        messages = [{"role": (USER, ASSISTANT)[number % 2], "content": one} for number, one in enumerate(messages)]
    if media := next((name for name in MEDIA if fields.values.get(name)), None):
        raise LoraSuiteError(f"{media} beside a conversation: not supported", where=fields.where, wanted="text")
    return fields.conversation(messages, _as_turns(fields.values.get("chosen")))  # of which the messages are the start


def _read_prompt(fields: Fields) -> Record:
    prompt, answer = fields.values[fields.key], fields.first(ANSWERS)
    turns = _as_turns(answer)
    if isinstance(prompt, list) or is_messages(prompt):
        return fields.conversation(prompt, turns or fields.reference("", answer, "a completion") or None)
    text = read_text(prompt, fields.where, "a prompt")
    if turns:  # the answer alone, or the whole conversation
        read = read_messages(turns, fields.where)
        asked = any(turn["role"] == USER for turn in read)
        return fields.conversation(read if asked else [{"role": USER, "content": text}, *read])
    output = fields.reference("", answer, "a completion").removeprefix(text)
    return fields.asked(text, output) or Completion(text, output)


def _read_question(fields: Fields) -> Record:
    if is_messages(fields.values[fields.key]) or _as_turns(fields.first(ANSWERS)):
        return _read_prompt(fields)
    if choices := next((name for name in CHOICES if fields.values.get(name)), None):
        raise LoraSuiteError(
            f"the {choices} are apart from the question", where=fields.where, do="write them into the question"
        )
    names = [name for name in ANSWERS if name in fields.values and name != fields.key]
    name = names[0] if names else ""
    answer, calls = fields.values.get(name), _read_calls(fields.values.get(name))
    scored = fields.reference("answer", fields.values["answer"]) if "answer" in names[1:] else ""
    context = read_text(fields.first(CONTEXTS) or "", f"{fields.where}, input")
    question = read_text(fields.values[fields.key], f"{fields.where}, {fields.key}")
    found = Example(question, "" if calls else fields.reference(name, answer), context, scored)
    return fields.asked(found.whole, calls or found.output) or found


def _as_turns(answer: Any) -> Any:
    """Return an answer that is a message, or a list of them, also as JSON text; None otherwise."""
    parsed = json_or_none(answer) if isinstance(answer, str) else answer
    return parsed if is_messages(parsed) or (parsed is answer and is_message(parsed)) else None


def _read_calls(answer: Any) -> dict[str, Any] | None:
    """Return an answer that is a list of calls of tools, or JSON text of one, as a message."""
    calls = json_or_none(answer) if isinstance(answer, str) else answer
    if not isinstance(calls, list) or not calls:
        return None
    are_calls = all(isinstance(one, Mapping) and {"name", "arguments"} <= set(one) for one in calls)
    return {"role": ASSISTANT, "tool_calls": calls} if are_calls else None


def _read_chosen(fields: Fields) -> Record:
    chosen = fields.values[fields.key]
    is_text = isinstance(chosen, str) and not is_messages(chosen)
    return _read_formatted(fields) if is_text else fields.conversation(chosen)


def _read_formatted(fields: Fields) -> Record:
    return Completion(*split_answer(read_text(fields.values[fields.key], fields.where, "a text")))


def read_text(value: Any, where: str, what: str | None = None) -> str:
    """Return a value as text; numbers too, unless it is named.

    Raises:
        LoraSuiteError: If it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, (str,) if what else (str, int, float)):
        raise LoraSuiteError(f"{what or ''} must be a string".strip(), where=where, got=type(value).__name__)
    check_text(str(value), where)
    return str(value)


_MESSAGES = Shape(_read_messages, "assistant turn at the end")
_QUESTION, _INPUT = Shape(_read_question, "answer"), Shape(_read_question, "output")
SHAPES: dict[str, Shape] = {
    "messages": _MESSAGES,
    "conversations": _MESSAGES,
    "conversation": _MESSAGES,
    "dialog": _MESSAGES,
    "dialogue": _MESSAGES,
    "instruction": _INPUT,
    "prompt": Shape(_read_prompt, "completion"),
    "question": _QUESTION,
    "query": _QUESTION,
    "problem": _QUESTION,
    "inputs": _INPUT,
    "input": _INPUT,
    "user": _INPUT,
    "chosen": Shape(_read_chosen, "assistant turn at the end"),
    "text": Shape(_read_formatted, "response apart from the text"),
    "context": _INPUT,
}
"""Key -> shape of the records that have it; the first key that a record has decides."""
