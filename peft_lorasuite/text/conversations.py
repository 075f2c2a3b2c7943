"""Conversations: messages with roles, tools and, where there is one, the last assistant turn as the reference."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

from ..errors import LoraSuiteError
from .templates import check_text

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
"""``from`` of a ShareGPT message -> role."""
USER, ASSISTANT, TOOL = "user", "assistant", "tool"
AnyItem = TypeVar("AnyItem")

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """The messages that a model answers.

    Attributes:
        messages: Messages with ``role`` and ``content``, as chat templates take them, up to the turn to answer.
        reference: The assistant turn that followed them in the data, if there was one.
        tools: The tools that the model may call, as JSON schemas.
        where: The record, for messages.
        number: Number of the record in the data, starting at 1; None where it is not known.
    """

    messages: tuple[Message, ...]
    reference: Message | None = None
    tools: tuple[Any, ...] = ()
    where: str = field(default="the conversation", compare=False, repr=False)
    number: int | None = field(default=None, compare=False, repr=False)

    @property
    def question(self) -> str:
        """Text of the last user turn."""
        return next(message["content"] for message in reversed(self.messages) if message["role"] == USER)

    @property
    def beginnings(self) -> list[Conversation]:
        """The conversation up to each user turn that is answered in it, and the conversation itself at the end.

        Each has the assistant turn that follows as its reference, if the conversation has a reference.
        """
        roles = [message["role"] for message in self.messages]
        ends = [n for n, pair in enumerate(pairwise(roles), 1) if pair == (USER, ASSISTANT)]
        references = [self.messages[end] if self.reference else None for end in ends]
        starts = [self.messages[:end] for end in ends]
        return [*(replace(self, messages=s, reference=r) for s, r in zip(starts, references, strict=True)), self]

    def ask(self, question: str) -> Conversation:
        """Return the conversation with another text of the last user turn, and without the reference."""
        last = max(number for number, message in enumerate(self.messages) if message["role"] == USER)
        messages = list(self.messages)
        messages[last] = {**messages[last], "content": question}
        return replace(self, messages=tuple(messages), reference=None)

    def with_system(self, system: str | None) -> Conversation:
        """Return the conversation with a system prompt, if it has none."""
        if system is None or self.messages[0]["role"] in ("system", "developer"):
            return self
        return replace(self, messages=({"role": "system", "content": system}, *self.messages))


def spread_turns(items: Sequence[AnyItem], most: int, seed: int) -> list[AnyItem]:
    """Return every conversation up to one of its user turns, at random; up to others too while there are fewer.

    An adapter that was trained on all turns also has its way of answering the first ones.

    Args:
        items: Conversations, and other prompts, which stay as they are.
        most: How many to return at most, unless there are more already.
        seed: Seed of the choice.
    """
    source = random.Random(seed)
    turns: list[list[Any]] = [list(one.beginnings) if isinstance(one, Conversation) else [one] for one in items]
    for several in turns:
        source.shuffle(several)
    others = [one for several in turns for one in several[1:]]
    source.shuffle(others)
    return [*(several[0] for several in turns), *others[: max(most - len(turns), 0)]]


def user_turn(text: str, where: str = "the prompt") -> Conversation:
    """Return a conversation of one user turn."""
    return Conversation(({"role": USER, "content": text},), where=where)


def read_conversation(
    messages: Any, where: str, *, reference: Any = None, tools: Any = None, system: Any = None
) -> Conversation:
    """Read a conversation; its last message is the reference if it is an assistant turn.

    Args:
        messages: Messages with ``role`` and ``content`` (OpenAI), or with ``from`` and ``value`` (ShareGPT).
        where: The record, for errors.
        reference: Messages or text of the answer, where they are apart from ``messages``.
        tools: JSON schemas of tools, or JSON text of them.
        system: System prompt beside the messages.

    Raises:
        LoraSuiteError: If it is malformed, has no user turn, has an assistant turn without content, has images or
            audio, or ends in a tool result.
    """
    turns = _read_messages(messages, where)
    if isinstance(reference, str):
        turns.append({"role": ASSISTANT, "content": _check_content(reference, where)})
    elif reference is not None:
        answer = _read_messages(reference, where)
        turns = answer if answer[: len(turns)] == turns else turns + answer
    if isinstance(system, str) and system.strip() and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": _check_content(system, where)})
    _check_turns(turns, where)
    answered = turns[-1]["role"] == ASSISTANT
    return Conversation(
        tuple(turns[:-1] if answered else turns), turns[-1] if answered else None, _read_tools(tools, where), where
    )


def _check_turns(turns: Sequence[Message], where: str) -> None:
    roles = [turn["role"] for turn in turns]
    for number, turn in enumerate(turns, 1):
        if turn["role"] == ASSISTANT and not turn["content"].strip() and not turn.get("tool_calls"):
            raise LoraSuiteError(
                "an assistant turn is empty", where=f"{where}, message {number}", do="leave the record out"
            )
    if roles[-1] in (TOOL, "function"):
        raise LoraSuiteError(
            "the conversation ends in a tool result", where=where, wanted="the assistant's answer after it",
            do="add that answer, or leave the record out",
        )  # fmt: skip
    if USER not in roles[: -1 if roles[-1] == ASSISTANT else None]:
        raise LoraSuiteError(
            "the conversation has no user turn before the answer", where=where, got=f"the roles {', '.join(roles)}",
            do="leave the record out",
        )  # fmt: skip
    if roles[-1] not in (USER, ASSISTANT):
        raise LoraSuiteError(
            f"the conversation ends in a turn of {roles[-1]!r}", where=where, wanted="a user or an assistant turn"
        )


def _read_messages(messages: Any, where: str) -> list[Message]:
    messages = parse_json(messages, where) if isinstance(messages, str) else messages
    if hasattr(messages, "tolist"):
        messages = messages.tolist()  # an array of pandas or NumPy
    if not isinstance(messages, (list, tuple)) or not messages:
        raise LoraSuiteError(
            "a conversation must be a list of messages",
            where=where,
            got=_describe(messages),
            wanted="at least one message",
        )
    return [_read_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise LoraSuiteError("a message must be an object", where=where, got=_describe(message))
    values = {str(name): value for name, value in message.items() if value is not None}
    if "from" in values and "role" not in values:
        return _read_sharegpt(values, where)
    role = values.get("role")
    if not isinstance(role, str) or not role.strip():
        raise LoraSuiteError(
            "a message has no role", where=where, got=f"the keys {', '.join(values) or 'none'}",
            wanted="role and content, or from and value",
        )  # fmt: skip
    if "content" not in values and not values.get("tool_calls"):
        raise LoraSuiteError(
            "a message has no content", where=where, got=f"the keys {', '.join(values)}", wanted="role and content"
        )
    role = ASSISTANT if role == "model" else role  # as Gemma's template writes it
    return {**values, "role": role, "content": _join_parts(values.get("content", ""), where)}


def _read_sharegpt(values: Mapping[str, Any], where: str) -> Message:
    role = SHAREGPT_ROLES.get(str(values["from"]))
    if role is None:
        raise LoraSuiteError(
            "unknown sender of a message", where=where, got=repr(values["from"]), wanted=" or ".join(SHAREGPT_ROLES)
        )
    text = _join_parts(values.get("value", ""), where)
    if values["from"] != "function_call":
        return {"role": role, "content": text}
    call = parse_json(text, where)
    return {"role": role, "content": "", "tool_calls": [{"type": "function", "function": call}]}


def _join_parts(content: Any, where: str) -> str:
    """Return the text of a message; content in parts is joined."""
    if isinstance(content, (list, tuple)):
        content = "".join(_part_text(part, where) for part in content)
    if not isinstance(content, str):
        raise LoraSuiteError("the content of a message must be text", where=where, got=_describe(content))
    return _check_content(content, where)


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise LoraSuiteError(
            f"content of type {kind!r} is not supported", where=where, wanted="text", do="leave it out"
        )
    return part["text"]


def _read_tools(tools: Any, where: str) -> tuple[Any, ...]:
    tools = parse_json(tools, where) if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return ()
    if not isinstance(tools, (list, tuple)):
        raise LoraSuiteError("tools must be a list of JSON schemas", where=where, got=_describe(tools))
    return tuple(tools)


def parse_json(text: str, where: str) -> Any:
    """Parse JSON that a record has as text: CSV has no nested values."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraSuiteError(f"the text is not JSON ({error})", where=where, got=repr(text[:60])) from error


def _check_content(text: str, where: str) -> str:
    check_text(text, where)
    return text


def _describe(value: Any) -> str:
    return "an empty list" if isinstance(value, (list, tuple)) and not value else type(value).__name__
