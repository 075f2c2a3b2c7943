"""Messages of every spelling (OpenAI, ShareGPT, LangChain and others) as chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import LoraSuiteError
from .conversations import ASSISTANT, SYSTEM, TOOL, USER, Conversation, Message
from .templates import check_text
from .values import describe, json_or_none, parse_json, without_nulls

SENDERS = {
    USER: (USER, "human", "prompter"),
    ASSISTANT: (ASSISTANT, "gpt", "chatgpt", "model", "bot", "chatbot", "ai"),
    SYSTEM: (SYSTEM,),
    "developer": ("developer",),
    TOOL: (TOOL, "observation", "function", "function_response", "tool_response", "environment"),
}
"""Role -> names of it; their case does not matter."""
CALLS = ("function_call", "tool_call")
"""Senders of an assistant turn that is a call of tools, as JSON."""
ROLES = {name: role for role, names in SENDERS.items() for name in names} | dict.fromkeys(CALLS, ASSISTANT)
SENDER_KEYS = ("role", "from", "type")
"""Keys of the sender; ``type`` only where it names one (LangChain), since other messages have it too."""
CONTENT_KEYS = ("content", "value", "text", "parts")
PAIRS = (("human", ASSISTANT), (USER, ASSISTANT), ("input", "output"), ("query", "response"))
"""Keys of an object that has a question and its answer, in place of two messages."""
TEXT_PARTS = (None, "text", "input_text", "output_text")
"""``type`` of the parts of a content that are text."""


def read_conversation(
    messages: Any, where: str, *, reference: Any = None, tools: Any = None, system: Any = None, labeled: bool = True
) -> Conversation:
    """Read a conversation; its last message is the reference if it is an assistant turn.

    Args:
        messages: Messages with ``role`` and ``content`` (OpenAI), with ``from`` and ``value`` (ShareGPT), or pairs of
            question and answer; also as JSON text.
        where: The record, for errors.
        reference: Messages or text of the answer, where they are apart from ``messages``.
        tools: JSON schemas of tools, or JSON text of them.
        system: System prompt beside the messages.
        labeled: Whether the reference is used; an empty one is no error otherwise.

    Raises:
        LoraSuiteError: If it is malformed, has no user turn, has an assistant turn without content, has images or
            audio, or ends in a tool result.
    """
    turns = read_messages(messages, where)
    if isinstance(reference, str):
        turns.append({"role": ASSISTANT, "content": _check_content(reference, where)})
    elif reference is not None:
        turns = _join(turns, read_messages(reference, where))
    system = _join_parts(system, where) if isinstance(system, (str, list)) else ""
    turns = [turn for turn in turns if turn["role"] != SYSTEM or turn["content"].strip()]
    if system.strip() and not (turns and turns[0]["role"] in (SYSTEM, "developer")):
        turns.insert(0, {"role": SYSTEM, "content": system})
    if not labeled and turns and turns[-1]["role"] == ASSISTANT and _is_empty(turns[-1]):
        turns.pop()
    _check_turns(turns, where)
    answered = turns[-1]["role"] == ASSISTANT
    return Conversation(
        tuple(turns[:-1] if answered else turns), turns[-1] if answered else None, read_tools(tools, where), where
    )


def _join(turns: list[Message], answer: list[Message]) -> list[Message]:
    """Return the prompt's turns and those of the answer, which may have the prompt in it, without its system turn."""
    asked = [turn for turn in turns if turn["role"] != SYSTEM]
    if answer[: len(turns)] == turns:
        return answer
    return turns + (answer[len(asked) :] if asked and answer[: len(asked)] == asked else answer)


def _is_empty(turn: Message) -> bool:
    return not turn["content"].strip() and not turn.get("tool_calls")


def _check_turns(turns: Sequence[Message], where: str) -> None:
    roles = [turn["role"] for turn in turns]
    for number, turn in enumerate(turns, 1):
        if turn["role"] == ASSISTANT and _is_empty(turn):
            raise LoraSuiteError(
                "an assistant turn is empty", where=f"{where}, message {number}", do="leave the record out"
            )
        if turn["role"] == USER and not turn["content"].strip():
            raise LoraSuiteError("a user turn is empty", where=f"{where}, message {number}", do="leave the record out")
    if roles and roles[-1] == TOOL:
        raise LoraSuiteError(
            "the conversation ends in a tool result", where=where, wanted="the assistant's answer after it",
            do="add that answer, or leave the record out",
        )  # fmt: skip
    if not roles or USER not in roles[: -1 if roles[-1] == ASSISTANT else None]:
        raise LoraSuiteError(
            "the conversation has no user turn before the answer", where=where,
            got=f"the roles {', '.join(roles) or 'none'}", do="leave the record out",
        )  # fmt: skip
    if roles[-1] not in (USER, ASSISTANT):
        raise LoraSuiteError(
            f"the conversation ends in a turn of {roles[-1]!r}", where=where, wanted="a user or an assistant turn"
        )


def read_messages(messages: Any, where: str) -> list[Message]:
    """Read messages; a system message without content is left out.

    Raises:
        LoraSuiteError: If they are malformed, or have images or audio.
    """
    messages = parse_json(messages, where) if isinstance(messages, str) else messages
    if isinstance(messages, Mapping):
        columns = all(isinstance(values, list) for values in messages.values())  # a list of values for every key
        rows = zip(*messages.values(), strict=False) if columns else []
        messages = [dict(zip(messages, row, strict=True)) for row in rows] if columns else [messages]
    if not isinstance(messages, (list, tuple)) or not messages:
        raise LoraSuiteError(
            "a conversation must be a list of messages", where=where, got=describe(messages),
            wanted="at least one message",
        )  # fmt: skip
    found = [_read_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]
    return [message for several in found for message in several]


def is_messages(value: Any) -> bool:
    """Return whether a value, or the JSON text that it is, is a list of messages."""
    value = json_or_none(value) if isinstance(value, str) else value
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def is_message(value: Any) -> bool:
    """Return whether a value is a single message."""
    return isinstance(value, Mapping) and _sender(value) is not None


def _sender(values: Mapping[str, Any]) -> str | None:
    """Return the key of a message's sender."""
    known = [key for key in SENDER_KEYS if values.get(key) is not None]
    return next((key for key in known if key != "type" or str(values[key]).lower() in ROLES), None)


def _read_message(message: Any, where: str) -> list[Message]:
    """Read a message, or an object with a question and its answer, which are two."""
    if isinstance(message, (list, tuple)) and len(message) == 2:
        message = dict(zip(PAIRS[0], message, strict=True))
    if not isinstance(message, Mapping):
        raise LoraSuiteError("a message must be an object", where=where, got=describe(message))
    values = {str(name): value for name, value in message.items() if value is not None}
    if (key := _sender(values)) is not None:
        return [_read_turn(values, key, where)]
    if pair := next((pair for pair in PAIRS if all(name in values for name in pair)), None):
        turns = [(SYSTEM, values.get(SYSTEM)), (USER, values[pair[0]]), (ASSISTANT, values[pair[1]])]
        return [{"role": role, "content": _join_parts(text, where)} for role, text in turns if text]
    raise LoraSuiteError(
        "a message has no role", where=where, got=f"the keys {', '.join(values) or 'none'}",
        wanted="role and content, or from and value",
    )  # fmt: skip


def _read_turn(values: dict[str, Any], key: str, where: str) -> Message:
    sender = str(values.pop(key))
    role = ROLES.get(sender.lower(), sender if key == "role" and sender.strip() else None)
    if role is None:
        raise LoraSuiteError("unknown sender of a message", where=where, got=repr(sender), wanted=" or ".join(ROLES))
    content = next((values.pop(name) for name in CONTENT_KEYS if name in values), None)
    calls = _read_calls(values.pop("tool_calls", None) or values.pop("function_call", None), where)
    if sender.lower() in CALLS and isinstance(content, str) and not calls:
        calls, content = _read_calls(content, where), None
    if content is None and not calls and role not in (SYSTEM, TOOL):
        raise LoraSuiteError(
            "a message has no content", where=where, got=f"the keys {', '.join((key, *values))}",
            wanted="role and content",
        )  # fmt: skip
    if role == TOOL and isinstance(content, Mapping):
        content = json.dumps(content, ensure_ascii=False)
    kept = values if key == "role" else {name: values[name] for name in ("weight",) if name in values}
    text = "" if content is None else _join_parts(content, where)
    return {**kept, "role": role, "content": text, **({"tool_calls": calls} if calls else {})}


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Read calls of tools, with their arguments as objects: OpenAI has them as JSON text, chat templates write JSON."""
    calls = parse_json(calls, where) if isinstance(calls, str) else calls
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not calls:
        return []
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise LoraSuiteError("calls of tools must be objects", where=where, got=describe(calls))
    found = []
    for call in without_nulls(calls):
        call = call if isinstance(call.get("function"), Mapping) else {"type": "function", "function": call}
        function = dict(call["function"])
        if isinstance(parsed := json_or_none(function.get("arguments")), dict):
            function["arguments"] = parsed
        found.append({**call, "function": function})
    return found


def _join_parts(content: Any, where: str) -> str:
    """Return the text of a message; content in parts is joined."""
    if isinstance(content, (list, tuple)):
        content = "".join(_part_text(part, where) for part in content)
    if not isinstance(content, str):
        raise LoraSuiteError("the content of a message must be text", where=where, got=describe(content))
    return _check_content(content, where)


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise LoraSuiteError(
            f"content of type {kind!r} is not supported", where=where, wanted="text", do="leave it out"
        )
    return part["text"]


def read_tools(tools: Any, where: str) -> tuple[Any, ...]:
    """Read the JSON schemas of tools.

    Raises:
        LoraSuiteError: If they are no list, or not JSON.
    """
    tools = parse_json(tools, where) if isinstance(tools, str) and tools.strip() else tools
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not tools:
        return ()
    if not isinstance(tools, (list, tuple)):
        raise LoraSuiteError("tools must be a list of JSON schemas", where=where, got=describe(tools))
    return tuple(without_nulls([parse_json(one, where) if isinstance(one, str) else one for one in tools]))


def _check_content(text: str, where: str) -> str:
    check_text(text, where)
    return text
