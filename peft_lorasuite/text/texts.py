"""Texts and pairs of texts that a classifier reads, with or without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import LoraSuiteError
from .shapes import ANSWERS, WEAK
from .templates import check_text

PAIRS = (
    ("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "passage"), ("question", "sentence"), ("query", "document"), ("query", "passage"),
)  # fmt: skip
"""Fields of a record with two texts, in the order in which a model reads them."""
SINGLE = ("text", "sentence", "review")
"""Fields of a record with a single text."""
TOKENS = ("tokens", "words")
"""Fields of a record with the words of a text, for token classification."""
PROMPT_FIELDS = {
    "messages", "conversations", "conversation", "dialog", "dialogue", "instruction", "prompt", "chosen", "role",
    "from",
}  # fmt: skip
"""Fields of prompts, conversations and messages, which have texts of other names beside them."""
LABELS = ("label", "labels", "score", "ner_tags", "tags")
"""Fields of the label or, for token classification, of one label per word."""


@dataclass(frozen=True)
class Text:
    """A text or a pair of texts.

    Attributes:
        text: The text.
        pair: The second text, if there is one.
        words: Character spans of the words, for token classification; empty if the text was not split.
        label: The label, as it was read: a name or number, several of them, or one per word.
    """

    text: str
    pair: str | None = None
    words: tuple[tuple[int, int], ...] = ()
    label: Any = None


def has_text(record: Any) -> bool:
    """Return whether a record has the fields of a text to classify, rather than those of a prompt."""
    if not isinstance(record, Mapping):
        return False
    names = {str(name).lower(): value for name, value in record.items() if value is not None}
    fields = None if PROMPT_FIELDS & set(names) else _fields(record)
    if fields is None or len(fields) > 1 or any(name in names for name in LABELS):
        return fields is not None
    return not (any(name in names for name in WEAK) and any(name in names for name in ANSWERS))


def parse_text(record: Mapping[str, Any], where: str) -> Text:
    """Read a text, a pair of texts, or a list of words from a record, with its label if it has one.

    Raises:
        LoraSuiteError: If a text is missing, empty or not a string, or a list of words is malformed.
    """
    label = next((record[name] for name in LABELS if record.get(name) is not None), None)
    fields = _fields(record)
    if fields is None:
        raise LoraSuiteError(
            "a record has no text", where=where, got=f"the keys {', '.join(map(str, record)) or 'none'}",
            wanted=f"{', '.join(SINGLE)}, {TOKENS[0]}, or a pair such as {' and '.join(PAIRS[0])}",
        )  # fmt: skip
    if fields[0] in TOKENS:
        return _read_words(record[fields[0]], label, f"{where}, {fields[0]}")
    first, *rest = (_checked(record[name], f"{where}, {name}") for name in fields)
    return Text(first, rest[0] if rest else None, label=label)


def _fields(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the fields of a record that have its texts."""
    known = [*PAIRS, *((name,) for name in (*SINGLE, *TOKENS))]
    return next((fields for fields in known if all(record.get(name) is not None for name in fields)), None)


def _checked(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise LoraSuiteError("a text must be a string", where=where, got=type(text).__name__)
    if not text.strip():
        raise LoraSuiteError("a text is empty", where=where)
    check_text(text, where)
    return text


def _read_words(words: Any, label: Any, where: str) -> Text:
    """Read a list of words."""
    if not isinstance(words, (list, tuple)) or not words:
        raise LoraSuiteError("a text has no tokens", where=where, got=repr(words)[:80], wanted="a list of words")
    for word in words:
        _checked(word, where)
    return join_words(words, label)


def join_words(words: Sequence[str], label: Any = None) -> Text:
    """Join words by spaces, and keep their character spans."""
    start, spans = 0, []
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return Text(" ".join(words), None, tuple(spans), label)
