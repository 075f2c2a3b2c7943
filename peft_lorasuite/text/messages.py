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
    system = "" if system is None else _join_parts(system, f"{where}, system")
    if system.strip():
        turns = turns[1:] if turns and turns[0]["role"] == SYSTEM and not turns[0]["content"].strip() else turns
        if not (turns and turns[0]["role"] in (SYSTEM, "developer")):
            turns = [{"role": SYSTEM, "content": system}, *turns]
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
    if _same(answer[: len(turns)], turns):
        return answer
    return turns + (answer[len(asked) :] if asked and _same(answer[: len(asked)], asked) else answer)


def _same(turns: Sequence[Message], others: Sequence[Message]) -> bool:
    """Whether two lists of messages say the same, whatever else is beside it."""
    return [(one["role"], one["content"]) for one in turns] == [(one["role"], one["content"]) for one in others]


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
    """Read messages; an object with a question and its answer becomes two.

    Raises:
        LoraSuiteError: If they are malformed, or have images or audio.
    """
    messages = parse_json(messages, where) if isinstance(messages, str) else messages
    if isinstance(messages, Mapping):
        messages = _rows(messages, where)
    if not isinstance(messages, (list, tuple)) or not messages:
        raise LoraSuiteError(
            "a conversation must be a list of messages", where=where, got=describe(messages),
            wanted="at least one message",
        )  # fmt: skip
    found = [_read_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]
    return [message for several in found for message in several]


def _rows(message: Mapping[str, Any], where: str) -> list[Any]:
    """Return a single message as a list, or the messages of which an object has a list for every key."""
    columns = {name: values for name, values in message.items() if isinstance(values, list)}
    if not any(name in columns for name in SENDER_KEYS):
        return [message]
    if len({len(values) for values in columns.values()}) > 1:
        raise LoraSuiteError("the lists of a conversation have different lengths", where=where)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def is_messages(value: Any) -> bool:
    """Return whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def is_message(value: Any) -> bool:
    """Return whether a value is a single message."""
    return isinstance(value, Mapping) and _sender(value) is not None


def as_messages(value: Any, *, answer: bool = False) -> Any:
    """Return a value that is a message, a list of them, or JSON text of a list; None otherwise.

    A text must be clear: every object has a known sender and a content, and an answer ends in the assistant's turn.
    """
    if not isinstance(value, str):
        return value if is_messages(value) or is_message(value) else None
    parsed = json_or_none(value)
    if not is_messages(parsed):
        return None
    roles = [ROLES.get(str(one[_sender(one) or ""]).lower()) for one in parsed]
    full = all(any(name in one for name in (*CONTENT_KEYS, "tool_calls", "function_call")) for one in parsed)
    is_clear = full and None not in roles and (roles[-1] == ASSISTANT if answer else USER in roles)
    return parsed if is_clear else None


def _sender(values: Mapping[str, Any]) -> str | None:
    """Return the key of a message's sender."""
    known = [key for key in SENDER_KEYS if values.get(key) is not None]
    return next((key for key in known if key != "type" or str(values[key]).lower() in ROLES), None)


def _read_message(message: Any, where: str) -> list[Message]:
    """Read a message, or an object with a question and its answer, which are two."""
    if isinstance(message, (list, tuple)) and len(message) == 2:  # a sender and its text, or a question and its answer
        names = ("role", "content") if str(message[0]).lower() in ROLES else PAIRS[0]
        message = dict(zip(names, message, strict=True))
    if not isinstance(message, Mapping):
        raise LoraSuiteError("a message must be an object", where=where, got=describe(message))
    values = {str(name): value for name, value in message.items() if value is not None}
    if (key := _sender(values)) is not None:
        return [_read_turn(values, key, where)]
    if pair := next((pair for pair in PAIRS if all(name in message for name in pair)), None):
        turns = [(SYSTEM, values.get(SYSTEM)), *zip((USER, ASSISTANT), map(values.get, pair), strict=True)]
        return [{"role": role, "content": _join_parts(text, where)} for role, text in turns if text]
    raise LoraSuiteError(
        "a message has no role", where=where, got=f"the keys {', '.join(values) or 'none'}",
        wanted="role and content, or from and value",
    )  # fmt: skip


def _read_turn(values: dict[str, Any], key: str, where: str) -> Message:
    sender = values.pop(key)
    if not isinstance(sender, str):
        raise LoraSuiteError("a message has no role", where=where, got=describe(sender), wanted="a string")
    role = ROLES.get(sender.lower(), sender if key == "role" and sender.strip() else None)
    if role is None:
        raise LoraSuiteError("unknown sender of a message", where=where, got=repr(sender), wanted=" or ".join(ROLES))
    names = sorted(CONTENT_KEYS, key=lambda name: key == "from" and name != "value")
    content = next((values.pop(name) for name in names if name in values), None)
    calls = _read_calls(values.pop("tool_calls", None) or values.pop("function_call", None), where)
    if sender.lower() in CALLS and isinstance(content, str) and not calls:
        calls, content = _read_calls(content, where), None
    if content is None and not calls and role not in (SYSTEM, TOOL):
        raise LoraSuiteError(
            "a message has no content", where=where, got=f"the keys {', '.join((key, *values))}",
            wanted="role and content",
        )  # fmt: skip
    if role == TOOL and isinstance(content, Mapping):
        content = json.dumps(content, ensure_ascii=False, default=str)
    kept = values if key == "role" else {name: values[name] for name in ("weight",) if name in values}
    text = "" if content is None else _join_parts(content, where)
    return {**kept, "role": role, "content": text, **({"tool_calls": calls} if calls else {})}


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Read calls of tools, with their arguments as objects: OpenAI has them as JSON text, chat templates write JSON."""
    calls = parse_json(calls, where) if isinstance(calls, str) else without_nulls(calls)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not calls:
        return []
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise LoraSuiteError("calls of tools must be objects", where=where, got=describe(calls))
    found = []
    for call in calls:
        call = call if isinstance(call.get("function"), Mapping) else {"type": "function", "function": call}
        function = dict(call["function"])
        if "args" in function and "arguments" not in function:  # LangChain
            function["arguments"] = function.pop("args")
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
    where = f"{where}, tools"
    tools = parse_json(tools, where) if isinstance(tools, str) and tools.strip() else without_nulls(tools)
    if not tools:
        return ()
    several = tools if isinstance(tools, (list, tuple)) else [tools]
    found = tuple(parse_json(one, where) if isinstance(one, str) else one for one in several)
    if wrong := [one for one in found if not isinstance(one, Mapping)]:
        raise LoraSuiteError("tools must be a list of JSON schemas", where=where, got=describe(wrong[0]))
    return found


def _check_content(text: str, where: str) -> str:
    check_text(text, where)
    return text
