"""The chat templates of both sides of an upgrade."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import LoraSuiteError
from .chat import OLD_TEMPLATE, Chat
from .chat_options import ChatOptions
from .conversations import Conversation


@dataclass(frozen=True, eq=False)
class ChatPair:
    """How each side renders conversations.

    Attributes:
        old: The old side.
        new: The new side.
        origin: Where the template of the new side is from, for the report: ``"new backbone"``, ``"old side"``,
            ``"option"`` or ``"none"``.
    """

    old: Chat
    new: Chat
    origin: str

    @classmethod
    def open(
        cls, options: ChatOptions, old: tuple[str, Any], new: tuple[str, Any], prompts: Sequence[str | Conversation],
        *, adapter_template: str | None = None, markup: bool = True,
    ) -> ChatPair:  # fmt: skip
        """Choose the templates, and check that the prompts render.

        Args:
            options: The options.
            old: Name and tokenizer of the old side.
            new: Name and tokenizer of the new side.
            prompts: The prompts; strings need no template.
            adapter_template: Chat template of the tokenizer beside the adapter.
            markup: Whether to check that the new vocabulary has the special tokens of a template from the old side.

        Raises:
            LoraSuiteError: If a side has no template, or a conversation does not render.
        """
        shared = {"variables": dict(options.template_kwargs), "system": options.system}
        old_template = None if options.old_template is None else str(options.old_template)
        left = Chat(*old, template=old_template or adapter_template, **shared)
        right = Chat(*new, template=None if options.new_template is None else str(options.new_template), **shared)
        conversation = next((prompt for prompt in prompts if isinstance(prompt, Conversation)), None)
        if conversation is None:
            return cls(left, right, "none")
        left.check()
        origin = "new backbone" if right.template is None else "none" if right.plain else "option"
        if right.template == OLD_TEMPLATE or (right.template is None and not right.tokenizer.chat_template):
            asked = right.template == OLD_TEMPLATE
            named = f"{right.name} with the template of the old side"
            right, origin = replace(right, name=named, template=left.template_text), "old side"
            if right.template is None:
                raise LoraSuiteError(
                    "the old side has no single template",
                    where=left.name,
                    do="pass one (new_template= of ChatOptions, --new-template FILE)",
                )
            if not asked and markup:
                _check_markup(left, right, conversation)
        for side in (left, right):
            side.check_prompts(prompts)
        return cls(left, right, origin)

    @property
    def new_has_template(self) -> bool:
        """Whether the new side has a chat template of its own, or one was given."""
        return self.new.has_template

    @property
    def saved_template(self) -> str | None:
        """The template that must be saved beside the result: None where the new backbone has it."""
        return self.new.template_text if self.origin in ("old side", "option") else None


def _check_markup(old: Chat, new: Chat, conversation: Conversation) -> None:
    """Check that the new vocabulary has the special tokens that the old template writes."""
    text = new.write(conversation)
    ends = old.turn_ends(conversation)
    written = [token for token in old.special_tokens if token in text]
    if ends is not None and (token := old.tokenizer.convert_ids_to_tokens(ends.end)) != old.tokenizer.eos_token:
        written.append(token)
    known = new.tokenizer.get_vocab()
    missing = [token for token in written if token not in known]
    if missing:
        raise LoraSuiteError(
            "the new backbone has no chat template, and its vocabulary lacks a token of the old one", where=new.name,
            got=missing[0], do="pass one, or 'none' for plain text (new_template= of ChatOptions, --new-template)",
        )  # fmt: skip
