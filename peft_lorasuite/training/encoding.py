"""Tokenized examples with labels on the response, and padded batches of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError
from ..text.examples import Example, format_example
from ..text.vocabulary import eos_token_id

log = logging.getLogger(__name__)

IGNORE_INDEX = -100
"""The label that torch's cross entropy ignores."""


@dataclass(frozen=True)
class Encoded:
    """A tokenized example.

    Attributes:
        ids: Prompt, response and, unless it was cut off, the end-of-sequence token.
        start: Position of the first response token.
    """

    ids: tuple[int, ...]
    start: int

    @property
    def labels(self) -> tuple[int, ...]:
        """The ids of the response, `IGNORE_INDEX` for the prompt."""
        return (IGNORE_INDEX,) * self.start + self.ids[self.start :]


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
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + response)["input_ids"]
    eos = eos_token_id(tokenizer)
    ids = [*(ids[:-1] if ids[-1] == eos else ids), eos]
    shorter = min(len(prompt_ids), len(ids))
    start = max(next((n for n in range(shorter) if prompt_ids[n] != ids[n]), shorter), 1)
    return Encoded(tuple(ids[:cutoff]), min(start, cutoff or start))


def encode_examples(
    tokenizer: Any, examples: Sequence[Example], template: str | None, *, cutoff: int | None = None
) -> list[Encoded]:
    """Tokenize examples. Those without a response token within the cutoff are left out, with a warning.

    Raises:
        LoraSuiteError: If no example is left.
    """
    encoded = [
        encode(tokenizer, format_example(example, template), example.output, cutoff=cutoff) for example in examples
    ]
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


def batch(rows: Sequence[Encoded], *, padding: int) -> dict[str, Tensor]:
    """Pad rows on the right: ``input_ids``, ``attention_mask`` and ``labels``, each int64, (rows, longest)."""
    width = max(len(row.ids) for row in rows)
    return {
        "input_ids": torch.tensor([[*row.ids, *[padding] * (width - len(row.ids))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows]),
        "labels": torch.tensor([[*row.labels, *[IGNORE_INDEX] * (width - len(row.ids))] for row in rows]),
    }
