"""Formats of prompts: how an instruction becomes a prompt, by a template or as a user turn of a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import LoraSuiteError
from ..io.paths import is_file
from .conversations import Conversation, user_turn
from .record_types import Completion, Record
from .templates import check_template, format_prompt

AUTO, CHAT, ALPACA = "auto", "chat", "alpaca"
PLAIN = "{instruction}"
TEMPLATES = {
    ALPACA: None,
    "plain": PLAIN,
    "question": "Question: {instruction}\nAnswer: ",
    "vicuna": "USER: {instruction} ASSISTANT:",
}
"""Format -> prompt template; None for those of LLM-Adapters."""
NAMES = (AUTO, CHAT, *TEMPLATES)


@dataclass(frozen=True)
class Format:
    """A format of prompts.

    Attributes:
        name: One of `NAMES`, or the name of a file.
        template: Prompt template with ``{instruction}``; None for those of LLM-Adapters, and for conversations.
    """

    name: str = AUTO
    template: str | None = None

    @classmethod
    def read(cls, value: str | Path) -> Format:
        """Return the format of a name, or of a file with a prompt template.

        Raises:
            LoraSuiteError: If it is neither, or the template has no ``{instruction}``.
        """
        text = str(value)
        if text in NAMES:
            return cls(text, TEMPLATES.get(text))
        if not is_file(value):
            raise LoraSuiteError(
                "unknown format", where="format", got=repr(text[:80]), wanted=f"{', '.join(NAMES)} or a file"
            )
        try:
            template = Path(value).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise LoraSuiteError(f"the file cannot be read: {error}", where=value, wanted="text in UTF-8") from error
        check_template(template)
        return cls(Path(value).name, template)

    def write(self, record: Record) -> str | Conversation:
        """Return the prompt of a record; conversations and formatted prompts stay as they are unless it is ``chat``."""
        if isinstance(record, Conversation):
            return record
        if isinstance(record, Completion):
            return user_turn(record.prompt) if self.name == CHAT else record.prompt
        if self.name == CHAT:
            return user_turn(record.whole)
        if self.template is None:
            return format_prompt({"instruction": record.instruction, "input": record.input})
        if "{input}" in self.template:
            return format_prompt({"instruction": record.instruction, "input": record.input}, self.template)
        return format_prompt({"instruction": record.whole, "input": ""}, self.template)
