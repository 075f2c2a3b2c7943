"""Conversations: messages with roles, tools and, where there is one, the last assistant turn as the reference."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

USER, ASSISTANT, SYSTEM, TOOL = "user", "assistant", "system", "tool"
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
        if system is None or self.messages[0]["role"] in (SYSTEM, "developer"):
            return self
        return replace(self, messages=({"role": SYSTEM, "content": system}, *self.messages))


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
