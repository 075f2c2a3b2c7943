"""Chat templates: conversations as the text that one model reads, and what the template writes around an answer.

Templates are untrusted text: they are rendered by transformers alone, in its sandbox.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import LoraSuiteError, short_message
from .conversations import ASSISTANT, SYSTEM, Conversation, Message
from .prompt_text import PromptText
from .templates import check_text
from .vocabulary import eos_token_id

NO_TEMPLATE, OLD_TEMPLATE = "none", "old"
"""Values of the option ``new_template``: the texts of the messages alone, and the template of the old side."""
PROBE, PROBE_TWO = "xyzzy", "qwvwq"
"""Contents of an assistant turn that show what a template writes before and after it."""


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

    def check_prompts(self, prompts: Sequence[str | Conversation]) -> None:
        """Raise `LoraSuiteError` if a conversation does not render, alone or with an answer."""
        for prompt in prompts:
            self.write(prompt)
            self.turn_ends(prompt)

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

    def _answers_in(self, text: str, conversation: Conversation) -> list[tuple[int, int]]:
        """Return the characters of the assistant turns in a rendered prompt.

        Where the place of one is not known, these are all characters after the last one before it.
        """
        spans: list[tuple[int, int]] = []
        for span in self._assistant_turns(text, conversation, conversation.messages, generate=True):
            if span is None:
                return [*spans, (spans[-1][1] if spans else 0, len(text))]
            spans.append(span)
        return spans

    def _assistant_turns(
        self, text: str, conversation: Conversation, messages: Sequence[Message], *, generate: bool = False
    ) -> Iterator[tuple[int, int] | None]:
        """Yield the characters of every assistant turn in a rendered text, None for a turn whose place is not known.

        A turn reaches from the end of the generation prompt to the end of the end-of-turn token. Where the text has
        no such generation prompt before it (one that starts with thoughts), the turn starts at its content.
        """
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT or (self.plain and not message["content"]):
                continue
            try:
                start = self._render(conversation, messages[:number], generate=True) if number else ""
                end = self._render(conversation, messages[: number + 1])
            except LoraSuiteError:  # the template refuses a part of the conversation
                start = end = ""
            if start and text.startswith(start) and text.startswith(end) and len(start) < len(end):
                yield len(start), len(start) + self._turn_length(end[len(start) :])
                continue
            place = self._content_place(text, conversation, messages, number, generate=generate)
            if place and start and text.startswith(start) and len(start) < place[1]:
                place = len(start), place[1]
            yield place

    def _content_place(
        self, text: str, conversation: Conversation, messages: Sequence[Message], number: int, *, generate: bool
    ) -> tuple[int, int] | None:
        """Return where the content of a message starts and its end-of-turn token ends, None if it is not written.

        The content is what differs once it is replaced, so that the same words elsewhere are not taken for it. Of two
        replacements that share no letter, one at most starts or ends as the content does.
        """
        start, end = len(text), 0
        for content in (PROBE, PROBE_TWO):
            others = [*messages[:number], {"role": ASSISTANT, "content": content}, *messages[number + 1 :]]
            try:
                other = self._render(conversation, others, generate=generate)
            except LoraSuiteError:
                return None
            if other == text:
                return None
            same = _shared_length(text, other)
            start = min(start, same)
            end = max(end, len(text) - min(_shared_length(text[::-1], other[::-1]), len(text) - same))
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
        continue the generation prompt, the span starts at its content. A turn whose content is not found has no span,
        nor has one with ``weight`` 0 (as in OpenAI's format).
        """
        conversation = conversation.with_system(self.system)
        messages = (*conversation.messages, *([conversation.reference] if conversation.reference else []))
        whole = self._render(conversation, messages)
        answers = [one for one in messages if one["role"] == ASSISTANT and (one["content"] or not self.plain)]
        found = zip(answers, self._assistant_turns(whole, conversation, messages), strict=True)
        spans = [span for answer, span in found if span and answer.get("weight") != 0]
        return PromptText(whole, rendered=not self.plain), spans

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
                [self._with_known_role(message) for message in messages], tools=list(conversation.tools) or None,
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

    def _with_known_role(self, message: Message) -> Message:
        """Return a message for the template; one that knows no developer would leave that turn out."""
        known = message["role"] != "developer" or "developer" in (self.template_text or "")
        return {**message, **({} if known else {"role": SYSTEM})}
