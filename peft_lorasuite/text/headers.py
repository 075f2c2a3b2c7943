"""What a format writes before a user's text, and what shows that the text has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import LoraSuiteError
from .chat import PROBE, Chat
from .formats import Format
from .prompt_text import PromptText, encode_prompt
from .record_types import Example

SECTION = "###"
"""Start of a heading in the prompts of Alpaca: before the answer, or before an input."""
SENTENCE_ENDS = ".?!:\n"


@dataclass(frozen=True)
class UserHeader:
    """The start of a prompt up to the user's text.

    Attributes:
        text: What a model reads before it writes a user's text.
        ends: Texts that follow a user's text.
    """

    text: str
    ends: tuple[str, ...]

    @classmethod
    def of(cls, form: Format, chat: Chat) -> UserHeader:
        """Return the header of a format, from a prompt that is rendered with a marker.

        Raises:
            LoraSuiteError: If a chat template does not render, or does not write the user's text.
        """
        whole = chat.write(form.write(Example(PROBE)))
        before, found, after = whole.partition(PROBE)
        if not found:
            raise LoraSuiteError(
                "the chat template does not write the user's text", where=chat.name, do="pass another template"
            )
        end = next((line.strip() for line in after.splitlines() if line.strip()), "\n")
        # a space before a word is a part of the word's token
        before = before.rstrip(" ")
        if isinstance(whole, PromptText) and whole.rendered:
            before = PromptText(before, rendered=True)
        return cls._start(before, SECTION if end.startswith(SECTION) else end, chat.tokenizer)

    @classmethod
    def _start(cls, before: str, end: str, tokenizer: Any) -> UserHeader:
        if not encode_prompt(tokenizer, before)["input_ids"]:  # as a text starts in training, where there is no BOS
            before = PromptText(tokenizer.bos_token or tokenizer.eos_token, rendered=True)
        written = tokenizer.decode(tokenizer(end, add_special_tokens=False)["input_ids"])  # it may drop white space
        return cls(before, tuple(dict.fromkeys(one for one in (end, written.strip(" ")) if one)))

    def cut(self, text: str, *, ended: bool) -> str:
        """Return a user's text of what a model wrote after the header.

        Args:
            text: The text.
            ended: Whether it ended by itself; else it is cut after its last sentence.
        """
        text = text.lstrip()
        places = [at for end in self.ends if (at := text.find(end)) >= 0]
        if places:
            return text[: min(places)].strip()
        if ended:
            return text.strip()
        return text[: max(text.rfind(mark) for mark in SENTENCE_ENDS) + 1].strip()
