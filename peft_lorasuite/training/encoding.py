"""Tokenized examples with labels on the response, and padded batches of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError
from ..text.chat import Chat
from ..text.conversations import Conversation
from ..text.examples import format_example
from ..text.prompt_text import encode_prompt
from ..text.record_types import Completion, Record
from ..text.vocabulary import check_token_rows, eos_token_id

log = logging.getLogger(__name__)

IGNORE_INDEX = -100
"""The label that torch's cross entropy ignores."""


@dataclass(frozen=True)
class Encoded:
    """A tokenized example.

    Attributes:
        ids: Prompt, response and, unless it was cut off, the end-of-sequence token.
        start: Position of the first response token.
        prompts: Positions from ``start`` on that belong to later prompts of a conversation: they have no loss.
    """

    ids: tuple[int, ...]
    start: int
    prompts: frozenset[int] = frozenset()

    @property
    def labels(self) -> tuple[int, ...]:
        """The ids of the responses, `IGNORE_INDEX` for the prompts."""
        labels = (IGNORE_INDEX,) * self.start + self.ids[self.start :]
        if not self.prompts:
            return labels
        return tuple(IGNORE_INDEX if number in self.prompts else label for number, label in enumerate(labels))


def encode(tokenizer: Any, prompt: str, response: str, *, cutoff: int | None = None) -> Encoded:
    """Tokenize prompt and response as one text: the token at their boundary may belong to both.

    The response starts at the first token that differs from the prompt's own tokens. It never starts at position 0,
    since no position predicts that token.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The prompt.
        response: The response, without an end of sequence.
        cutoff: Maximum number of tokens; the rest is cut off.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)["input_ids"]
    ids = encode_prompt(tokenizer, prompt, response)["input_ids"]
    eos = eos_token_id(tokenizer)
    ids = [*(ids[:-1] if ids[-1] == eos else ids), eos]
    shorter = min(len(prompt_ids), len(ids))
    start = max(next((n for n in range(shorter) if prompt_ids[n] != ids[n]), shorter), 1)
    return Encoded(tuple(ids[:cutoff]), min(start, cutoff or start))


def encode_conversation(chat: Chat, conversation: Conversation, *, cutoff: int | None = None) -> Encoded:
    """Tokenize a conversation with its reference; the assistant turns, with their end-of-turn tokens, have a loss.

    Raises:
        LoraSuiteError: If the chat template does not render it, or renders no assistant turn.
    """
    text, spans = chat.assistant_spans(conversation)
    if not spans:
        raise LoraSuiteError(
            "the chat template writes no assistant turn", where=f"{chat.name}, {conversation.where}",
            do="pass another template",
        )  # fmt: skip
    encoded = encode_prompt(chat.tokenizer, text, return_offsets_mapping=True)
    # a token that starts with white space before a turn belongs to the turn, as in `encode`
    inside = [any(start < right and end > left for left, right in spans) for start, end in encoded["offset_mapping"]]
    ids, first = tuple(encoded["input_ids"]), max(inside.index(True), 1)
    last = max(number for number, one in enumerate(inside) if one) + 1
    prompts = frozenset(number for number in range(first, last) if not inside[number])
    return Encoded(ids[:last][:cutoff], min(first, cutoff or first), prompts)


def encode_examples(
    tokenizer: Any, examples: Sequence[Record], template: str | None, *, cutoff: int | None = None,
    chat: Chat | None = None, rows: int | None = None,
) -> list[Encoded]:  # fmt: skip
    """Tokenize examples. Those without a response token within the cutoff are left out, with a warning.

    Args:
        tokenizer: The model's tokenizer.
        examples: Labeled records of any shape.
        template: Prompt template of instructions and questions.
        cutoff: Maximum length in tokens.
        chat: Renders conversations; by default with the tokenizer's own template.
        rows: Rows of the model's embedding.

    Raises:
        LoraSuiteError: If no example is left, a conversation does not render, or a token has no row.
    """
    chat = chat or Chat("the model", tokenizer)
    encoded = [_encode_record(one, tokenizer, template, cutoff, chat) for one in examples]
    if rows is not None:
        check_token_rows(tokenizer, (number for one in encoded for number in one.ids), rows, "the model")
    kept = [one for one in encoded if one.start < len(one.ids)]
    if not kept:
        raise LoraSuiteError(
            "no example has a response within the cutoff", where=f"{len(examples)} examples", got=f"cutoff {cutoff}",
            do="increase the cutoff or shorten the prompts",
        )  # fmt: skip
    if len(kept) < len(encoded):
        log.warning(
            "%d of %d examples have no response within %s tokens", len(encoded) - len(kept), len(encoded), cutoff
        )
    return kept


def _encode_record(record: Record, tokenizer: Any, template: str | None, cutoff: int | None, chat: Chat) -> Encoded:
    if isinstance(record, Conversation):
        chat.check()
        return encode_conversation(chat, record, cutoff=cutoff)
    prompt = record.prompt if isinstance(record, Completion) else format_example(record, template)
    return encode(tokenizer, prompt, record.output, cutoff=cutoff)


def batch(rows: Sequence[Encoded], *, padding: int) -> dict[str, Tensor]:
    """Pad rows on the right: ``input_ids``, ``attention_mask`` and ``labels``, each int64, (rows, longest)."""
    width = max(len(row.ids) for row in rows)
    return {
        "input_ids": torch.tensor([[*row.ids, *[padding] * (width - len(row.ids))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows]),
        "labels": torch.tensor([[*row.labels, *[IGNORE_INDEX] * (width - len(row.ids))] for row in rows]),
    }
