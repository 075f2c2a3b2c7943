"""Options of rendering conversations, and chat templates from files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import LoraSuiteError
from ..io.paths import is_file
from .chat import NO_TEMPLATE, OLD_TEMPLATE, Chat
from .formats import AUTO, Format
from .templates import check_text

RESERVED = ("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "tokenize", "return_dict")
"""Names that ``template_kwargs`` cannot have."""
LARGEST_TEMPLATE = 2**20
"""Bytes of a template file at most."""


@dataclass(frozen=True)
class ChatOptions:
    """How conversations are rendered.

    Attributes:
        old_template: Chat template of the old side: a file, or the template itself; ``"none"`` for the texts of the
            messages alone. By default that of the tokenizer beside the adapter, else of the old backbone's.
        new_template: The same for the new side, by default that of the new backbone. ``"old"`` is that of the old side.
        template_kwargs: Further variables of the templates, such as ``enable_thinking``.
        system: System prompt of conversations that have none.
        format: Format of the built-in prompts and of records with an instruction: ``"chat"``, ``"alpaca"``,
            ``"plain"``, ``"question"``, ``"vicuna"``, or a file with a prompt template. ``"auto"`` asks the adapter for
            that of the built-in prompts, and leaves given prompts as they are; ``"chat"`` makes strings user turns.
    """

    old_template: str | Path | None = None
    new_template: str | Path | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    format: str | Path = AUTO

    def __post_init__(self) -> None:
        Format.read(self.format)
        for name in ("old_template", "new_template"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, read_template(getattr(self, name), name))
        if self.old_template == OLD_TEMPLATE:
            raise LoraSuiteError("the old side has no other template", where="old_template", got=repr(OLD_TEMPLATE))
        if not isinstance(self.template_kwargs, Mapping):
            raise LoraSuiteError("must be a mapping", where="template_kwargs", got=type(self.template_kwargs).__name__)
        wrong = [name for name in self.template_kwargs if not str(name).isidentifier() or name in RESERVED]
        if wrong:
            raise LoraSuiteError("not a variable of a template", where="template_kwargs", got=repr(wrong[0]))
        if self.system is not None:
            check_text(self.system, "system")

    @classmethod
    def of(cls, value: ChatLike) -> ChatOptions:
        """Return options from options, a mapping or None."""
        if value is None or isinstance(value, ChatOptions):
            return value or cls()
        if not isinstance(value, Mapping):
            raise LoraSuiteError("must be ChatOptions or a mapping", where="chat", got=type(value).__name__)
        known = list(cls.__dataclass_fields__)
        unknown = [name for name in value if name not in known]
        if unknown:
            raise LoraSuiteError("unknown option", where="chat", got=repr(unknown[0]), wanted=" or ".join(known))
        return cls(**value)

    @property
    def prompt_format(self) -> Format:
        """The format of prompts."""
        return Format.read(self.format)

    def one_side(self, name: str, tokenizer: Any) -> Chat:
        """Return how one model renders conversations: with ``new_template``, else its tokenizer's template."""
        template = None if self.new_template in (None, OLD_TEMPLATE) else str(self.new_template)
        return Chat(name, tokenizer, template, dict(self.template_kwargs), self.system)


ChatLike: TypeAlias = "ChatOptions | Mapping[str, Any] | None"
"""Options of rendering, or a mapping of their names to values."""


def read_template(value: str | Path, where: str) -> str:
    """Read a chat template: a file, the template itself, ``"none"`` or ``"old"``.

    Raises:
        LoraSuiteError: If it is neither a file nor a template.
    """
    text = str(value)
    if text in (NO_TEMPLATE, OLD_TEMPLATE) or "{%" in text or "{{" in text:
        return text
    if not is_file(value):
        raise LoraSuiteError(
            "the chat template is not a file",
            where=where,
            got=repr(text[:80]),
            wanted="a file, or none",
            do="check the name",
        )
    try:
        if Path(value).expanduser().stat().st_size > LARGEST_TEMPLATE:
            raise LoraSuiteError(
                "the chat template is too large", where=value, wanted=f"at most {LARGEST_TEMPLATE} bytes"
            )
        found = Path(value).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraSuiteError(f"the file cannot be read: {error}", where=value, wanted="text in UTF-8") from error
    return _from_json(found, value) if found.lstrip().startswith("{") and "chat_template" in found else found


def _from_json(text: str, where: object) -> str:
    """Return the template of a tokenizer_config.json; a text that is no JSON is a template itself."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return text
    template = values.get("chat_template") if isinstance(values, dict) else None
    if not isinstance(template, str):
        raise LoraSuiteError("the file has no chat template", where=where, wanted="the key chat_template with a text")
    return template


def parse_variable(text: str) -> Any:
    """Parse the value of a template variable on a command line: JSON, and any other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
