"""Chat templates: conversations as the text that one model reads, and what the template writes around an answer.

Templates are untrusted text: they are rendered by transformers alone, in its sandbox.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import LoraSuiteError, short_message
from .conversations import ASSISTANT, Conversation, Message
from .prompt_text import PromptText
from .templates import check_text
from .vocabulary import eos_token_id

NO_TEMPLATE, OLD_TEMPLATE = "none", "old"
"""Values of the option ``new_template``: the texts of the messages alone, and the template of the old side."""
PROBE = "xyzzy"
"""Content of an assistant turn that shows what a template writes before and after it."""


@dataclass(frozen=True)
class TurnEnds:
    """What a template writes around the content of an assistant turn that follows the generation prompt.

    Attributes:
        before: Text between the generation prompt and the content.
        after: Text between the content and the end-of-turn token.
        end: Id of the end-of-turn token; of the end-of-sequence token where the template writes no token.
    """

    before: str
    after: str
    end: int


def _shared_length(text: str, other: str) -> int:
    """Return how many leading characters two texts share."""
    shorter = min(len(text), len(other))
    return next((at for at in range(shorter) if text[at] != other[at]), shorter)


@dataclass(frozen=True, eq=False)
class Chat:
    """Renders conversations for one model.

    Attributes:
        name: The model, for messages.
        tokenizer: Its tokenizer.
        template: The chat template; None for that of the tokenizer, ``"none"`` for the texts of the messages alone.
        variables: Further variables of the template.
        system: System prompt of conversations that have none.
    """

    name: str
    tokenizer: Any
    template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None

    @property
    def plain(self) -> bool:
        """Whether there is no template."""
        return self.template == NO_TEMPLATE

    @property
    def has_template(self) -> bool:
        """Whether conversations are rendered by a template."""
        return not self.plain and bool(self.template or self.tokenizer.chat_template)

    @property
    def template_text(self) -> str | None:
        """The template as text, None for one of the tokenizer's that is not text."""
        found = self.tokenizer.chat_template if self.template is None else self.template
        return found if isinstance(found, str) and found != NO_TEMPLATE else None

    def check(self) -> None:
        """Raise `LoraSuiteError` if there is no template."""
        if not self.plain and not self.has_template:
            raise LoraSuiteError(
                "the tokenizer has no chat template, and the prompts are conversations", where=self.name,
                do="pass one, or 'none' for plain text (old_template= or new_template= of ChatOptions, or the flags "
                "--old-template and --new-template)",
            )  # fmt: skip

    def write(self, prompt: str | Conversation, *, answers: bool = False) -> PromptText | str:
        """Return the text that the model reads: a conversation up to the start of the answer; a string as it is.

        Args:
            prompt: The conversation, or the string.
            answers: Whether to find the assistant turns in it (`PromptText.answers`), which renders each of them again.
        """
        if isinstance(prompt, str):
            return prompt
        conversation = prompt.with_system(self.system)
        text = self._render(conversation, conversation.messages, generate=True)
        found = self._answers_in(text, conversation) if answers else ()
        return PromptText(text, prompt.number, rendered=not self.plain, answers=found)

    def _answers_in(self, text: str, conversation: Conversation) -> Sequence[tuple[int, int]]:
        """Return the characters of the assistant turns in a rendered prompt.

        From the first of them on whose place is not known, these are all characters.
        """
        messages, spans = conversation.messages, []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT or (self.plain and not message["content"]):
                continue
            try:
                start = self._render(conversation, messages[:number], generate=True) if number else ""
                end = self._render(conversation, messages[: number + 1])
            except LoraSuiteError:  # the template refuses a part of the conversation
                return [*spans, (spans[-1][1] if spans else 0, len(text))]
            at = _shared_length(text, start)
            if at < len(start) or not text.startswith(end):  # the whole conversation is written in another way
                place = self._place_in(text, at, message)
                if place is None:
                    return [*spans, (at, len(text))]
                if number and messages[number - 1]["content"].strip() not in text[:at]:
                    at = place[0]  # the texts part before this turn: a later user turn gets the system prompt
                end = text[: place[1]]
            spans.append((at, at + self._turn_length(end[at:])))
        return spans

    def _place_in(self, text: str, at: int, message: Message) -> tuple[int, int] | None:
        """Return where the content of a turn after ``at`` starts and its end-of-turn token ends; None if unknown."""
        content, rest = message["content"].strip(), text[at:]
        if message.get("tool_calls") or not content:
            return None
        if not rest.lstrip().startswith(content) and rest.count(content) != 1:
            return None
        start = text.index(content, at)
        end = start + len(content)
        return start, end + next(iter(self._special_ends(text[end:])), 0)

    def turn_ends(self, prompt: str | Conversation) -> TurnEnds | None:
        """Return what the template writes around the answer to a conversation; None for a string."""
        if isinstance(prompt, str) or self.plain:
            return None
        return self._turn_ends(prompt.with_system(self.system))

    def _turn_ends(self, conversation: Conversation) -> TurnEnds:
        answer = {"role": ASSISTANT, "content": PROBE}
        prompt = self._render(conversation, conversation.messages, generate=True)
        whole = self._render(conversation, (*conversation.messages, answer))
        start = whole.rfind(PROBE)
        before = whole[len(prompt) : start] if whole.startswith(prompt) and len(prompt) <= start else ""
        tail = whole[start + len(PROBE) :] if start >= 0 else ""
        after, end = self._end_token(tail)
        return TurnEnds(before, after, end)

    def _end_token(self, tail: str) -> tuple[str, int]:
        """Return the text before the first special token of a text, and the token; the EOS token if there is none."""
        encoded = self.tokenizer(tail, add_special_tokens=False, return_offsets_mapping=True)
        for number, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if number in self.special_ids:
                return tail[:start], number
        return "", eos_token_id(self.tokenizer)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special and added tokens, without white space and the token for unknown words."""
        added = self.tokenizer.added_tokens_decoder  # some vocabularies have runs of spaces among them
        special = {*self.tokenizer.all_special_ids, *(id for id, one in added.items() if one.content.strip())}
        return frozenset(special - {self.tokenizer.unk_token_id})

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens as text."""
        return [self.tokenizer.convert_ids_to_tokens(number) for number in sorted(self.special_ids)]

    def assistant_spans(self, conversation: Conversation) -> tuple[PromptText, list[tuple[int, int]]]:
        """Render a conversation with its reference; also return the characters of the assistant turns.

        A span reaches from the end of the generation prompt to the end of the end-of-turn token. Where a turn does not
        continue the generation prompt, or is rendered in another way once others follow (without its thoughts), the
        span starts at its content. A turn whose content is not found has no span.
        """
        conversation = conversation.with_system(self.system)
        messages = (*conversation.messages, *([conversation.reference] if conversation.reference else []))
        whole = self._render(conversation, messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            start = self._render(conversation, messages[:number], generate=True)
            end = self._render(conversation, messages[: number + 1])
            at = len(start)
            if not (whole.startswith(start) and whole.startswith(end)):
                before = self._render(conversation, messages[:number]) if number else ""
                at, end = self._find_turn(whole, before, message)
            if at < len(end):
                spans.append((at, at + self._turn_length(end[at:])))
        return PromptText(whole, rendered=not self.plain), spans

    def _find_turn(self, whole: str, before: str, message: Message) -> tuple[int, str]:
        """Return where a turn's content starts, and the text up to its end-of-turn token; 0 and "" without content."""
        content = message["content"].strip()
        at = whole.find(content, len(before)) if content and whole.startswith(before) else -1
        if at < 0:
            return 0, ""
        end = at + len(content)
        return at, whole[: end + next(iter(self._special_ends(whole[end:])), 0)]

    def _turn_length(self, text: str) -> int:
        """Return the length of a turn up to its end-of-turn token; white space after it is the template's."""
        ends = self._special_ends(text)
        return ends[-1] if ends and not text[ends[-1] :].strip() else len(text.rstrip())

    def _special_ends(self, text: str) -> list[int]:
        """Return the characters at which special tokens end."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [end for number, (_, end) in pairs if number in self.special_ids]

    def _render(self, conversation: Conversation, messages: Sequence[Message], *, generate: bool = False) -> str:
        if self.plain:
            texts = "\n\n".join(message["content"] for message in messages if message["content"])
            return f"{texts}\n\n" if generate else texts
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tools=list(conversation.tools) or None,
                chat_template=self.template, add_generation_prompt=generate, tokenize=False, **self.variables,
            )  # fmt: skip
        except Exception as error:  # a template can raise whatever Jinja and transformers raise
            raise LoraSuiteError(
                f"the chat template does not render: {short_message(error)}",
                where=f"{self.name}, {conversation.where}",
                got=f"the roles {', '.join(message['role'] for message in messages)}",
                do="pass another template, or change the record",
            ) from error  # fmt: skip
        check_text(text, conversation.where)
        return text
