"""Examples as token ids with labels on the response, and batches of them padded to their own longest row."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError
from ..text.examples import Example, fill
from ..text.vocabulary import end_of_sequence

log = logging.getLogger(__name__)

IGNORED = -100
"""The label that torch's cross entropy leaves out."""


@dataclass(frozen=True)
class Encoded:
    """One example as tokens.

    Attributes:
        ids: Prompt, response and, unless it was cut off, the end of sequence.
        start: Where the response begins.
    """

    ids: tuple[int, ...]
    start: int

    @property
    def labels(self) -> tuple[int, ...]:
        """The response's ids, the prompt's left out."""
        return (IGNORED,) * self.start + self.ids[self.start :]


def encode(tokenizer: Any, prompt: str, response: str, *, cutoff: int | None = None) -> Encoded:
    """Tokenize prompt and response as one text, so that the seam is cut as the model will see it.

    The response starts at the first token that the prompt alone would not have given, but never at the very first one:
    nothing stands before that to predict it from.
    """
    alone = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + response)["input_ids"]
    eos = end_of_sequence(tokenizer)
    ids = [*(ids[:-1] if ids[-1] == eos else ids), eos]
    start = next((n for n, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), min(len(alone), len(ids)))
    start = max(start, 1)
    return Encoded(tuple(ids[:cutoff]), min(start, cutoff or start))


def encode_examples(
    tokenizer: Any, examples: Sequence[Example], template: str | None, *, cutoff: int | None = None
) -> list[Encoded]:
    """Tokenize examples; those whose response lies wholly beyond the cutoff are left out, with a line in the log.

    Raises:
        LoraSuiteError: When no response is left.
    """
    encoded = [encode(tokenizer, fill(example, template), example.output, cutoff=cutoff) for example in examples]
    kept = [one for one in encoded if one.start < len(one.ids)]
    if not kept:
        raise LoraSuiteError(
            "no example has a response within the cutoff", where=f"{len(examples)} examples", got=f"cutoff {cutoff}",
            do="raise the cutoff or shorten the prompts",
        )  # fmt: skip
    if len(kept) < len(encoded):
        log.warning(
            "%d of %d examples have no response within %s tokens", len(encoded) - len(kept), len(encoded), cutoff
        )
    return kept


def batch(rows: Sequence[Encoded], *, padding: int) -> dict[str, Tensor]:
    """Pad rows on the right to ``(rows, longest)``: ``input_ids``, ``attention_mask`` and ``labels``, int64."""
    width = max(len(row.ids) for row in rows)
    return {
        "input_ids": torch.tensor([[*row.ids, *[padding] * (width - len(row.ids))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows]),
        "labels": torch.tensor([[*row.labels, *[IGNORED] * (width - len(row.ids))] for row in rows]),
    }
